"""The monitor port of a worker: liveness, readiness and metrics.

It is served with asyncio alone: a web server in every worker would cost memory and a longer start.
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
from asyncinfer.schemas.responses import Liveness

_MAX_HEAD_BYTES: Final = 8192
_MAX_CONNECTIONS: Final = 64

_NOT_CONNECTED: Final = "It has not reached its Redis yet."

Unready = Callable[[], str | None]
"""Returns why the worker cannot claim now; None when it can."""


class Metrics(Protocol):
    """The text of the metrics, for Prometheus."""

    media_type: str

    def text(self) -> bytes: ...


class Answer(Struct, frozen=True):
    """A response of the monitor port."""

    status: int
    body: bytes
    media_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


class Monitor:
    """The pages of the port. The worker is not ready until `why_not_ready` is set, and has no
    metrics until `metrics` is set."""

    def __init__(self) -> None:
        self.why_not_ready: Unready = lambda: _NOT_CONNECTED
        self.metrics: Metrics | None = None
        self._pages: dict[str, Callable[[], Answer]] = {
            "/health/live": lambda: _ALIVE,
            "/health/ready": self._readiness_page,
            "/metrics": self._metrics_page,
        }

    def answer(self, method: str, path: str) -> Answer:
        """The response to a request, with a body also for HEAD; `path` is without the query. Raises
        RouteNotFound, MethodNotAllowed, and NotReady while the worker is not ready."""
        page = self._pages.get(path)
        if page is None:
            raise RouteNotFound(f"A worker has {', '.join(self._pages)}.")
        if method not in ("GET", "HEAD"):
            raise MethodNotAllowed(
                f"{method[:20]} is not possible here; use GET.", headers=[("allow", "GET, HEAD")]
            )
        return page()

    def _readiness_page(self) -> Answer:
        """The page of a ready worker; raises NotReady with the reason."""
        if reason := self.why_not_ready():
            raise NotReady(reason)
        return _ALIVE

    def _metrics_page(self) -> Answer:
        """The page of the metrics; raises NotReady until the worker has some."""
        if self.metrics is None:
            raise NotReady(_NOT_CONNECTED)
        return Answer(200, self.metrics.text(), self.metrics.media_type)


def open_listener(host: str, port: int) -> socket.socket:
    """A listening TCP socket, which the caller closes; raises StartError when there can be none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise StartError(
            f"Cannot listen on {host}:{port}: {error.strerror}. Stop what listens there, or "
            "choose another MONITOR_HOST or MONITOR_PORT; each worker needs a port of its own."
        ) from error


@asynccontextmanager
async def serve_monitor(
    listener: socket.socket | None, *, head_seconds: float = 5.0
) -> AsyncIterator[Monitor]:
    """A monitor that answers on `listener` within the context; None: it answers nowhere. At the end
    all connections and the listener are closed.

    A request must be complete within `head_seconds`.
    """
    monitor = Monitor()
    if listener is None:
        yield monitor
        return
    open_connections: dict[_Connection, None] = {}
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: _Connection(monitor, open_connections, head_seconds), sock=listener
    )
    try:
        yield monitor
    finally:
        server.close()
        for connection in list(open_connections):
            connection.close()


_ALIVE: Final = Answer(200, msgspec.json.encode(Liveness()))


class _Connection(asyncio.Protocol):
    """One request and its response, after which the connection is closed."""

    def __init__(
        self, monitor: Monitor, open_connections: "dict[_Connection, None]", head_seconds: float
    ) -> None:
        """`open_connections` holds all open connections, the oldest first; this one adds itself."""
        self._monitor = monitor
        self._head_seconds = head_seconds
        self._open_connections = open_connections
        self._head = b""
        self._transport: asyncio.WriteTransport
        self._deadline: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Starts the deadline; closes the oldest connection if there are too many."""
        self._transport = cast(asyncio.WriteTransport, transport)
        self._open_connections[self] = None
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(self._head_seconds, self._time_out)
        if len(self._open_connections) > _MAX_CONNECTIONS:
            # A probe sends its request at once, so the connection that is silent for longest is
            # none: when the new one was closed, 64 idle connections made a kubelet restart the
            # worker.
            oldest = next(iter(self._open_connections))
            del self._open_connections[oldest]
            oldest.close()

    def data_received(self, data: bytes) -> None:
        """Responds once the head of the request is complete, or too large; ignores what comes after
        that."""
        self._head += data
        if self._transport.is_closing():
            return
        if b"\r\n\r\n" in self._head:
            method, *rest = self._head.partition(b"\r\n")[0].decode("latin-1").split(" ")
            self._answer(method, rest[0].partition("?")[0] if len(rest) == 2 else None)
        elif len(self._head) > _MAX_HEAD_BYTES:
            self._send_problem(HeadersTooLarge(f"A request may have {_MAX_HEAD_BYTES} bytes."))

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the deadline, and no longer counts the connection as open."""
        self._deadline.cancel()
        self._open_connections.pop(self, None)

    def close(self) -> None:
        """Closes the connection once what was sent is written."""
        self._transport.close()

    def _answer(self, method: str, path: str | None) -> None:
        """Sends the page at this path, or the problem; `path` None: the request line is malformed.
        Raises nothing."""
        try:
            if path is None:
                raise MalformedRequest("The bytes sent are no HTTP/1.1 request.")
            self._send(self._monitor.answer(method, path), bodiless=method == "HEAD")
        except RequestError as error:
            self._send_problem(error, path or "")

    def _send_problem(self, error: RequestError, path: str = "") -> None:
        """Sends the error as a JSON problem, as the API does, and closes the connection."""
        body = msgspec.json.encode(problem_of(error, path))
        self._send(Answer(error.status, body, "application/problem+json", error.headers))

    def _time_out(self) -> None:
        """Closes the connection; sends a problem first if a part of a request has come."""
        if self._head:
            self._send_problem(
                RequestTimeout(f"The request was not there within {self._head_seconds:g} s.")
            )
        self.close()

    def _send(self, answer: Answer, *, bodiless: bool = False) -> None:
        """Writes the response, without its body if `bodiless`, and closes the connection."""
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
