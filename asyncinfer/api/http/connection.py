"""An HTTP connection with deadlines and size limits."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal, NoReturn, Protocol
from urllib.parse import unquote

import httptools
from msgspec import Struct
from starlette.types import ASGIApp, Scope

from asyncinfer.api.http.exchange import CONNECTION_CLOSE, Exchange, head_of
from asyncinfer.api.http.head_checks import (
    FRAMING,
    check_version,
    expects_continue,
    is_path,
    split_target,
    with_host,
)
from asyncinfer.api.http.messages import (
    ABORT_CONNECTION,
    KEEP_BODY_OPEN,
    Header,
    header_block,
)
from asyncinfer.api.http.probe_paths import HEALTH_PATHS
from asyncinfer.api.http.problems import problem_reply
from asyncinfer.errors import (
    HeadersTooLarge,
    MalformedRequest,
    RequestError,
    RequestTimeout,
    ServerStopping,
    TooManyConnections,
)


class ConnectionLimits(Struct, frozen=True, kw_only=True):
    """Limits of each connection, and how many there may be."""

    header_seconds: float
    body_seconds: float
    """For the whole body."""
    header_bytes: int
    """For the whole head, and again for trailers and chunk extensions."""
    connections: int
    idle_seconds: float
    """How long a connection is kept open between requests."""
    on_refusal: Callable[[str], None] = lambda _: None
    """Is called with the code of each error with which a connection itself answers."""


class Registry(Protocol):
    """What the server keeps of all connections: it waits for both sets when it stops."""

    connections: set[Any]
    tasks: set[asyncio.Task[None]]
    """Applications that run."""
    default_headers: list[Header]
    """Headers of every answer."""


class ShortWay(Protocol):
    """Answers usual requests without their application."""

    def begin(self, exchange: Exchange) -> Callable[[], bool] | None:
        """Called when the head was received. Returns what to call when the body is received too,
        which returns whether the exchange will be answered; None, or False then, leaves it to the
        application."""


RESERVED_CONNECTIONS: Final = 16
"""Connections accepted above the limit, for probes: a kubelet restarts a pod that does not answer
them, which happens just when the pod is busiest."""

_RESERVED_SECONDS: Final = 2.0

_MAX_PIPELINED: Final = 100
"""Requests that may wait on one connection; a client that sends more must send the rest again."""

_MAX_BUFFERED_BYTES: Final = 65_536
"""How much of a body may wait for its handler before reading is paused."""

_DISCARD_SECONDS: Final = 2.0
_HALF_CLOSED_SECONDS: Final = 2.0
"""How long a client that has closed its sending side may wait for the end of a job, or be sent a
stream: it may as well be gone."""

_SMALL_BYTES: Final = 64 << 10
"""An answer of up to this size is copied into one packet."""
_LAST_BYTES_SECONDS: Final = 1.0
"""How long a body may still be received while the server stops."""

_PROBE_PATHS: Final = frozenset(path.encode() for path in HEALTH_PATHS)

_FORBIDDEN_TRAILERS: Final = frozenset({b"connection", b"proxy-connection"})
"""The parser obeys these fields even in a trailer: it silently takes no further request."""

_ASGI: Final = {"version": "3.0", "spec_version": "2.3"}
_NOT_HTTP: Final = "The bytes sent are not an HTTP/1.1 request."

Awaited = Literal["head", "body", "streamed", "nothing"]
"""What the connection waits to receive. `streamed` is a body whose handler reads it for as long as
it lasts, with a deadline of its own."""


_log = logging.getLogger(__name__)


class Connection(asyncio.Protocol):
    """An HTTP/1.1 connection, parsed by httptools: requests are answered in turn, each within a
    deadline for its head and one for its body, with limits on headers, trailers and pipelining. An
    offer to upgrade is ignored. The server makes one object for each connection."""

    def __init__(
        self,
        app: ASGIApp,
        limits: ConnectionLimits,
        registry: Registry,
        short_way: ShortWay | None,
    ) -> None:
        self._app = app
        self._short_way = short_way
        self._finish: Callable[[], bool] | None = None
        """Ends the short way of the latest exchange, whose body is being received."""
        self._registry = registry
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        # Bytes after the last request must not keep it from being answered.
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._transport: asyncio.Transport
        self.client: tuple[str, int] | None = None
        self._server: tuple[str, int] | None = None
        self._state: dict[str, Any] = {
            ABORT_CONNECTION: self._abort,
            KEEP_BODY_OPEN: self._keep_body_open,
        }
        """The ASGI state of every request."""
        self._target = b""
        self._headers: list[Header] = []
        self._is_reading_paused = False
        self.is_writing_paused = False
        self.writable = asyncio.Event()
        self._latest: Exchange | None = None
        """The exchange of the request that was received last."""
        self._answering: Exchange | None = None
        """The exchange that is being answered, or was last."""
        self._waiting: deque[Exchange] = deque()
        """Exchanges of requests that were sent ahead, in the order in which they came."""
        self._is_half_closed = False
        """Whether the client has closed its sending side."""
        self._half_closed_timer: asyncio.TimerHandle | None = None
        self._is_stopping = False
        """Whether the server stops, and waits for no client that may be gone."""
        self._is_ended = False
        """Whether the last answer of this connection was given."""
        self._limits = limits
        self._awaited: Awaited = "nothing"
        self._deadline_for: Awaited = "nothing"
        """What the running deadline is for."""
        self._deadline: asyncio.TimerHandle | None = None
        self._request_begun = False
        """Whether a request has begun and is not completely received."""
        self._chunk_bytes = 0
        self._head_bytes = 0
        """Bytes of an unfinished head, without the chunk in which it began."""
        self._begin_chunk_bytes = 0
        """Size of the chunk in which the head began, which may also hold other requests."""
        self._trailer_bytes = 0
        self._bytes_since_body = 0
        """Bytes of whole chunks received since the last byte of the body: trailers or chunk
        extensions."""
        self._expects_continue = False
        self._has_framing_field = False
        """Whether the head has a field that `expects_continue` reads."""
        self._is_last_request = False
        """Whether no request is accepted after the one received last."""
        self._reserved_timer: asyncio.TimerHandle | None = None
        """Closes a connection above the limit; None on all others."""
        self._idle_since: float | None = None
        """When the last answer was sent, by the loop's clock; None while a request is open."""
        self._idle_timer: asyncio.TimerHandle | None = None
        self._refusal: RequestError | None = None
        """The reply to send instead, if one of our callbacks stopped the parser."""
        self._refused = False
        self._pending_refusal: RequestError | None = None
        """A refusal to send once the requests before it are answered."""

    # --- callbacks of the transport -----------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for a head. A connection above the limit has 2 s and is only for a probe;
        one above the reserve too is refused at once."""
        self._transport = transport
        self.client = _address(transport.get_extra_info("peername"))
        self._server = _address(transport.get_extra_info("sockname"))
        self._registry.connections.add(self)
        held = len(self._registry.connections)
        if held > self._limits.connections + RESERVED_CONNECTIONS:
            self._refuse(self._too_many_connections())
            self._close()
            return
        if held > self._limits.connections:
            self._reserved_timer = self._loop.call_later(_RESERVED_SECONDS, self._close_reserved)
        self._awaited = "head"
        self._set_deadline()

    def data_received(self, data: bytes) -> None:
        """Parses the bytes and checks what they add up to. Drops them once the connection has
        refused a request, or after its last one."""
        self._idle_since = None
        if self._refused or (self._is_last_request and not self._request_begun):
            return
        self._chunk_bytes = len(data)
        if self._awaited == "head" and self._request_begun:
            self._head_bytes += len(data)
        elif self._awaited in ("body", "streamed"):
            self._bytes_since_body += len(data)
        self._feed_parser(data)
        if self._refused or self._transport.is_closing():
            return
        if self._awaited == "head" and self._head_bytes > self._limits.header_bytes:
            self._refuse(self._headers_too_large())
        elif self._request_begun and self._bytes_since_body > self._limits.header_bytes:
            self._refuse(self._trailers_too_large())
        elif self._awaited == "nothing" and self._all_answered():
            # These are line ends between requests, which end the idle time.
            self._awaited = "head"
        self._set_deadline()

    def _feed_parser(self, data: bytes) -> None:
        """Parses the bytes; refuses those that are not HTTP, and ignores an offer to upgrade."""
        rest = data
        while rest:
            try:
                self._parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as offer:
                # RFC 9110, 7.8: a server may ignore an offer to upgrade, and this one does. The
                # parser skips the body then, so a new parser gets the head without the offer.
                rest = self._head_without_offer() + rest[offer.args[0] :]
                self._parser = httptools.HttpRequestParser(self)
            except httptools.HttpParserError as error:
                self._refuse_unreadable(error)
                return

    def _refuse_unreadable(self, error: httptools.HttpParserError) -> None:
        """Refuses what the parser stopped at, with our callback's error if one stopped it. Does
        nothing after the last request."""
        if self._is_last_request and not self._request_begun:
            return
        _log.debug("Refused what %s sent: %r", self.client, self._refusal or error)
        self._refuse(self._refusal or MalformedRequest(_NOT_HTTP))

    def _head_without_offer(self) -> bytes:
        """The head that was just parsed, as it would have been sent without the Upgrade field."""
        method: bytes = self._parser.get_method()
        version = self._parser.get_http_version().encode()
        lines = [
            b"%b: %b\r\n" % (name, value) for name, value in self._headers if name != b"upgrade"
        ]
        return b"".join((method, b" ", self._target, b" HTTP/", version, b"\r\n", *lines, b"\r\n"))

    def eof_received(self) -> bool:
        """Returns whether to keep our side open: the client sends nothing more, but RFC 9112, 9.5,
        does not let that mean that it reads no answer either. Requests that came whole are
        answered; a part of another is dropped."""
        if self._waiting and not self._waiting[-1].is_received:
            self._waiting.pop().abandon()
        answering = self._answering
        if answering is None or not answering.is_open:
            return False
        if not self._is_half_closed:
            self._is_half_closed = True
            self._disarm()
            seconds = 0 if self._is_stopping else _HALF_CLOSED_SECONDS
            self._half_closed_timer = self._loop.call_later(seconds, self._take_for_gone)
        return True

    def _take_for_gone(self) -> None:
        """Ends waits and streams of a client that has closed its sending side."""
        for exchange in self._open_exchanges():
            exchange.take_for_gone()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancels all timers and lets every open request's application see that the client is
        gone."""
        self._disarm()
        for timer in (self._reserved_timer, self._idle_timer, self._half_closed_timer):
            if timer:
                timer.cancel()
        self._abandon_all()
        self._waiting.clear()
        if self._finish and self._answering:
            # Its body never came. The application sees that, as for any other request.
            self._start(self._answering)
        self.resume_writing()
        self._registry.connections.discard(self)
        # They refer to this object, which would otherwise wait for the garbage collector.
        self._latest = self._answering = self._finish = None
        self._state = {}
        del self._parser

    def _abort(self) -> None:
        """Closes at once without sending what is left; open requests' applications see a
        disconnect."""
        self._abandon_all()
        self._transport.abort()

    def _abandon_all(self) -> None:
        """Makes the applications of all requests see that the client has disconnected."""
        for exchange in self._open_exchanges():
            exchange.abandon()

    def _open_exchanges(self) -> Iterator[Exchange]:
        """The exchange that is being answered, or was last, and those that wait."""
        if self._answering is not None:
            yield self._answering
        yield from self._waiting

    def pause_writing(self) -> None:
        """Called when much of what was written is not sent yet."""
        self.is_writing_paused = True
        self.writable.clear()

    def resume_writing(self) -> None:
        """Called when most of what was written is sent."""
        self.is_writing_paused = False
        self.writable.set()

    def _pause_reading(self) -> None:
        if not self._is_reading_paused:
            self._is_reading_paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Continues to read if reading was paused."""
        if self._is_reading_paused:
            self._is_reading_paused = False
            self._transport.resume_reading()

    # --- callbacks of the parser --------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Raises MalformedRequest, which stops the parser, if no request is accepted any more."""
        if self._is_last_request or self._is_ended:
            raise MalformedRequest("No request is accepted after the last one.")
        self._target, self._headers, self._expects_continue = b"", [], False
        self._awaited, self._request_begun, self._has_framing_field = "head", True, False
        self._begin_chunk_bytes = self._chunk_bytes
        self._head_bytes = self._trailer_bytes = self._bytes_since_body = 0

    def on_url(self, target: bytes) -> None:
        """Keeps a part of the target."""
        self._target += target

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keeps a header, its name in lower case; a field after the head is a trailer."""
        if self._awaited != "head":
            self._drop_trailer(name, value)
            return
        name = name.lower()
        if name in FRAMING:
            self._has_framing_field = True
        self._headers.append((name, value.rstrip(b" \t")))

    def _drop_trailer(self, name: bytes, value: bytes) -> None:
        """Counts and ignores a trailer. RFC 9110, 6.5.1: a trailer counts as a header only if its
        definition says so, and none of those that are read here does. The parser obeys some all the
        same: such trailers, and too many bytes of them, stop it."""
        if name.lower() in _FORBIDDEN_TRAILERS:
            self._stop_parser(MalformedRequest(f"{name.decode('latin-1')} may not be a trailer."))
        self._trailer_bytes += len(name) + len(value) + 4
        if self._trailer_bytes > self._limits.header_bytes:
            self._stop_parser(self._trailers_too_large())

    def on_headers_complete(self) -> None:
        """Checks the head and begins its exchange; an error in the head stops the parser. Does
        nothing for an offer to upgrade, whose head is parsed again without it."""
        version = self._parser.get_http_version()
        try:
            self._check_head(version)
        except RequestError as error:
            self._stop_parser(error)
        if self._parser.should_upgrade():
            return
        self._begin_exchange(version)
        self._awaited = "body"

    def _check_head(self, version: str) -> None:
        """Raises MalformedRequest, InvalidHeader, HeadersTooLarge or TooManyConnections. Replaces a
        target that names a host by its path and a Host field."""
        if self._begin_chunk_bytes + self._head_bytes > self._limits.header_bytes:
            self._check_size()
        if version != "1.1":
            check_version(version)
        if self._parser.should_upgrade():
            self._check_offer()
            return
        if self._has_framing_field:
            self._expects_continue = expects_continue(self._headers, version)
        if not is_path(self._target):
            self._read_target(version)
        if self._reserved_timer and self._target.partition(b"?")[0] not in _PROBE_PATHS:
            raise self._too_many_connections()

    def _check_size(self) -> None:
        """Raises HeadersTooLarge by the head's exact size; needed only if the chunks that it came
        in have more bytes than the limit."""
        size = len(self._target) + sum(len(name) + len(value) + 4 for name, value in self._headers)
        if size > self._limits.header_bytes:
            raise self._headers_too_large()

    def _check_offer(self) -> None:
        """Raises MalformedRequest for CONNECT; other offers are ignored."""
        if self._parser.get_method() == b"CONNECT":
            raise MalformedRequest("CONNECT is for proxies, and this server is not one.")

    def _read_target(self, version: str) -> None:
        """Replaces a target that is not a plain path by its path, and Host by the host it names.
        Raises MalformedRequest or InvalidHeader."""
        authority, self._target = split_target(self._target, self._parser.get_method())
        if authority is not None:
            self._headers = list(with_host(self._headers, authority, version))

    def _begin_exchange(self, version: str) -> None:
        """Starts the request's application, or queues it and stops reading while an earlier request
        is open."""
        keep_alive = version == "1.1" and self._parser.should_keep_alive()
        self._is_last_request = (
            not keep_alive
            or len(self._waiting) >= _MAX_PIPELINED
            or self._reserved_timer is not None
        )
        before = self._latest
        self._latest = Exchange(
            self,
            self._scope(version),
            expects_continue=self._expects_continue,
            keep_alive=not self._is_last_request,
        )
        if before is not None and not before.is_answered:
            self._pause_reading()
            self._waiting.append(self._latest)
            return
        self._answering = self._latest
        self._finish = self._begin_short_way(self._latest)
        if self._finish is None:
            self._start(self._latest)

    def _begin_short_way(self, exchange: Exchange) -> Callable[[], bool] | None:
        """What ends the short way of a request, if it may take that. Not one whose client does not
        read: its answers would pile up."""
        if (
            self._short_way is None
            or self._is_last_request
            or exchange.expects_continue
            or self.is_writing_paused
        ):
            return None
        return self._short_way.begin(exchange)

    def _start(self, exchange: Exchange) -> None:
        """Starts the exchange's application as a task."""
        self._answering = exchange
        task = self._loop.create_task(exchange.run(self._app))
        self._registry.tasks.add(task)
        task.add_done_callback(self._registry.tasks.discard)

    def _scope(self, version: str) -> Scope:
        """The ASGI scope of the request whose head was received."""
        raw_path, _, query = self._target.partition(b"?")
        path = raw_path.decode("ascii")
        return {
            "type": "http",
            "asgi": _ASGI,
            "http_version": version,
            "method": self._parser.get_method().decode("ascii"),
            "scheme": "http",
            "path": unquote(path) if "%" in path else path,
            "raw_path": raw_path,
            "query_string": query,
            "root_path": "",
            "headers": tuple(self._headers),
            "client": self.client,
            "server": self._server,
            "state": self._state,
        }

    def on_body(self, body: bytes) -> None:
        """Passes bytes of the body on, and stops reading while more than 64 KiB of them wait; drops
        them once the answer is complete."""
        self._bytes_since_body = 0
        exchange = self._latest
        assert exchange is not None
        if not exchange.is_answered:
            exchange.add_body(body)
            if exchange.buffered_bytes > _MAX_BUFFERED_BYTES:
                self._pause_reading()

    def _stop_parser(self, error: RequestError) -> NoReturn:
        """Raises the error to make the parser stop; it becomes the reply."""
        self._refusal = error
        raise error

    def on_message_complete(self) -> None:
        """Ends the body of the request, and its deadline."""
        if self._parser.should_upgrade():
            return
        assert self._latest is not None
        self._latest.end_body()
        self._awaited, self._request_begun = "nothing", False
        self._disarm()
        finish, self._finish = self._finish, None
        if finish and not finish():
            self._start(self._latest)

    # --- limits -------------------------------------------------------------------------------

    def _headers_too_large(self) -> HeadersTooLarge:
        return HeadersTooLarge(f"The headers may have {self._limits.header_bytes} bytes in all.")

    def _trailers_too_large(self) -> HeadersTooLarge:
        return HeadersTooLarge(
            f"Trailers and chunk extensions may have {self._limits.header_bytes} bytes in all, and "
            "are not read; leave them out."
        )

    def _too_many_connections(self) -> TooManyConnections:
        return TooManyConnections(
            f"This server holds {self._limits.connections} connections. Retry later, or close "
            "those you do not use."
        )

    def _set_deadline(self) -> None:
        """Sets the deadline of what is awaited, unless that is already running; none while nothing
        is awaited or the handler has a deadline of its own."""
        if self._awaited == self._deadline_for:
            return
        self._disarm()
        if self._awaited in ("nothing", "streamed") or self._transport.is_closing():
            return
        self._deadline_for = self._awaited
        self._deadline = self._loop.call_later(self._deadline_seconds(), self._too_slow)

    def _keep_body_open(self, scope: Scope) -> None:
        """Lifts the deadline if the scope is still that of the request being read; else does
        nothing."""
        if self._awaited == "body" and self._latest and self._latest.scope is scope:
            self._disarm()
            self._awaited = "streamed"

    def _deadline_seconds(self) -> float:
        """How long the head, or the whole body, may take from when it is awaited."""
        if self._awaited == "head":
            return self._limits.header_seconds
        return self._limits.body_seconds

    def _disarm(self) -> None:
        """Cancels the deadline, if one is running."""
        self._deadline_for = "nothing"
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        """Called at the deadline: refuses a request that has begun, and closes a connection on
        which none has. Sets it again while this connection itself does not read."""
        self._disarm()
        if self._waiting:
            # This connection itself stopped reading, until earlier requests are answered.
            self._set_deadline()
        elif not self._request_begun:
            self._close()
        else:
            self._refuse(
                RequestTimeout(
                    f"The request's {self._awaited} was not received within "
                    f"{self._deadline_seconds():g} s."
                )
            )

    def _all_answered(self) -> bool:
        """Whether every request received so far is answered."""
        return self._latest is None or self._latest.is_answered

    def _refuse(self, error: RequestError) -> None:
        """Answers in place of the application and closes the connection; the application sees a
        disconnected client. Earlier requests are answered first. No error can be sent if the
        response has begun: then only closes."""
        self._refused = True
        self._disarm()
        answering = self._answering
        if self._awaited in ("body", "streamed") and not self._drop_current_request():
            self.end()
        elif answering and not (answering.is_answered or answering.is_abandoned):
            self._pending_refusal = error
        else:
            self._send_refusal(error)

    def _drop_current_request(self) -> bool:
        """Abandons the request whose body is being read; returns whether it can still be answered,
        which it cannot once its answer has begun."""
        exchange = self._latest
        assert exchange is not None
        if self._waiting and self._waiting[-1] is exchange:
            self._waiting.pop()
        exchange.abandon()
        return not exchange.is_begun

    def _send_refusal(self, error: RequestError) -> None:
        """Writes the error as a reply and closes the connection in stages; does nothing if it is
        closing."""
        if self._transport.is_closing():
            return
        self._limits.on_refusal(error.code)
        reply = problem_reply(error)
        head = head_of(reply.status, (*header_block(reply), CONNECTION_CLOSE))
        is_head = self._request_begun and self._parser.get_method() == b"HEAD"
        self._send(head, b"" if is_head else reply.body)
        self._close_after_discarding()

    def _close_reserved(self) -> None:
        """Called when the time of a connection above the limit is up: closes it, with an error if
        it sent no request."""
        if not (self._refused or self._answering):
            self._refuse(self._too_many_connections())
        self._close()

    # --- answering ----------------------------------------------------------------------------

    @property
    def default_headers(self) -> Sequence[Header]:
        """Headers of every answer."""
        return self._registry.default_headers

    def write(self, *parts: bytes) -> None:
        """Writes the parts; drops them after the last answer, or once the connection is closing."""
        if not (self._is_ended or self._transport.is_closing()):
            self._send(*parts)

    def _send(self, *parts: bytes) -> None:
        """Sends the parts, small ones in one packet.

        Not by `writelines`: that of asyncio keeps a core busy for ever after an empty part, or once
        the connection is lost, in Python 3.13.5 and others (CPython issues 136234 and 155888).
        """
        if sum(map(len, parts)) <= _SMALL_BYTES:
            self._transport.write(b"".join(parts))
        else:
            for part in parts:
                self._transport.write(part)

    def answered(self, exchange: Exchange) -> None:
        """Called after each answer: starts the next request, waits for one, or closes."""
        if not exchange.keep_alive or self._awaited == "streamed":
            self.end()
        if self._is_ended:
            # RFC 9112, 9.6: no request is processed after the answer that said `close`. The client
            # gets no other answer, and must send again what it had sent ahead.
            self._waiting.clear()
        elif not self._transport.is_closing():
            self._continue()
        if self._transport.is_closing():
            self._abort_if_unsent()

    def _continue(self) -> None:
        """After an answer, starts the next request or waits idle for one."""
        self.resume_reading()
        if self._waiting:
            self._start(self._waiting.popleft())
            if self._waiting:
                # What a client sends ahead would all be kept in memory.
                self._pause_reading()
        elif self._pending_refusal:
            self._send_refusal(self._pending_refusal)
        elif self._is_half_closed:
            self._close()
        else:
            self._idle_since = self._loop.time()
            if self._idle_timer is None:
                self._idle_timer = self._loop.call_later(
                    self._limits.idle_seconds, self._close_if_idle
                )

    # --- closing ------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """Called when the server stops. Open requests are still answered; a body that is still
        being received is refused after a second, since it would otherwise be cut off at the end of
        the grace period."""
        self._is_stopping = True
        if self._latest is None or self._latest.is_answered:
            self._transport.close()
        else:
            self._latest.keep_alive = False
        if self._is_half_closed:
            self._take_for_gone()
        if self._awaited == "body":
            self._loop.call_later(_LAST_BYTES_SECONDS, self._stop_reading)

    def _stop_reading(self) -> None:
        """Refuses the request whose body is still being received, if there is one."""
        if self._awaited == "body" and not (self._refused or self._transport.is_closing()):
            self._refuse(
                ServerStopping(
                    "The server is stopping, and did not read all of this request. Send it again.",
                    retry_after_seconds=1,
                )
            )

    def _close_if_idle(self) -> None:
        """Closes the connection if it was idle for the keep-alive time. The timer is not set and
        cancelled for each request: if it ends during one, the next idle time sets it, and if it
        ends too early in an idle time, it is set for the rest."""
        self._idle_timer = None
        if self._idle_since is None:
            return
        left = self._idle_since + self._limits.idle_seconds - self._loop.time()
        if left > 0:
            self._idle_timer = self._loop.call_later(left, self._close_if_idle)
        else:
            self._close()

    def end(self) -> None:
        """Closes after an answer, in stages (RFC 9112, 9.6), since the client may still be sending
        this request's body or another request. What it sends is dropped, and so is what else would
        be written. Does nothing the second time, or if already closing."""
        if self._is_ended:
            return
        self._is_ended = True
        if not self._transport.is_closing():
            self._refused = True
            self._disarm()
            self._close_after_discarding()

    def _close_after_discarding(self) -> None:
        """Ends our side now, and closes after reading and dropping incoming bytes for 2 s: a socket
        closed with unread bytes is reset, and the client may lose the answer with it. Returns at
        once."""
        if self._is_half_closed:
            self._close()
            return
        self.resume_reading()
        self._transport.write_eof()
        self._loop.call_later(_DISCARD_SECONDS, self._close)

    def _close(self) -> None:
        """Closes once everything written is sent, for which the client has as long as for a
        body."""
        self._transport.close()
        self._abort_if_unsent()

    def _abort_if_unsent(self) -> None:
        """Bounds how long a closed transport waits for its client to read its answer: as long as a
        body may take."""
        if self._transport.get_write_buffer_size():
            self._loop.call_later(self._limits.body_seconds, self._transport.abort)


def _address(name: Any) -> tuple[str, int] | None:
    """Host and port of a socket's name; None if it has none any more."""
    return (name[0], name[1]) if name else None
