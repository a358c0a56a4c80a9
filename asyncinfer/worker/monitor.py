"""A worker's private port: whether it lives, whether it can claim, and what it counts.

asyncio alone answers here: a web server in every worker would cost memory and a longer start.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Final, Protocol, cast

import msgspec
from msgspec import Struct

from asyncinfer.errors import (
    HeadersTooLarge,
    MalformedRequest,
    MethodNotAllowed,
    NotReady,
    RequestError,
    RequestTimeout,
    RouteNotFound,
    StartError,
)
from asyncinfer.schemas.problems import problem_of
from asyncinfer.schemas.responses import Alive

_HEAD_BYTES: Final = 8192
_MOST_CONNECTIONS: Final = 64

_STARTS: Final = "It has not reached its Redis yet."

Unready = Callable[[], str | None]
"""Why the worker cannot claim just now; None when it can."""


class Metrics(Protocol):
    """What Prometheus reads."""

    media_type: str

    def text(self) -> bytes: ...


class Answer(Struct, frozen=True):
    status: int
    body: bytes
    media_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


class Monitor:
    """What is asked of the port. Until told whom to ask, the worker is not ready."""

    def __init__(self) -> None:
        self.unready: Unready = lambda: _STARTS
        self.metrics: Metrics | None = None
        self._pages: dict[str, Callable[[], Answer]] = {
            "/health/live": lambda: _ALIVE,
            "/health/ready": self._ready,
            "/metrics": self._counted,
        }

    def answer(self, method: str, path: str) -> Answer:
        """Raises RequestError where there is nothing to show."""
        page = self._pages.get(path)
        if page is None:
            raise RouteNotFound(f"A worker has {', '.join(self._pages)}.")
        if method not in ("GET", "HEAD"):
            raise MethodNotAllowed(
                f"{method[:20]} is not possible here; use GET.", headers=[("allow", "GET, HEAD")]
            )
        return page()

    def _ready(self) -> Answer:
        if why := self.unready():
            raise NotReady(why)
        return _ALIVE

    def _counted(self) -> Answer:
        if self.metrics is None:
            raise NotReady(_STARTS)
        return Answer(200, self.metrics.text(), self.metrics.media_type)


def listen(host: str, port: int) -> socket.socket:
    """Raises StartError when it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise StartError(
            f"Cannot listen on {host}:{port}: {error.strerror}. Stop what listens there, or "
            "choose another MONITOR_HOST or MONITOR_PORT; each worker needs a port of its own."
        ) from error


@asynccontextmanager
async def monitored(
    listener: socket.socket | None, *, head_seconds: float = 5.0
) -> AsyncIterator[Monitor]:
    """A monitor that answers on `listener`; on nothing when there is none."""
    monitor = Monitor()
    if listener is None:
        yield monitor
        return
    open_now: dict[_Exchange, None] = {}
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: _Exchange(monitor, open_now, head_seconds), sock=listener
    )
    try:
        yield monitor
    finally:
        server.close()
        for exchange in list(open_now):
            exchange.close()


_ALIVE: Final = Answer(200, msgspec.json.encode(Alive()))


class _Exchange(asyncio.Protocol):
    """One request and its answer; the connection ends with it."""

    def __init__(
        self, monitor: Monitor, open_now: "dict[_Exchange, None]", head_seconds: float
    ) -> None:
        """`open_now` has all that are open, the oldest first."""
        self._monitor = monitor
        self._head_seconds = head_seconds
        self._open_now = open_now
        self._head = b""
        self._transport: asyncio.WriteTransport
        self._deadline: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)
        self._open_now[self] = None
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(self._head_seconds, self._too_slow)
        if len(self._open_now) > _MOST_CONNECTIONS:
            # A probe sends its request at once, so the one that is silent for longest is none:
            # were the new one closed, 64 idle connections had a kubelet restart the worker.
            oldest = next(iter(self._open_now))
            del self._open_now[oldest]
            oldest.close()

    def data_received(self, data: bytes) -> None:
        self._head += data
        if self._transport.is_closing():
            return
        if b"\r\n\r\n" in self._head:
            method, *rest = self._head.partition(b"\r\n")[0].decode("latin-1").split(" ")
            self._answer(method, rest[0].partition("?")[0] if len(rest) == 2 else None)
        elif len(self._head) > _HEAD_BYTES:
            self._refuse(HeadersTooLarge(f"A request may have {_HEAD_BYTES} bytes."))

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        self._open_now.pop(self, None)

    def close(self) -> None:
        self._transport.close()

    def _answer(self, method: str, path: str | None) -> None:
        try:
            if path is None:
                raise MalformedRequest("The bytes sent are no HTTP/1.1 request.")
            self._send(self._monitor.answer(method, path), bodiless=method == "HEAD")
        except RequestError as error:
            self._refuse(error, path or "")

    def _refuse(self, error: RequestError, path: str = "") -> None:
        body = msgspec.json.encode(problem_of(error, path))
        self._send(Answer(error.status, body, "application/problem+json", error.headers))

    def _too_slow(self) -> None:
        if self._head:
            self._refuse(
                RequestTimeout(f"The request was not there within {self._head_seconds:g} s.")
            )
        self.close()

    def _send(self, answer: Answer, *, bodiless: bool = False) -> None:
        lines = [
            f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}",
            f"content-type: {answer.media_type}",
            f"content-length: {len(answer.body)}",
            "cache-control: no-store",
            *(f"{name}: {value}" for name, value in answer.headers),
            "connection: close\r\n\r\n",
        ]
        self._transport.write("\r\n".join(lines).encode() + (b"" if bodiless else answer.body))
        self.close()
