"""One HTTP connection, closed when it is slow, silent or too wordy."""

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


class Limits(Struct, frozen=True, kw_only=True):
    """What one connection may take; the body's time is for all of it."""

    header_seconds: float
    body_seconds: float
    header_bytes: int
    connections: int


RESERVED_CONNECTIONS: Final = 16
"""Taken above the limit, for probes: a kubelet restarts a pod that does not answer them, and it
does so just when the pod is busiest."""

_RESERVED_SECONDS: Final = 2.0

_MOST_PIPELINED: Final = 100
"""Requests that wait on one connection; a client that sends more sends the rest again."""

_DISCARD_SECONDS: Final = 2.0
_LAST_BYTES_SECONDS: Final = 1.0
"""How long a body may still come while the server stops."""

_PROBED: Final = frozenset(path.encode() for path in HEALTH_PATHS)

_HOP_BY_HOP: Final = frozenset({b"connection", b"proxy-connection"})
"""What these fields say in a trailer the parser does: it takes no further request, without a
word."""

_CLOSES: Final = (b"connection", b"close")
_NOT_HTTP: Final = "The bytes sent are no HTTP/1.1 request."

Awaited = Literal["head", "body", "streamed", "nothing"]
"""`streamed`: a body whose handler reads it for as long as it comes, and has its own deadline."""


_log = logging.getLogger(__name__)


