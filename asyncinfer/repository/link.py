"""Connections to Redis on which calls follow each other, none waiting for the reply before it."""

import asyncio
import contextlib
import fcntl
import struct
import termios
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, cast

import hiredis
import redis.exceptions as redis_errors
from hiredis import pack_command
from redis.asyncio import Redis

from asyncinfer.repository import wire
from asyncinfer.repository.redis_errors import NO_REPLY_ERRORS, error_of_reply
from asyncinfer.repository.wire import ClientLink

Command = tuple[Any, ...]
BeforeSend = Callable[[], None]
"""Is called just before a command may be sent; what it raises ends the call."""

_CONNECT_SECONDS: Final = 3.0
"""A few round trips, which callers do not wait for: their time is that of a call."""
_MAX_SECONDS: Final = 30.0
"""How long the reply to one call may take to arrive."""
_LOOK_SECONDS: Final = 0.1
_MOVED_BYTES: Final = 1024
"""So many bytes are a sign of life. A server that drips a byte now and then is away."""
_LANES: Final = 4
_OWN_PIECE_BYTES: Final = 16 << 10
"""A value above this is written by itself. Packed with the others it would be copied, and an image
of 588 KiB would be in memory once more."""

Pack = Callable[[Command], Sequence[bytes]]
"""Puts a command into pieces that are written one after another."""


def pack_whole(command: Command) -> Sequence[bytes]:
    """The command as one piece: the fastest way for a small one."""
    return (pack_command(command),)


def pack_in_pieces(command: Command) -> Sequence[bytes]:
    """The command (as RESP arrays are written) with each large value as a piece of its own, which
    is the value itself."""
    pieces: list[bytes] = []
    small = [b"*%d\r\n" % len(command)]
    for value in command:
        encoded = value if isinstance(value, bytes) else str(value).encode()
        small.append(b"$%d\r\n" % len(encoded))
        if len(encoded) > _OWN_PIECE_BYTES:
            pieces += b"".join(small), encoded
            small = [b"\r\n"]
        else:
            small += encoded, b"\r\n"
    return [*pieces, b"".join(small)]


class Link:
    """One connection to Redis, opened by the first call, and again by the next one after it was
    lost. redis-py opens it, which knows sentinels, TLS and passwords."""

    def __init__(
        self,
        client: Redis,
        on_connected: Callable[[], None] = lambda: None,
        pack: Pack = pack_whole,
    ) -> None:
        """`on_connected` is called each time that it has connected."""
        self._pack = pack
        self._client = client
        self._on_connected = on_connected
        self._channel: _Channel | None = None
        self._opening: asyncio.Task[_Channel] | None = None
        self._is_closed = False

    async def ask(
        self, command: Command, silence_seconds: float, before_send: BeforeSend = lambda: None
    ) -> Any:
        """Sends a command and returns its reply as Redis sent it. Without a connection it is not
        sent.

        Raises TimeoutError if no byte moves for `silence_seconds`, or the reply takes over 30 s;
        also redis-py's ConnectionError and ResponseError, and OSError. Cancelling it neither stops
        the command nor disturbs others.
        """
        channel = await self._open(silence_seconds)
        before_send()
        return await channel.send(self._pack(command), silence_seconds)

    async def ask_together(self, commands: Sequence[Command], silence_seconds: float) -> list[Any]:
        """Sends commands as one transaction; returns their replies. Raises as `ask` does, the first
        error of a command among them."""
        channel = await self._open(silence_seconds)
        packed = [pack_whole(command) for command in (("MULTI",), *commands, ("EXEC",))]
        calls = [channel.send(pieces, silence_seconds) for pieces in packed]
        *queued, replies = await asyncio.gather(*calls, return_exceptions=True)
        for reply in (*queued, replies, *(replies if isinstance(replies, list) else ())):
            if isinstance(reply, BaseException):
                raise reply
        return cast(list[Any], replies)

    @property
    def moved_at(self) -> float:
        """When a byte last came, or large ones went, on the clock of the event loop."""
        return self._channel.moved_at if self._channel else 0.0

    async def disconnect(self) -> None:
        """Ends the calls under way with redis-py's ConnectionError; the next call connects anew."""
        if self._channel:
            self._channel.end(redis_errors.ConnectionError("the connection was closed"))

    async def close(self) -> None:
        """As `disconnect`, for good; also ends an attempt to connect."""
        self._is_closed = True
        if self._opening:
            self._opening.cancel()
            await asyncio.wait([self._opening])
        # redis-py may have swallowed the cancellation, and connected.
        await self.disconnect()

    async def _open(self, seconds: float) -> "_Channel":
        """The channel, opened if need be. Raises TimeoutError after `seconds`, while it goes on
        connecting for later calls."""
        if self._channel and not self._channel.is_lost:
            return self._channel
        if self._is_closed:
            raise redis_errors.ConnectionError("the connection was closed")
        opening = self._begin_opening()
        async with asyncio.timeout(seconds):
            await asyncio.wait([opening])
        if opening.cancelled() or (channel := opening.result()).is_lost:
            raise redis_errors.ConnectionError("the connection was closed")
        return channel

    def open_ahead(self) -> None:
        """Begins to connect, unless it has a connection; returns at once."""
        if self._channel is None or self._channel.is_lost:
            self._begin_opening()

    def _begin_opening(self) -> "asyncio.Task[_Channel]":
        if self._opening is None:
            self._opening = asyncio.create_task(self._connect())
            self._opening.add_done_callback(self._opened)
        return self._opening

    async def _connect(self) -> "_Channel":
        async with asyncio.timeout(_CONNECT_SECONDS):
            self._channel = _Channel(await wire.connect(self._client))
        return self._channel

    def _opened(self, task: "asyncio.Task[_Channel]") -> None:
        self._opening = None
        if not task.cancelled():
            error = task.exception()  # is raised in the calls that wait, if any still do
            if error is None:
                self._on_connected()


