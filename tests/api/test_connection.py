"""Connections that are slow, silent, too large or too many, over raw sockets."""

import asyncio
import contextlib
import gc
import logging
import re
import time
from collections.abc import AsyncIterator
from typing import NamedTuple

import msgspec
import pytest
import redis
from starlette.types import ASGIApp

from asyncinfer.api.config import ApiConfig
from asyncinfer.api.http.connection import (
    RESERVED_CONNECTIONS,
    Connection,
    ConnectionLimits,
    Registry,
    ShortWay,
)
from asyncinfer.api.server import Server
from asyncinfer.repository.store import Store
from tests.faults.harness import eventually

from .harness import (
    QUEUE,
    ROW,
    ManualWorker,
    announce,
    client_of,
    count_waiters,
    hosted,
    raw_exchange,
    reset,
    running,
    running_server,
    submit,
)

ONE_ROW = b'{"data":[[1,2,3,4]]}'
GET = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture
async def strict_port(config: ApiConfig, store: Store) -> AsyncIterator[int]:
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
    """Sends `first`, then `drop` every 20 ms until the server closes; the answer and the time."""
    began = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(first)
    answer = asyncio.ensure_future(read_until_closed(reader))
    while not answer.done() and time.monotonic() - began < 5:
        await asyncio.wait([answer], timeout=0.02)
        writer.write(drop)
    ended_seconds = time.monotonic() - began
    writer.close()
    return await answer, ended_seconds


async def read_until_closed(reader: asyncio.StreamReader) -> bytes:
    """Reads until the server has closed; a client that keeps writing may get a reset instead."""
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


async def test_a_head_that_dribbles_is_ended(strict_port: int) -> None:
    answer, ended_seconds = await dribble(strict_port, GET, b"X: y\r\n")
    assert_refused(answer, 408, "request_timeout")
    assert 0.3 <= ended_seconds < 4


async def test_a_silent_connection_is_closed_without_an_answer(strict_port: int) -> None:
    began = time.monotonic()
    assert await raw_exchange(strict_port, b"") == b""
    assert 0.3 <= time.monotonic() - began < 4


async def test_line_ends_keep_no_connection_open(strict_port: int) -> None:
    answer, ended_seconds = await dribble(strict_port, b"\r\n", b"\r\n")
    assert answer == b""
    assert ended_seconds < 4
    answer, ended_seconds = await dribble(strict_port, GET + b"\r\n\r\n", b"\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1") == 1
    assert ended_seconds < 4


async def test_a_body_that_dribbles_is_ended(strict_port: int) -> None:
    first = POST + b"Content-Length: 1000\r\n\r\n"
    answer, ended_seconds = await dribble(strict_port, first, b" ")
    assert_refused(answer, 408, "request_timeout")
    assert 0.4 <= ended_seconds < 4


async def test_a_chunked_body_that_dribbles_is_ended(strict_port: int) -> None:
    first = POST + b"Transfer-Encoding: chunked\r\n\r\n"
    answer, _ = await dribble(strict_port, first, b"1\r\n \r\n")
    assert_refused(answer, 408, "request_timeout")


async def test_a_body_shorter_than_announced_is_ended(strict_port: int) -> None:
    answer = await raw_exchange(strict_port, POST + b'Content-Length: 1000\r\n\r\n{"data": [[1]]}')
    assert_refused(answer, 408, "request_timeout")


async def test_a_body_that_no_handler_reads_is_ended_too(strict_port: int) -> None:
    answer, ended_seconds = await dribble(
        strict_port, GET + b"Content-Length: 100000\r\n\r\n", b"x"
    )
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert ended_seconds < 4


async def test_the_next_request_on_a_connection_has_its_own_time(strict_port: int) -> None:
    answer, _ = await dribble(strict_port, GET + b"\r\n" + GET, b"X: y\r\n")
    first, _, second = answer.partition(b"HTTP/1.1 408 ")
    assert first.startswith(b"HTTP/1.1 200 ")
    assert b"request_timeout" in second


async def test_requests_sent_at_once_are_answered_in_turn(strict_port: int) -> None:
    last = GET.replace(b"live", b"none") + b"Connection: close\r\n\r\n"
    answer = await raw_exchange(strict_port, (GET + b"\r\n") * 3 + last)
    assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"200", b"200", b"404"]


