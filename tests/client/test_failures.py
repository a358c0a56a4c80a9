"""Errors of the client: each is one clear line with the remedy in it."""

import asyncio
import gzip
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest

from asyncinfer import api_keys
from asyncinfer.client import (
    AsyncClient,
    AsyncinferError,
    Cadence,
    CannotSend,
    ClearedJobs,
    Client,
    ConnectionFailed,
    Forbidden,
    Health,
    InvalidInput,
    JobNotFound,
    ModelNotFound,
    NotAsyncinfer,
    PausedState,
    QueueFull,
    RequestError,
    Unauthorized,
    WaitTimeout,
    WrongAddress,
)
from asyncinfer.client._drivers import ResponseBody
from asyncinfer.client._errors import problem_error
from asyncinfer.client._events import EventSubscription
from asyncinfer.client._protocol import Response
from asyncinfer.client._requests import RemoteServer
from asyncinfer.errors import RedisRefused, RouteNotFound
from asyncinfer.testing import Running, service
from tests.faults.harness import stop_listening
from tests.faults.proxy import Proxy, proxied
from tests.ports import free_port

SETOSA: Final = [5.1, 3.5, 1.4, 0.2]


def assert_one_line(error: AsyncinferError) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 400


def test_a_server_that_is_not_there_is_reported_at_once() -> None:
    begun = time.monotonic()
    with (
        Client(f"http://127.0.0.1:{free_port()}") as client,
        pytest.raises(ConnectionFailed, match=r"nothing listens.*asyncinfer serve") as refused,
    ):
        client.predict([SETOSA])

    assert time.monotonic() - begun < 2
    assert_one_line(refused.value)
    assert isinstance(refused.value, ConnectionError)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://a", "http://", "http://[oops"])
def test_an_invalid_address_is_refused_before_anything_is_sent(url: str) -> None:
    with pytest.raises(WrongAddress, match="give one such as http://127"):
        Client(url)


def test_an_invalid_key_is_not_shown() -> None:
    with pytest.raises(WrongAddress) as refused:
        AsyncClient("http://127.0.0.1:1", "a sécret")
    assert "cret" not in str(refused.value)


def test_a_path_in_the_address_is_reported(running: Running) -> None:
    with (
        Client(f"{running.url}/api") as client,
        pytest.raises(RouteNotFound, match="the server's address alone"),
    ):
        client.health()


def test_a_fault_of_an_input_is_reported_with_its_place(client: Client) -> None:
    with pytest.raises(InvalidInput, match="row 1 has 3 numbers, iris takes 4") as refused:
        client.predict([SETOSA, [1, 2, 3]])
    assert refused.value.faults[0].pointer == "/data/1"
    assert_one_line(refused.value)

    with pytest.raises(ModelNotFound, match=r"'irs'.*iris"):
        client.predict([SETOSA], "irs")
    with pytest.raises(JobNotFound, match="no job with this id"):
        client.job("nothing")


def test_an_input_that_cannot_be_sent_is_reported(client: Client) -> None:
    with pytest.raises(CannotSend, match="Give lists, arrays"):
        client.predict([object()])
    with pytest.raises(CannotSend, match=r"several inputs.*'a', 'b', 'c'"):
        client.predict({1, 2}, "several")
    with pytest.raises(CannotSend, match=r"from -3\.4"):
        client.predict({"input": [[1e39] * 4]}, "iris")


# --- keys --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The URL of a service that requires keys, and a key that may only read."""
    path: Path = tmp_path_factory.mktemp("keys") / "api_keys"
    key = api_keys.new_key()
    path.touch(mode=0o600)
    path.write_text(f"{api_keys.entry_of(key, 'acme', 'read').line()}\n")
    with service(api_keys=path) as running:
        yield running.url, key


def test_a_missing_and_a_wrong_key_are_reported_with_the_remedy(guarded: tuple[str, str]) -> None:
    url, _ = guarded
    for key in (None, "ai_wrong"):
        with Client(url, key) as client, pytest.raises(Unauthorized, match="api_key="):
            client.predict([SETOSA])


