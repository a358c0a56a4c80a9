"""Several API processes on one address, kept running by their parent."""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final, Protocol

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

_FIGURES_SECONDS: Final = 0.5
"""How often a process sends its figures: what it counted since then is lost if it is killed."""

_REST_SECONDS: Final = 0.01
"""How long a process waits for its parent to read, if the pipe has no room for all its figures."""

_LENGTH_BYTES: Final = 4
_MAX_FIGURES_BYTES: Final = 4 << 20
_READ_BYTES: Final = 64 << 10


class FiguresReceiver(Protocol):
    """Receives the figures that processes send; `source` tells them apart."""

    def receive(self, source: int, frame: bytes) -> None:
        """Replaces the figures of a process."""

    def end(self, source: int) -> None:
        """The process has ended."""


class ApiProcessPlan(Struct, frozen=True, kw_only=True):
    """How many API processes to start, and how."""

    count: int
    command: Callable[[int, int], Sequence[str]]
    """Gives the command line of a process that writes its report to the first descriptor, and its
    figures to the second, which is -1 if nobody reads them."""
    environ: Mapping[str, str]
    keep_fds: tuple[int, ...] = ()
    """Descriptors that the processes inherit besides those of the report and the figures."""
    figures: FiguresReceiver | None = None
    """None: nobody reads figures."""


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
            child, report_fd, figures_fd = _spawn(plan)
            group.start_soon(_read_report, report_fd, ready)
            if plan.figures:
                group.start_soon(_read_figures, figures_fd, plan.figures)
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


def _spawn(plan: ApiProcessPlan) -> tuple[Child, int, int]:
    """Starts a process; returns it and the descriptors from which its report and its figures are
    read, which the caller closes. The second is -1 if the plan reads no figures."""
    report_fd, child_report_fd = os.pipe()
    figures_fd, child_figures_fd = os.pipe() if plan.figures else (-1, -1)
    child_fds = [fd for fd in (child_report_fd, child_figures_fd) if fd >= 0]
    try:
        child = child_process.spawn(
            plan.command(child_report_fd, child_figures_fd),
            death_signal=signal.SIGKILL,
            env=plan.environ,
            keep_fds=(*plan.keep_fds, *child_fds),
        )
    except BaseException:
        for fd in (report_fd, figures_fd):
            if fd >= 0:
                os.close(fd)
        raise
    finally:
        for fd in child_fds:
            os.close(fd)
    return child, report_fd, figures_fd


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


async def _read_figures(figures_fd: int, receiver: FiguresReceiver) -> None:
    """Passes on what one process sends until it ends, and closes `figures_fd`. Stops reading, which
    is logged, if it says that it sends more than 4 MiB."""
    received = b""
    try:
        while True:
            await anyio.wait_readable(figures_fd)
            if not (part := os.read(figures_fd, _READ_BYTES)):
                return
            received += part
            while frame := _first_frame(received):
                receiver.receive(figures_fd, frame)
                received = received[_LENGTH_BYTES + len(frame) :]
    except ValueError as error:
        _log.error("The figures of an API process are not read any more: %s", error)
    finally:
        receiver.end(figures_fd)
        os.close(figures_fd)


def _first_frame(received: bytes) -> bytes | None:
    """The first frame, without its length; None while it is incomplete. Raises ValueError for one
    that is too large."""
    size_bytes = int.from_bytes(received[:_LENGTH_BYTES], "big")
    if size_bytes > _MAX_FIGURES_BYTES:
        raise ValueError(f"it sends {size_bytes} bytes, and at most {_MAX_FIGURES_BYTES} are read")
    frame = received[_LENGTH_BYTES : _LENGTH_BYTES + size_bytes]
    return frame if frame and len(frame) == size_bytes else None


# --- in the child ----------------------------------------------------------------------------


def report_ready(report_fd: int) -> None:
    """Tells the parent that this process serves; does nothing if the parent no longer reads
    reports."""
    _write_report(report_fd, _READY)


def report_refusal(report_fd: int, detail: str) -> None:
    """Tells the parent why this process does not start; `detail` is cut after 4096 bytes. The
    parent shows it once, even if all its children are refused. Does not end this process."""
    _write_report(report_fd, detail.encode()[:_MAX_REPORT_BYTES])


@asynccontextmanager
async def sending_figures(figures_fd: int, read: Callable[[], bytes]) -> AsyncIterator[None]:
    """Sends to the parent, within the context, what `read` returns, twice a second and at the end;
    closes `figures_fd`. A parent that does not read gets no more until it does."""
    os.set_blocking(figures_fd, False)
    unsent = b""

    def send() -> None:
        """Sends what the pipe takes, beginning with the rest of the frame before."""
        nonlocal unsent
        if not unsent:
            frame = read()
            unsent = len(frame).to_bytes(_LENGTH_BYTES, "big") + frame
        # The pipe is full, or the parent reads no figures any more.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            unsent = unsent[os.write(figures_fd, unsent) :]

    async def send_forever() -> None:
        while True:
            send()
            await anyio.sleep(_REST_SECONDS if unsent else _FIGURES_SECONDS)

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(send_forever)
            yield
            group.cancel_scope.cancel()
        send()
    finally:
        os.close(figures_fd)


def _write_report(report_fd: int, report: bytes) -> None:
    """Writes the report, of at most 4096 bytes; raises nothing if the parent no longer reads it."""
    # The parent has closed the pipe if another child's refusal has ended the start.
    with contextlib.suppress(BrokenPipeError):
        os.write(report_fd, report)