async def test_a_quick_request_may_wait_longer_than_the_times_for_reading(strict_port: int) -> None:
    async with client_of(strict_port) as client:
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
async def test_long_headers_are_refused(strict_port: int, head: bytes) -> None:
    assert_refused(await raw_exchange(strict_port, head), 431, "headers_too_large")


async def test_headers_without_end_are_counted_as_they_come(strict_port: int) -> None:
    answer, _ = await dribble(strict_port, GET, b"X: " + b"y" * 1000 + b"\r\n")
    assert_refused(answer, 431, "headers_too_large")


async def test_a_long_body_behind_a_short_head_does_not_count_as_headers(strict_port: int) -> None:
    body = b'{"data": [[1, 2, 3, 4]]}' + b" " * 20_000
    whole = POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    assert (await raw_exchange(strict_port, whole)).startswith(b"HTTP/1.1 202 ")


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
async def test_bytes_that_are_not_http_are_400(strict_port: int, sent: bytes) -> None:
    assert_refused(await raw_exchange(strict_port, sent), 400, "malformed_request")


async def test_the_refusal_of_a_head_has_no_body(strict_port: int) -> None:
    for line in (b"HEAD /jobs#x HTTP/1.1", b"HEAD /jobs HTTP/2.0"):
        answer = await raw_exchange(strict_port, line + b"\r\nHost: localhost\r\n\r\n")
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 ")
        assert b"content-length: " in head
        assert body == b""


async def test_a_request_without_a_host_is_400(strict_port: int) -> None:
    answer = await raw_exchange(strict_port, b"GET / HTTP/1.0\r\n\r\n")
    assert_refused(answer, 400, "invalid_header")


@pytest.fixture
async def full_port(config: ApiConfig, store: Store) -> AsyncIterator[int]:
    """The port of an API with all of its connections in use."""
    async with hosted(running(msgspec.structs.replace(config, max_connections=5))) as port:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(5)]
        yield port
        for _, writer in held:
            writer.close()


@pytest.mark.parametrize("path", [b"/health/live", b"/health/ready", b"/health"])
async def test_probes_are_answered_when_all_connections_are_held(
    full_port: int, path: bytes
) -> None:
    probe = GET.replace(b"/health/live", path) + b"\r\n"
    # Several requests, as from a client that keeps its connection: only the first is answered.
    answer = await raw_exchange(full_port, probe * 3)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"\r\nconnection: close\r\n" in answer
    assert answer.count(b"HTTP/1.1") == 1


async def test_nothing_else_is_answered_when_all_connections_are_held(
    full_port: int, server: redis.Redis
) -> None:
    body = msgspec.json.encode({"data": ROW})
    post = POST + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    for request in (
        post,
        GET.replace(b"/health/live", b"/jobs") + b"\r\n",
        b"GET /healthy HTTP/1.1",
    ):
        whole = request if request.endswith((b"\n", b"}")) else request + b"\r\nHost: a\r\n\r\n"
        assert_refused(await raw_exchange(full_port, whole), 503, "too_many_connections")
    assert server.llen(QUEUE) == 0


@pytest.mark.soak
async def test_a_reserved_connection_is_held_for_two_seconds_at_most(full_port: int) -> None:
    began = time.monotonic()
    reserved = [raw_exchange(full_port, sent) for sent in (b"", GET, b"\r\n")]
    for answer in await asyncio.gather(*reserved):
        assert_refused(answer, 503, "too_many_connections")
    assert 1.9 <= time.monotonic() - began < 8


