"""The processes of `asyncinfer serve`: Valkey, a worker and the API, ended in order."""

import asyncio
import logging
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Final, Protocol

import anyio
from msgspec import Struct

from asyncinfer.errors import StartError
from asyncinfer.processes import child_process, valkey
from asyncinfer.processes.child_process import Child

_log = logging.getLogger(__name__)

_DRAIN_MARGIN_SECONDS: Final = 3.0
"""After its drain time a child still needs a moment: a worker gives its jobs back."""

_HURRY_GRACE_SECONDS: Final = 1.0

_MIN_PAUSE_SECONDS: Final = 0.1
_MAX_PAUSE_SECONDS: Final = 30.0
_REFUSED_EXIT: Final = 2
"""Exit code of `asyncinfer work` if it refuses its settings; it has logged why."""

_STABLE_SECONDS: Final = 60.0
"""After this run time a child no longer counts as one that keeps failing."""


class ServePlan(Struct, frozen=True, kw_only=True):
    """What runs besides the API."""

    redis_url: str | None = None
    """None: an embedded Valkey with its data under `data_dir`."""
    data_dir: Path
    embedded_max_bytes: int | None = None
    """The maxmemory of that Valkey; None: as `valkey.default_max_bytes`."""
    worker: tuple[str, ...] = ()
    """The worker's command; empty: no worker."""
    environ: Mapping[str, str] = {}
    """The environment of the children, without REDIS_URL."""
    drain_seconds: float = 20.0


class BackgroundTasks(Protocol):
    """Tasks that `serve` runs before and besides the worker, for the Redis at a URL."""

    async def before_worker(self, url: str) -> None:
        """Runs to its end before the worker and the API are started; what it raises ends
        `serve`."""

    async def beside_worker(self, url: str, worker_pid: Callable[[], int]) -> None:
        """Runs until it is cancelled, besides the worker; is not called if there is no worker.
        `worker_pid` returns the pid of the current worker process."""


async def serve(plan: ServePlan, api: "Api", beside: BackgroundTasks | None = None) -> None:
    """Runs `api`, the plan's worker, and an embedded Valkey unless `plan.redis_url` is set;
    restarts the worker and Valkey if they end. Returns after SIGINT or SIGTERM, once the API, the
    worker and Valkey have ended in this order; a second signal hastens the end.

    Raises StartError if Valkey, the worker or the API cannot start; it may come in a group.
    """
    with _signals() as stop:
        async with _redis(plan) as url:
            if beside:
                await beside.before_worker(url)
            async with (
                _run_worker(plan, url, stop) as worker_pid,
                _cancel_when(stop.stop_requested),
                anyio.create_task_group() as group,
            ):
                if beside and worker_pid:
                    group.start_soon(beside.beside_worker, url, worker_pid)
                await api(url, stop)
                group.cancel_scope.cancel()


# --- signals ---------------------------------------------------------------------------------


class StopSignals:
    """What signals request: `stop_requested` is set by the first one, for a stop, and
    `hurry_requested` by later ones, for a stop without delay."""

    def __init__(self) -> None:
        self.stop_requested = asyncio.Event()
        self.hurry_requested = asyncio.Event()
        self._first_is_ours = True

    def count_signal(self) -> None:
        """Counts a signal: sets `stop_requested` for the first one, and `hurry_requested` for a
        later one or after `leave_first_to_api`."""
        (self.stop_requested if self._first_is_ours else self.hurry_requested).set()
        self._first_is_ours = False

    def leave_first_to_api(self) -> None:
        """Leaves the first signal to the API's server: a signal that arrives here from now on is a
        later one."""
        self._first_is_ours = False


Api = Callable[[str, StopSignals], Awaitable[None]]
"""Serves with the Redis at a URL, until it is cancelled or, after `leave_first_to_api`, a signal
ends it."""


@contextmanager
def _signals() -> Iterator[StopSignals]:
    """Counts each SIGINT and SIGTERM in the `StopSignals` that it yields, unless a server in this
    process has installed its own handlers; restores the earlier handlers on leaving. Main thread
    only."""
    stop = StopSignals()
    loop = asyncio.get_running_loop()

    def handle(_: int, __: FrameType | None) -> None:
        loop.call_soon_threadsafe(stop.count_signal)

    earlier = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@asynccontextmanager
async def _cancel_when(event: asyncio.Event) -> AsyncIterator[None]:
    """Cancels the block when the event is set, without an exception behind it."""

    async def leave() -> None:
        await event.wait()
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(leave)
        yield
        group.cancel_scope.cancel()