def new_link(
    client: Redis, on_connected: Callable[[], None] = lambda: None, pack: Pack = pack_whole
) -> Link | ClientLink:
    """A link, or what does its work where redis-py is not as expected."""
    return Link(client, on_connected, pack) if wire.is_as_expected() else ClientLink(client)


class Lanes:
    """A few links for large calls, one call at a time each, so that none is in front of small
    ones."""

    def __init__(self, client: Redis) -> None:
        self._links = [new_link(client, pack=pack_in_pieces) for _ in range(_LANES)]
        self._idle = list(self._links)
        self._free = asyncio.Semaphore(_LANES)
        self._lost_at = 0.0

    async def ask(
        self, command: Command, silence_seconds: float, before_send: BeforeSend = lambda: None
    ) -> Any:
        """As `Link.ask`, in turn. A call that has waited while another got no reply fails with
        ConnectionError: it would hardly get one."""
        loop = asyncio.get_running_loop()
        began_at = loop.time()
        async with self._free:
            if self._lost_at > began_at:
                raise redis_errors.ConnectionError("Redis did not answer the call before")
            link = self._idle.pop()
            try:
                return await link.ask(command, silence_seconds, before_send)
            except NO_REPLY_ERRORS:
                self._lost_at = loop.time()
                raise
            finally:
                self._idle.append(link)

    def open_ahead(self) -> None:
        """Begins to connect all: on a distant link that takes longer than a call may."""
        for link in self._links:
            link.open_ahead()

    @property
    def moved_at(self) -> float:
        """As `Link.moved_at`, of all."""
        return max(link.moved_at for link in self._links)

    async def disconnect(self) -> None:
        """As `Link.disconnect`."""
        for link in self._links:
            await link.disconnect()

    async def close(self) -> None:
        """As `Link.close`."""
        for link in self._links:
            await link.close()


class _Call(NamedTuple):
    future: "asyncio.Future[Any]"
    silence_seconds: float
    sent_at: float


