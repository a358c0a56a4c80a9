"""A minimal HTTP/1.1 client: so light that the client does not become the bottleneck."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final
from urllib.parse import urlsplit

_TIMEOUT_SECONDS: Final = 60.0
_CONNECT_TIMEOUT_SECONDS: Final = 5.0


class LoadConnection:
    """One connection for requests one after another; `open` makes one."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, key: str | None
    ) -> None:
        self._reader = reader
        self._writer = writer
        authorization = f"authorization: Bearer {key}\r\n" if key else ""
        self._head = f"host: {host}\r\n{authorization}"

    @classmethod
    @asynccontextmanager
    async def open(
        cls, url: str, key: str | None, ca: str | None = None
    ) -> AsyncIterator["LoadConnection"]:
        """Connects to the host of `url`, and closes the connection at the end of the block.

        `key` is an API key or None; `ca` a PEM file with the CA of the server. Raises OSError,
        TimeoutError among them, after 5 s.
        """
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        async with asyncio.timeout(_CONNECT_TIMEOUT_SECONDS):
            reader, writer = await asyncio.open_connection(
                parts.hostname or "127.0.0.1",
                parts.port or (443 if secure else 80),
                ssl=_tls_context(ca) if secure else None,
            )
        try:
            yield cls(reader, writer, parts.netloc.rpartition("@")[2], key)
        finally:
            writer.close()

    def encode_request(self, method: str, path: str, body: bytes = b"", headers: str = "") -> bytes:
        """The bytes of a request; a `body` is JSON, and each line of `headers` has its line end."""
        content_type = "content-type: application/json\r\n" if body else ""
        length = f"content-length: {len(body)}\r\n"
        head = f"{method} {path} HTTP/1.1\r\n{self._head}{content_type}{headers}{length}\r\n"
        return head.encode() + body

    async def exchange(self, request: bytes) -> int:
        """Sends a request and returns the status of its response, whose body is read and dropped.

        Raises OSError or EOFError if the connection is lost, and TimeoutError after 60 s.
        """
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            self._writer.write(request)
            head = await self._reader.readuntil(b"\r\n\r\n")
            await self._drop_body(head.lower())
        return int(head[9:12])

    async def _drop_body(self, head: bytes) -> None:
        """Reads the body of a response; `head` is its head in lower case."""
        if b"transfer-encoding: chunked" in head:
            while length := int(await self._reader.readline(), 16):
                await self._reader.readexactly(length + 2)
            await self._reader.readline()
            return
        _, found, rest = head.partition(b"content-length:")
        if found:
            await self._reader.readexactly(int(rest.partition(b"\r\n")[0]))


def _tls_context(ca: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if ca:
        context.load_verify_locations(ca)
    return context