class Connection(HttpToolsProtocol):
    """uvicorn's, which has no deadline for what it reads, no bound on headers and trailers, takes
    trailers for headers, and loses the body of a request that offers an upgrade."""

    def __init__(self, limits: Limits, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self.app_state = {
            **self.app_state,
            ABORT_CONNECTION: self._break_off,
            KEEP_BODY_OPEN: self._keep_body_open,
            SEND_WHOLE_REPLY: self._answer_whole,
        }
        self._limits = limits
        self._awaited: Awaited = "nothing"
        self._timed: Awaited = "nothing"
        """What the deadline is for."""
        self._deadline: asyncio.TimerHandle | None = None
        self._begun = False
        """Whether a request has begun and is not complete."""
        self._chunk_bytes = 0
        self._head_bytes = 0
        """Of an unfinished head, without the chunk it began in."""
        self._begun_bytes = 0
        """Of the chunk that the head began in: other requests may be in it too."""
        self._trailer_bytes = 0
        self._bodiless_bytes = 0
        """That came in whole chunks since the last byte of the body: of trailers or chunk
        extensions."""
        self._framed = False
        """Whether the head has a field that `expects_continue` reads."""
        self._answering: RequestResponseCycle | None = None
        """The cycle that runs, or ran last; `cycle` is the one whose request came last."""
        self._last = False
        """Whether no request is taken after the one that came last."""
        self._reserved: asyncio.TimerHandle | None = None
        """On a connection above the limit, what ends it."""
        self._rests_since: float | None = None
        """When the last answer was given, by the loop's clock; None while there is more to do."""
        self._rest_timer: asyncio.TimerHandle | None = None
        self._refusal: RequestError | None = None
        """What to say instead, when a callback of ours made the parser give up."""
        self._refused = False
        self._owed: RequestError | None = None
        """A refusal to be sent once the requests before it are answered."""

    # --- what the transport says --------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._answers = _Answers(transport, self._end)
        held = len(self.connections)
        if held > self._limits.connections + RESERVED_CONNECTIONS:
            self._refuse(self._too_many_connections())
            self._close()
            return
        if held > self._limits.connections:
            self._reserved = self.loop.call_later(_RESERVED_SECONDS, self._end_reserved)
        self._awaited = "head"
        self._time()

    def data_received(self, data: bytes) -> None:
        self._rests_since = None
        if self._refused or (self._last and not self._begun):
            return
        self._chunk_bytes = len(data)
        if self._awaited == "head" and self._begun:
            self._head_bytes += len(data)
        elif self._awaited in ("body", "streamed"):
            self._bodiless_bytes += len(data)
        self._feed(data)
        if self._refused or self.transport.is_closing():
            return
        if self._awaited == "head" and self._head_bytes > self._limits.header_bytes:
            self._refuse(self._headers_too_large())
        elif self._begun and self._bodiless_bytes > self._limits.header_bytes:
            self._refuse(self._trailers_too_large())
        elif self._awaited == "nothing" and self._idle():
            # Line ends between requests: uvicorn took them for a request and stopped its clock.
            self._awaited = "head"
        self._time()

    def _feed(self, data: bytes) -> None:
        rest = data
        while rest:
            try:
                self.parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as offer:
                # RFC 9110, 7.8: a server may ignore an offer to upgrade, and this one does. The
                # parser leaves out the body then, so another one is shown the head without it.
                rest = self._head_without_offer() + rest[offer.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
            except httptools.HttpParserError as error:
                self._refuse_unreadable(error)
                return

    def _refuse_unreadable(self, error: httptools.HttpParserError) -> None:
        if self._last and not self._begun:
            return
        _log.debug("Refused what %s sent: %r", self.client, self._refusal or error)
        self._refuse(self._refusal or MalformedRequest(_NOT_HTTP))

    def _head_without_offer(self) -> bytes:
        method: bytes = self.parser.get_method()
        version = self.parser.get_http_version().encode()
        lines = [
            b"%b: %b\r\n" % (name, value) for name, value in self.headers if name != b"upgrade"
        ]
        return b"".join((method, b" ", self.url, b" HTTP/", version, b"\r\n", *lines, b"\r\n"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        for timer in (self._reserved, self._rest_timer):
            if timer:
                timer.cancel()
        # uvicorn tells the cycle whose request came last; one that runs before it would write on.
        for cycle in self._cycles():
            self._abandon(cycle)
        self.pipeline.clear()
        self.app_state = {}
        super().connection_lost(exc)

    def _cycles(self) -> Iterator[RequestResponseCycle]:
        if self._answering is not None:
            yield self._answering
        for cycle, _ in self.pipeline:
            yield cycle

    def _break_off(self) -> None:
        for cycle in self._cycles():
            self._abandon(cycle)
        self.transport.abort()

    def _abandon(self, cycle: RequestResponseCycle) -> None:
        """Lets its application see that the client has left."""
        if not cycle.response_complete:
            cycle.disconnected = True
        cycle.message_event.set()

    # --- what the parser says -----------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._last or self._answers.closed:
            raise MalformedRequest("Nothing is taken after the last request.")
        super().on_message_begin()
        self._awaited, self._begun, self._framed = "head", True, False
        self._begun_bytes = self._chunk_bytes
        self._head_bytes = self._trailer_bytes = self._bodiless_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._awaited != "head":
            self._drop_trailer(name, value)
            return
        name = name.lower()
        if name in FRAMING:
            self._framed = True
        self.headers.append((name, value.rstrip(b" \t")))

    def _drop_trailer(self, name: bytes, value: bytes) -> None:
        """RFC 9110, 6.5.1: a trailer counts as a header only where its definition says so, and none
        of those that are read here does. The parser acts on some all the same."""
        if name.lower() in _HOP_BY_HOP:
            self._give_up(MalformedRequest(f"{name.decode('latin-1')} may not be a trailer."))
        self._trailer_bytes += len(name) + len(value) + 4
        if self._trailer_bytes > self._limits.header_bytes:
            self._give_up(self._trailers_too_large())

    def on_headers_complete(self) -> None:
        version = self.parser.get_http_version()
        try:
            self._check_head(version)
        except RequestError as error:
            self._give_up(error)
        if self.parser.should_upgrade():
            return
        self._begin_cycle(version)
        self._awaited = "body"

    def _check_head(self, version: str) -> None:
        if self._begun_bytes + self._head_bytes > self._limits.header_bytes:
            self._check_size()
        if version != "1.1":
            check_version(version)
        if self.parser.should_upgrade():
            self._check_offer()
            return
        if self._framed:
            self.expect_100_continue = expects_continue(self.headers, version)
        if not is_path(self.url):
            self._read_target(version)
        if self._reserved and self.url.partition(b"?")[0] not in _PROBED:
            raise self._too_many_connections()

    def _check_size(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._limits.header_bytes:
            raise self._headers_too_large()

    def _check_offer(self) -> None:
        if self.parser.get_method() == b"CONNECT":
            raise MalformedRequest("CONNECT is for proxies, and this is none.")

    def _read_target(self, version: str) -> None:
        authority, self.url = split_target(self.url, self.parser.get_method())
        if authority is not None:
            self.headers = list(with_host(self.headers, authority, version))

    def _begin_cycle(self, version: str) -> None:
        """uvicorn's `on_headers_complete`, with one copy of the head that nothing changes later,
        and without a second look at what is known here."""
        self._describe(version)
        ahead = len(self.pipeline)
        keep_alive = version == "1.1" and self.parser.should_keep_alive()
        self._last = not keep_alive or ahead >= _MOST_PIPELINED or self._reserved is not None
        before, self.cycle = (
            self.cycle,
            RequestResponseCycle(
                scope=self.scope,
                transport=self._answers,  # type: ignore[arg-type]
                flow=self.flow,
                logger=self.logger,
                access_logger=self.access_logger,
                access_log=self.access_log,
                default_headers=self.server_state.default_headers,
                message_event=asyncio.Event(),
                expect_100_continue=self.expect_100_continue,
                keep_alive=not self._last,
                on_response=self.on_response_complete,
            ),
        )
        if before is None or before.response_complete:
            self._answering = self.cycle
            self._start_asgi_task(self.cycle, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))

    def _describe(self, version: str) -> None:
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
        self._bodiless_bytes = 0
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.body += body
            if len(cycle.body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            cycle.message_event.set()

    def _give_up(self, error: RequestError) -> NoReturn:
        """Makes the parser stop where it is."""
        self._refusal = error
        raise error

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        # All of it has come, so `100 Continue` would come too late (RFC 9110, 10.1.1).
        self.cycle.waiting_for_100_continue = False
        self._awaited, self._begun = "nothing", False
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

    def _time(self) -> None:
        """Sets the deadline of what is awaited, unless it runs already."""
        if self._awaited == self._timed:
            return
        self._disarm()
        if self._awaited in ("nothing", "streamed") or self.transport.is_closing():
            return
        self._timed = self._awaited
        self._deadline = self.loop.call_later(self._seconds(), self._too_slow)

    def _keep_body_open(self, scope: Scope) -> None:
        """Lifts the deadline, if this is still the request that is being read."""
        if scope is self.scope and self._awaited == "body":
            self._disarm()
            self._awaited = "streamed"

    def _seconds(self) -> float:
        if self._awaited == "head":
            return self._limits.header_seconds
        return self._limits.body_seconds

    def _disarm(self) -> None:
        self._timed = "nothing"
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._disarm()
        if self.pipeline:
            # We have stopped reading ourselves, until earlier requests are answered.
            self._time()
        elif not self._begun:
            self._close()
        else:
            self._refuse(
                RequestTimeout(
                    f"The request's {self._awaited} was not there within {self._seconds():g} s."
                )
            )

    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _refuse(self, error: RequestError) -> None:
        """Answers in the application's place and closes; the application sees a client leave."""
        self._refused = True
        self._disarm()
        if self._awaited in ("body", "streamed") and not self._drop_current():
            self._answers.close()
        elif self._answering and not (
            self._answering.response_complete or self._answering.disconnected
        ):
            self._owed = error
        else:
            self._send_refusal(error)

    def _drop_current(self) -> bool:
        """Gives up the request whose body is being read; returns whether it can be answered."""
        cycle = self.cycle
        if self.pipeline and self.pipeline[0][0] is cycle:
            self.pipeline.popleft()
        self._abandon(cycle)
        return not cycle.response_started

    def _send_refusal(self, error: RequestError) -> None:
        if self.transport.is_closing():
            return
        reply = problem_reply(error)
        self.transport.writelines((_head(reply, _CLOSES), reply.body))
        self._close_gently()

    def _end_reserved(self) -> None:
        if not (self._refused or self._answering):
            self._refuse(self._too_many_connections())
        self._close()

    # --- answering ----------------------------------------------------------------------------

    def _answer_whole(self, scope: Scope, reply: Reply) -> bool:
        """What uvicorn's cycle does in two messages, in one write: two of them woke the client
        twice, and all that is checked of any application's headers took as long as a write."""
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
            others = [*others, _CLOSES]
        body = b"" if scope["method"] == "HEAD" else reply.body
        self.transport.writelines((_head(reply, *others), body))
        cycle.message_event.set()
        if not cycle.keep_alive:
            self._answers.close()
        cycle.on_response()
        return True

    def shutdown(self) -> None:
        """Called when the server stops: what is under way is answered. A body that goes on coming
        would be cut off at the end of the grace, with a traceback for each."""
        super().shutdown()
        if self._awaited == "body":
            self.loop.call_later(_LAST_BYTES_SECONDS, self._stop_reading)

    def _stop_reading(self) -> None:
        if self._awaited == "body" and not (self._refused or self.transport.is_closing()):
            self._refuse(
                ServerStopping(
                    "The server stops, and has not read this request to its end. Send it again.",
                    retry_after_seconds=1,
                )
            )

    # --- closing ------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        if self._answers.closed:
            # RFC 9112, 9.6: nothing is done after the answer that said `close`. Its client, which
            # will hear of no other, sends again what it had sent ahead.
            self.pipeline.clear()
        self.server_state.total_requests += 1
        if not self.transport.is_closing():
            self._go_on()
        if self._awaited == "streamed":
            self._answers.close()
        if self._answers.closed:
            self._rests_since = None
        if self.transport.is_closing():
            self._abort_later()

    def _go_on(self) -> None:
        """After an answer: to the next request, or to rest until one comes."""
        self.flow.resume_reading()
        if self.pipeline:
            self._answering, app = self.pipeline.pop()
            self._start_asgi_task(self._answering, app)
            if self.pipeline:
                # uvicorn goes on reading, and would keep all that a client sends ahead.
                self.flow.pause_reading()
        elif self._owed:
            self._send_refusal(self._owed)
        else:
            self._rests_since = self.loop.time()
            if self._rest_timer is None:
                self._rest_timer = self.loop.call_later(self.timeout_keep_alive, self._rested)

    def _rested(self) -> None:
        """Closes a connection that nobody uses. One timer goes on while requests come and go,
        instead of one that is set and unset for each."""
        self._rest_timer = None
        if self._rests_since is None:
            return
        left = self._rests_since + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self._rest_timer = self.loop.call_later(left, self._rested)
        else:
            self._close()

    def _end(self) -> None:
        """Closes after an answer, in stages (RFC 9112, 9.6): it may have been given early, or the
        client may have sent another request."""
        if not self.transport.is_closing():
            self._refused = True
            self._disarm()
            self._close_gently()

    def _close_gently(self) -> None:
        """A socket closed with unread bytes is reset, and the client may lose the answer with it:
        for a moment they are taken, and dropped."""
        self.flow.resume_reading()
        self.transport.write_eof()
        self.loop.call_later(_DISCARD_SECONDS, self._close)

    def _close(self) -> None:
        self.transport.close()
        self._abort_later()

    def _abort_later(self) -> None:
        """A closed transport waits for its client to take the rest of the answer: not for ever."""
        if self.transport.get_write_buffer_size():
            self.loop.call_later(self._limits.body_seconds, self.transport.abort)


class _Answers:
    """The transport as uvicorn's cycles see it; one that closes it may still be sent a request, and
    one whose client has left may still write."""

    def __init__(self, transport: asyncio.Transport, end: Callable[[], None]) -> None:
        self._write = transport.write
        self._end = end
        self.is_closing = transport.is_closing
        self.closed = False

    def write(self, data: bytes) -> None:
        if not (self.closed or self.is_closing()):
            self._write(data)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._end()


def _head(reply: Reply, *others: Header) -> bytes:
    lines = [b"%b: %b\r\n" % header for header in (*others, *header_block(reply))]
    return b"%b%b\r\n" % (STATUS_LINE[reply.status], b"".join(lines))
