"""Several flows at once, in tasks of an event loop, their outcomes as they come."""

import asyncio
from typing import Any

from asyncinfer.client._drivers import AsyncDriver
from asyncinfer.client._map.threads import LEAVE_SECONDS, Done, Stopped
from asyncinfer.client._protocol import Flow, Pause, Told
from asyncinfer.client._wait_reasons import WaitingFor


class AsyncCrew:
    """Tasks, as many as are started; none outlives `leave`."""

    def __init__(self, driver: AsyncDriver, size: int) -> None:
        self._driver = driver
        self._gate = asyncio.Semaphore(size)
        self._done: asyncio.Queue[Done] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self._paused: dict[int, WaitingFor | None] = {}

    def start(self, number: int, flow: Flow[Any]) -> None:
        task = asyncio.create_task(self._work(number, flow))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def next(self, seconds: float) -> Done | None:
        """Waits for a flow to end; None where none does within so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                return await self._done.get()
        except TimeoutError:
            return None

    @property
    def reason(self) -> WaitingFor | None:
        """Why a flow has to send its request again."""
        return next(filter(None, self._paused.values()), None)

    @property
    def has_news(self) -> bool:
        return not self._done.empty()

    def stop(self) -> None:
        """No flow asks anything more; what is being asked is waited for by `leave`."""
        self._stopping.set()

    async def leave(self) -> None:
        tasks = set(self._tasks)
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=LEAVE_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _work(self, number: int, flow: Flow[Any]) -> None:
        try:
            async with self._gate:
                value = await self._run(number, flow)
            self._done.put_nowait(Done(number, value=value))
        except Exception as error:  # it is raised where the outcome is waited for
            self._done.put_nowait(Done(number, error=error))

    async def _run(self, number: int, flow: Flow[Any]) -> Any:
        told: Told = None
        try:
            while not self._stopping.is_set():
                asked = flow.send(told)
                if isinstance(asked, Pause):
                    self._paused[number] = asked.reason
                    await self._pause(asked.seconds)
                    del self._paused[number]
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
