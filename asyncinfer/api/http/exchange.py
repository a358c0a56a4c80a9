"""One request and its answer on an HTTP connection, as the application sees them (ASGI)."""

import asyncio
import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Final, Protocol

from starlette.types import ASGIApp, Message, Scope

from asyncinfer.api.http.messages import REQUEST_ID, Header, Reply, header_block
from asyncinfer.api.http.request_id import request_id_header, request_id_of

CONNECTION_CLOSE: Final = (b"connection", b"close")

STATUS_LINES: Final = {
    status.value: b"HTTP/1.1 %d %b\r\n" % (status.value, status.phrase.encode())
    for status in HTTPStatus
}

_CHUNKED: Final = (b"transfer-encoding", b"chunked")
_CONTROL_CHARACTER: Final = re.compile(b"[\x00-\x08\x0a-\x1f\x7f]")


class Channel(Protocol):
    """What an exchange needs of its connection."""

    is_writing_paused: bool
    """Whether the client has not read enough of what was written."""
    writable: asyncio.Event
    """Set while writing is not paused."""

    @property
    def default_headers(self) -> Sequence[Header]:
        """Headers of every answer."""

    def write(self, *parts: bytes) -> None:
        """Writes the parts; drops them once the connection is closing."""

    def resume_reading(self) -> None:
        """Continues to read if reading was paused."""

    def answered(self, exchange: "Exchange") -> None:
        """Called when the exchange's answer is complete."""

    def end(self) -> None:
        """Closes the connection once everything written is sent."""


