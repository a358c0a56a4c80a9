"""Several API processes on one address, kept running by their parent."""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final

import anyio
from msgspec import Struct

from asyncinfer.errors import StartError
from asyncinfer.processes import child_process
from asyncinfer.processes.child_process import Child
from asyncinfer.processes.supervisor import Keeper, Stop, drain

_log = logging.getLogger(__name__)

_GRACE_SECONDS: Final = 5.0
"""As long as an API waits for those that take their answers slowly."""

_READY: Final = b"ready"
_MOST_BYTES: Final = 4096
"""Written to a pipe in one piece."""


class ApiProcesses(Struct, frozen=True, kw_only=True):
    count: int
    command: Callable[[int], Sequence[str]]
    """Runs one that tells what became of its start by this descriptor."""
    environ: Mapping[str, str]
    keep_fds: tuple[int, ...] = ()
    """What they inherit beside it."""


@asynccontextmanager
async def running(plan: ApiProcesses, stop: Stop) -> AsyncIterator[asyncio.Event]:
    """The processes, kept running; the event comes when the first of them is ready.

    Raises StartError when the first to tell of its start was refused.
    """
    keepers: list[Keeper] = []
    try:
        async with _kept(plan, keepers) as ready:
            yield ready
    finally:
        # Not before nobody listens to reports: one that we end while it starts has nothing to say.
        with anyio.CancelScope(shield=True):
            await _drain(keepers, stop)


@asynccontextmanager
async def _kept(plan: ApiProcesses, keepers: list[Keeper]) -> AsyncIterator[asyncio.Event]:
    ready = asyncio.Event()
    async with anyio.create_task_group() as group:

        async def start() -> Child:
            child, report_fd = _spawn(plan)
            group.start_soon(_hear, report_fd, ready)
            return child

        for _ in range(plan.count):
            keepers.append(Keeper("An API process", await start(), start))
            group.start_soon(keepers[-1].run)
        yield ready
        group.cancel_scope.cancel()


async def _drain(keepers: Sequence[Keeper], stop: Stop) -> None:
    async with anyio.create_task_group() as group:
        for keeper in keepers:
            group.start_soon(drain, keeper.child, _GRACE_SECONDS, stop.hurry)


def _spawn(plan: ApiProcesses) -> tuple[Child, int]:
    """A new process, and where its report is read."""
    read_fd, write_fd = os.pipe()
    try:
        child = child_process.spawn(
            plan.command(write_fd),
            death_signal=signal.SIGKILL,
            env=plan.environ,
            keep_fds=(*plan.keep_fds, write_fd),
        )
    except BaseException:
        os.close(read_fd)
        raise
    finally:
        os.close(write_fd)
    return child, read_fd


async def _hear(report_fd: int, ready: asyncio.Event) -> None:
    try:
        await anyio.wait_readable(report_fd)
        said = os.read(report_fd, _MOST_BYTES)
    finally:
        os.close(report_fd)
    if said == _READY:
        ready.set()
        return
    refusal = said.decode() or "An API process ended as it started. What it logged says why."
    # One that is refused while others serve may be let in later: its keeper tries again.
    if not ready.is_set():
        raise StartError(refusal)
    _log.error("An API process does not start: %s", refusal)


# --- in the child ----------------------------------------------------------------------------


def report_ready(report_fd: int) -> None:
    _report(report_fd, _READY)


def report_refusal(report_fd: int, detail: str) -> None:
    """Tells the parent, who tells people: once, though all its children are refused."""
    _report(report_fd, detail.encode()[:_MOST_BYTES])


def _report(report_fd: int, said: bytes) -> None:
    # Nobody listens any more where another child's refusal has ended the start.
    with contextlib.suppress(BrokenPipeError):
        os.write(report_fd, said)
