"""A TCP proxy in front of Redis that cuts replies, swallows requests, refuses connections, or is
as slow as a distant or narrow link."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from tests.faults.harness import stop_listening

from .lane import Lane, Pipe

_CHUNK_BYTES = 1 << 16

_RECEIVE_BUFFER_BYTES = 128 << 10
"""Of the kernel, for each socket. Unbounded it takes in megabytes that the link has not sent."""


class Proxy:
    """Forwards connections to a server, with the faults that a test sets."""

    def __init__(self, upstream_url: str) -> None:
        self._upstream = upstream_url
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._cuts: list[bytes] = []
        self._swallowed_words: list[bytes] = []
        self._cut_if: Callable[[], bool] = lambda: False
        self.port = 0
        self.requests = Lane()
        self.replies = Lane()
        """The two directions of the link."""
        self.replies_cut = 0
        self.requests_swallowed = 0
        self._is_forwarding = asyncio.Event()
        self._is_forwarding.set()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    async def up(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def down(self) -> None:
        """Refuses new connections and aborts the open ones."""
        if self._server:
            await stop_listening(self._server)
        for writer in list(self._connections):
            writer.transport.abort()
        for task in list(self._tasks):
            task.cancel()

    def limit_rate(self, bytes_per_second: float) -> None:
        """Limits each direction to a rate, over all connections together; `math.inf` ends it."""
        for lane in (self.requests, self.replies):
            lane.limit_rate(bytes_per_second)

    def drip(self) -> None:
        """Lets one byte a second pass in each direction."""
        self.limit_rate(1)

    def add_latency(self, seconds: float) -> None:
        """Lets every byte arrive later by `seconds` in each direction; 0 ends it. A new connection
        sends nothing for one round trip more, the time of a TCP handshake."""
        for lane in (self.requests, self.replies):
            lane.latency_seconds = seconds

    def black_hole(self) -> None:
        """Forwards nothing more; connections stay open and new ones are accepted."""
        self._is_forwarding.clear()

    def restore(self) -> None:
        """Ends the black hole."""
        self._is_forwarding.set()

    def cut_reply_to(self, command: bytes, times: int = 1) -> None:
        """Forwards the next `times` requests that contain `command`, but not their replies."""
        self._cuts += [command] * times

    def swallow_requests_with(self, word: bytes) -> None:
        """Drops requests that contain `word`, and all that follows on their connections."""
        self._swallowed_words.append(word)

    def cut_replies_if(self, condition: Callable[[], bool]) -> None:
        """Cuts a connection, before it forwards a reply, if `condition` returns true."""
        self._cut_if = condition

    async def close(self) -> None:
        self.restore()
        await self.down()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)

        def end(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            writer.transport.abort()
            if not task.cancelled() and not isinstance(task.exception(), OSError | None):
                task.result()

        task.add_done_callback(end)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await self._dial()
        self._connections |= {writer, up_writer}
        cuts_reply = asyncio.Event()
        requests, replies = Pipe(self.requests, up_writer), Pipe(self.replies, writer)
        try:
            for end in (writer, up_writer):
                _bound_receive_buffer(end)
            await asyncio.sleep(self.requests.latency_seconds + self.replies.latency_seconds)
            async with asyncio.TaskGroup() as group:
                group.create_task(requests.deliver())
                group.create_task(replies.deliver())
                group.create_task(self._forward_requests(reader, requests, cuts_reply))
                group.create_task(self._forward_replies(up_reader, replies, cuts_reply))
        except* OSError:
            pass
        finally:
            self._connections -= {writer, up_writer}
            up_writer.transport.abort()

    async def _dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        parts = urlsplit(self._upstream)
        if parts.scheme == "unix":
            return await asyncio.open_unix_connection(parts.path)
        return await asyncio.open_connection(parts.hostname, parts.port or 6379)

    async def _forward_requests(
        self, reader: asyncio.StreamReader, requests: Pipe, cuts_reply: asyncio.Event
    ) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            await self._is_forwarding.wait()
            if any(word in data for word in self._swallowed_words):
                self.requests_swallowed += 1
                await asyncio.Event().wait()
            for command in self._cuts:
                if command in data:
                    self._cuts.remove(command)
                    cuts_reply.set()
                    break
            await requests.send(data)
        await requests.wait_until_delivered()
        raise ConnectionResetError

    async def _forward_replies(
        self, up: asyncio.StreamReader, replies: Pipe, cuts_reply: asyncio.Event
    ) -> None:
        while data := await up.read(_CHUNK_BYTES):
            await self._is_forwarding.wait()
            if cuts_reply.is_set() or self._cut_if():
                self.replies_cut += 1
                break
            await replies.send(data)
        await replies.wait_until_delivered()
        raise ConnectionResetError


def _bound_receive_buffer(writer: asyncio.StreamWriter) -> None:
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)


@asynccontextmanager
async def proxied(upstream_url: str) -> AsyncIterator[Proxy]:
    proxy = Proxy(upstream_url)
    await proxy.up()
    try:
        yield proxy
    finally:
        await proxy.close()
