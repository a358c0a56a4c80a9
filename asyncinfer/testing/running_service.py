"""A running service, as a test uses it."""

import time
from functools import cached_property
from typing import TYPE_CHECKING, Final

import anyio

from asyncinfer.errors import NotDrained
from asyncinfer.testing.process import ProcessOutput
from asyncinfer.testing.status import StatusClient

if TYPE_CHECKING:
    from asyncinfer.client import Client

_FIRST_PAUSE_SECONDS: Final = 0.01
_MAX_PAUSE_SECONDS: Final = 0.2


class Running:
    """Made by `service`; answers until its block ends."""

    def __init__(
        self, port: int, models: tuple[str, ...], api_key: str | None, log: ProcessOutput
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.models = models
        """The names of the models that are served."""
        self.api_key = api_key
        """With the setting `api_keys` a key beside those of the file, with every scope and the
        tenant `default`; else None."""
        self._log = log
        self._status = StatusClient(port, api_key)

    def __repr__(self) -> str:
        return f"<asyncinfer at {self.url}: {', '.join(self.models)}>"

    @cached_property
    def client(self) -> "Client":
        """A client of this service, which is closed with it.

        Async code makes its own `AsyncClient(running.url, running.api_key)`.
        """
        from asyncinfer.client import Client

        return Client(self.url, self.api_key)

    @property
    def log(self) -> str:
        """The output of the service and its worker, at most the last 5000 lines."""
        return "\n".join(self._log.lines)

    def drain(self, timeout_seconds: float = 30.0) -> None:
        """Waits until no job waits, delayed ones included, and none runs; blocks the thread.

        When the time is out it raises NotDrained, a TimeoutError that names the unfinished jobs; if
        the service does not answer, OSError.
        """
        deadline = time.monotonic() + timeout_seconds
        pause_seconds = _FIRST_PAUSE_SECONDS
        while unfinished := self._status.unfinished():
            if time.monotonic() > deadline:
                jobs = "; ".join(f"{model}: {counts}" for model, counts in unfinished.items())
                raise NotDrained(
                    f"Not done after {timeout_seconds:g} s: {jobs}. See the worker's log in "
                    "`running.log`."
                )
            time.sleep(pause_seconds)
            pause_seconds = min(_MAX_PAUSE_SECONDS, 1.5 * pause_seconds)

    async def drained(self, timeout_seconds: float = 30.0) -> None:
        """Does what `drain` does, in a thread, without blocking the event loop."""
        await anyio.to_thread.run_sync(self.drain, timeout_seconds)

    def close(self) -> None:
        """Closes `client`, if it was used; does not stop the service."""
        if "client" in self.__dict__:
            self.client.close()