class _Channel(asyncio.Protocol):
    """The protocol of a connection: replies come in the order of their calls.

    Time-outs count silence, since a large reply may take long to arrive: each look takes note
    whether bytes came or went.
    """

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        """Takes over the transport of a connection that is logged in."""
        self._loop = asyncio.get_running_loop()
        self.moved_at = self._loop.time()
        self._reader = hiredis.Reader(
            protocolError=redis_errors.InvalidResponse, replyError=error_of_reply
        )
        self._waiting: deque[_Call] = deque()
        self._first_since = self.moved_at
        """Since when the reply to the first of them is due."""
        self._received_bytes = self._seen_bytes = self._seen_unsent_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._looks_late = False
        """Whether the timer is set to the end of the silence, not to the next look."""
        self._look_due_at = 0.0
        self._looks_again = False
        """Whether the timer is set for a look that has come too late."""
        # The writer would close the transport once nothing refers to it.
        self._writer = writer
        self._transport = cast(asyncio.Transport, writer.transport)
        self._transport.set_protocol(self)

    @property
    def is_lost(self) -> bool:
        """Whether it can send nothing more, which the transport may know before `connection_lost`
        is called."""
        return self._transport.is_closing()

    def send(self, packed: Sequence[bytes], silence_seconds: float) -> "asyncio.Future[Any]":
        """Sends a packed command; a future of its reply."""
        call = _Call(self._loop.create_future(), silence_seconds, self._loop.time())
        if not self._waiting:
            self._first_since = call.sent_at
        self._waiting.append(call)
        for piece in packed:
            self._transport.write(piece)
        if self._timer is None or self._looks_late:
            self._look_in(_LOOK_SECONDS)
        return call.future

    def data_received(self, data: bytes) -> None:
        self._received_bytes += len(data)
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not False:
                self._take(reply)
        except Exception as error:
            self.end(error)
        if self._looks_late and self._waiting:
            self._look_in(_LOOK_SECONDS)

    def _take(self, reply: Any) -> None:
        if not self._waiting:
            raise redis_errors.InvalidResponse("a reply without a call")
        future = self._waiting.popleft().future
        self.moved_at = self._first_since = self._loop.time()
        if future.done():
            return
        if isinstance(reply, Exception):
            future.set_exception(reply)
        else:
            future.set_result(reply)

    def connection_lost(self, _: Exception | None) -> None:
        self.end(redis_errors.ConnectionError("the connection was lost"))

    def end(self, error: Exception) -> None:
        """Closes the connection; all calls without a reply raise the error."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        self._transport.abort()
        while self._waiting:
            future = self._waiting.popleft().future
            if not future.done():
                future.set_exception(error)

    def _look(self) -> None:
        """Ends a connection on which nothing has moved for too long, or one reply is overdue."""
        self._timer = None
        if not self._waiting:
            return
        now = self._loop.time()
        if now - self._look_due_at > _LOOK_SECONDS and not self._looks_again:
            # This process was halted: what came meanwhile is read before the next look.
            self._look_in(0.0)
            self._looks_again = True
            return
        if self._has_moved():
            self.moved_at = now
        first = self._waiting[0]
        silent_seconds = now - max(self.moved_at, first.sent_at)
        overdue = now - self._first_since > max(_MAX_SECONDS, first.silence_seconds)
        if silent_seconds >= first.silence_seconds or overdue:
            self.end(TimeoutError())
        elif len(self._waiting) == 1 and not self._seen_unsent_bytes:
            # An idle worker waits like this for a doorbell token, and ten looks a second were two
            # fifths of its CPU time.
            self._look_in(first.silence_seconds - silent_seconds, is_late=True)
        else:
            self._look_in(_LOOK_SECONDS)

    def _look_in(self, seconds: float, *, is_late: bool = False) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._look)
        self._look_due_at = self._loop.time() + seconds
        self._looks_late, self._looks_again = is_late, False

    def _has_moved(self) -> bool:
        """Whether a part of a reply has come, or one of a call has gone, since the last look."""
        came = self._received_bytes - self._seen_bytes
        unsent_bytes = self._unsent_bytes()
        went = self._seen_unsent_bytes - unsent_bytes
        if came >= _MOVED_BYTES:
            self._seen_bytes = self._received_bytes
        self._seen_unsent_bytes = unsent_bytes
        return came >= _MOVED_BYTES or went >= _MOVED_BYTES

    def _unsent_bytes(self) -> int:
        """What the other side has not taken yet, as far as the system tells."""
        unsent_bytes: int = self._transport.get_write_buffer_size()
        socket = self._transport.get_extra_info("socket")
        with contextlib.suppress(OSError, AttributeError):
            in_kernel = fcntl.ioctl(socket.fileno(), termios.TIOCOUTQ, b"\0" * 4)
            unsent_bytes += struct.unpack("i", in_kernel)[0]
        return unsent_bytes
