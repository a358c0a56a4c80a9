"""A service that runs, as a test sees it."""

import time
from functools import cached_property
from typing import TYPE_CHECKING, Final

import anyio

from asyncinfer.errors import NotDrained
from asyncinfer.testing.process import Log
from asyncinfer.testing.status import Left, Questions

if TYPE_CHECKING:
    from asyncinfer.client import Client

_FIRST_PAUSE_SECONDS: Final = 0.01
_LONGEST_PAUSE_SECONDS: Final = 0.2


class Running:
    """Made by `service`; answers until its block ends."""

    def __init__(self, port: int, models: tuple[str, ...], api_key: str | None, log: Log) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.models = models
        """The names of what is served."""
        self.api_key = api_key
        """With the setting `api_keys`, a key of ours beside those of the file: tenant `default`,
        every scope; else None."""
        self._log = log
        self._questions = Questions(port, api_key)

    def __repr__(self) -> str:
        return f"<asyncinfer at {self.url}: {', '.join(self.models)}>"

    @cached_property
    def client(self) -> "Client":
        """A client of this service, closed with it. In async code make an `AsyncClient(running.url,
        running.api_key)` of your own."""
        from asyncinfer.client import Client

        return Client(self.url, self.api_key)

    @property
    def log(self) -> str:
        """What the service and its worker have said."""
        return "\n".join(self._log.lines)

    def drain(self, timeout_seconds: float = 30.0) -> None:
        """Waits until no job waits, delayed ones included, and none runs.

        Raises NotDrained, a TimeoutError, with what is left when the time is out.
        """
        give_up = time.monotonic() + timeout_seconds
        pause_seconds = _FIRST_PAUSE_SECONDS
        while left := self._questions.left():
            if time.monotonic() > give_up:
                raise NotDrained(_still(left, timeout_seconds))
            time.sleep(pause_seconds)
            pause_seconds = min(_LONGEST_PAUSE_SECONDS, 1.5 * pause_seconds)

    async def drained(self, timeout_seconds: float = 30.0) -> None:
        """`drain`, while the loop runs on."""
        await anyio.to_thread.run_sync(self.drain, timeout_seconds)

    def close(self) -> None:
        if "client" in self.__dict__:
            self.client.close()


def _still(left: dict[str, Left], timeout_seconds: float) -> str:
    told = "; ".join(f"{model}: {one}" for model, one in left.items())
    return f"Not done after {timeout_seconds:g} s: {told}. `running.log` has what the worker says."
