"""The proxy itself: it is as slow as a test sets, and changes no byte."""

import asyncio
import math
import random
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeAlias

import pytest

from .harness import Halts, eventually, stop_listening
from .proxy import Proxy, proxied

pytestmark = pytest.mark.soak

_MB = 1_000_000
_RATE = 4 * _MB

Stream: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def _proxied_echo() -> AsyncIterator[Proxy]:
    """A proxy in front of a server that sends back what it receives."""
    writers: list[asyncio.StreamWriter] = []

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    try:
        port = server.sockets[0].getsockname()[1]
        async with proxied(f"redis://127.0.0.1:{port}") as proxy:
            yield proxy
    finally:
        await stop_listening(server)
        for writer in writers:
            writer.transport.abort()


@asynccontextmanager
async def _connected(proxy: Proxy, count: int) -> AsyncIterator[list[Stream]]:
    """Connections that the proxy forwards already."""
    streams = [await asyncio.open_connection("127.0.0.1", proxy.port) for _ in range(count)]
    for stream in streams:
        assert await _echoed(stream, b"hello") == b"hello"
    yield streams
    for _, writer in streams:
        writer.transport.abort()


async def _echoed(stream: Stream, data: bytes) -> bytes:
    """What comes back for `data`, which is sent while its echo is read."""
    reader, writer = stream
    writer.write(data)
    async with asyncio.timeout(30):
        return await reader.readexactly(len(data))


@contextmanager
def _taking(least_seconds: float, most_seconds: float) -> Iterator[None]:
    began = time.monotonic()
    with Halts() as halts:
        yield
    assert least_seconds <= time.monotonic() - began <= most_seconds + halts.seconds


async def _echo_all(streams: list[Stream], data: bytes) -> None:
    async with asyncio.TaskGroup() as group:
        for stream in streams:
            group.create_task(_echoed(stream, data))


@pytest.mark.parametrize("connections", [1, 8])
async def test_all_connections_together_get_the_rate_in_each_direction(connections: int) -> None:
    async with _proxied_echo() as proxy, _connected(proxy, connections) as streams:
        proxy.limit_rate(_RATE)
        # Both directions carry the same bytes at the same time: they do not share the rate.
        with _taking(0.8, 1.2):
            await _echo_all(streams, bytes(_RATE // connections))


async def test_latency_delays_each_byte_once_in_each_direction() -> None:
    async with _proxied_echo() as proxy, _connected(proxy, 1) as (stream,):
        proxy.add_latency(0.1)
        with _taking(0.2, 0.3):
            await _echoed(stream, b"alone")
        reader, writer = stream
        with _taking(0.2, 0.3):
            for number in range(50):
                writer.write(b"%03d" % number)
                await asyncio.sleep(0)
            expected = b"".join(b"%03d" % number for number in range(50))
            assert await reader.readexactly(150) == expected


async def test_latency_does_not_lower_the_rate() -> None:
    async with _proxied_echo() as proxy, _connected(proxy, 1) as (stream,):
        proxy.add_latency(0.1)
        proxy.limit_rate(_RATE)
        with _taking(0.8 + 0.2, 1.2 + 0.2):
            await _echoed(stream, bytes(_RATE))


async def test_a_new_connection_waits_for_a_round_trip_more() -> None:
    async with _proxied_echo() as proxy:
        proxy.add_latency(0.1)
        with _taking(0.4, 0.5):
            async with _connected(proxy, 1):
                pass


async def test_a_drip_is_a_byte_a_second_until_it_ends() -> None:
    async with _proxied_echo() as proxy, _connected(proxy, 1) as (stream,):
        before = proxy.requests.bytes_sent
        proxy.drip()
        stream[1].write(bytes(100_000))
        with _taking(0.9, 1.3):
            await eventually(lambda: proxy.requests.bytes_sent == before + 1, "a byte has come")
        with _taking(0.8, 1.3):
            await eventually(lambda: proxy.requests.bytes_sent == before + 2, "the next has come")
        proxy.limit_rate(math.inf)
        with _taking(0, 0.5):
            await stream[0].readexactly(100_000)


async def test_a_sender_waits_while_the_link_is_full() -> None:
    async with _proxied_echo() as proxy, _connected(proxy, 1) as ((reader, writer),):
        proxy.limit_rate(_RATE)
        connection: socket.socket = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        before, accepted, most_ahead = proxy.requests.bytes_sent, 0, 0

        async def send() -> None:
            nonlocal accepted, most_ahead
            for _ in range(60):
                writer.write(bytes(1 << 16))
                await writer.drain()
                accepted += 1 << 16
                sent = proxy.requests.bytes_sent - before
                most_ahead = max(most_ahead, accepted - sent)

        async with asyncio.TaskGroup() as group:
            group.create_task(send())
            await reader.readexactly(60 << 16)
        assert most_ahead < 1 << 20


async def test_bytes_stay_in_order_while_rate_and_latency_change() -> None:
    chance = random.Random(1)
    async with _proxied_echo() as proxy, _connected(proxy, 8) as streams:
        contents = [chance.randbytes(200_000) for _ in streams]
        async with asyncio.TaskGroup() as group:
            echoes = [
                group.create_task(_echoed(stream, content))
                for stream, content in zip(streams, contents, strict=True)
            ]
            while not all(echo.done() for echo in echoes):
                proxy.limit_rate(chance.choice([_MB, 20 * _MB, math.inf]))
                proxy.add_latency(chance.choice([0, 0.002, 0.02]))
                before = proxy.requests.bytes_sent + proxy.replies.bytes_sent
                await eventually(
                    lambda before=before: (  # type: ignore[misc]
                        all(echo.done() for echo in echoes)
                        or proxy.requests.bytes_sent + proxy.replies.bytes_sent > before + 100_000
                    ),
                    "more bytes have come",
                )
        assert [echo.result() for echo in echoes] == contents
