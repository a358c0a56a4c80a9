"""A private port for probes and metrics, with one page for each path.

It is served with asyncio alone: a web server in every worker would cost memory and a longer start.
"""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Final, cast

import msgspec
from msgspec import Struct

from asyncinfer.errors import (
    HeadersTooLarge,
    InternalError,
    MalformedRequest,
    MethodNotAllowed,
    RequestError,
    RequestTimeout,
    RouteNotFound,
    StartError,
)
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.schemas.problems import problem_of

_MAX_HEAD_BYTES: Final = 8192
_MAX_CONNECTIONS: Final = 64

_log = LimitedLog(logging.getLogger(__name__))


class Answer(Struct, frozen=True):
    """A response of the monitor port."""

    status: int
    body: bytes
    media_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


Page = Callable[[], Awaitable[Answer]]
"""Makes the response to a GET or HEAD of one path; raises a RequestError in its place."""


async def answer(pages: Mapping[str, Page], method: str, path: str) -> Answer:
    """The response to a request, with a body also for HEAD; `path` is without the query. Raises
    RouteNotFound, MethodNotAllowed, and what the page raises."""
    page = pages.get(path)
    if page is None:
        raise RouteNotFound(f"This port has {', '.join(pages)}.")
    if method not in ("GET", "HEAD"):
        raise MethodNotAllowed(
            f"{method[:20]} is not possible here; use GET.", headers=[("allow", "GET, HEAD")]
        )
    return await page()


def open_listener(host: str, port: int, setting: str) -> socket.socket:
    """A listening TCP socket, which the caller closes; raises StartError when there can be none.
    `setting` names the two settings, as `MONITOR` does for MONITOR_HOST and MONITOR_PORT."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise StartError(
            f"Cannot listen on {host}:{port}: {error.strerror}. Stop what listens there, or "
            f"choose another {setting}_HOST or {setting}_PORT; each process needs its own port."
        ) from error


@asynccontextmanager
async def serve_pages(
    listener: socket.socket, pages: Mapping[str, Page], *, head_seconds: float = 5.0
) -> AsyncIterator[None]:
    """Answers on `listener` within the context with what the pages return. At the end all
    connections and the listener are closed.

    A request must be complete within `head_seconds`, and its response be read within as many.
    """
    open_connections: dict[_Connection, None] = {}
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: _Connection(pages, open_connections, head_seconds), sock=listener
    )
    try:
        yield
    finally:
        server.close()
        for connection in list(open_connections):
            connection.close()


class _Connection(asyncio.Protocol):
    """One request and its response, after which the connection is closed."""

    def __init__(
        self,
        pages: Mapping[str, Page],
        open_connections: "dict[_Connection, None]",
        head_seconds: float,
    ) -> None:
        """`open_connections` holds all open connections, the oldest first; this one adds itself."""
        self._pages = pages
        self._head_seconds = head_seconds
        self._open_connections = open_connections
        self._head = b""
        self._answering: asyncio.Task[None] | None = None
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
            oldest.drop()

    def data_received(self, data: bytes) -> None:
        """Responds once the head of the request is complete, or too large; ignores what comes after
        that."""
        if self._answering or self._transport.is_closing():
            return
        self._head += data
        if b"\r\n\r\n" in self._head:
            method, *rest = self._head.partition(b"\r\n")[0].decode("latin-1").split(" ")
            path = rest[0].partition("?")[0] if len(rest) == 2 else None
            self._deadline.cancel()
            self._answering = asyncio.get_running_loop().create_task(self._answer(method, path))
        elif len(self._head) > _MAX_HEAD_BYTES:
            self._send_problem(HeadersTooLarge(f"A request may have {_MAX_HEAD_BYTES} bytes."))

    def eof_received(self) -> bool:
        """Keeps the connection open for the answer to a client that sends nothing more."""
        return self._answering is not None

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the deadline and the answer, and no longer counts the connection as open."""
        self._deadline.cancel()
        if self._answering:
            self._answering.cancel()
        self._open_connections.pop(self, None)

    def close(self) -> None:
        """Closes the connection once what was sent is written."""
        self._transport.close()

    def drop(self) -> None:
        """Closes the connection now, also if its client does not read what was sent."""
        if self._transport.get_write_buffer_size():
            self._transport.abort()
        self.close()

    async def _answer(self, method: str, path: str | None) -> None:
        """Sends the page at this path, or the problem; `path` None: the request line is malformed.
        Raises nothing."""
        try:
            if path is None:
                raise MalformedRequest("The bytes sent are no HTTP/1.1 request.")
            self._send(await answer(self._pages, method, path), bodiless=method == "HEAD")
        except RequestError as error:
            self._send_problem(error, path or "")
        except Exception as error:
            _log.unexpected(f"{path!r} could not be answered.", error)
            detail = "Something went wrong; the log of this process has the rest."
            self._send_problem(InternalError(detail), path or "")

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
        self._deadline.cancel()
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(self._head_seconds, self._transport.abort)
        self.close()
