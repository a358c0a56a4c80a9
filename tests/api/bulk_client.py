"""A client of bulk requests that reads answers while it sends lines."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-ndjson\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n"


class BulkClient:
    """A client that reads while it sends, line by line."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._lines = b""
        self._head_read = False

    async def read_head(self) -> bytes:
        self._head_read = True
        return await self._reader.readuntil(b"\r\n\r\n")

    async def send(self, text: bytes) -> None:
        self._writer.write(b"%x\r\n%b\r\n" % (len(text), text))
        await self._writer.drain()

    def end(self) -> None:
        self._writer.write(b"0\r\n\r\n")

    def disconnect(self) -> None:
        self._writer.transport.abort()

    async def read_line(self) -> dict[str, Any] | None:
        """The next line; None at the end of the answer."""
        while b"\n" not in self._lines:
            size = int(await self._reader.readuntil(b"\r\n"), 16)
            self._lines += (await self._reader.readexactly(size + 2))[:-2]
            if not size:
                return None
        line, _, self._lines = self._lines.partition(b"\n")
        found: dict[str, Any] = msgspec.json.decode(line)
        return found

    async def read_first_line(self) -> dict[str, Any]:
        if not self._head_read:
            await self.read_head()
        answer = await self.read_line()
        assert answer, "the answer ended"
        return answer

    async def is_closed(self) -> bool:
        return await self._reader.read() == b""


@asynccontextmanager
async def bulk_client(port: int, headers: bytes = b"") -> AsyncIterator[BulkClient]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(90):
            writer.write(CHUNKED + headers + b"\r\n")
            bulk = BulkClient(reader, writer)
            yield bulk
    finally:
        writer.close()
