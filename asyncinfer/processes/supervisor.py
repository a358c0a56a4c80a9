"""The processes of `asyncinfer serve`: Valkey, a worker and the API, ended in order."""

import asyncio
import logging
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
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
"""After its time a child still stops what it runs; a worker gives its jobs back."""

_HURRIED_SECONDS: Final = 1.0

_FIRST_PAUSE_SECONDS: Final = 0.1
_LONGEST_PAUSE_SECONDS: Final = 30.0
_REFUSED_EXIT: Final = 2
"""How `asyncinfer work` ends when its settings keep it from its start; it has said why."""

_SETTLED_SECONDS: Final = 60.0
"""A child that ran as long is no longer one that keeps failing."""


class Plan(Struct, frozen=True, kw_only=True):
    """What runs beside the API."""

    redis_url: str | None = None
    """None: an embedded Valkey, its data under `data_dir`."""
    data_dir: Path
    worker: tuple[str, ...] = ()
    """The worker's command; empty: no worker."""
    environ: Mapping[str, str] = {}
    """The children's, but for the REDIS_URL."""
    drain_seconds: float = 20.0


class Beside(Protocol):
    """What else is to be done for the Redis at a URL."""

    async def before_worker(self, url: str) -> None:
        """Before the worker and the API are started."""

    async def beside_worker(self, url: str, worker_pid: Callable[[], int]) -> None:
        """From then on; until it is cancelled."""


async def serve(plan: Plan, api: "Api", beside: Beside | None = None) -> None:
    """Runs until SIGINT or SIGTERM; a second one hastens the end. Raises StartError."""
    with _signals() as stop:
        async with _redis(plan) as url:
            if beside:
                await beside.before_worker(url)
            async with (
                _worker(plan, url, stop) as worker_pid,
                _beside(beside, url, worker_pid),
                _until(stop.asked),
            ):
                await api(url, stop)


# --- being asked to stop ---------------------------------------------------------------------


class Stop:
    """What signals ask for: the first to stop, those after it to hurry."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.hurry = asyncio.Event()
        self._first_is_ours = True

    def ask(self) -> None:
        (self.asked if self._first_is_ours else self.hurry).set()
        self._first_is_ours = False

    def hand_over(self) -> None:
        """The API takes requests, and the first signal: what reaches us now comes after it."""
        self._first_is_ours = False


Api = Callable[[str, Stop], Awaitable[None]]
"""Serves with the Redis at a URL, until it is cancelled or has handed over and a signal ends it."""


@contextmanager
def _signals() -> Iterator[Stop]:
    """Signals are ours, but for those that a server takes which runs in this process."""
    stop = Stop()
    loop = asyncio.get_running_loop()

    def handle(_: int, __: FrameType | None) -> None:
        loop.call_soon_threadsafe(stop.ask)

    before = {it: signal.signal(it, handle) for it in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for it, handler in before.items():
            signal.signal(it, handler)


@asynccontextmanager
async def _until(event: asyncio.Event) -> AsyncIterator[None]:
    """Leaves the block when the event comes."""

    async def leave() -> None:
        await event.wait()
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(leave)
        yield
        group.cancel_scope.cancel()


# --- Valkey ----------------------------------------------------------------------------------


def _redis(plan: Plan) -> AbstractAsyncContextManager[str]:
    return _given(plan.redis_url) if plan.redis_url else _embedded(plan.data_dir)


@asynccontextmanager
async def _given(url: str) -> AsyncIterator[str]:
    yield url


@asynccontextmanager
async def _embedded(data_dir: Path) -> AsyncIterator[str]:
    async with (
        valkey.embedded(data_dir) as server,
        Keeper("Valkey", server.child, server.start).keeping(),
    ):
        yield server.url


# --- the worker ------------------------------------------------------------------------------


@asynccontextmanager
async def _worker(plan: Plan, url: str, stop: Stop) -> AsyncIterator[Callable[[], int] | None]:
    """Gives what tells its pid, which is another one when it was started again."""
    if not plan.worker:
        yield None
        return

    async def start() -> Child:
        environ = {**plan.environ, "REDIS_URL": url}
        return child_process.spawn(plan.worker, death_signal=signal.SIGKILL, env=environ)

    keeper = Keeper("The worker", await start(), start, refused_exit=_REFUSED_EXIT)
    try:
        async with keeper.keeping():
            yield lambda: keeper.child.pid
    finally:
        with anyio.CancelScope(shield=True):
            await drain(keeper.child, plan.drain_seconds, stop.hurry)


@asynccontextmanager
async def _beside(
    beside: Beside | None, url: str, worker_pid: Callable[[], int] | None
) -> AsyncIterator[None]:
    if beside is None or worker_pid is None:
        yield
        return
    async with anyio.create_task_group() as group:
        group.start_soon(beside.beside_worker, url, worker_pid)
        yield
        group.cancel_scope.cancel()


async def drain(child: Child, drain_seconds: float, hurry: asyncio.Event) -> None:
    """Ends a child that may finish what it runs, or with no delay when there is a hurry."""
    child.signal(signal.SIGTERM)
    with anyio.move_on_after(drain_seconds + _DRAIN_MARGIN_SECONDS):
        async with _until(hurry):
            await child.wait()
    await child.stop(_HURRIED_SECONDS)


# --- keeping a child alive -------------------------------------------------------------------


class Keeper:
    """Starts a child again whenever it ends, after a pause that grows while it keeps failing.

    The first child alone may end it all, with `refused_exit`: settings that never worked never
    will. A later one may have been refused for what changed since (its folder was emptied, say),
    which must not end what still serves, and may be mended.
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

    @asynccontextmanager
    async def keeping(self) -> AsyncIterator[None]:
        async with anyio.create_task_group() as group:
            group.start_soon(self.run)
            yield
            group.cancel_scope.cancel()

    async def run(self) -> None:
        """Until it is cancelled; raises StartError where the first child refuses its settings."""
        failures = 0
        while True:
            failures = 0 if await self._lived_seconds() > _SETTLED_SECONDS else failures + 1
            while not await self._started_again(pause_seconds(failures)):
                failures += 1

    async def _lived_seconds(self) -> float:
        started_at = time.monotonic()
        code = await self.child.wait()
        if code == self._refused_exit:
            raise StartError(f"{self._name} cannot start with these settings; it says above why.")
        self._refused_exit = None
        _log.error("%s (pid %d) ended with %s.", self._name, self.child.pid, _reason(code))
        return time.monotonic() - started_at

    async def _started_again(self, pause: float) -> bool:
        _log.info("%s is started again in %.1f s.", self._name, pause)
        await anyio.sleep(pause)
        try:
            self.child = await self._start()
        except (StartError, OSError) as error:
            _log.error("%s does not start: %s", self._name, error)
            return False
        return True


def pause_seconds(failures: int) -> float:
    """How long to wait before a child is started again."""
    return min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2.0 ** min(failures, 10))


def _reason(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