async def test_sixteen_connections_are_reserved_and_those_above_are_refused(full_port: int) -> None:
    reserved = [
        await asyncio.open_connection("127.0.0.1", full_port) for _ in range(RESERVED_CONNECTIONS)
    ]
    assert RESERVED_CONNECTIONS == 16
    assert_refused(await raw_exchange(full_port, b""), 503, "too_many_connections")
    reader, writer = reserved[-1]
    writer.write(GET + b"\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
    for _, writer in reserved:
        writer.close()


async def test_connections_are_accepted_again_when_others_are_closed(strict_port: int) -> None:
    held = [await asyncio.open_connection("127.0.0.1", strict_port) for _ in range(5)]
    for _, writer in held:
        writer.close()

    async def is_accepted() -> bool:
        answer = await raw_exchange(
            strict_port, GET.replace(b"health/live", b"") + b"Connection: close\r\n\r\n"
        )
        return answer.startswith(b"HTTP/1.1 200 ")

    await eventually(is_accepted, "a connection is accepted again")


# --- trailers --------------------------------------------------------------------------------

CHUNKED = POST + b"Transfer-Encoding: chunked\r\n"
CHUNK = b'18\r\n{"data": [[1, 2, 3, 4]]}\r\n'


async def test_a_trailer_gives_no_key_and_changes_none(two_tenant_port: int) -> None:
    keyless = CHUNKED + b"\r\n" + CHUNK + b"0\r\nX-API-Key: bob\r\n\r\n"
    assert b" 401 " in await first_answer(two_tenant_port, keyless)
    keyed = CHUNKED + b"X-API-Key: alice\r\n\r\n" + CHUNK + b"0\r\nX-API-Key: bob\r\n\r\n"
    answer = await first_answer(two_tenant_port, keyed)
    assert b" 202 " in answer.partition(b"\r\n")[0]
    job_id = msgspec.json.decode(answer.partition(b"\r\n\r\n")[2])["job_id"]
    for key, status in (("alice", 200), ("bob", 404)):
        async with client_of(two_tenant_port, **{"x-api-key": key}) as client:
            assert (await client.get(f"/job/{job_id}")).status_code == status


@pytest.mark.parametrize(
    "endless",
    [
        pytest.param(b"a:b\r\n" * 200, id="many trailers"),
        pytest.param(b"a" * 1000, id="one long name"),
        pytest.param(b"0;" + b"a" * 1000, id="one long chunk extension"),
    ],
)
@pytest.mark.parametrize("at_once", [1, 5000])
async def test_trailers_and_chunk_extensions_are_bounded(
    strict_port: int, endless: bytes, at_once: int
) -> None:
    first = CHUNKED + b"\r\n" + CHUNK
    first += b"" if endless.startswith(b"0") else b"0\r\n"
    answer, ended_seconds = await dribble(strict_port, first, endless * at_once)
    assert_refused(answer, 431, "headers_too_large")
    assert ended_seconds < 4


async def test_small_chunks_do_not_count_as_trailers(strict_port: int) -> None:
    body = b'{"data": [[1, 2, 3, 4]]}' + b" " * 4000
    chunks = b"".join(b"1;extension\r\n%c\r\n" % byte for byte in body)
    whole = CHUNKED + b"Connection: close\r\n\r\n" + chunks + b"0\r\n\r\n"
    assert (await raw_exchange(strict_port, whole)).startswith(b"HTTP/1.1 202 ")


async def first_answer(port: int, sent: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    answer = await read_answer(reader)
    writer.close()
    return answer


async def read_answer(reader: asyncio.StreamReader) -> bytes:
    """Reads an answer with a Content-Length."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
    return head + await reader.readexactly(int(length))


# --- 100 Continue and requests sent ahead ----------------------------------------------------


async def test_a_client_that_waits_for_100_continue_gets_it(strict_port: int) -> None:
    body = msgspec.json.encode({"data": ROW})
    head = POST + b"Content-Length: %d\r\nExpect: 100-continue\r\n" % len(body)
    reader, writer = await asyncio.open_connection("127.0.0.1", strict_port)
    writer.write(head + b"\r\n")
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(body)
    assert (await read_answer(reader)).startswith(b"HTTP/1.1 202 ")
    writer.write(head + b"Connection: close\r\n\r\n" + body)
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 202 "), (
        "a client that has sent the whole body gets no 100 Continue"
    )
    writer.close()


async def test_over_http_1_0_nothing_precedes_the_answer(strict_port: int) -> None:
    head = POST.replace(b"1.1", b"1.0") + b"Content-Length: 24\r\nExpect: 100-continue\r\n\r\n"
    assert_refused(await raw_exchange(strict_port, head), 408, "request_timeout")


async def test_requests_sent_ahead_are_answered_up_to_the_limit(
    strict_port: int,
) -> None:
    request = GET + b"\r\n"
    answer = await raw_exchange(strict_port, request * 5000)
    first, _, last = answer.rpartition(b"HTTP/1.1 200 ")
    assert b"connection: close" in last
    assert b"connection: close" not in first
    assert 100 <= answer.count(b"HTTP/1.1 200 ") < 5000


# --- clients that disconnect -----------------------------------------------------------------


class ApiWithJobs(NamedTuple):
    server: Server
    port: int
    job_id: str
    result_id: str


@pytest.fixture
async def api_with_jobs(
    config: ApiConfig, store: Store, manual_worker: ManualWorker
) -> AsyncIterator[ApiWithJobs]:
    """An API with a waiting job and a completed job with a large result."""
    await announce(store, "iris", default="iris")
    async with hosted(running_server(config)) as (server, port), client_of(port) as client:
        result_id = await submit(client)
        await manual_worker.complete(body={"prediction": "y" * (8 << 20)})
        yield ApiWithJobs(server, port, await submit(client), result_id)


WHOLE = POST + b"Content-Length: %d\r\n\r\n" % len(ONE_ROW) + ONE_ROW
HALF_CLOSED: dict[str, tuple[bytes, list[int]]] = {
    "read": (GET + b"\r\n", [200]),
    "submit": (WHOLE, [202]),
    "submits": (WHOLE * 3, [202] * 3),
    "submit and a part": (WHOLE + WHOLE[:-1], [202]),
    "read and a part": (GET + b"\r\n" + b"GET /jo", [200]),
    "read and malformed": (GET + b"\r\n" + b"Bad\r\n\r\n", [200, 400]),
    "a part": (WHOLE[:-1], []),
    "a part of a head": (b"GET /jo", []),
    "nothing": (b"", []),
    "lines": (WHOLE.replace(b"json", b"x-ndjson", 1), [200]),
}


async def test_a_client_that_closes_its_sending_side_gets_its_answers(
    strict_port: int, subtests: pytest.Subtests
) -> None:
    for case, (sent, statuses) in HALF_CLOSED.items():
        with subtests.test(case):
            answer = await raw_exchange(strict_port, sent, half_close=True)
            assert [int(status) for status in re.findall(rb"HTTP/1.1 (\d+) ", answer)] == statuses
            if b"ndjson" in sent:
                assert answer.endswith(b"\r\n0\r\n\r\n")


async def test_who_has_closed_the_sending_side_gets_the_end_of_a_job_that_ends_soon(
    api_with_jobs: ApiWithJobs, manual_worker: ManualWorker
) -> None:
    api = api_with_jobs
    wait = f"GET /job/{api.job_id}?wait=30 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    answer = asyncio.create_task(raw_exchange(api.port, wait * 2, half_close=True))
    await eventually(lambda: count_waiters() == 1, "the first request waits")
    await manual_worker.complete()
    assert (await answer).count(b'"status":"completed"') == 2


async def test_who_has_closed_the_sending_side_waits_and_follows_for_two_seconds_at_most(
    api_with_jobs: ApiWithJobs,
) -> None:
    """Such a client may as well be gone."""
    api = api_with_jobs
    wait = f"GET /job/{api.job_id}?wait=30 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    waiting_submit = WHOLE.replace(b"Host", b"Prefer: wait=30\r\nHost")
    events = b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n"
    began = time.monotonic()
    sent = (wait * 2, waiting_submit, events, waiting_submit.replace(b"json", b"x-ndjson", 1))
    waits, submitted, followed, lines = await asyncio.gather(
        *(raw_exchange(api.port, request, half_close=True) for request in sent)
    )
    assert 1.9 <= time.monotonic() - began < 6
    assert waits.count(b"HTTP/1.1 200 ") == waits.count(b'"status":"pending"') == 2
    assert submitted.startswith(b"HTTP/1.1 202 ")
    assert b'"job_id"' in submitted
    assert followed.startswith(b"HTTP/1.1 200 ")
    assert lines.startswith(b"HTTP/1.1 200 ")
    await eventually(lambda: not count_waiters(), "nothing waits")
    await eventually(lambda: not api.server.server_state.tasks, "nothing runs")


CUT_SHORT = {
    "head": b"GET /jo",
    "body": POST + b"Content-Length: 9\r\n\r\n{",
    "chunked body": CHUNKED + b"\r\n" + CHUNK,
    "refused body": POST + b"Content-Length: 99999999\r\n\r\n",
    "lines": POST.replace(b"json", b"x-ndjson") + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNK,
    "result": b"GET /job/RESULT/result HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "results": b"GET /job/RESULT/result HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3,
    "wait": b"GET /job/JOB?wait=30 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "wait and more": b"GET /job/JOB?wait=30 HTTP/1.1\r\nHost: localhost\r\n\r\n" + GET + b"\r\n",
    "events": b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "events and more": b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n" + GET + b"\r\n",
    "malformed": GET + b"Bad Header\r\n\r\n",
    "wait and malformed": b"GET /job/JOB?wait=30 HTTP/1.1\r\nHost: localhost\r\n\r\nBad\r\n",
}
"""What a client has sent when it disconnects."""


@pytest.mark.parametrize("is_reset", [False, pytest.param(True, marks=pytest.mark.soak)])
async def test_a_client_that_disconnects_in_the_middle_is_no_error(
    api_with_jobs: ApiWithJobs,
    caplog: pytest.LogCaptureFixture,
    is_reset: bool,
    subtests: pytest.Subtests,
) -> None:
    for case, sent in CUT_SHORT.items():
        with subtests.test(case):
            caplog.clear()
            await disconnect_in_the_middle(api_with_jobs, sent, is_reset)
            assert [
                record.getMessage()
                for record in caplog.records
                if record.levelno >= logging.WARNING
            ] == []


async def disconnect_in_the_middle(api: ApiWithJobs, sent: bytes, is_reset: bool) -> None:
    """Sends it and disconnects at once, and again once the API has taken the connection."""
    request = sent.replace(b"JOB", api.job_id.encode()).replace(b"RESULT", api.result_id.encode())
    state = api.server.server_state
    clients = []
    for known in (False, True):
        _, writer = await asyncio.open_connection("127.0.0.1", api.port)
        client = writer.get_extra_info("sockname")
        writer.write(request)
        if known:
            await eventually(lambda: is_held(api.server, client), "it is accepted")  # noqa: B023
        if is_reset:
            reset(writer)
        writer.close()
        # A later connection is accepted after this one.
        await first_answer(api.port, GET + b"\r\n")
        clients.append(client)
    for client in clients:
        await eventually(lambda: not is_held(api.server, client), "it is closed")  # noqa: B023
    await eventually(lambda: not state.tasks, "no task of a disconnected client is left", 10)


def is_held(server: Server, client: tuple[str, int]) -> bool:
    return any(
        isinstance(connection, Connection) and connection.client == client
        for connection in server.server_state.connections
    )


async def test_an_offer_to_upgrade_is_answered_as_plain_http(strict_port: int) -> None:
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", strict_port)
    writer.write(GET + offer)
    assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200 ")
    writer.write(GET + b"Connection: close\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
    writer.close()


@pytest.mark.soak
async def test_an_answer_leaves_nothing_for_the_garbage_collector(strict_port: int) -> None:
    """Collecting garbage of answers stopped an API for 10 ms and more, twice a second."""
    body = msgspec.json.encode({"data": ROW})
    request = POST + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    reader, writer = await asyncio.open_connection("127.0.0.1", strict_port)
    await submit_on(reader, writer, request)
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(5):
            await submit_on(reader, writer, request)
        gc.collect()
        modules = {type(garbage).__module__.partition(".")[0] for garbage in gc.garbage}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        writer.close()
    assert not modules & {"asyncinfer", "uvicorn", "starlette"}


async def submit_on(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
) -> None:
    writer.write(request)
    answer = await read_answer(reader)
    assert answer.startswith(b"HTTP/1.1 202 "), answer


class ShortIdleConnection(Connection):
    """A connection that is kept open for only 0.3 s between requests."""

    def __init__(
        self, app: ASGIApp, limits: ConnectionLimits, registry: Registry, short_way: ShortWay | None
    ) -> None:
        short = msgspec.structs.replace(limits, idle_seconds=0.3)
        super().__init__(app, short, registry, short_way)


@pytest.mark.soak
async def test_a_connection_is_closed_when_it_is_idle_and_not_while_it_is_used(
    config: ApiConfig, store: Store
) -> None:
    await announce(store, "iris", default="iris")
    server = hosted(running_server(config, ShortIdleConnection))
    async with server as (_, port), client_of(port) as client:
        job_id = await submit(client)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        look = f"GET /job/{job_id}?wait=0.7 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        for _ in range(2):
            writer.write(look)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()
