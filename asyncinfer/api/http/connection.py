"""An HTTP connection with deadlines and size limits."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Any, Final, Literal, NoReturn
from urllib.parse import unquote

import httptools
from msgspec import Struct
from starlette.types import Scope
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import (
    HEADER_VALUE_RE,
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

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
    SEND_WHOLE_REPLY,
    Header,
    Reply,
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


RESERVED_CONNECTIONS: Final = 16
"""Connections accepted above the limit, for probes: a kubelet restarts a pod that does not answer
them, which happens just when the pod is busiest."""

_RESERVED_SECONDS: Final = 2.0

_MAX_PIPELINED: Final = 100
"""Requests that may wait on one connection; a client that sends more must send the rest again."""

_DISCARD_SECONDS: Final = 2.0
_LAST_BYTES_SECONDS: Final = 1.0
"""How long a body may still be received while the server stops."""

_PROBE_PATHS: Final = frozenset(path.encode() for path in HEALTH_PATHS)

_FORBIDDEN_TRAILERS: Final = frozenset({b"connection", b"proxy-connection"})
"""The parser obeys these fields even in a trailer: it silently takes no further request."""

_CONNECTION_CLOSE: Final = (b"connection", b"close")
_NOT_HTTP: Final = "The bytes sent are not an HTTP/1.1 request."

Awaited = Literal["head", "body", "streamed", "nothing"]
"""What the connection waits to receive. `streamed` is a body whose handler reads it for as long as
it lasts, with a deadline of its own."""


_log = logging.getLogger(__name__)


class Connection(HttpToolsProtocol):
    """uvicorn's connection, with what that lacks: deadlines for reading, limits on headers and
    trailers, trailers kept apart from headers, and the body of a request that offers an upgrade.
    uvicorn makes one object for each connection."""

    def __init__(self, limits: ConnectionLimits, **uvicorn_arguments: Any) -> None:
        super().__init__(**uvicorn_arguments)
        self.app_state = {
            **self.app_state,
            ABORT_CONNECTION: self._abort,
            KEEP_BODY_OPEN: self._keep_body_open,
            SEND_WHOLE_REPLY: self._send_whole_reply,
        }
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
        self._has_framing_field = False
        """Whether the head has a field that `expects_continue` reads."""
        self._running_cycle: RequestResponseCycle | None = None
        """The cycle that is being answered, or was last; `cycle` is that of the last request."""
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
        super().connection_made(transport)
        self._cycle_transport = _CycleTransport(transport, self._end_after_answer)
        held = len(self.connections)
        if held > self._limits.connections + RESERVED_CONNECTIONS:
            self._refuse(self._too_many_connections())
            self._close()
            return
        if held > self._limits.connections:
            self._reserved_timer = self.loop.call_later(_RESERVED_SECONDS, self._close_reserved)
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
        if self._refused or self.transport.is_closing():
            return
        if self._awaited == "head" and self._head_bytes > self._limits.header_bytes:
            self._refuse(self._headers_too_large())
        elif self._request_begun and self._bytes_since_body > self._limits.header_bytes:
            self._refuse(self._trailers_too_large())
        elif self._awaited == "nothing" and self._all_answered():
            # These are line ends between requests, for which uvicorn has stopped its keep-alive
            # timer.
            self._awaited = "head"
        self._set_deadline()

    def _feed_parser(self, data: bytes) -> None:
        """Parses the bytes; refuses those that are not HTTP, and ignores an offer to upgrade."""
        rest = data
        while rest:
            try:
                self.parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as offer:
                # RFC 9110, 7.8: a server may ignore an offer to upgrade, and this one does. The
                # parser skips the body then, so a new parser gets the head without the offer.
                rest = self._head_without_offer() + rest[offer.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
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
        method: bytes = self.parser.get_method()
        version = self.parser.get_http_version().encode()
        lines = [
            b"%b: %b\r\n" % (name, value) for name, value in self.headers if name != b"upgrade"
        ]
        return b"".join((method, b" ", self.url, b" HTTP/", version, b"\r\n", *lines, b"\r\n"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancels all timers and lets every open request's application see that the client is
        gone."""
        self._disarm()
        for timer in (self._reserved_timer, self._idle_timer):
            if timer:
                timer.cancel()
        # uvicorn notifies the cycle of the last request; an earlier one would continue to write.
        for cycle in self._open_cycles():
            self._abandon(cycle)
        self.pipeline.clear()
        self.app_state = {}
        super().connection_lost(exc)

    def _open_cycles(self) -> Iterator[RequestResponseCycle]:
        """The cycle that is being answered, or was last, and those that wait in the pipeline."""
        if self._running_cycle is not None:
            yield self._running_cycle
        for cycle, _ in self.pipeline:
            yield cycle

    def _abort(self) -> None:
        """Closes at once without sending what is left; open requests' applications see a
        disconnect."""
        for cycle in self._open_cycles():
            self._abandon(cycle)
        self.transport.abort()

    def _abandon(self, cycle: RequestResponseCycle) -> None:
        """Makes the cycle's application see that the client has disconnected. Only wakes one whose
        response is complete."""
        if not cycle.response_complete:
            cycle.disconnected = True
        cycle.message_event.set()

    # --- callbacks of the parser --------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Raises MalformedRequest, which stops the parser, if no request is accepted any more."""
        if self._is_last_request or self._cycle_transport.closed:
            raise MalformedRequest("No request is accepted after the last one.")
        super().on_message_begin()
        self._awaited, self._request_begun, self._has_framing_field = "head", True, False
        self._begin_chunk_bytes = self._chunk_bytes
        self._head_bytes = self._trailer_bytes = self._bytes_since_body = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keeps a header, its name in lower case; a field after the head is a trailer."""
        if self._awaited != "head":
            self._drop_trailer(name, value)
            return
        name = name.lower()
        if name in FRAMING:
            self._has_framing_field = True
        self.headers.append((name, value.rstrip(b" \t")))

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
        """Checks the head and begins its cycle; an error in the head stops the parser. Does nothing
        for an offer to upgrade, whose head is parsed again without it."""
        version = self.parser.get_http_version()
        try:
            self._check_head(version)
        except RequestError as error:
            self._stop_parser(error)
        if self.parser.should_upgrade():
            return
        self._begin_cycle(version)
        self._awaited = "body"

    def _check_head(self, version: str) -> None:
        """Raises MalformedRequest, InvalidHeader, HeadersTooLarge or TooManyConnections. Replaces a
        target that names a host by its path and a Host field."""
        if self._begin_chunk_bytes + self._head_bytes > self._limits.header_bytes:
            self._check_size()
        if version != "1.1":
            check_version(version)
        if self.parser.should_upgrade():
            self._check_offer()
            return
        if self._has_framing_field:
            self.expect_100_continue = expects_continue(self.headers, version)
        if not is_path(self.url):
            self._read_target(version)
        if self._reserved_timer and self.url.partition(b"?")[0] not in _PROBE_PATHS:
            raise self._too_many_connections()

    def _check_size(self) -> None:
        """Raises HeadersTooLarge by the head's exact size; needed only if the chunks that it came
        in have more bytes than the limit."""
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._limits.header_bytes:
            raise self._headers_too_large()

    def _check_offer(self) -> None:
        """Raises MalformedRequest for CONNECT; other offers are ignored."""
        if self.parser.get_method() == b"CONNECT":
            raise MalformedRequest("CONNECT is for proxies, and this server is not one.")

    def _read_target(self, version: str) -> None:
        """Replaces a target that is not a plain path by its path, and Host by the host it names.
        Raises MalformedRequest or InvalidHeader."""
        authority, self.url = split_target(self.url, self.parser.get_method())
        if authority is not None:
            self.headers = list(with_host(self.headers, authority, version))

    def _begin_cycle(self, version: str) -> None:
        """Starts the request's application, or queues it and stops reading while an earlier request
        is open. Does what uvicorn's `on_headers_complete` does, with a single immutable copy of the
        head and without repeating the checks made here."""
        self._fill_scope(version)
        waiting = len(self.pipeline)
        keep_alive = version == "1.1" and self.parser.should_keep_alive()
        self._is_last_request = (
            not keep_alive or waiting >= _MAX_PIPELINED or self._reserved_timer is not None
        )
        before, self.cycle = (
            self.cycle,
            RequestResponseCycle(
                scope=self.scope,
                transport=self._cycle_transport,  # type: ignore[arg-type]
                flow=self.flow,
                logger=self.logger,
                access_logger=self.access_logger,
                access_log=self.access_log,
                default_headers=self.server_state.default_headers,
                message_event=asyncio.Event(),
                expect_100_continue=self.expect_100_continue,
                keep_alive=not self._is_last_request,
                on_response=self.on_response_complete,
            ),
        )
        if before is None or before.response_complete:
            self._running_cycle = self.cycle
            self._start_asgi_task(self.cycle, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))

    def _fill_scope(self, version: str) -> None:
        """Completes the ASGI scope with the request's line and headers."""
        scope = self.scope
        raw_path, _, query = self.url.partition(b"?")
        path = raw_path.decode("ascii")
        scope["method"] = self.parser.get_method().decode("ascii")
        scope["http_version"] = version
        scope["path"] = self.root_path + (unquote(path) if "%" in path else path)
        scope["raw_path"] = self.root_path.encode() + raw_path
        scope["query_string"] = query
        scope["headers"] = tuple(self.headers)

    def on_body(self, body: bytes) -> None:
        """Passes bytes of the body on, and stops reading while more than 64 KiB of them wait; drops
        them once the response is complete."""
        self._bytes_since_body = 0
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.body += body
            if len(cycle.body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            cycle.message_event.set()

    def _stop_parser(self, error: RequestError) -> NoReturn:
        """Raises the error to make the parser stop; it becomes the reply."""
        self._refusal = error
        raise error

    def on_message_complete(self) -> None:
        """Ends the body of the request, and its deadline."""
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        # The body is complete, so `100 Continue` would come too late (RFC 9110, 10.1.1).
        self.cycle.waiting_for_100_continue = False
        self._awaited, self._request_begun = "nothing", False
        self._disarm()

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
        if self._awaited in ("nothing", "streamed") or self.transport.is_closing():
            return
        self._deadline_for = self._awaited
        self._deadline = self.loop.call_later(self._deadline_seconds(), self._too_slow)

    def _keep_body_open(self, scope: Scope) -> None:
        """Lifts the deadline if the scope is still that of the request being read; else does
        nothing."""
        if scope is self.scope and self._awaited == "body":
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
        if self.pipeline:
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
        return self.cycle is None or self.cycle.response_complete

    def _refuse(self, error: RequestError) -> None:
        """Answers in place of the application and closes the connection; the application sees a
        disconnected client. Earlier requests are answered first. No error can be sent if the
        response has begun: then only closes."""
        self._refused = True
        self._disarm()
        if self._awaited in ("body", "streamed") and not self._drop_current_request():
            self._cycle_transport.close()
        elif self._running_cycle and not (
            self._running_cycle.response_complete or self._running_cycle.disconnected
        ):
            self._pending_refusal = error
        else:
            self._send_refusal(error)

    def _drop_current_request(self) -> bool:
        """Abandons the request whose body is being read; returns whether it can still be answered,
        which it cannot once its response has begun."""
        cycle = self.cycle
        if self.pipeline and self.pipeline[0][0] is cycle:
            self.pipeline.popleft()
        self._abandon(cycle)
        return not cycle.response_started

    def _send_refusal(self, error: RequestError) -> None:
        """Writes the error as a reply and closes the connection in stages; does nothing if it is
        closing."""
        if self.transport.is_closing():
            return
        reply = problem_reply(error)
        self.transport.writelines((_head(reply, _CONNECTION_CLOSE), reply.body))
        self._close_after_discarding()

    def _close_reserved(self) -> None:
        """Called when the time of a connection above the limit is up: closes it, with an error if
        it sent no request."""
        if not (self._refused or self._running_cycle):
            self._refuse(self._too_many_connections())
        self._close()

    # --- answering ----------------------------------------------------------------------------

    def _send_whole_reply(self, scope: Scope, reply: Reply) -> bool:
        """Writes a complete reply at once, where uvicorn's cycle takes two messages: two writes
        woke the client twice, and its checks of the headers took as long as a write.

        Returns True if the reply is done, which includes that the client has disconnected; False
        if the caller must send it through the cycle: another request was received meanwhile, the
        response has begun, writing is paused, or a header needs uvicorn's handling.
        """
        cycle = self.cycle
        if scope is not self.scope or cycle.response_started or self.flow.write_paused:
            return False
        for name, value in reply.headers:
            if name == b"connection" or HEADER_VALUE_RE.search(value):
                return False
        if cycle.disconnected or self.transport.is_closing():
            cycle.disconnected = True
            return True
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        others = self.server_state.default_headers
        if not cycle.keep_alive:
            others = [*others, _CONNECTION_CLOSE]
        body = b"" if scope["method"] == "HEAD" else reply.body
        self.transport.writelines((_head(reply, *others), body))
        cycle.message_event.set()
        if not cycle.keep_alive:
            self._cycle_transport.close()
        cycle.on_response()
        return True

    def shutdown(self) -> None:
        """Called when the server stops. Open requests are still answered; a body that is still
        being received is refused after a second, since it would otherwise be cut off at the end of
        the grace period, with a traceback for each."""
        super().shutdown()
        if self._awaited == "body":
            self.loop.call_later(_LAST_BYTES_SECONDS, self._stop_reading)

    def _stop_reading(self) -> None:
        """Refuses the request whose body is still being received, if there is one."""
        if self._awaited == "body" and not (self._refused or self.transport.is_closing()):
            self._refuse(
                ServerStopping(
                    "The server is stopping, and did not read all of this request. Send it again.",
                    retry_after_seconds=1,
                )
            )

    # --- closing ------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        """Called after each answer: starts the next request, waits for one, or closes."""
        if self._cycle_transport.closed:
            # RFC 9112, 9.6: no request is processed after the answer that said `close`. The client
            # gets no other answer, and must send again what it had sent ahead.
            self.pipeline.clear()
        self.server_state.total_requests += 1
        if not self.transport.is_closing():
            self._continue()
        if self._awaited == "streamed":
            self._cycle_transport.close()
        if self._cycle_transport.closed:
            self._idle_since = None
        if self.transport.is_closing():
            self._abort_if_unsent()

    def _continue(self) -> None:
        """After an answer, starts the next request or waits idle for one."""
        self.flow.resume_reading()
        if self.pipeline:
            self._running_cycle, app = self.pipeline.pop()
            self._start_asgi_task(self._running_cycle, app)
            if self.pipeline:
                # uvicorn would continue reading, and keep in memory all that a client sends ahead.
                self.flow.pause_reading()
        elif self._pending_refusal:
            self._send_refusal(self._pending_refusal)
        else:
            self._idle_since = self.loop.time()
            if self._idle_timer is None:
                self._idle_timer = self.loop.call_later(
                    self.timeout_keep_alive, self._close_if_idle
                )

    def _close_if_idle(self) -> None:
        """Closes the connection if it was idle for the keep-alive time. The timer is not set and
        cancelled for each request: if it ends during one, the next idle time sets it, and if it
        ends too early in an idle time, it is set for the rest."""
        self._idle_timer = None
        if self._idle_since is None:
            return
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self._idle_timer = self.loop.call_later(left, self._close_if_idle)
        else:
            self._close()

    def _end_after_answer(self) -> None:
        """Closes after an answer, in stages (RFC 9112, 9.6), since the client may still be sending
        this request's body or another request. What it sends is dropped. Does nothing if already
        closing."""
        if not self.transport.is_closing():
            self._refused = True
            self._disarm()
            self._close_after_discarding()

    def _close_after_discarding(self) -> None:
        """Ends our side now, and closes after reading and dropping incoming bytes for 2 s: a socket
        closed with unread bytes is reset, and the client may lose the answer with it. Returns at
        once."""
        self.flow.resume_reading()
        self.transport.write_eof()
        self.loop.call_later(_DISCARD_SECONDS, self._close)

    def _close(self) -> None:
        """Closes once everything written is sent, for which the client has as long as for a
        body."""
        self.transport.close()
        self._abort_if_unsent()

    def _abort_if_unsent(self) -> None:
        """Bounds how long a closed transport waits for its client to read its answer: as long as a
        body may take."""
        if self.transport.get_write_buffer_size():
            self.loop.call_later(self._limits.body_seconds, self.transport.abort)


class _CycleTransport:
    """The transport as uvicorn's cycles see it: a cycle may close it while the client still sends,
    and a cycle whose client has disconnected may still write."""

    def __init__(self, transport: asyncio.Transport, end: Callable[[], None]) -> None:
        """`end` is called at the first `close`."""
        self._write = transport.write
        self._end_after_answer = end
        self.is_closing = transport.is_closing
        self.closed = False

    def write(self, data: bytes) -> None:
        """Writes the data; drops it after `close`, or once the connection is closing."""
        if not (self.closed or self.is_closing()):
            self._write(data)

    def close(self) -> None:
        """Ends the connection after the answer; later calls do nothing."""
        if not self.closed:
            self.closed = True
            self._end_after_answer()


def _head(reply: Reply, *others: Header) -> bytes:
    """The status line and all headers, with the empty line that ends them; `others` come first."""
    lines = [b"%b: %b\r\n" % header for header in (*others, *header_block(reply))]
    return b"%b%b\r\n" % (STATUS_LINE[reply.status], b"".join(lines))
