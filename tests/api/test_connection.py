"""Connections that are slow, silent, too wordy or too many, over raw sockets."""

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator

import msgspec
import pytest

from asyncinfer.api.config import ApiConfig
from asyncinfer.repository.store import Store
from tests.faults.harness import eventually

from .harness import ROW, announce, client_of, hosted, raw_exchange, running, submit

GET = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture
async def strict(config: ApiConfig, store: Store) -> AsyncIterator[int]:
    """The port of an API with short times and small limits."""
    await announce(store, "iris", default="iris")
    limits = msgspec.structs.replace(
        config,
        header_timeout_seconds=0.3,
        body_timeout_seconds=0.4,
        max_header_bytes=4096,
        max_connections=5,
    )
    async with hosted(running(limits)) as port:
        yield port


async def dribble(port: int, first: bytes, drop: bytes) -> tuple[bytes, float]:
    """Sends `first`, then `drop` every 20 ms until the server ends it: what it said, and when."""
    began = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(first)
    answer = asyncio.ensure_future(all_that_came(reader))
    while not answer.done() and time.monotonic() - began < 5:
        await asyncio.wait([answer], timeout=0.02)
        writer.write(drop)
    ended = time.monotonic() - began
    writer.close()
    return await answer, ended


async def all_that_came(reader: asyncio.StreamReader) -> bytes:
    """Until the server has closed; who goes on writing may be told so by a reset."""
    came = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := await reader.read(65_536):
            came += chunk
    return came


def assert_refused(answer: bytes, status: int, code: str) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer
    assert b"content-type: application/problem+json" in head
    assert b"connection: close" in head
    assert msgspec.json.decode(body)["code"] == code


async def test_a_head_that_dribbles_is_ended(strict: int) -> None:
    answer, ended = await dribble(strict, GET, b"X: y\r\n")
    assert_refused(answer, 408, "request_timeout")
    assert 0.3 <= ended < 4


async def test_a_silent_connection_is_closed_without_a_word(strict: int) -> None:
    began = time.monotonic()
    assert await raw_exchange(strict, b"") == b""
    assert 0.3 <= time.monotonic() - began < 4


async def test_line_ends_keep_no_connection_open(strict: int) -> None:
    answer, ended = await dribble(strict, b"\r\n", b"\r\n")
    assert answer == b""
    assert ended < 4
    answer, ended = await dribble(strict, GET + b"\r\n\r\n", b"\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1") == 1
    assert ended < 4


async def test_a_body_that_dribbles_is_ended(strict: int) -> None:
    first = POST + b"Content-Length: 1000\r\n\r\n"
    answer, ended = await dribble(strict, first, b" ")
    assert_refused(answer, 408, "request_timeout")
    assert 0.4 <= ended < 4


async def test_a_chunked_body_that_dribbles_is_ended(strict: int) -> None:
    first = POST + b"Transfer-Encoding: chunked\r\n\r\n"
    answer, _ = await dribble(strict, first, b"1\r\n \r\n")
    assert_refused(answer, 408, "request_timeout")


async def test_a_body_shorter_than_announced_is_ended(strict: int) -> None:
    answer = await raw_exchange(strict, POST + b'Content-Length: 1000\r\n\r\n{"data": [[1]]}')
    assert_refused(answer, 408, "request_timeout")


async def test_a_body_nobody_reads_is_ended_too(strict: int) -> None:
    answer, ended = await dribble(strict, GET + b"Content-Length: 100000\r\n\r\n", b"x")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert ended < 4


async def test_the_next_request_on_a_connection_has_its_own_time(strict: int) -> None:
    answer, _ = await dribble(strict, GET + b"\r\n" + GET, b"X: y\r\n")
    first, _, second = answer.partition(b"HTTP/1.1 408 ")
    assert first.startswith(b"HTTP/1.1 200 ")
    assert b"request_timeout" in second


async def test_requests_sent_at_once_are_answered_in_turn(strict: int) -> None:
    last = GET.replace(b"live", b"none") + b"Connection: close\r\n\r\n"
    answer = await raw_exchange(strict, (GET + b"\r\n") * 3 + last)
    assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"200", b"200", b"404"]


async def test_a_quick_request_may_wait_longer_than_the_times_for_reading(strict: int) -> None:
    async with client_of(strict) as client:
        job_id = await submit(client)
        reply = await client.get(f"/job/{job_id}?wait=0.8")
    assert reply.json()["status"] == "pending"


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(GET + b"X: " + b"y" * 5000 + b"\r\n\r\n", id="one long"),
        pytest.param(GET + b"X: y\r\n" * 1000 + b"\r\n", id="many"),
        pytest.param(b"GET /" + b"y" * 5000 + b" HTTP/1.1\r\n\r\n", id="path"),
        pytest.param(GET + b"X: " + b"y" * 300_000, id="no end"),
    ],
)
async def test_long_headers_are_refused(strict: int, head: bytes) -> None:
    assert_refused(await raw_exchange(strict, head), 431, "headers_too_large")


async def test_headers_without_end_are_counted_as_they_come(strict: int) -> None:
    answer, _ = await dribble(strict, GET, b"X: " + b"y" * 1000 + b"\r\n")
    assert_refused(answer, 431, "headers_too_large")


async def test_a_long_body_behind_a_short_head_counts_for_no_header(strict: int) -> None:
    body = b'{"data": [[1, 2, 3, 4]]}' + b" " * 20_000
    whole = POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    assert (await raw_exchange(strict, whole)).startswith(b"HTTP/1.1 202 ")


@pytest.mark.parametrize(
    "sent",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        GET + b"Bad Header\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        POST + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
async def test_what_is_no_http_is_400(strict: int, sent: bytes) -> None:
    assert_refused(await raw_exchange(strict, sent), 400, "malformed_request")


async def test_a_request_without_a_host_is_400(strict: int) -> None:
    answer = await raw_exchange(strict, b"GET / HTTP/1.0\r\n\r\n")
    assert_refused(answer, 400, "invalid_header")


async def test_connections_above_the_cap_are_told_so(strict: int) -> None:
    held = [await asyncio.open_connection("127.0.0.1", strict) for _ in range(5)]
    await asyncio.sleep(0.05)
    assert_refused(await raw_exchange(strict, b""), 503, "too_many_connections")
    for _, writer in held:
        writer.close()

    async def let_in() -> bool:
        answer = await raw_exchange(strict, GET + b"Connection: close\r\n\r\n")
        return answer.startswith(b"HTTP/1.1 200 ")

    await eventually(let_in, "there is room again")


async def test_an_offer_to_upgrade_is_answered_as_plain_http(strict: int) -> None:
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", strict)
    writer.write(GET + offer)
    assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200 ")
    writer.write(GET + b"Connection: close\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
    writer.close()


async def test_an_answer_leaves_nothing_for_the_garbage_collector(strict: int) -> None:
    """Collecting what answers left behind stopped an API for 10 ms and more, twice a second."""
    body = msgspec.json.encode({"data": ROW})
    request = POST + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    reader, writer = await asyncio.open_connection("127.0.0.1", strict)
    await answered(reader, writer, request)
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(5):
            await answered(reader, writer, request)
        gc.collect()
        left = {type(one).__module__.partition(".")[0] for one in gc.garbage}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        writer.close()
    assert not left & {"asyncinfer", "uvicorn", "starlette"}


async def answered(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
) -> None:
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 202 "), head
    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
    await reader.readexactly(int(length))
