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
from asyncinfer.processes.supervisor import Restarter, StopSignals, drain

_log = logging.getLogger(__name__)

_GRACE_SECONDS: Final = 5.0
"""As long as an API process waits for clients that read their responses slowly."""

_READY: Final = b"ready"
_MAX_REPORT_BYTES: Final = 4096
"""A write of this size to a pipe is atomic."""


class ApiProcessPlan(Struct, frozen=True, kw_only=True):
    """How many API processes to start, and how."""

    count: int
    command: Callable[[int], Sequence[str]]
    """Gives the command line of a process that writes its report to this descriptor."""
    environ: Mapping[str, str]
    keep_fds: tuple[int, ...] = ()
    """Descriptors that the processes inherit besides the report's."""


@asynccontextmanager
async def run_api_processes(
    plan: ApiProcessPlan, stop: StopSignals
) -> AsyncIterator[asyncio.Event]:
    """Starts the processes, restarts those that end, and yields an event that is set once the first
    is ready. On leaving it drains them: each has 5 s to finish, unless `stop.hurry_requested` is
    set.

    Raises StartError (in a group, and from the block) if a process reports a refusal, or ends,
    before any is ready; a later refusal is logged.
    """
    restarters: list[Restarter] = []
    try:
        async with _run_restarters(plan, restarters) as ready:
            yield ready
    finally:
        # Only once no report is read any more: a process ended during its start reports nothing.
        with anyio.CancelScope(shield=True):
            await _drain_all(restarters, stop)


@asynccontextmanager
async def _run_restarters(
    plan: ApiProcessPlan, restarters: list[Restarter]
) -> AsyncIterator[asyncio.Event]:
    """`run_api_processes` without the end: adds a Restarter for each process to `restarters`, and
    leaves the processes running."""
    ready = asyncio.Event()
    async with anyio.create_task_group() as group:

        async def start() -> Child:
            child, report_fd = _spawn(plan)
            group.start_soon(_read_report, report_fd, ready)
            return child

        for _ in range(plan.count):
            restarters.append(Restarter("An API process", await start(), start))
            group.start_soon(restarters[-1].run)
        yield ready
        group.cancel_scope.cancel()


async def _drain_all(restarters: Sequence[Restarter], stop: StopSignals) -> None:
    """Drains all processes at once; returns when the last has ended."""
    async with anyio.create_task_group() as group:
        for restarter in restarters:
            group.start_soon(drain, restarter.child, _GRACE_SECONDS, stop.hurry_requested)


def _spawn(plan: ApiProcessPlan) -> tuple[Child, int]:
    """Starts a process; returns it and the descriptor from which its report is read, which the
    caller closes."""
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


async def _read_report(report_fd: int, ready: asyncio.Event) -> None:
    """Waits for the report of one process and closes `report_fd`. Sets `ready` if the process is
    ready. Otherwise raises StartError with the reason, or only logs it if another process is ready
    already."""
    try:
        await anyio.wait_readable(report_fd)
        report = os.read(report_fd, _MAX_REPORT_BYTES)
    finally:
        os.close(report_fd)
    if report == _READY:
        ready.set()
        return
    refusal = report.decode() or "An API process ended during its start. Its log says why."
    # A process refused while others serve may be accepted later: its restarter tries again.
    if not ready.is_set():
        raise StartError(refusal)
    _log.error("An API process does not start: %s", refusal)


# --- in the child ----------------------------------------------------------------------------


def report_ready(report_fd: int) -> None:
    """Tells the parent that this process serves; does nothing if the parent no longer reads
    reports."""
    _write_report(report_fd, _READY)


def report_refusal(report_fd: int, detail: str) -> None:
    """Tells the parent why this process does not start; `detail` is cut after 4096 bytes. The
    parent shows it once, even if all its children are refused. Does not end this process."""
    _write_report(report_fd, detail.encode()[:_MAX_REPORT_BYTES])


def _write_report(report_fd: int, report: bytes) -> None:
    """Writes the report, of at most 4096 bytes; raises nothing if the parent no longer reads it."""
    # The parent has closed the pipe if another child's refusal has ended the start.
    with contextlib.suppress(BrokenPipeError):
        os.write(report_fd, report)
