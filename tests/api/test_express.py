"""A usual submit takes a short way, which a client cannot tell from the ordinary one."""

import asyncio
import logging
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final, cast

import msgspec
import pytest
import redis

from asyncinfer.api.app import Api
from asyncinfer.api.config import ApiConfig
from asyncinfer.api.http.connection import Connection
from asyncinfer.api.http.exchange import Exchange
from asyncinfer.api.server import Server
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from asyncinfer.repository.submissions import Submissions
from tests.faults.harness import eventually
from tests.faults.proxy import proxied
from tests.queue_driver import new_job

from .harness import QUEUE, announce, client_of, hosted, reset, running_server, submit
from .http_shapes import ALIVE, BODY, CHUNKED, CHUNKS, HOST, JSON, LENGTH, POST, SHAPES

CRLF: Final = b"\r\n"
LAST: Final = ALIVE + b"Connection: close\r\n\r\n"
USUAL: Final = POST + LENGTH + CRLF + BODY
MODEL: Final = USUAL.replace(b"/predict", b"/predict/iris")


def with_body(body: bytes, *lines: bytes, path: bytes = b"/predict") -> bytes:
    """A submit of a body, with these header lines beside the usual ones."""
    head = POST.replace(b"/predict", path) + b"Content-Length: %d\r\n" % len(body)
    return head + b"".join(line + CRLF for line in lines) + CRLF + body


def _wide(size_bytes: int) -> bytes:
    return BODY[:-1] + b" " * (size_bytes - len(BODY)) + b"}"


BODIES: Final = (
    BODY,
    b'{"data":[[1,2,3,4],[5,6,7,8]]}',
    b'\xef\xbb\xbf{"data":[[1,2,3,4]]}',
    b'{"data":[[1,2,3]]}',
    b'{"data":[[1,2,3,"x"]]}',
    b'{"data":[[1,2,3,null]]}',
    b'{"data":[[1,2,3,NaN]]}',
    b'{"data":[]}',
    b'{"data":[[1,2,3,4]],"data":[[1,2,3,4]]}',
    b'{"data":[[1,2,3,4]],"more":1}',
    b'{"data":[[1,2,3,4]],"options":{"priority":"high","ttl_seconds":60}}',
    b'{"data":[[1,2,3,4]],"options":{"ttl_seconds":100000000}}',
    b'{"data":[[1,2,3,4]],"options":{"version":"9"}}',
    b'{"data":[[1,2,3,4]],"options":{"start_within_seconds":9,"group":"g"}}',
    b'{"data":[[1,2,3,4]],"options":{"webhook":{"url":"https://example.com/"}}}',
    b'{"data":[[1,2,3,4]],"options":{"webhook":{"url":"http://example.com/"}}}',
    b'{"data":[[1,2,3,4]],"options":{"webhook":{"url":"https://127.0.0.1/"}}}',
    b'{"data":[[1,2,3,4]],"options":{"webhook":{"metadata":{}}}}',
    b'{"inputs":[{"name":"input","shape":[1,4],"datatype":"FP32","data":[1,2,3,4]}]}',
    b"{}",
    b"[",
    b"null",
    b"\xff",
    b"[" * 5000,
    _wide(1 << 16),
    _wide((1 << 16) + 1),
    b'{"data":[%b]}' % b",".join([b"[1,2,3,4]"] * 400),
)
LINES: Final = (
    b"Prefer: wait=0",
    b"Prefer: wait=x",
    b"Prefer: respond-async",
    b"Idempotency-Key: " + b"k" * 300,
    b"Accept: application/octet-stream",
    b"Accept: text/html",
    b"Content-Encoding: identity",
    b"Content-Encoding: gzip",
    b"Content-Type: application/json",
    b"Inference-Header-Content-Length: 24",
    b"Inference-Header-Content-Length: 10",
    b"Origin: http://localhost",
    b"Origin: https://elsewhere.example",
    b"Host: localhost",
    b"Authorization: Bearer key",
    b"X-API-Key: key",
    b"Expect: 100-continue",
    b"Expect: other",
    b"Connection: close",
    b"Connection: keep-alive",
)
PATHS: Final = (
    *(b"/predict/iris", b"/predict/digits", b"/predict/nothing", b"/predict/", b"/predict//iris"),
    *(b"/predict/%69ris", b"/predict/iris%0a", b"/predict%2firis", b"/predict/iris/x"),
    *(
        b"/predictiris",
        b"/x/predict/iris",
        b"/predict?",
        b"/predict?priority=high",
        b"/predict?x=1",
    ),
    *(b"/predict/iris?version=1", b"http://localhost/predict", b"/models/iris/validate"),
)


