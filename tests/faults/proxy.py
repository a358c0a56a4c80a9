"""A small TCP proxy before Redis that cuts replies, swallows requests, or is gone."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

_CHUNK = 1 << 16


class Proxy:
    """Forwards connections to a server, faults included."""

    def __init__(self, upstream_url: str) -> None:
        self._upstream = upstream_url
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._cuts: list[bytes] = []
        self._swallows: list[bytes] = []
        self._cut_if: Callable[[], bool] = lambda: False
        self.port = 0
        self.cut = 0
        self.swallowed = 0
        self.open_road = asyncio.Event()
        self.open_road.set()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    async def up(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def down(self) -> None:
        """Refuses connections, and closes those there are."""
        if self._server:
            self._server.close()
        for writer in list(self._connections):
            writer.transport.abort()

    def black_hole(self) -> None:
        """Swallows everything; connections stay open and connecting still works."""
        self.open_road.clear()

    def restore(self) -> None:
        self.open_road.set()

    def cut_reply_to(self, command: bytes, times: int = 1) -> None:
        """Cuts the next replies to requests that contain `command`."""
        self._cuts += [command] * times

    def swallow_requests_with(self, word: bytes) -> None:
        """A request that contains `word` never arrives, nor what follows on its connection."""
        self._swallows.append(word)

    def cut_replies_if(self, chance: Callable[[], bool]) -> None:
        self._cut_if = chance

    async def close(self) -> None:
        self.restore()
        await self.down()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with suppress(OSError, asyncio.CancelledError):
            await self._serve(reader, writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await self._dial()
        self._connections |= {writer, up_writer}
        doomed = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._requests(reader, up_writer, doomed))
                group.create_task(self._replies(up_reader, writer, doomed))
        except* OSError:
            pass
        finally:
            for stream in (writer, up_writer):
                self._connections.discard(stream)
                stream.transport.abort()

    async def _dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        parts = urlsplit(self._upstream)
        if parts.scheme == "unix":
            return await asyncio.open_unix_connection(parts.path)
        return await asyncio.open_connection(parts.hostname, parts.port or 6379)

    async def _requests(
        self, reader: asyncio.StreamReader, up: asyncio.StreamWriter, doomed: asyncio.Event
    ) -> None:
        while data := await reader.read(_CHUNK):
            await self.open_road.wait()
            if any(word in data for word in self._swallows):
                self.swallowed += 1
                await asyncio.Event().wait()
            for command in self._cuts:
                if command in data:
                    self._cuts.remove(command)
                    doomed.set()
                    break
            up.write(data)
            await up.drain()
        raise ConnectionResetError

    async def _replies(
        self, up: asyncio.StreamReader, writer: asyncio.StreamWriter, doomed: asyncio.Event
    ) -> None:
        while data := await up.read(_CHUNK):
            await self.open_road.wait()
            if doomed.is_set() or self._cut_if():
                self.cut += 1
                break
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError


@asynccontextmanager
async def proxied(upstream_url: str) -> AsyncIterator[Proxy]:
    proxy = Proxy(upstream_url)
    await proxy.up()
    try:
        yield proxy
    finally:
        await proxy.close()