# --- Valkey ----------------------------------------------------------------------------------


@asynccontextmanager
async def _redis(plan: ServePlan) -> AsyncIterator[str]:
    """Yields the URL of the plan's Redis. Without one, runs an embedded Valkey, restarts it if it
    ends, and stops it on leaving."""
    if plan.redis_url:
        yield plan.redis_url
        return
    async with (
        valkey.embedded(plan.data_dir, plan.embedded_max_bytes) as server,
        anyio.create_task_group() as group,
    ):
        group.start_soon(Restarter("Valkey", server.child, server.start).run)
        yield server.url
        group.cancel_scope.cancel()


# --- the worker ------------------------------------------------------------------------------


@asynccontextmanager
async def _run_worker(
    plan: ServePlan, url: str, stop: StopSignals
) -> AsyncIterator[Callable[[], int] | None]:
    """Runs the worker and restarts it if it ends; yields a function that returns its pid, which
    changes with each restart, or None if the plan has no worker. Drains the worker on leaving.

    Raises OSError if its command cannot be run, and StartError (in a group, and from the block) if
    it refuses its settings.
    """
    if not plan.worker:
        yield None
        return

    async def start() -> Child:
        environ = {**plan.environ, "REDIS_URL": url}
        return child_process.spawn(plan.worker, death_signal=signal.SIGKILL, env=environ)

    restarter = Restarter("The worker", await start(), start, refused_exit=_REFUSED_EXIT)
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(restarter.run)
            yield lambda: restarter.child.pid
            group.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await drain(restarter.child, plan.drain_seconds, stop.hurry_requested)


async def drain(child: Child, drain_seconds: float, hurry: asyncio.Event) -> None:
    """Ends a child and returns once it has ended. The child gets SIGTERM and may finish what it
    runs for `drain_seconds` and 3 s more, or until `hurry_requested` is set; 1 s later it is
    killed."""
    child.signal(signal.SIGTERM)
    with anyio.move_on_after(drain_seconds + _DRAIN_MARGIN_SECONDS):
        async with _cancel_when(hurry):
            await child.wait()
    await child.stop(_HURRY_GRACE_SECONDS)


# --- keeping a child alive -------------------------------------------------------------------


class Restarter:
    """Starts a child again whenever it ends, after a pause that grows while it keeps failing.
    `child` is the first one, already running; `start` starts the next; `name` begins its log lines.

    Only the first child can end everything, by the exit code `refused_exit`: settings that never
    worked never will. A later child may have been refused for something that changed since (its
    folder was emptied, say), which must not end what still serves, and may be repaired.
    """

    def __init__(
        self,
        name: str,
        child: Child,
        start: Callable[[], Awaitable[Child]],
        *,
        refused_exit: int | None = None,
    ) -> None:
        self.child = child
        self._name = name
        self._start = start
        self._refused_exit = refused_exit

    async def run(self) -> None:
        """Runs until it is cancelled, which leaves the child running. `child` is the current one.
        Raises StartError if the first child refuses its settings."""
        failures = 0
        while True:
            failures = 0 if await self._wait_for_end() > _STABLE_SECONDS else failures + 1
            while not await self._restart(pause_seconds(failures)):
                failures += 1

    async def _wait_for_end(self) -> float:
        """Waits until the child ends and logs that. Returns how many seconds it ran from this call
        on; raises StartError if it is the first child and refused its settings."""
        started_at = time.monotonic()
        code = await self.child.wait()
        if code == self._refused_exit:
            raise StartError(f"{self._name} cannot start with these settings; its log says why.")
        self._refused_exit = None
        _log.error("%s (pid %d) ended with %s.", self._name, self.child.pid, _describe_exit(code))
        return time.monotonic() - started_at

    async def _restart(self, seconds: float) -> bool:
        """Starts the child again after `seconds`. Returns False if it does not start, which
        is logged."""
        _log.info("%s is started again in %.1f s.", self._name, seconds)
        await anyio.sleep(seconds)
        try:
            self.child = await self._start()
        except (StartError, OSError) as error:
            _log.error("%s does not start: %s", self._name, error)
            return False
        return True


def pause_seconds(failures: int) -> float:
    """Seconds before a child is started again: 0.1 s without a failure, twice as long after each
    failure in a row, at most 30 s."""
    return min(_MAX_PAUSE_SECONDS, _MIN_PAUSE_SECONDS * 2.0 ** min(failures, 10))


def _describe_exit(code: int) -> str:
    """The end of a child for the log, such as "SIGKILL" or "exit code 2"; `code` is as `Child.wait`
    returns it."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
