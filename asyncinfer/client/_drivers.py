"""The drivers of flows, for threads and for an event loop. The only door to httpx2."""

import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import urlsplit

import msgspec

from asyncinfer.client._errors import raise_client_closed
from asyncinfer.client._protocol import (
    Event,
    Flow,
    FlowReply,
    FlowRequest,
    Lost,
    Pause,
    Request,
    Response,
    T,
)
from asyncinfer.client._requests import RemoteServer
from asyncinfer.client._wait_reasons import RetryNotices

if TYPE_CHECKING:
    import ssl

    import httpx2

_CONNECT_SECONDS: Final = 5.0
_CONNECT_ERRORS: Final = frozenset({"ConnectError", "ConnectTimeout", "UnsupportedProtocol"})
_REASONS: Final = {
    "ConnectTimeout": f"no connection within {_CONNECT_SECONDS:g} s",
    "ReadTimeout": "the connection is open, but silent",
    "WriteTimeout": "the connection is open, but takes nothing",
    "UnsupportedProtocol": "an address begins with http:// or https://",
}
_LOCAL_HOSTS: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_MAX_BYTES: Final = 1 << 30
"""The largest body of an answer. The largest of asyncinfer has 16 lines with a result each, of
16 MiB as it is stored and some 60 MiB as JSON."""


class ResponseBody:
    """The body of an answer as it comes, at most `_MAX_BYTES`.

    Another program may send without end. Its body is dropped, and NotAsyncinfer is raised for the
    empty one.
    """

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._size = 0

    def add(self, chunk: bytes) -> bool:
        """Keeps a chunk; drops all and returns False once the body is too large."""
        self._size += len(chunk)
        if self._size > _MAX_BYTES:
            self._chunks = []
            return False
        self._chunks.append(chunk)
        return True

    def content(self) -> bytes:
        """All chunks; empty if the body was too large."""
        return self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)


class OpenMap(Protocol):
    """What a client ends before its connections are closed."""

    def end(self) -> None:
        """Ends it, within seconds; raises no AsyncinferError."""


class AsyncOpenMap(Protocol):
    """The same in an event loop."""

    async def end(self) -> None:
        """Ends it, within seconds; raises no AsyncinferError."""


class Driver:
    """Carries out flows over one pool of connections, from any number of threads.

    The connections are opened when needed, and closed by `close`.
    """

    def __init__(self, server: RemoteServer) -> None:
        self._url = server.url
        self._ca = server.ca
        self._notices = RetryNotices(server.on_wait, server.cadence)
        self._http: httpx2.Client | None = None
        # The end of a map may come in between, when its iterator is collected.
        self._lock = threading.RLock()
        self._has_answered = False
        self.open_maps: set[OpenMap] = set()
        self.open_streams: set[Generator[Any, None, None]] = set()
        """Those of `events` that are read. At the exit of the interpreter one that is left over may
        close its connection when much is gone already, so that they are closed before."""
        self.closed = False

    def run(self, flow: Flow[T], carry_out: Callable[[FlowRequest], FlowReply] | None = None) -> T:
        """Carries out a flow to its end; returns its result, or raises its error.

        `carry_out` takes the place of sending a request, and of sleeping for a pause.
        """
        carry_out = carry_out or self._carry_out
        reply: FlowReply = None
        try:
            while True:
                reply = carry_out(flow.send(reply))
        except StopIteration as done:
            result: T = done.value
            return result
        finally:
            flow.close()

    def events(self, request: Request) -> Generator[Response | Lost | Event, None, None]:
        """Yields the response, then its events, and a Lost at the end if the stream was cut.

        The content of a 200 is empty, as the events are its content; another response has no
        events. A Lost alone means that there was no response. Raises ClientClosed. Close the
        generator to close the stream.
        """
        import httpx2

        try:
            with self._pool().stream(**_arguments(self._url, request)) as answer:
                self._has_answered = True
                yield _response(answer, b"" if answer.status_code == 200 else answer.read())
                if answer.status_code == 200:
                    yield from map(_event, filter(_has_data, httpx2.EventSource(answer)))
        except httpx2.TransportError as error:
            yield _lost(error, self._has_answered)

    def close(self) -> None:
        """Ends the open maps, then closes the connections; every request raises ClientClosed then.

        May be called twice.
        """
        try:
            for open_map in list(self.open_maps):
                open_map.end()
            for stream in list(self.open_streams):
                close_stream(stream)
        finally:
            self.closed = True
            if self._http is not None:
                self._http.close()
                self._http = None

    def _carry_out(self, request: FlowRequest) -> FlowReply:
        """Sends a request, or sleeps for a pause and returns None."""
        if isinstance(request, Pause):
            self._notices.report(request.reason, request.begun_at, request.seconds)
            time.sleep(request.seconds)
            return None
        return self.exchange(request)

    def exchange(self, request: Request) -> Response | Lost:
        """Sends a request once, and returns the response of any status, or a Lost if none came.

        Raises ClientClosed, and nothing for errors of the network.
        """
        import httpx2

        body = ResponseBody()
        try:
            with self._pool().stream(**_arguments(self._url, request)) as answer:
                for chunk in answer.iter_bytes():
                    if not body.add(chunk):
                        break
        except httpx2.TransportError as error:
            return _lost(error, self._has_answered)
        self._has_answered = True
        return _response(answer, body.content())

    def _pool(self) -> "httpx2.Client":
        """The connections, opened now if they are not yet; raises ClientClosed."""
        if self.closed:
            raise_client_closed()
        with self._lock:
            if self._http is None:
                import httpx2

                self._http = httpx2.Client(**_settings(self._url, self._ca))
            return self._http


