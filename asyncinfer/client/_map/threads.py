"""Several flows at once in threads, their outcomes as they come."""

import contextvars
import queue
import threading
import time
from functools import partial
from typing import Any, Final

from msgspec import Struct

from asyncinfer.client._drivers import Driver
from asyncinfer.client._protocol import Flow, FlowReply, FlowRequest, Pause
from asyncinfer.client._wait_reasons import WaitingFor

JOIN_SECONDS: Final = 10.0
"""How long flows that are stopped are awaited."""


class FlowOutcome(Struct, frozen=True):
    """What the flow `number` returned, or the error that it raised, which may be a FlowStopped."""

    number: int
    value: Any = None
    error: BaseException | None = None


class FlowStopped(Exception):
    """Ends a flow after `stop()`."""


class FlowThreads:
    """At most `size` threads that run flows, each one flow at a time.

    They are daemons, so that a second Ctrl-C leaves at once. Call `stop`, then `join`, at the end.
    """

    def __init__(self, driver: Driver, size: int) -> None:
        self._driver = driver
        self._size = size
        self._todo: queue.SimpleQueue[tuple[int, Flow[Any]] | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[FlowOutcome] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()
        self._pause_reasons: dict[int, WaitingFor] = {}

    def start(self, number: int, flow: Flow[Any]) -> None:
        """Queues a flow, to be run as soon as a thread is free; returns at once.

        `number` comes back in its outcome.
        """
        if len(self._threads) < self._size:
            # In the context of the caller, whose trace the jobs continue.
            work = partial(contextvars.copy_context().run, self._work)
            thread = threading.Thread(target=work, name="asyncinfer-map", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._todo.put((number, flow))

    def wait_for_outcome(self, seconds: float) -> FlowOutcome | None:
        """The outcome of a flow that has ended, in the order of their ends, each once.

        None if none ends within `seconds`. It does not raise the error of a flow.
        """
        try:
            return self._outcomes.get(timeout=seconds)
        except queue.Empty:
            return None

    @property
    def retry_reason(self) -> WaitingFor | None:
        """Why one of the flows has to send its request again; None if none waits to do so."""
        return next(iter(list(self._pause_reasons.values())), None)

    @property
    def has_outcomes(self) -> bool:
        """Whether `wait_for_outcome` would return one at once."""
        return not self._outcomes.empty()

    def stop(self) -> None:
        """Lets no flow send another request, and ends the threads then; returns at once.

        A flow that had not ended has FlowStopped as its outcome. May be called twice.
        """
        self._stopping.set()
        for _ in self._threads:
            self._todo.put(None)

    def join(self, seconds: float = JOIN_SECONDS) -> bool:
        """Waits until the threads have ended, at most `seconds`; whether they have."""
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        """Runs flows one after another until it is told to end."""
        while item := self._todo.get():
            number, flow = item
            try:
                value = self._driver.run(flow, partial(self._carry_out, number))
                self._outcomes.put(FlowOutcome(number, value=value))
            except BaseException as error:  # it is raised where the outcome is awaited
                self._outcomes.put(FlowOutcome(number, error=error))

    def _carry_out(self, number: int, request: FlowRequest) -> FlowReply:
        """Sends a request or pauses, until `stop` is called; raises FlowStopped after that."""
        if isinstance(request, Pause):
            self._pause_reasons[number] = request.reason
            self._stopping.wait(request.seconds)
            del self._pause_reasons[number]
            return None
        if self._stopping.is_set():
            raise FlowStopped
        return self._driver.exchange(request)
