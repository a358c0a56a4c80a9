"""A map under way in threads: whatever ends it early cancels its jobs, once."""

import atexit
import contextlib
import threading
from typing import Final

from asyncinfer.client._drivers import Driver
from asyncinfer.client._errors import (
    ClientClosed,
    ConnectionFailed,
    WaitTimeout,
    raise_client_closed,
)
from asyncinfer.client._map import jobs
from asyncinfer.client._map.threads import FlowThreads
from asyncinfer.client._requests import RemoteServer

CANCEL_PAUSES: Final = (0.1, 0.3, 1.0, 3.0, 5.6)
"""The seconds between cancels, until all flows have ended: a submit that was under way at the first
cancel brings another job, whose flow would wait for it."""
_LATE_SECONDS: Final = 2.0
"""How long the last answers are awaited after a time-out."""


class OpenMap:
    """The threads of a map under way. An error in its `with` ends it, and so does the close of the
    client, or the exit of the interpreter.

    It does not refer to the iterator of the results, so that one which nobody has any more is
    closed at once.
    """

    def __init__(self, server: RemoteServer, driver: Driver, group: str, size: int) -> None:
        self._server = server
        self._driver = driver
        self._group = group
        self.threads = FlowThreads(driver, size)
        self._lock = threading.RLock()
        self._has_ended = False

    def __enter__(self) -> "OpenMap":
        self._driver.open_maps.add(self)
        # A script may end during a map: later than this no request can be sent.
        atexit.register(self.end)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            if error is not None:
                self._end(error)
        finally:
            atexit.unregister(self.end)
            self._driver.open_maps.discard(self)
            self.threads.stop()

    def raise_if_ended(self) -> None:
        """Raises ClientClosed if the close of the client has ended the map."""
        if self._has_ended:
            raise_client_closed()

    def end(self) -> None:
        """Cancels the jobs that have not ended, and raises no AsyncinferError; does nothing the
        second time. From another thread than that of the map too."""
        self._end(None)

    def _end(self, error: BaseException | None) -> None:
        """As `end`; after an error by which the server is away or the time is over it cancels
        nothing."""
        with self._lock:
            if self._has_ended:
                return
            self._has_ended = True
            self.threads.stop()
            if isinstance(error, WaitTimeout):
                # Requests in flight end with the wait, and a submit is not interrupted.
                self.threads.join(_LATE_SECONDS)
            elif not isinstance(error, ConnectionFailed | ClientClosed):
                with contextlib.suppress(ClientClosed):
                    self._cancel()

    def _cancel(self) -> None:
        """Cancels the jobs, waits for the requests in flight, and cancels again; gives up if the
        server does not answer."""
        for seconds in CANCEL_PAUSES:
            if not self._driver.run(jobs.cancel(self._server, self._group)):
                return
            if self.threads.join(seconds):
                break
        self._driver.run(jobs.cancel(self._server, self._group))