def test_a_key_without_the_scope_is_reported(guarded: tuple[str, str]) -> None:
    with Client(*guarded) as client:
        assert client.models()
        with pytest.raises(Forbidden, match="submit"):
            client.predict([SETOSA])


# --- answers of other servers ------------------------------------------------------------------

ANSWERS: Final = [
    (b"200 OK", b"text/html", b"<h1>It works!</h1>"),
    (b"404 Not Found", b"text/html", b"<h1>Not here</h1>"),
    (b"200 OK", b"application/json", b'{"hello": "world"}'),
    (b"200 OK", b"application/json", b"[]"),
    (b"403 Forbidden", b"application/json", b'{"message": "no"}'),
]


@asynccontextmanager
async def answering_server(
    answer: Callable[[], bytes], requests: list[bytes] | None = None
) -> AsyncIterator[str]:
    """The URL of another program, which gives one answer; its requests are added to `requests`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.read(65536)
        if requests is not None:
            requests.append(request)
        writer.write(answer())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await stop_listening(server)


def _http(status: bytes, kind: bytes, body: bytes, more: bytes = b"") -> bytes:
    head = b"HTTP/1.1 %b\r\nContent-Type: %b\r\nContent-Length: %d\r\n%bConnection: close\r\n\r\n"
    return head % (status, kind, len(body), more) + body


@pytest.mark.parametrize("answer", ANSWERS)
async def test_another_server_is_recognised(answer: tuple[bytes, bytes, bytes]) -> None:
    calls: list[Callable[[AsyncClient], Awaitable[object]]] = [
        lambda client: client.predict([SETOSA]),
        lambda client: client.submit([SETOSA]),
        lambda client: client.health(),
        lambda client: client.models(),
        lambda client: client.jobs(),
    ]
    async with answering_server(lambda: _http(*answer)) as url, AsyncClient(url) as client:
        for call in calls:
            with pytest.raises(NotAsyncinfer, match="not how asyncinfer answers") as refused:
                await call(client)
            assert_one_line(refused.value)


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b'{"models": 7}', b'{"models": [{"model": 7}]}', b'{"models": [[]]}']
)
async def test_json_of_another_server_is_recognised(body: bytes) -> None:
    async with (
        answering_server(lambda: _http(b"200 OK", b"application/json", body)) as url,
        AsyncClient(url) as client,
    ):
        with pytest.raises(NotAsyncinfer, match="asyncinfer") as refused:
            await client.models()
        assert_one_line(refused.value)


@pytest.mark.parametrize(
    "body",
    [b"{}", b"[]", b"7", b'{"cancelled": "x", "retried": 7, "queues": [{}], "workers": {}}'],
)
async def test_an_answer_that_is_not_understood_is_one_error(body: bytes) -> None:
    calls: list[Callable[[AsyncClient], Awaitable[object]]] = [
        lambda client: client.cancel_all(group="a"),
        lambda client: client.cancel_all(["a"]),
        lambda client: client.retry_all(group="a"),
        lambda client: client.retry_all(["a"]),
        lambda client: client.purge(group="a"),
        lambda client: client.cancel_queue("a"),
        lambda client: client.pause("a"),
        lambda client: client.resume("a"),
        lambda client: client.queues(),
        lambda client: client.workers(),
        lambda client: client.audit(),
        lambda client: client.health(),
        lambda client: client.catalog(),
        lambda client: client.group("a"),
        lambda client: client.job("a"),
        lambda client: client.validate([SETOSA], "a"),
    ]
    async with (
        answering_server(lambda: _http(b"200 OK", b"application/json", body)) as url,
        AsyncClient(url) as client,
    ):
        for call in calls:
            with pytest.raises(NotAsyncinfer, match="not how asyncinfer answers") as refused:
                await call(client)
            assert_one_line(refused.value)


@pytest.mark.parametrize("time", [b'"yesterday"', b'"2026-01-01T00:00:00"', b"{}"])
async def test_a_job_with_times_that_are_none_is_not_one_of_asyncinfer(time: bytes) -> None:
    body = b'{"job_id": "a", "status": "pending", "created_at": %b, "later": 1}' % time
    async with (
        answering_server(lambda: _http(b"200 OK", b"application/json", body)) as url,
        AsyncClient(url) as client,
    ):
        with pytest.raises(NotAsyncinfer, match="created_at"):
            await client.job("a")


async def test_what_a_newer_server_adds_is_ignored() -> None:
    body = b'{"status": "ok", "model": "a", "paused": true, "cancelled": 1, "later": {"x": 1}}'
    async with (
        answering_server(lambda: _http(b"200 OK", b"application/json", body)) as url,
        AsyncClient(url) as client,
    ):
        assert await client.health() == Health(status="ok")
        assert await client.pause("a") == PausedState("a", True)
        assert await client.cancel_all(group="a") == ClearedJobs(cancelled=1)


async def test_an_answer_is_requested_uncompressed() -> None:
    """A few bytes may unpack to gigabytes."""
    packed = gzip.compress(b" " * 1_000_000 + b"{}")
    reply = _http(b"200 OK", b"application/json", packed, b"Content-Encoding: gzip\r\n")
    heads: list[bytes] = []
    async with answering_server(lambda: reply, heads) as url, AsyncClient(url) as client:
        with pytest.raises(NotAsyncinfer):
            await client.models()
    assert b"accept-encoding: identity" in heads[0].lower()


def test_an_answer_that_goes_on_for_ever_is_cut() -> None:
    body = ResponseBody()
    chunk = bytes(1 << 20)
    taken = sum(body.add(chunk) for _ in range(1100))
    assert taken == 1024
    assert body.content() == b""


@pytest.mark.parametrize("key", ["", "a\r\nX: y", "é", "a b", "k" * 256])
async def test_an_invalid_idempotency_key_is_refused_before_it_is_sent(key: str) -> None:
    """Else an empty key, of a variable that was not set, would be left out in silence."""
    async with AsyncClient("http://127.0.0.1:9") as client:
        with pytest.raises(InvalidInput, match="idempotency_key takes"):
            await client.submit([SETOSA], idempotency_key=key)


@pytest.mark.parametrize("name", ["", ".", ".."])
async def test_a_name_that_is_a_step_in_a_path_is_refused_before_it_is_sent(name: str) -> None:
    async with AsyncClient("http://127.0.0.1:9") as client:
        for request in (client.job(name), client.group(name), client.model(name)):
            with pytest.raises(InvalidInput, match="name"):
                await request


@pytest.mark.soak
async def test_an_answer_that_is_not_http_is_reported_at_once() -> None:
    async with (
        answering_server(lambda: b"SSH-2.0-OpenSSH_9.2\r\n") as url,
        AsyncClient(url) as client,
    ):
        async with asyncio.timeout(5):
            with pytest.raises(ConnectionFailed, match="No answer from http"):
                await client.health()


def test_of_two_classes_with_one_code_the_base_class_is_raised() -> None:
    problem = {"code": "redis_refused", "detail": "Redis refused."}
    assert type(problem_error(problem, None)) is RedisRefused


async def test_an_error_of_a_newer_server_keeps_its_text() -> None:
    body = b'{"code": "moon_phase", "detail": "Wait for the new moon.", "status": 409}'
    problem = _http(b"409 Conflict", b"application/problem+json", body)
    async with answering_server(lambda: problem) as url, AsyncClient(url) as client:
        with pytest.raises(RequestError, match="new moon"):
            await client.health()


# --- away for a while --------------------------------------------------------------------------


async def test_retry_after_is_honoured_and_the_last_error_is_the_servers() -> None:
    body = b'{"code": "queue_full", "detail": "Full. Retry later.", "status": 429}'
    full = _http(b"429 Full", b"application/problem+json", body, b"Retry-After: 1\r\n")
    begun = time.monotonic()
    async with answering_server(lambda: full) as url, AsyncClient(url, retries=1) as client:
        with pytest.raises(QueueFull, match="Full"):
            await client.submit([SETOSA])

    assert 1 <= time.monotonic() - begun < 10


def test_a_stream_of_events_is_requested_again_within_half_a_minute() -> None:
    server = RemoteServer("http://127.0.0.1:8000", {}, timeout_seconds=60, retries=5)
    subscription = EventSubscription(server, job_id="some")

    for _ in range(server.retries):
        subscription.handle(Response(503, {}, b""))
        assert subscription.pause_seconds <= 30

    with pytest.raises(AsyncinferError):
        subscription.handle(Response(503, {}, b""))


async def test_why_a_request_is_sent_again_is_said_and_its_time_may_be_limited() -> None:
    body = b'{"code": "queue_full", "detail": "Full. Retry later.", "status": 429}'
    full = _http(b"429 Full", b"application/problem+json", body)
    lines: list[str] = []
    cadence = Cadence(first_check_seconds=0.0)
    async with (
        answering_server(lambda: full) as url,
        AsyncClient(url, total_timeout=0.3, on_wait=lines.append, cadence=cadence) as client,
    ):
        with pytest.raises(WaitTimeout, match="Full"):
            await client.submit([SETOSA])

    def plain() -> None:
        with (
            Client(url, retries=9, total_timeout=0.3, on_wait=lines.append) as client,
            pytest.raises(ConnectionFailed),
        ):
            client.submit([SETOSA])

    await asyncio.to_thread(plain)
    assert lines == ["It is tried again: Full. Retry later."]


@pytest.fixture
async def proxy(running: Running) -> AsyncIterator[Proxy]:
    async with proxied(running.url) as started:
        yield started


@pytest.mark.soak
async def test_submits_whose_answers_are_cut_make_one_job_each(proxy: Proxy) -> None:
    async with AsyncClient(f"http://127.0.0.1:{proxy.port}") as client:
        await client.health()
        proxy.cut_reply_to(b"POST /predict", times=2)
        job = await client.submit([SETOSA], group="cut")
        proxy.cut_reply_to(b"POST /predict", times=2)
        result = await client.predict([SETOSA], group="cut")

        assert proxy.replies_cut == 4
        assert result["class_name"] == "setosa"
        assert len(await client.jobs(group="cut")) == 2
        assert job.id in [listed.id for listed in await client.jobs(group="cut")]


async def test_the_very_first_answer_may_be_cut(proxy: Proxy) -> None:
    proxy.cut_reply_to(b"GET /health")
    async with AsyncClient(f"http://127.0.0.1:{proxy.port}") as client:
        assert (await client.health()).status == "ok"


async def test_a_cancel_and_a_retry_succeed_when_their_first_answer_was_cut(proxy: Proxy) -> None:
    async with AsyncClient(f"http://127.0.0.1:{proxy.port}") as client:
        await client.pause("iris")
        job = await client.submit([SETOSA])
        proxy.cut_reply_to(b"DELETE /job")
        assert (await job.cancel()).status == "cancelled"
        proxy.cut_reply_to(b"/retry")
        assert (await job.retry()).status == "pending"
        await client.resume("iris")
        assert (await job)["class_name"] == "setosa"


async def test_a_map_whose_answers_are_cut_loses_and_repeats_nothing(proxy: Proxy) -> None:
    rows = [[float(number % 3)] for number in range(200)]
    async with AsyncClient(f"http://127.0.0.1:{proxy.port}") as client:
        await client.model("picky")
        proxy.cut_reply_to(b"POST /predict", times=5)
        results = client.map(rows, "picky", batch=10, progress=False)
        found = [result.item() async for result in results]

        assert proxy.replies_cut == 5
        assert found == [number % 3 for number in range(200)]
        assert (await client.group(results.group)).jobs == 20


async def test_events_are_resumed_after_a_cut_where_they_stopped(proxy: Proxy) -> None:
    async with AsyncClient(f"http://127.0.0.1:{proxy.port}") as client:
        await client.pause("iris")
        job = await client.submit([SETOSA])
        names = []
        async with asyncio.timeout(20):
            async for event in job.events():
                names.append(event.name)
                if names == ["snapshot"]:
                    await proxy.down()
                    await proxy.up()
                    await client.resume("iris")

    assert names[0] == "snapshot"
    assert names[-1] == "completed"
    assert names.count("snapshot") == 1
