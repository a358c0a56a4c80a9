"""Several API processes on one address, kept running by their parent."""

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import anyio
from msgspec import Struct

from asyncinfer import children
from asyncinfer.children import Child
from asyncinfer.errors import StartError
from asyncinfer.supervisor import Keeper, Stop, drain

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
    held_fd: int
    """Their address; the command knows it."""


async def serve(plan: ApiProcesses, stop: Stop, on_ready: Callable[[], None]) -> None:
    """Runs until cancelled; raises StartError when the first to tell of its start has failed."""
    ready = asyncio.Event()
    async with anyio.create_task_group() as group:

        async def start() -> Child:
            child, report_fd = _spawn(plan)
            group.start_soon(_hear, report_fd, ready)
            return child

        async with _kept(plan.count, start, stop):
            await ready.wait()
            on_ready()
            await anyio.sleep_forever()


@asynccontextmanager
async def _kept(
    count: int, start: Callable[[], Awaitable[Child]], stop: Stop
) -> AsyncIterator[None]:
    keepers = [Keeper("An API process", await start(), start) for _ in range(count)]
    try:
        async with AsyncExitStack() as stack:
            for keeper in keepers:
                await stack.enter_async_context(keeper.keeping())
            yield
    finally:
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as group:
                for keeper in keepers:
                    group.start_soon(drain, keeper.child, _GRACE_SECONDS, stop.hurry)


def _spawn(plan: ApiProcesses) -> tuple[Child, int]:
    """A new process, and where its report is read."""
    read_fd, write_fd = os.pipe()
    try:
        child = children.spawn(
            plan.command(write_fd),
            death_signal=signal.SIGKILL,
            env=plan.environ,
            keep_fds=(plan.held_fd, write_fd),
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
    os.write(report_fd, _READY)


def report_refusal(report_fd: int, detail: str) -> None:
    """Tells the parent, who tells people: once, though all its children are refused."""
    os.write(report_fd, detail.encode()[:_MOST_BYTES])
