"""A submit that fails says whether its job may be stored: not if nothing was sent to Redis."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest
import redis

from asyncinfer.api.config import ApiConfig
from asyncinfer.errors import RedisUnavailable
from asyncinfer.repository import keys
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from asyncinfer.repository.submissions import NewJob, SubmitReply
from tests.api.harness import ROW, announce, running_client
from tests.faults.load_client import LoadClient
from tests.ports import free_port

from .harness import assert_at_rest, eventually
from .proxy import Proxy, proxied

Submit = Callable[[LoadClient, NewJob], Awaitable[SubmitReply]]

LARGE = b"[[%b]]" % b",".join([b"1.0"] * 50_000)
"""Goes over one of the connections for large calls."""


@asynccontextmanager
async def load_client_of(url: str, policy: Policy) -> AsyncIterator[LoadClient]:
    async with Store.open(url, queue_name="predict_queue", policy=policy, name="t") as store:
        yield LoadClient(store)


async def submit_in_a_tick(client: LoadClient, job: NewJob) -> SubmitReply:
    sending = asyncio.create_task(client.submissions.run())
    try:
        return await client.submissions.submit(job)
    finally:
        sending.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sending


async def submit_in_bulk(client: LoadClient, job: NewJob) -> SubmitReply:
    (reply,) = await client.submissions.submit_all([job])
    if isinstance(reply, SubmitReply):
        return reply
    raise reply


SUBMITS = pytest.mark.parametrize(
    ("submit", "data"),
    [(submit_in_a_tick, b"[[1.0]]"), (submit_in_bulk, LARGE)],
    ids=["one", "bulk"],
)


@asynccontextmanager
async def refused(_: str) -> AsyncIterator[str]:
    yield f"redis://127.0.0.1:{free_port()}"


@asynccontextmanager
async def unknown_name(_: str) -> AsyncIterator[str]:
    yield "redis://redis.invalid:6379"


def by_url(template: str) -> Callable[[str], contextlib.AbstractAsyncContextManager[str]]:
    """The server by a URL that it refuses; `PORT` stands for its port."""

    @asynccontextmanager
    async def opened(redis_url: str) -> AsyncIterator[str]:
        async with proxied(redis_url) as proxy:
            yield template.replace("PORT", str(proxy.port))

    return opened


@asynccontextmanager
async def never_connected(redis_url: str) -> AsyncIterator[str]:
    async with proxied(redis_url) as proxy:
        proxy.black_hole()
        yield proxy.url


@SUBMITS
@pytest.mark.parametrize(
    "unreachable",
    [
        pytest.param(refused, id="refused"),
        pytest.param(unknown_name, id="unknown_name"),
        pytest.param(by_url("rediss://127.0.0.1:PORT"), id="no_tls"),
        pytest.param(by_url("redis://somebody:wrong@127.0.0.1:PORT"), id="wrong_password"),
        pytest.param(by_url("redis://127.0.0.1:PORT/1000000"), id="no_such_database"),
        pytest.param(never_connected, id="never_connected"),
    ],
)
async def test_a_submit_without_a_connection_says_that_nothing_was_stored(
    unreachable: Callable[[str], contextlib.AbstractAsyncContextManager[str]],
    data: bytes,
    submit: Submit,
    redis_url: str,
    server: redis.Redis,
    policy: Policy,
) -> None:
    async with unreachable(redis_url) as url, load_client_of(url, policy) as client:
        job = _with_data(client, data)
        with pytest.raises(RedisUnavailable, match="Nothing was stored") as caught:
            await submit(client, job)
    assert caught.value.job_id is None
    assert not server.exists(keys.status(job.job_id))
    assert_at_rest(server, "predict_queue")


@SUBMITS
@pytest.mark.parametrize("is_refused_then", [False, True], ids=["silent", "then refused"])
async def test_a_submit_that_may_have_reached_redis_names_its_job(
    is_refused_then: bool,
    data: bytes,
    submit: Submit,
    redis_url: str,
    server: redis.Redis,
    policy: Policy,
) -> None:
    async with proxied(redis_url) as proxy, load_client_of(proxy.url, policy) as client:
        assert (await submit(client, _with_data(client, data))).verdict == "ok"
        job = _with_data(client, data)
        proxy.swallow_requests_with(job.job_id.encode())
        async with asyncio.TaskGroup() as group:
            submitting = group.create_task(_error_of(submit, client, job))
            if is_refused_then:
                group.create_task(_end_once_sent(proxy, submitting))
        error = submitting.result()
    assert "Nothing was stored" not in error.detail
    assert error.job_id == job.job_id
    server.flushall()


async def _error_of(submit: Submit, client: LoadClient, job: NewJob) -> RedisUnavailable:
    with pytest.raises(RedisUnavailable) as caught:
        await submit(client, job)
    return caught.value


async def _end_once_sent(proxy: Proxy, submitting: "asyncio.Task[RedisUnavailable]") -> None:
    await eventually(lambda: proxy.requests_swallowed > 0, "the submit has been sent")
    await proxy.down()
    assert not submitting.done()


def _with_data(client: LoadClient, data: bytes) -> NewJob:
    job = client.new_job(1.0)
    return NewJob(job.job_id, job.queue, data, job.record)


@pytest.mark.parametrize("media_type", ["application/json", "application/x-ndjson"])
async def test_over_http_a_refused_connection_is_a_503_without_a_job_id(
    media_type: str, redis_url: str, store: Store, policy: Policy
) -> None:
    await announce(store, "iris", default="iris")
    async with (
        proxied(redis_url) as proxy,
        running_client(ApiConfig(redis_url=proxy.url, policy=policy)) as client,
    ):
        assert (await client.get("/models")).status_code == 200
        await proxy.down()
        answer = await client.post(
            "/predict",
            content=msgspec.json.encode({"data": ROW}) + b"\n",
            headers={"content-type": media_type},
        )
    problem = json.loads(answer.text.splitlines()[0])
    assert (problem["status"], problem["code"]) == (503, "redis_unavailable")
    assert "Nothing was stored" in problem["detail"]
    assert "job_id" not in problem
