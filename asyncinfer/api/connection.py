"""One HTTP connection, closed when it is slow, silent or too wordy."""

import asyncio
from collections.abc import Callable
from typing import Any, Final, Literal

from msgspec import Struct
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import (
    HEADER_VALUE_RE,
    STATUS_LINE,
    HttpToolsProtocol,
)

from asyncinfer.api.exchange import ANSWER_WHOLE, KEEP_BODY_OPEN, Header, Reply, header_block
from asyncinfer.api.problems import problem_reply
from asyncinfer.errors import (
    HeadersTooLarge,
    MalformedRequest,
    RequestError,
    RequestTimeout,
    TooManyConnections,
)


class Limits(Struct, frozen=True, kw_only=True):
    """What one connection may take; the body's time is for all of it."""

    header_seconds: float
    body_seconds: float
    header_bytes: int
    connections: int


_DISCARD_SECONDS: Final = 2.0
_CLOSES: Final = (b"connection", b"close")

Awaited = Literal["head", "body", "streamed", "nothing"]
"""`streamed`: a body whose handler reads it for as long as it comes, and has its own deadline."""


class Connection(HttpToolsProtocol):
    """uvicorn's, which has no deadline for what it reads and no bound on headers."""

    def __init__(self, limits: Limits, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self.app_state = {
            **self.app_state,
            KEEP_BODY_OPEN: self._keep_body_open,
            ANSWER_WHOLE: self._answer_whole,
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
        self._refusal: RequestError | None = None
        """What to say instead, when a callback of ours made the parser give up."""
        self._refused = False

    # --- what the transport says --------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._answers = _Answers(transport, self._end)
        if len(self.connections) > self._limits.connections:
            self._refuse(
                TooManyConnections(
                    f"This server holds {self._limits.connections} connections. Retry later, or "
                    "close those you do not use."
                )
            )
            self._close()
            return
        self._awaited = "head"
        self._time()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._chunk_bytes = len(data)
        if self._awaited == "head" and self._begun:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._refused or self.transport.is_closing():
            return
        if self._awaited == "head" and self._head_bytes > self._limits.header_bytes:
            self._refuse(self._headers_too_large())
        elif self._awaited == "nothing" and self._idle():
            # Line ends between requests: uvicorn took them for a request and stopped its clock.
            self._awaited = "head"
        self._time()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self.app_state = {}
        super().connection_lost(exc)

    # --- what the parser says -----------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._awaited, self._begun, self._head_bytes = "head", True, 0

    def on_headers_complete(self) -> None:
        if self._head_bytes + self._chunk_bytes > self._limits.header_bytes:
            self._check_head()
        super().on_headers_complete()
        self.cycle.transport = self._answers  # type: ignore[assignment]
        self._awaited = "body"

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._awaited, self._begun = "nothing", False
        self._disarm()

    def send_400_response(self, msg: str) -> None:
        """Where uvicorn ends when the parser, or a callback of ours in it, gives up."""
        self._refuse(self._refusal or MalformedRequest("The bytes sent are no HTTP/1.1 request."))

    def _unsupported_upgrade_warning(self) -> None:
        """An upgrade is only an offer; the request is answered as it is."""

    # --- limits -------------------------------------------------------------------------------

    def _check_head(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._limits.header_bytes:
            self._refusal = self._headers_too_large()
            raise self._refusal

    def _headers_too_large(self) -> HeadersTooLarge:
        return HeadersTooLarge(f"The headers may have {self._limits.header_bytes} bytes in all.")

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

    def _answer_under_way(self) -> bool:
        """Whether bytes written now would land in, or be taken for, another answer."""
        if self._awaited == "body":
            return bool(self.pipeline) or self.cycle.response_started
        return not self._idle()

    def _refuse(self, error: RequestError) -> None:
        """Answers in the application's place and closes; the application sees a client leave."""
        self._refused = True
        self._disarm()
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self._answer_under_way():
            self._close()
            return
        reply = problem_reply(error)
        self.transport.writelines((_head(reply, _CLOSES), reply.body))
        self._close_gently()

    # --- answering ----------------------------------------------------------------------------

    def _answer_whole(self, scope: Scope, reply: Reply) -> bool:
        """What uvicorn's cycle does in two messages, in one write: two of them woke the client
        twice, and all that is checked of any application's headers took as long as a write."""
        cycle = self.cycle
        if scope is not self.scope or cycle.response_started or self.flow.write_paused:
            return False
        if any(
            name == b"connection" or HEADER_VALUE_RE.search(value) for name, value in reply.headers
        ):
            return False
        if cycle.disconnected:
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
            self._end()
        cycle.on_response()
        return True

    # --- closing ------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._awaited == "streamed":
            self._end()
        if self.transport.is_closing():
            self._abort_later()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def _end(self) -> None:
        """Closes after an answer; one whose request still comes may have been given early."""
        if self._awaited != "streamed":
            self._close()
        elif not (self._refused or self.transport.is_closing()):
            self._refused = True
            self._disarm()
            self._close_gently()

    def _close_gently(self) -> None:
        """A socket closed with unread bytes is reset, and the client may lose the answer with it:
        for a moment they are taken, and dropped."""
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
    """The transport as uvicorn's cycles see it; one that closes it may still be sent a request."""

    def __init__(self, transport: asyncio.Transport, end: Callable[[], None]) -> None:
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = end


def _head(reply: Reply, *others: Header) -> bytes:
    lines = [b"%b: %b\r\n" % header for header in (*others, *header_block(reply))]
    return b"".join((STATUS_LINE[reply.status], *lines, b"\r\n"))
