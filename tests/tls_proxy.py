"""A proxy that ends TLS in front of a server, in a thread."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from urllib.parse import urlsplit

from anyio.from_thread import start_blocking_portal


@contextmanager
def tls_in_front_of(upstream_url: str, context: ssl.SSLContext) -> Iterator[int]:
    """Yields the port on 127.0.0.1 at which clients reach the server at `upstream_url` by TLS."""
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(_serving(upstream_url, context)) as port,
    ):
        yield port


@asynccontextmanager
async def _serving(upstream_url: str, context: ssl.SSLContext) -> AsyncIterator[int]:
    writers: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.add(writer)
        with contextlib.suppress(OSError):
            up_reader, up_writer = await _dial(upstream_url)
            writers.add(up_writer)
            await asyncio.wait(
                [
                    asyncio.create_task(_forward(reader, up_writer)),
                    asyncio.create_task(_forward(up_reader, writer)),
                ],
                return_when=asyncio.FIRST_COMPLETED,
            )
            up_writer.transport.abort()
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    yield server.sockets[0].getsockname()[1]
    server.close()
    while writers:
        writer = writers.pop()
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _dial(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return await asyncio.open_unix_connection(parts.path)
    return await asyncio.open_connection(parts.hostname, parts.port or 6379)


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