def _corpus() -> Iterator[bytes]:
    """Requests to compare the two ways by, good and bad."""
    yield from (shape.sent for shape in SHAPES if b"/predict" in shape.sent)
    yield from _whole_requests()


def _whole_requests() -> Iterator[bytes]:
    """Those of the corpus that end. Whether a part of one is answered before its client is seen to
    have ended it, is a matter of time."""
    yield from map(with_body, BODIES)
    yield from (with_body(BODY, line) for line in LINES)
    yield from (with_body(BODY, path=path) for path in PATHS)
    yield USUAL * 3
    yield MODEL + USUAL + b"\x00\xff"
    yield USUAL + b"GET"
    yield USUAL.replace(b"POST", b"PUT")
    yield USUAL.replace(HOST, b"Host: elsewhere.example\r\n")
    yield USUAL.replace(JSON, b"Content-Type: application/json; charset=utf-8\r\n")
    yield USUAL.replace(JSON, b"Content-Type: text/plain\r\n")
    yield POST + CHUNKED + CRLF + CHUNKS


class TwoApis:
    """Two APIs on one Redis, one with the short way and one without."""

    def __init__(self, *servers: tuple[Server, int]) -> None:
        self._servers = servers

    async def assert_equal_answers(self, sent: bytes) -> bytes:
        """Returns the answer. The bytes are sent in one packet, and again in two, cut after the
        first head."""
        cut = sent.find(b"\r\n\r\n") + 4
        await self._assert_equal_answers(sent + LAST)
        return await self._assert_equal_answers(sent[:cut], sent[cut:] + LAST)

    async def assert_equal_answers_after_the_end(self, sent: bytes) -> None:
        """As `assert_equal_answers`, to a client that closes its sending side behind the bytes."""
        await self._assert_equal_answers(sent, b"")

    async def _assert_equal_answers(self, *parts: bytes) -> bytes:
        answers = (self._answer(*api, parts) for api in self._servers)
        short, ordinary = await asyncio.gather(*answers)
        assert short == ordinary, parts
        return short

    async def leave_after(self, sent: bytes) -> None:
        """Sends the begin of a request to both, and leaves once it was read."""
        for server, port in self._servers:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            name = name_of(writer)
            await eventually(lambda s=server, n=name: _has_read_a_head(s, n), "the head is read")  # type: ignore[misc]
            writer.transport.abort()

    def has_counted(self, requests: int) -> bool:
        """Whether each has counted so many requests."""
        apis = (cast(Api, server.config.app) for server, _ in self._servers)
        return all(sum(_counts_of(api).values()) == requests for api in apis)

    def counts(self) -> dict[str, int]:
        """What both have counted of requests, submits and refusals, which must be equal."""
        short, ordinary = (_counts_of(cast(Api, server.config.app)) for server, _ in self._servers)
        assert short == ordinary
        return short

    async def _answer(self, server: Server, port: int, parts: tuple[bytes, ...]) -> bytes:
        """All that the API answers, without dates and ids; an empty part ends what is sent."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        name = name_of(writer)
        answer = asyncio.create_task(reader.read())
        try:
            for place, part in enumerate(parts):
                if part:
                    writer.write(part)
                else:
                    writer.write_eof()
                if place + 1 < len(parts) and parts[-1]:
                    await eventually(
                        lambda: answer.done() or _has_read_a_head(server, name), "the head is read"
                    )
            async with asyncio.timeout(20):
                return _comparable(await answer)
        except ConnectionResetError:
            return b"reset"
        finally:
            writer.close()


def _counts_of(api: Api) -> dict[str, int]:
    """By name and labels, without what is 0."""
    figures = api.figures()
    requests = figures.histograms["asyncinfer_request_seconds"]
    found = {" ".join(key): sum(histogram.counts) for key, histogram in requests.items()}
    for name in ("asyncinfer_submits", "asyncinfer_refusals"):
        for labels, count in figures.counts[name].items():
            found[" ".join((name, *labels))] = int(count)
    return {key: count for key, count in found.items() if count}


def _has_read_a_head(server: Server, client: tuple[str, int]) -> bool:
    return any(held.client == client and held._latest for held in connections(server))


def connections(server: Server) -> list[Connection]:
    return [held for held in server.server_state.connections if isinstance(held, Connection)]


def name_of(writer: asyncio.StreamWriter) -> tuple[str, int]:
    name: tuple[str, int] = writer.get_extra_info("sockname")
    return name


def _comparable(answer: bytes) -> bytes:
    without_date = re.sub(rb"\r\ndate: [^\r]+", b"", answer)
    return re.sub(rb"[0-9a-f]{32}|(?<=x-request-id: )[0-9a-f]{16}", b"ID", without_date)


@pytest.fixture
async def two_apis(redis_url: str, store: Store) -> AsyncIterator[TwoApis]:
    config = ApiConfig(redis_url=redis_url, policy=Policy(max_queue=100_000))
    async with hosted(_two_apis(config, store)) as apis:
        yield apis


@asynccontextmanager
async def _two_apis(config: ApiConfig, store: Store) -> AsyncIterator[TwoApis]:
    await announce(store, "iris", "digits", default="iris")
    announcement = {"models": ["iris", "digits"], "state": "ready"}
    await Announcements(store).announce_worker("h-1-aaaaaa", announcement, ttl_seconds=60)
    ordinary = msgspec.structs.replace(config, express=False)
    async with running_server(config) as short, running_server(ordinary) as other:
        yield TwoApis(short, other)


async def compare_all(
    compare: Callable[[bytes], Awaitable[object]], requests: Iterable[bytes]
) -> None:
    slots = asyncio.Semaphore(20)

    async def compare_one(sent: bytes) -> None:
        async with slots:
            await compare(sent)

    async with asyncio.TaskGroup() as group:
        for sent in requests:
            group.create_task(compare_one(sent))


async def test_both_ways_give_the_same_answers_byte_by_byte(two_apis: TwoApis) -> None:
    await compare_all(two_apis.assert_equal_answers, _corpus())
    two_apis.counts()


async def test_both_ways_give_a_client_that_closes_its_sending_side_the_same_answers(
    two_apis: TwoApis,
) -> None:
    await compare_all(two_apis.assert_equal_answers_after_the_end, _whole_requests())
    two_apis.counts()


async def test_each_submit_is_counted_once_by_either_way(two_apis: TwoApis) -> None:
    unknown, invalid = with_body(BODY, path=b"/predict/nothing"), with_body(b'{"data":[[1]]}')
    for sent in (USUAL, MODEL, USUAL * 3, unknown, invalid):
        await two_apis.assert_equal_answers(sent)
    assert two_apis.counts() == {
        "POST /predict 202 no": 2 * 4,
        "POST /predict/{model} 202 no": 2,
        "POST /predict/{model} 404 no": 2,
        "POST /predict 422 no": 2,
        "GET /health/live 200 no": 2 * 5,
        "asyncinfer_submits iris": 2 * 5,
        "asyncinfer_refusals model_not_found": 2,
        "asyncinfer_refusals invalid_input": 2,
    }


async def test_a_client_that_leaves_before_the_end_of_its_body_is_counted_by_either_way(
    two_apis: TwoApis,
) -> None:
    await two_apis.leave_after(USUAL[:-1])
    await eventually(lambda: two_apis.has_counted(1), "both have counted it")
    assert two_apis.counts() == {"POST /predict 499 no": 1}


@pytest.mark.parametrize("refusal", ["full", "takes no writes", "silent"])
async def test_both_ways_give_the_same_reason_for_a_job_that_is_not_accepted(
    redis_url: str, store: Store, server: redis.Redis, refusal: str
) -> None:
    async with proxied(redis_url) as proxy:
        config = ApiConfig(redis_url=proxy.url, policy=Policy(max_queue=1))
        async with _two_apis(config, store) as apis:
            if refusal == "full":
                await Submissions(store).submit_many(QUEUE, [new_job()])
            elif refusal == "takes no writes":
                server.config_set("min-replicas-to-write", "1")
            else:
                proxy.black_hole()
            try:
                answers = await apis.assert_equal_answers(USUAL)
            finally:
                server.config_set("min-replicas-to-write", "0")
                proxy.restore()
            counts = apis.counts()
    status, code = {
        "full": ("429", "queue_full"),
        "takes no writes": ("503", "too_few_replicas"),
        "silent": ("503", "redis_unavailable"),
    }[refusal]
    assert answers.startswith(f"HTTP/1.1 {status} ".encode())
    assert counts[f"POST /predict {status} no"] == counts[f"asyncinfer_refusals {code}"] == 2
    assert "asyncinfer_submits iris" not in counts


@pytest.mark.parametrize("sent", [USUAL, MODEL], ids=["default model", "named model"])
@pytest.mark.parametrize("is_cut", [False, True], ids=["one packet", "two packets"])
async def test_a_usual_submit_takes_the_short_way(
    config: ApiConfig, store: Store, has_short_way: bool, sent: bytes, is_cut: bool
) -> None:
    await announce(store, "iris", default="iris")
    async with running_server(config) as (api, port):
        tasks = api.server_state.tasks = CountingSet()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        cut = sent.find(b"\r\n\r\n") + 4
        if is_cut:
            writer.write(sent[:cut])
            await eventually(lambda: _has_read_a_head(api, name_of(writer)), "the head is read")
        writer.write(sent[cut:] if is_cut else sent)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 202 ")
        writer.close()
    assert tasks.added == (0 if has_short_way else 1)


class CountingSet(set[Any]):
    """A set that counts what is added to it."""

    added = 0

    def add(self, element: Any) -> None:
        self.added += 1
        super().add(element)


async def test_a_submit_that_is_under_way_when_the_server_stops_is_answered(
    config: ApiConfig, store: Store, server: redis.Redis
) -> None:
    await announce(store, "iris", default="iris")
    async with proxied(config.redis_url) as proxy:
        away = msgspec.structs.replace(config, redis_url=proxy.url)
        async with running_server(away) as (api, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            async with client_of(port) as client:
                await submit(client)
            proxy.black_hole()
            writer.write(USUAL)
            (connection,) = [held for held in connections(api) if held.client == name_of(writer)]
            await eventually(lambda: connection._latest is not None, "the request is read")
            connection.shutdown()
            proxy.restore()
            answer = await reader.read()
            writer.close()
    assert answer.startswith(b"HTTP/1.1 202 ")
    assert b"\r\nconnection: close\r\n" in answer
    assert server.llen(QUEUE) == 2


async def test_a_submit_whose_client_has_left_is_stored_once(
    config: ApiConfig, store: Store, server: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    await announce(store, "iris", default="iris")
    async with proxied(config.redis_url) as proxy:
        away = msgspec.structs.replace(config, redis_url=proxy.url)
        async with running_server(away) as (api, port), client_of(port) as client:
            await submit(client)
            proxy.black_hole()
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(USUAL)
            await eventually(lambda: _has_read_a_head(api, name_of(writer)), "it is read")
            reset(writer)
            await eventually(lambda: len(connections(api)) == 1, "the client has left")
            proxy.restore()
            await eventually(lambda: server.llen(QUEUE) == 2, "the job is stored")
            await submit(client)
    assert server.llen(QUEUE) == 3
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


class NarrowConnection(Connection):
    """A connection of which the system keeps hardly any bytes that its client does not read."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        super().connection_made(transport)


async def test_answers_to_a_client_that_reads_none_do_not_pile_up(
    config: ApiConfig, store: Store
) -> None:
    await announce(store, "iris", default="iris")
    async with running_server(config, NarrowConnection) as (api, port), client_of(port) as client:
        with socket.socket() as unread:
            unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            unread.connect(("127.0.0.1", port))
            await eventually(lambda: len(connections(api)) == 1, "the client is connected")
            (connection,) = connections(api)

            def latest_if_answered() -> Exchange | None:
                latest = connection._latest
                return latest if latest and latest.is_answered else None

            while not connection.is_writing_paused:
                before = connection._latest
                unread.sendall(USUAL)
                await eventually(
                    lambda: latest_if_answered() not in (None, before),  # noqa: B023
                    "the request is answered",
                )
            before = connection._latest
            unread.sendall(USUAL)
            await eventually(lambda: connection._latest is not before, "one more request is read")
            await submit(client)
            await submit(client)
            assert latest_if_answered() is None
