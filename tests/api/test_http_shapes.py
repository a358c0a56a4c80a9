"""Requests of any shape, cut into packets at any place, are answered as RFC 9110 and 9112 say.

No byte of one request is taken for another request.
"""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Final, NamedTuple

import msgspec
import pytest
import redis

from asyncinfer.api.config import ApiConfig
from asyncinfer.api.http.connection import Connection
from asyncinfer.repository.store import Store
from tests.faults.harness import eventually

from .harness import announce, hosted, running_server
from .http_shapes import ALIVE, ROW, SHAPES, Shape

Address = tuple[str, int]

AT_ONCE: Final = 60
PROBE: Final = ALIVE + b"Connection: close\r\n\r\n"


def counting(received_bytes: dict[Address, int]) -> type[Connection]:
    """Connections that count received bytes, so that a client can send the rest in another
    packet."""

    class CountingConnection(Connection):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            assert self.client is not None
            received_bytes[self.client] = received_bytes.get(self.client, 0) + len(data)

    return CountingConnection


class ReceivedAnswer(NamedTuple):
    """The status and error code of an answer."""

    status: int
    code: str | None


class CountingApi(NamedTuple):
    port: int
    received: dict[Address, int]
    """How many bytes of each client the server has read."""


@pytest.fixture
async def counting_api(config: ApiConfig, store: Store) -> AsyncIterator[CountingApi]:
    """An API that serves iris."""
    await announce(store, "iris", default="iris")
    received_bytes: dict[Address, int] = {}
    async with hosted(running_server(config, counting(received_bytes))) as (_, port):
        yield CountingApi(port, received_bytes)


def test_the_corpus_is_large_and_names_each_shape_once() -> None:
    names = [shape.name for shape in SHAPES]
    assert len(names) >= 80
    assert len(set(names)) == len(names)


async def test_every_shape_is_answered_as_it_should_be(
    counting_api: CountingApi, server: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    await _assert_answered(counting_api, server, ((shape, (shape.sent,)) for shape in SHAPES))
    assert not _warnings(caplog)


@pytest.mark.soak
async def test_every_shape_is_answered_the_same_in_two_packets(
    counting_api: CountingApi, server: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    await _assert_answered(counting_api, server, _cut(SHAPES))
    assert not _warnings(caplog)


def _cut(shapes: Iterable[Shape]) -> Iterator[tuple[Shape, tuple[bytes, bytes]]]:
    """Each shape cut at the end of each line; of many equal lines only at some."""
    for shape in shapes:
        lines = shape.sent.splitlines(keepends=True)[:-1]
        ends = list(itertools.accumulate(len(line) for line in lines))
        for end in [*ends[:24], *ends[24:][-4:]]:
            yield shape, (shape.sent[:end], shape.sent[end:])


async def _assert_answered(
    api: CountingApi, server: redis.Redis, sent: Iterable[tuple[Shape, tuple[bytes, ...]]]
) -> None:
    slots = asyncio.Semaphore(AT_ONCE)
    numbered = list(enumerate(sent, start=int(ROW) + 1))

    async def attempt(number: int, shape: Shape, parts: tuple[bytes, ...]) -> str | None:
        async with slots, asyncio.timeout(30):
            row = b"%d" % number
            return await _fault(api, shape, [part.replace(ROW, row) for part in parts])

    faults = await asyncio.gather(
        *(attempt(number, *shape_and_parts) for number, shape_and_parts in numbered)
    )
    found = [fault for fault in faults if fault]
    assert not found, "\n".join(found)
    kept = _kept_rows(server)
    for number, (shape, parts) in numbered:
        assert kept.count(number) == shape.answers.count(202), (shape.name, parts)


async def _fault(api: CountingApi, shape: Shape, parts: list[bytes]) -> str | None:
    """What is wrong with the answers to `parts`; None if nothing is."""
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    try:
        received = await _conversation(api, shape, parts, reader, writer)
    finally:
        writer.close()
    expected: list[ReceivedAnswer | str] = [
        ReceivedAnswer(*answer) if isinstance(answer, tuple) else ReceivedAnswer(answer, None)
        for answer in shape.answers
    ]
    expected += [CLOSED] if shape.closes else [ReceivedAnswer(200, None), CLOSED]
    return None if received == expected else f"{shape.name}: {received} to {parts}"


CLOSED: Final = "closed"


async def _conversation(
    api: CountingApi,
    shape: Shape,
    parts: list[bytes],
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> list[ReceivedAnswer | str]:
    """The answers to the shape, the answer to one more request if the shape leaves the connection
    open, and the end of the connection."""
    client = writer.get_extra_info("sockname")
    for place, part in enumerate(parts, start=1):
        writer.write(part)
        if place < len(parts):
            await eventually(
                lambda: api.received.get(client, 0) >= len(part) or reader.at_eof(),  # noqa: B023
                "the first packet is read",
            )
    received = [await _answer(reader, shape.bodiless) for _ in shape.answers]
    if not shape.closes:
        writer.write(PROBE)
        received.append(await _answer(reader, False))
    return [*received, await _answer(reader, False)]


async def _answer(reader: asyncio.StreamReader, bodiless: bool) -> ReceivedAnswer | str:
    status = 100
    while status < 200:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
        except asyncio.IncompleteReadError as error:
            return CLOSED if not error.partial else repr(error.partial)
        except ConnectionResetError:
            return "reset"
        status = int(head[9:12])
    length = int(head.partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0])
    body = b"" if bodiless else await reader.readexactly(length)
    is_problem = b"content-type: application/problem+json" in head
    return ReceivedAnswer(status, msgspec.json.decode(body)["code"] if is_problem else None)


def _kept_rows(server: redis.Redis) -> list[int]:
    """The first number of each input that was stored."""
    inputs = [server.get(name) for name in server.scan_iter("job:*:data", count=1000)]
    return [int(msgspec.json.decode(text)[0][0]) for text in inputs if isinstance(text, bytes)]


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
