"""Several flows at once, in threads, their outcomes as they come."""

import queue
import threading
from typing import Any, Final

from msgspec import Struct

from asyncinfer.client._drivers import Driver
from asyncinfer.client._protocol import Flow, Pause, Told
from asyncinfer.client._wait_reasons import WaitingFor

LEAVE_SECONDS: Final = 10.0
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
        self._paused: dict[int, WaitingFor | None] = {}

    def start(self, number: int, flow: Flow[Any]) -> None:
        if len(self._threads) < self._size:
            thread = threading.Thread(target=self._work, name="asyncinfer-map", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._todo.put((number, flow))

    def next(self, seconds: float) -> Done | None:
        """Waits for a flow to end; None where none does within so many seconds."""
        try:
            return self._done.get(timeout=seconds)
        except queue.Empty:
            return None

    @property
    def reason(self) -> WaitingFor | None:
        """Why a flow has to send its request again."""
        return next(filter(None, list(self._paused.values())), None)

    @property
    def has_news(self) -> bool:
        return not self._done.empty()

    def stop(self) -> None:
        """No flow asks anything more; what is being asked is waited for by `leave`."""
        self._stopping.set()
        for _ in self._threads:
            self._todo.put(None)

    def leave(self, seconds: float = LEAVE_SECONDS) -> None:
        for thread in self._threads:
            thread.join(seconds / len(self._threads))

    def _work(self) -> None:
        while given := self._todo.get():
            number, flow = given
            try:
                self._done.put(Done(number, value=self._run(number, flow)))
            except BaseException as error:  # it is raised where the outcome is waited for
                self._done.put(Done(number, error=error))

    def _run(self, number: int, flow: Flow[Any]) -> Any:
        told: Told = None
        try:
            while not self._stopping.is_set():
                asked = flow.send(told)
                if isinstance(asked, Pause):
                    self._paused[number] = asked.reason
                    self._stopping.wait(asked.seconds)
                    del self._paused[number]
                    told = None
                else:
                    told = self._driver.exchange(asked)
            raise Stopped
        except StopIteration as done:
            return done.value
        finally:
            flow.close()