def close_stream(stream: Generator[Any, None, None]) -> None:
    """Closes the stream of `Driver.events`, unless another thread waits for an event."""
    with contextlib.suppress(ValueError):
        stream.close()


class AsyncDriver:
    """Carries out flows in an event loop; the same as Driver otherwise."""

    def __init__(self, server: RemoteServer) -> None:
        self._url = server.url
        self._ca = server.ca
        self._notices = RetryNotices(server.on_wait, server.cadence)
        self._http: httpx2.AsyncClient | None = None
        self._has_answered = False
        self.open_maps: set[AsyncOpenMap] = set()
        self.open_streams: set[AsyncGenerator[Any, None]] = set()
        """Those of `events` that are read. An event loop closes what is left of them in any order,
        which fails, so that they are closed with the client."""
        self.closed = False

    async def run(
        self, flow: Flow[T], carry_out: Callable[[FlowRequest], Awaitable[FlowReply]] | None = None
    ) -> T:
        """Carries out a flow to its end; as `Driver.run`."""
        carry_out = carry_out or self._carry_out
        reply: FlowReply = None
        try:
            while True:
                reply = await carry_out(flow.send(reply))
        except StopIteration as done:
            result: T = done.value
            return result
        finally:
            flow.close()

    async def events(self, request: Request) -> AsyncGenerator[Response | Lost | Event, None]:
        """Yields a response and its events, as `Driver.events`."""
        import httpx2

        try:
            async with self._pool().stream(**_arguments(self._url, request)) as answer:
                self._has_answered = True
                yield _response(answer, b"" if answer.status_code == 200 else await answer.aread())
                if answer.status_code == 200:
                    async for event in httpx2.EventSource(answer):
                        if _has_data(event):
                            yield _event(event)
        except httpx2.TransportError as error:
            yield _lost(error, self._has_answered)

    async def close(self) -> None:
        """Ends open maps and streams, then closes the connections; as `Driver.close`."""
        try:
            for open_map in list(self.open_maps):
                await open_map.end()
            for stream in list(self.open_streams):
                # Another task may be waiting for an event, which the closed connection ends.
                with contextlib.suppress(RuntimeError):
                    await stream.aclose()
        finally:
            self.closed = True
            if self._http is not None:
                await self._http.aclose()
                self._http = None

    async def _carry_out(self, request: FlowRequest) -> FlowReply:
        """Sends a request, or sleeps for a pause and returns None."""
        if isinstance(request, Pause):
            import asyncio

            self._notices.report(request.reason, request.begun_at, request.seconds)
            await asyncio.sleep(request.seconds)
            return None
        return await self.exchange(request)

    async def exchange(self, request: Request) -> Response | Lost:
        """Sends a request once, as `Driver.exchange`."""
        import httpx2

        body = ResponseBody()
        try:
            async with self._pool().stream(**_arguments(self._url, request)) as answer:
                async for chunk in answer.aiter_bytes():
                    if not body.add(chunk):
                        break
        except httpx2.TransportError as error:
            return _lost(error, self._has_answered)
        self._has_answered = True
        return _response(answer, body.content())

    def _pool(self) -> "httpx2.AsyncClient":
        """The connections, opened now if they are not yet; raises ClientClosed."""
        if self.closed:
            raise_client_closed()
        if self._http is None:
            import httpx2

            self._http = httpx2.AsyncClient(**_settings(self._url, self._ca))
        return self._http


def _settings(url: str, ca: str | None) -> dict[str, Any]:
    """The arguments of an HTTP client for this server."""
    import httpx2

    parts = urlsplit(url)
    return {
        # Loading the certificates takes a while; they are needed for https only, since redirects
        # are not followed.
        "verify": _tls_context(ca) if parts.scheme == "https" else False,
        # A proxy from the environment does not lead to this machine.
        "trust_env": parts.hostname not in _LOCAL_HOSTS,
        "limits": httpx2.Limits(max_connections=None, max_keepalive_connections=64),
    }


def _tls_context(ca: str | None) -> "ssl.SSLContext":
    """Trusts the CAs of the system, or of SSL_CERT_FILE, and those in the file `ca`."""
    import ssl

    import httpx2

    if ca is None:
        return httpx2.create_ssl_context()
    context = ssl.create_default_context()
    context.load_verify_locations(ca)
    return context


def _arguments(url: str, request: Request) -> dict[str, Any]:
    """The arguments with which an HTTP client sends the request."""
    import httpx2

    return {
        "method": request.method,
        "url": url + request.path,
        # Asyncinfer compresses nothing, and a few bytes of another server might unpack to many.
        "headers": {"accept-encoding": "identity", **request.headers},
        "content": request.body,
        "timeout": httpx2.Timeout(request.timeout_seconds, connect=_CONNECT_SECONDS, pool=None),
    }


def _response(answer: "httpx2.Response", content: bytes) -> Response:
    """The Response of an answer whose content was read."""
    return Response(answer.status_code, answer.headers, content)


def _has_data(event: "httpx2.ServerSentEvent") -> bool:
    """Whether a block of the stream has data, so that it is an event (WHATWG HTML, 9.2.6).

    One with only `retry:`, for example, has none.
    """
    return bool(event.data)


def _event(event: "httpx2.ServerSentEvent") -> Event:
    """The event with its decoded data; raises ValueError if that is not JSON."""
    return Event(event.event, msgspec.json.decode(event.data), event.id)


def _lost(error: Exception, has_answered: bool) -> Lost:
    """The Lost of an error of the network; `has_answered`: this URL has answered before."""
    from asyncinfer.tls_errors import tls_fault

    if fault := tls_fault(error):
        return Lost(
            reason=str(fault),
            is_unreachable=True,
            is_first_contact=not has_answered,
            advice=_TLS_ADVICE.get(fault.problem.name, _TLS_ADVICE["OTHER"]),
        )
    kind, text = type(error).__name__, str(error).strip().rstrip(".")
    is_cut = kind not in _CONNECT_ERRORS and "disconnected" in (text or "disconnected")
    return Lost(
        reason=_no_connection(error) or _REASONS.get(kind) or text or "the connection was cut",
        is_unreachable=not (has_answered or is_cut),
        is_first_contact=not has_answered,
        advice=_CUT_ADVICE if is_cut and not has_answered else "",
    )


def _no_connection(error: Exception) -> str:
    """Why no connection came about, as the system says it; empty if it does not."""
    import socket

    from asyncinfer.tls_errors import causes

    for cause in causes(error):
        if isinstance(cause, socket.gaierror):
            return "the host name is not known"
        if isinstance(cause, ConnectionRefusedError):
            return "nothing listens there"
    return ""


_TLS_ADVICE: Final = {
    "UNTRUSTED": "Give the CA that signed it: ca=, or ASYNCINFER_CA.",
    "EXPIRED": "Renew it on the server.",
    "NOT_YET_VALID": "Compare the clocks of both machines.",
    "OTHER_NAME": "Give an address with a name that the certificate has: Client(url), or "
    "ASYNCINFER_URL.",
    "NO_TLS": "Give its address with http://: Client(url), or ASYNCINFER_URL.",
    "CERTIFICATE_WANTED": "This client sends none; give the address of a proxy that needs none.",
    "OTHER": "Compare the TLS versions and ciphers of both sides.",
}
_CUT_ADVICE: Final = (
    "Is it asyncinfer, and does its address begin with http:// or with https://? Give it: "
    "Client(url), or ASYNCINFER_URL."
)