class Exchange:
    """A request whose head was received, its body as far as it came, and its answer."""

    __slots__ = (
        "_channel",
        "_chunks",
        "_is_chunked",
        "_unsent_head",
        "buffered_bytes",
        "changed",
        "expects_continue",
        "is_abandoned",
        "is_answered",
        "is_begun",
        "is_gone",
        "is_read",
        "is_received",
        "keep_alive",
        "scope",
    )

    def __init__(
        self, channel: Channel, scope: Scope, *, expects_continue: bool, keep_alive: bool
    ) -> None:
        self.scope = scope
        scope[REQUEST_ID] = request_id_of(scope["headers"])
        self.expects_continue = expects_continue
        """Whether the client still waits for `100 Continue`."""
        self.keep_alive = keep_alive
        """Whether the connection takes another request after the answer."""
        self.buffered_bytes = 0
        """Bytes of the body that the application has not received yet."""
        self.is_received = False
        """Whether the whole body was received."""
        self.is_read = False
        """Whether the application has received the whole body too."""
        self.is_begun = False
        """Whether the answer has begun."""
        self.is_answered = False
        self.is_abandoned = False
        """Whether nobody waits for the answer any more; what is sent is dropped."""
        self.is_gone = False
        """Whether the application sees a client that has disconnected, and is still answered."""
        self.changed = asyncio.Event()
        """Wakes `receive`."""
        self._channel = channel
        self._chunks: list[bytes] = []
        self._is_chunked = False
        self._unsent_head = b""

    async def run(self, app: ASGIApp) -> None:
        """Runs the application. Closes the connection if it leaves its answer incomplete."""
        try:
            await app(self.scope, self.receive, self.send)
        finally:
            if not (self.is_answered or self.is_abandoned):
                self._channel.end()

    def add_body(self, chunk: bytes) -> None:
        """Adds bytes to the body for the application to receive."""
        self._chunks.append(chunk)
        self.buffered_bytes += len(chunk)
        self.changed.set()

    def take_body(self) -> bytes:
        """Removes and returns what was received of the body."""
        body = b"".join(self._chunks)
        self._chunks.clear()
        self.buffered_bytes = 0
        return body

    def end_body(self) -> None:
        """Notes that the body is complete."""
        self.is_received = True
        # `100 Continue` would come too late now (RFC 9110, 10.1.1).
        self.expects_continue = False
        self.changed.set()

    def abandon(self) -> None:
        """Makes the application see that the client has disconnected. Only wakes one whose answer
        is complete."""
        if not self.is_answered:
            self.is_abandoned = True
        self.changed.set()

    @property
    def is_open(self) -> bool:
        """Whether the request came whole, and its answer is not complete."""
        return self.is_received and not (self.is_answered or self.is_abandoned)

    def take_for_gone(self) -> None:
        """Makes the application see that the client has disconnected, once it has read the body;
        its answer is sent all the same."""
        self.is_gone = True
        self.changed.set()

    async def receive(self) -> Message:
        """Waits for bytes of the body, or for the client to disconnect."""
        if self.expects_continue:
            self.expects_continue = False
            self._channel.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not self._is_over:
            self._channel.resume_reading()
            await self.changed.wait()
            self.changed.clear()
        if self._is_over:
            return {"type": "http.disconnect"}
        self.is_read = self.is_received
        return {
            "type": "http.request",
            "body": self.take_body(),
            "more_body": not self.is_received,
        }

    @property
    def _is_over(self) -> bool:
        """Whether the application is told that the client has disconnected."""
        return self.is_abandoned or self.is_answered or (self.is_gone and self.is_read)

    def reply(self, reply: Reply) -> None:
        """Writes a whole answer at once, also while writing is paused; drops it if the exchange is
        abandoned. Raises as `send` does."""
        if not self.is_abandoned:
            self._begin(reply.status, header_block(reply))
            self._continue(reply.body, more=False)

    async def send(self, message: Message) -> None:
        """Writes a part of the answer, after the client has read enough of what was written before;
        drops it if the exchange is abandoned.

        Raises ValueError for a header that would end its line, before anything is written.
        """
        if self._channel.is_writing_paused and not self.is_abandoned:
            await self._channel.writable.wait()
        if self.is_abandoned:
            return
        if message["type"] == "http.response.start":
            self._begin(message["status"], message["headers"])
        else:
            self._continue(message["body"], more=message.get("more_body", False))

    def _begin(self, status: int, headers: Sequence[Header]) -> None:
        """Begins the answer. The head of one of known length is sent with its first bytes: two
        writes would wake the client twice."""
        assert not self.is_begun, "an answer begins once"
        if CONNECTION_CLOSE in headers:
            self.keep_alive = False
        elif not self.keep_alive:
            headers = [*headers, CONNECTION_CLOSE]
        has_length = any(name == b"content-length" for name, _ in headers)
        if not has_length and self._may_be_chunked(status):
            headers = [*headers, _CHUNKED]
            self._is_chunked = True
        request_id = request_id_header(self.scope[REQUEST_ID])
        head = head_of(status, (*self._channel.default_headers, request_id, *headers))
        self.is_begun = True
        self.expects_continue = False
        if has_length:
            self._unsent_head = head
        else:
            self._channel.write(head)

    def _may_be_chunked(self, status: int) -> bool:
        """Whether the answer has a body that a client can read in chunks, which HTTP/1.0 has not:
        there the end of the connection ends the body."""
        scope = self.scope
        return (
            status != HTTPStatus.NO_CONTENT
            and scope["method"] != "HEAD"
            and scope["http_version"] != "1.0"
        )

    def _continue(self, body: bytes, *, more: bool) -> None:
        """Writes bytes of the answer's body, and its end unless `more` follows."""
        assert self.is_begun, "an answer begins with its head"
        assert not self.is_answered, "an answer ends once"
        if self._is_chunked:
            chunk = (b"%x\r\n" % len(body), body, b"\r\n") if body else ()
            self._channel.write(*chunk, b"" if more else b"0\r\n\r\n")
        else:
            self._channel.write(self._unsent_head, body)
            self._unsent_head = b""
        if not more:
            self.is_answered = True
            self.changed.set()
            self._channel.answered(self)


def head_of(status: int, headers: Sequence[Header]) -> bytes:
    """The status line and the headers, with the empty line that ends them. Raises ValueError for a
    value that would end its line."""
    lines = [STATUS_LINES[status]]
    for header in headers:
        if _CONTROL_CHARACTER.search(header[1]):
            raise ValueError(f"a control character in the header {header[0].decode()}")
        lines.append(b"%b: %b\r\n" % header)
    lines.append(b"\r\n")
    return b"".join(lines)
