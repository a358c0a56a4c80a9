"""Carries out what flows ask: with threads, or in an event loop. The only door to httpx2."""

import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import msgspec

from asyncinfer.client._errors import refuse_closed
from asyncinfer.client._protocol import Event, Flow, Lost, Pause, Request, Response, T, Told

if TYPE_CHECKING:
    import httpx2

_CONNECT_SECONDS: Final = 5.0
_NO_WAY: Final = frozenset({"ConnectError", "ConnectTimeout", "UnsupportedProtocol"})
_REASONS: Final = {
    "ConnectError": "nothing listens there, or the name is not known",
    "ConnectTimeout": f"no connection within {_CONNECT_SECONDS:g} s",
    "ReadTimeout": "the connection is open, but silent",
    "WriteTimeout": "the connection is open, but takes nothing",
    "UnsupportedProtocol": "an address begins with http:// or https://",
}
_LOCAL: Final = frozenset({"127.0.0.1", "localhost", "::1"})


_MOST_BYTES: Final = 1 << 30
"""Of one answer. The largest is of 16 lines with a result each, of 16 MiB as it is stored and some
60 MiB as JSON."""


class Content:
    """An answer's body as it comes. What is no asyncinfer may go on for ever, so that it is cut,
    and refused as what no asyncinfer answers."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._size = 0

    def takes(self, chunk: bytes) -> bool:
        """Whether there may be more."""
        self._size += len(chunk)
        if self._size > _MOST_BYTES:
            self._chunks = []
            return False
        self._chunks.append(chunk)
        return True

    def whole(self) -> bytes:
        """Empty where there was too much."""
        return self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)


class Driver:
    """Requests go through one pool of connections, from any number of threads."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._http: httpx2.Client | None = None
        self._lock = threading.Lock()
        self._answered = False
        self.closed = False
        self.on_pause: Callable[[Pause], None] = lambda _: None
        """Called before a request is sent again, unless it is one of a map's."""

    def run(self, flow: Flow[T]) -> T:
        told: Told = None
        try:
            while True:
                told = self._carry_out(flow.send(told))
        except StopIteration as done:
            result: T = done.value
            return result
        finally:
            flow.close()

    def events(self, request: Request) -> Generator[Response | Lost | Event, None, None]:
        """What is answered, the events that follow, and a Lost at the end where it was cut."""
        import httpx2

        try:
            with self._pool().stream(**_arguments(self._url, request)) as reply:
                self._answered = True
                yield _response(reply, b"" if reply.status_code == 200 else reply.read())
                if reply.status_code == 200:
                    yield from map(_event, filter(_has_data, httpx2.EventSource(reply)))
        except httpx2.TransportError as error:
            yield _lost(error, self._answered)

    def close(self) -> None:
        self.closed = True
        if self._http is not None:
            self._http.close()
            self._http = None

    def _carry_out(self, asked: Request | Pause) -> Told:
        if isinstance(asked, Pause):
            self.on_pause(asked)
            time.sleep(asked.seconds)
            return None
        return self.exchange(asked)

    def exchange(self, request: Request) -> Response | Lost:
        import httpx2

        content = Content()
        try:
            with self._pool().stream(**_arguments(self._url, request)) as reply:
                for chunk in reply.iter_bytes():
                    if not content.takes(chunk):
                        break
        except httpx2.TransportError as error:
            return _lost(error, self._answered)
        self._answered = True
        return _response(reply, content.whole())

    def _pool(self) -> "httpx2.Client":
        if self.closed:
            refuse_closed()
        with self._lock:
            if self._http is None:
                import httpx2

                self._http = httpx2.Client(**_settings(self._url))
            return self._http


class AsyncDriver:
    """The same in an event loop."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._http: httpx2.AsyncClient | None = None
        self._answered = False
        self.closed = False

    async def run(self, flow: Flow[T]) -> T:
        told: Told = None
        try:
            while True:
                told = await self._carry_out(flow.send(told))
        except StopIteration as done:
            result: T = done.value
            return result
        finally:
            flow.close()

    async def events(self, request: Request) -> AsyncGenerator[Response | Lost | Event, None]:
        """What is answered, the events that follow, and a Lost at the end where it was cut."""
        import httpx2

        try:
            async with self._pool().stream(**_arguments(self._url, request)) as reply:
                self._answered = True
                yield _response(reply, b"" if reply.status_code == 200 else await reply.aread())
                if reply.status_code == 200:
                    async for one in httpx2.EventSource(reply):
                        if _has_data(one):
                            yield _event(one)
        except httpx2.TransportError as error:
            yield _lost(error, self._answered)

    async def close(self) -> None:
        self.closed = True
        if self._http is not None:
            await self._http.aclose()
            self._http = None

    async def _carry_out(self, asked: Request | Pause) -> Told:
        if isinstance(asked, Pause):
            import asyncio

            await asyncio.sleep(asked.seconds)
            return None
        return await self.exchange(asked)

    async def exchange(self, request: Request) -> Response | Lost:
        import httpx2

        content = Content()
        try:
            async with self._pool().stream(**_arguments(self._url, request)) as reply:
                async for chunk in reply.aiter_bytes():
                    if not content.takes(chunk):
                        break
        except httpx2.TransportError as error:
            return _lost(error, self._answered)
        self._answered = True
        return _response(reply, content.whole())

    def _pool(self) -> "httpx2.AsyncClient":
        if self.closed:
            refuse_closed()
        if self._http is None:
            import httpx2

            self._http = httpx2.AsyncClient(**_settings(self._url))
        return self._http


def _settings(url: str) -> dict[str, Any]:
    import httpx2

    parts = urlsplit(url)
    return {
        # The certificates take a while to load, and redirects are not followed.
        "verify": parts.scheme == "https",
        # A proxy of the environment is no way to this very machine.
        "trust_env": parts.hostname not in _LOCAL,
        "limits": httpx2.Limits(max_connections=None, max_keepalive_connections=64),
    }


def _arguments(url: str, request: Request) -> dict[str, Any]:
    import httpx2

    silence = request.timeout_seconds
    return {
        "method": request.method,
        "url": url + request.path,
        # A server of ours compresses nothing, and another might send a little that becomes a lot.
        "headers": {"accept-encoding": "identity", **request.headers},
        "content": request.body,
        "timeout": httpx2.Timeout(silence, connect=_CONNECT_SECONDS, pool=None),
    }


def _response(reply: "httpx2.Response", content: bytes) -> Response:
    return Response(reply.status_code, reply.headers, content)


def _has_data(one: "httpx2.ServerSentEvent") -> bool:
    """What has none, such as a `retry:` alone, is no event (WHATWG HTML, 9.2.6)."""
    return bool(one.data)


def _event(one: "httpx2.ServerSentEvent") -> Event:
    return Event(one.event, msgspec.json.decode(one.data), one.id)


def _lost(error: Exception, answered: bool) -> Lost:
    kind, told = type(error).__name__, str(error).strip().rstrip(".")
    is_cut = kind not in _NO_WAY and "disconnected" in (told or "disconnected")
    reason = _REASONS.get(kind) or told or "the connection was cut"
    return Lost(reason, hopeless=not (answered or is_cut), first=not answered)
