"""Several flows at once, in threads or in tasks, their outcomes as they come."""

import asyncio
import queue
import threading
from typing import Any, Final

from msgspec import Struct

from asyncinfer.client._drivers import AsyncDriver, Driver
from asyncinfer.client._wire import Flow, Pause, Told

_LEAVE_SECONDS: Final = 10.0
"""How long those that were told to stop are waited for: their jobs are cancelled meanwhile."""


class Done(Struct, frozen=True):
    number: int
    value: Any = None
    error: BaseException | None = None


class Stopped(Exception):
    """What a flow that was told to stop ends with."""


class Crew:
    """Threads, at most `size`; daemons, so that a second Ctrl-C leaves at once."""

    def __init__(self, driver: Driver, size: int) -> None:
        self._driver = driver
        self._size = size
        self._todo: queue.SimpleQueue[tuple[int, Flow[Any]] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Done] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()

    def start(self, number: int, flow: Flow[Any]) -> None:
        if len(self._threads) < self._size:
            thread = threading.Thread(target=self._work, name="asyncinfer-map", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._todo.put((number, flow))

    def next(self) -> Done:
        """Waits for a flow to end."""
        return self._done.get()

    @property
    def has_news(self) -> bool:
        return not self._done.empty()

    def stop(self) -> None:
        """No flow asks anything more; what is being asked is waited for by `leave`."""
        self._stopping.set()
        for _ in self._threads:
            self._todo.put(None)

    def leave(self) -> None:
        for thread in self._threads:
            thread.join(_LEAVE_SECONDS / len(self._threads))

    def _work(self) -> None:
        while given := self._todo.get():
            number, flow = given
            try:
                self._done.put(Done(number, value=self._run(flow)))
            except BaseException as error:  # it is raised where the outcome is waited for
                self._done.put(Done(number, error=error))

    def _run(self, flow: Flow[Any]) -> Any:
        told: Told = None
        try:
            while not self._stopping.is_set():
                asked = flow.send(told)
                if isinstance(asked, Pause):
                    self._stopping.wait(asked.seconds)
                    told = None
                else:
                    told = self._driver.exchange(asked)
            raise Stopped
        except StopIteration as done:
            return done.value
        finally:
            flow.close()


class AsyncCrew:
    """Tasks, as many as are started; none outlives `leave`."""

    def __init__(self, driver: AsyncDriver, size: int) -> None:
        self._driver = driver
        self._gate = asyncio.Semaphore(size)
        self._done: asyncio.Queue[Done] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()

    def start(self, number: int, flow: Flow[Any]) -> None:
        task = asyncio.create_task(self._work(number, flow))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def next(self) -> Done:
        """Waits for a flow to end."""
        return await self._done.get()

    @property
    def has_news(self) -> bool:
        return not self._done.empty()

    def stop(self) -> None:
        """No flow asks anything more; what is being asked is waited for by `leave`."""
        self._stopping.set()

    async def leave(self) -> None:
        tasks = set(self._tasks)
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=_LEAVE_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _work(self, number: int, flow: Flow[Any]) -> None:
        try:
            async with self._gate:
                value = await self._run(flow)
            self._done.put_nowait(Done(number, value=value))
        except Exception as error:  # it is raised where the outcome is waited for
            self._done.put_nowait(Done(number, error=error))

    async def _run(self, flow: Flow[Any]) -> Any:
        told: Told = None
        try:
            while not self._stopping.is_set():
                asked = flow.send(told)
                if isinstance(asked, Pause):
                    await self._pause(asked.seconds)
                    told = None
                else:
                    told = await self._driver.exchange(asked)
            raise Stopped
        except StopIteration as done:
            return done.value
        finally:
            flow.close()

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass
