"""Several flows at once in tasks of an event loop, their outcomes as they come."""

import asyncio
from functools import partial
from typing import Any

from asyncinfer.client._drivers import AsyncDriver
from asyncinfer.client._map.threads import JOIN_SECONDS, FlowOutcome, FlowStopped
from asyncinfer.client._protocol import Flow, FlowReply, FlowRequest, Pause
from asyncinfer.client._wait_reasons import WaitingFor
from asyncinfer.timeouts import set_within


class FlowTasks:
    """Tasks that run flows, at most `size` at a time; none outlives `join`.

    The same as FlowThreads for an event loop. Call `stop`, then `join`, at the end.
    """

    def __init__(self, driver: AsyncDriver, size: int) -> None:
        self._driver = driver
        self._gate = asyncio.Semaphore(size)
        self._outcomes: asyncio.Queue[FlowOutcome] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self._pause_reasons: dict[int, WaitingFor] = {}

    def start(self, number: int, flow: Flow[Any]) -> None:
        """Starts a task for a flow, which may have to wait for others; returns at once."""
        task = asyncio.create_task(self._work(number, flow))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def wait_for_outcome(self, seconds: float) -> FlowOutcome | None:
        """The outcome of a flow that has ended, each once; None if none ends in `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                return await self._outcomes.get()
        except TimeoutError:
            return None

    @property
    def retry_reason(self) -> WaitingFor | None:
        """Why one of the flows has to send its request again; None if none waits to do so."""
        return next(iter(self._pause_reasons.values()), None)

    @property
    def has_outcomes(self) -> bool:
        """Whether `wait_for_outcome` would return one at once."""
        return not self._outcomes.empty()

    def stop(self) -> None:
        """Lets no flow send another request; returns at once: `join` waits for the present ones."""
        self._stopping.set()

    async def have_ended_within(self, seconds: float) -> bool:
        """Waits until all tasks have ended, at most `seconds`; whether they have."""
        return not self._tasks or not (await asyncio.wait(self._tasks, timeout=seconds))[1]

    async def join(self, seconds: float = JOIN_SECONDS) -> None:
        """Waits until all tasks have ended, and cancels those that have not within `seconds`."""
        if not await self.have_ended_within(seconds):
            late = list(self._tasks)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _work(self, number: int, flow: Flow[Any]) -> None:
        """Runs one flow when a place is free, and puts its outcome where it is awaited."""
        try:
            async with self._gate:
                value = await self._driver.run(flow, partial(self._carry_out, number))
            self._outcomes.put_nowait(FlowOutcome(number, value=value))
        except Exception as error:  # it is raised where the outcome is awaited
            self._outcomes.put_nowait(FlowOutcome(number, error=error))

    async def _carry_out(self, number: int, request: FlowRequest) -> FlowReply:
        """Sends a request or pauses, until `stop` is called; raises FlowStopped after that."""
        if isinstance(request, Pause):
            self._pause_reasons[number] = request.reason
            await set_within(self._stopping, request.seconds)
            del self._pause_reasons[number]
            return None
        if self._stopping.is_set():
            raise FlowStopped
        return await self._driver.exchange(request)
