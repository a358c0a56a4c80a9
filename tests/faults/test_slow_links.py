"""A Redis behind a narrow or distant link: large inputs and results pass, and nothing hangs."""

import asyncio
import io
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import httpx2
import numpy as np
import numpy.typing as npt
import pytest
import redis

from asyncinfer.api.config import ApiConfig
from asyncinfer.repository import keys
from asyncinfer.repository.endpoint import Endpoint
from asyncinfer.repository.link import Link, pack_in_pieces
from asyncinfer.repository.policy import Policy
from tests import zoo
from tests.api.harness import assert_problem, client_of, hosted, running
from tests.zoo.model_builder import node

from .harness import Halts, eventually
from .processes import OpenWorkers, WorkerChild, WorkerOptions
from .proxy import Proxy, proxied

_MB: Final = 1_000_000
_NARROW: Final = 5 * _MB
"""Bytes per second of a link of 40 Mbit/s."""

_NPY: Final = {"content-type": "application/x-npy", "accept": "application/x-npy"}
_OUTAGE_SECONDS: Final = 1.5
"""In this time a submit is answered although Redis is away."""

_PATIENCE_SECONDS: Final = 30.0
"""In this time a large transfer that stops making progress is given up."""

Numbers = npt.NDArray[np.float32]


@pytest.fixture
def policy() -> Policy:
    """Of a lease that is long enough for a large input on a busy machine."""
    return Policy()


@pytest.fixture
def twice(tmp_path: Path, policy: Policy) -> WorkerOptions:
    """The options of workers that serve a model whose result is its input twice."""
    concat = node("Concat", ["x", "x"], ["y"], axis=1)
    x, y = zoo.tensor("x", ["batch", "columns"]), zoo.tensor("y", ["batch", "doubled"])
    zoo.place(tmp_path / "models", "twice", zoo.model([concat], [x], [y]))
    return WorkerOptions(model_dir=str(tmp_path / "models"), models=("twice",), policy=policy)


@pytest.fixture
async def worker(
    server: redis.Redis, open_workers: OpenWorkers, twice: WorkerOptions
) -> AsyncIterator[WorkerChild]:
    """A worker beside Redis that serves `twice`."""
    with open_workers(**twice) as workers:
        worker = workers.start()
        await eventually(lambda: worker.is_announced(server), "the worker is ready")
        yield worker


@pytest.fixture
async def proxy(redis_url: str) -> AsyncIterator[Proxy]:
    """The link between an API and Redis, which is fast as yet."""
    async with hosted(proxied(redis_url)) as proxy:
        yield proxy


@asynccontextmanager
async def _open_api(proxy: Proxy, policy: Policy) -> AsyncIterator[httpx2.AsyncClient]:
    """Starts an API; ends with a link that is fast again, so that it can close."""
    config = ApiConfig(redis_url=proxy.url, policy=policy)
    async with running(config) as port, client_of(port) as client:
        try:
            yield client
        finally:
            proxy.restore()
            proxy.limit_rate(math.inf)
            proxy.add_latency(0)


@pytest.fixture
async def client(
    proxy: Proxy, policy: Policy, worker: WorkerChild
) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of an API behind `proxy`, which is connected to Redis already."""
    async with hosted(_open_api(proxy, policy)) as client:
        assert (await _submit(client, _body(1))).status_code == 202
        yield client


def _numbers(count: int) -> Numbers:
    return np.arange(count, dtype=np.float32).reshape(1, count)


def _body(count: int) -> bytes:
    """A `.npy` file with `count` numbers of 4 bytes."""
    file = io.BytesIO()
    np.save(file, _numbers(count))
    return file.getvalue()


async def _submit(client: httpx2.AsyncClient, body: bytes, **headers: str) -> httpx2.Response:
    return await client.post("/predict", content=body, headers={**_NPY, **headers})


async def _submit_all(client: httpx2.AsyncClient, count: int, body: bytes) -> list[httpx2.Response]:
    """The answers to `count` submits at once."""
    async with asyncio.TaskGroup() as group:
        submits = [group.create_task(_submit(client, body)) for _ in range(count)]
    return [submit.result() for submit in submits]


async def _completed(client: httpx2.AsyncClient, server: redis.Redis, count: int) -> str:
    """Submits `count` numbers, and waits until they are run; returns the job's id."""
    answer = await _submit(client, _body(count))
    assert answer.status_code == 202, answer.text
    job_id: str = answer.json()["job_id"]
    await eventually(lambda: server.get(keys.status(job_id)) == b"completed", "it is run")
    return job_id


async def _read_result(client: httpx2.AsyncClient, job_id: str) -> httpx2.Response:
    return await client.get(f"/job/{job_id}/result", headers={"accept": "application/x-npy"})


def _assert_twice(answer: httpx2.Response, count: int) -> None:
    """Asserts that the answer is the result for `count` numbers."""
    assert answer.status_code == 200, answer.text
    expected = np.concatenate([_numbers(count)] * 2, axis=1)
    np.testing.assert_array_equal(np.load(io.BytesIO(answer.content)), expected)


# --- a narrow link ---------------------------------------------------------------------------


@pytest.mark.soak
async def test_an_8_mb_input_is_accepted_over_5_mb_a_second_and_sent_once(
    client: httpx2.AsyncClient,
    proxy: Proxy,
) -> None:
    proxy.limit_rate(_NARROW)
    before = proxy.requests.bytes_sent
    answer = await _submit(client, _body(2 * _MB))
    assert answer.status_code == 202, answer.text
    assert proxy.requests.bytes_sent - before < 9 * _MB


@pytest.mark.soak
async def test_an_input_that_takes_half_a_second_to_send_is_sent_once(
    client: httpx2.AsyncClient, proxy: Proxy
) -> None:
    proxy.limit_rate(16 * _MB)
    before = proxy.requests.bytes_sent
    answer = await _submit(client, _body(2 * _MB))
    assert answer.status_code == 202, answer.text
    assert proxy.requests.bytes_sent - before < 9 * _MB


@pytest.mark.soak
async def test_a_16_mb_result_is_read_over_5_mb_a_second_and_sent_once(
    client: httpx2.AsyncClient, proxy: Proxy, server: redis.Redis
) -> None:
    job_id = await _completed(client, server, 2 * _MB)
    proxy.limit_rate(_NARROW)
    before = proxy.replies.bytes_sent
    _assert_twice(await _read_result(client, job_id), 2 * _MB)
    assert proxy.replies.bytes_sent - before < 17 * _MB


@pytest.mark.soak
async def test_who_waits_gets_a_large_result_over_5_mb_a_second(
    client: httpx2.AsyncClient, proxy: Proxy
) -> None:
    proxy.limit_rate(_NARROW)
    count = _MB // 2
    answer = await _submit(client, _body(count), prefer="wait=10")
    _assert_twice(answer, count)


@pytest.mark.soak
async def test_32_images_at_once_are_accepted_while_redis_takes_them_in_steadily(
    client: httpx2.AsyncClient,
    proxy: Proxy,
) -> None:
    proxy.limit_rate(20 * _MB)
    before = proxy.requests.bytes_sent
    answers = await _submit_all(client, 32, _body(300_000))
    assert [answer.status_code for answer in answers] == [202] * 32
    assert proxy.requests.bytes_sent - before < 33 * 1.2 * _MB


@pytest.mark.soak
async def test_a_small_submit_passes_beside_large_results(
    client: httpx2.AsyncClient, proxy: Proxy, server: redis.Redis
) -> None:
    """32 readers have 512 MB under way for ten seconds."""
    job_id = await _completed(client, server, 2 * _MB)
    proxy.limit_rate(50 * _MB)
    async with asyncio.TaskGroup() as group:
        readers = [group.create_task(_download(client, job_id)) for _ in range(32)]
        statuses = []
        while not all(reader.done() for reader in readers):
            statuses.append((await _submit(client, _body(1))).status_code)
    assert [reader.result() for reader in readers] == [(200, 16 * _MB + 128)] * 32
    assert set(statuses) == {202}
    assert len(statuses) > len(readers), "a submit waits for a whole result"


@pytest.mark.soak
async def test_100_readers_of_a_16_mb_result_at_once_all_get_it(
    client: httpx2.AsyncClient, proxy: Proxy, server: redis.Redis
) -> None:
    """1.6 GB take 32 seconds."""
    job_id = await _completed(client, server, 2 * _MB)
    proxy.limit_rate(50 * _MB)
    answers = await asyncio.gather(*(_download(client, job_id) for _ in range(100)))
    assert answers == [(200, 16 * _MB + 128)] * 100


async def _download(client: httpx2.AsyncClient, job_id: str) -> tuple[int, int]:
    """The status of an answer with a result, and its size in bytes."""
    size = 0
    url, headers = f"/job/{job_id}/result", {"accept": "application/x-npy"}
    async with client.stream("GET", url, headers=headers, timeout=120) as answer:
        async for part in answer.aiter_raw():
            size += len(part)
    return answer.status_code, size


@pytest.mark.soak
async def test_a_worker_behind_a_narrow_link_runs_a_large_job_once(
    redis_url: str,
    server: redis.Redis,
    open_workers: OpenWorkers,
    twice: WorkerOptions,
    policy: Policy,
) -> None:
    """The input takes 4 seconds to the worker, and its result 8 seconds back."""
    config = ApiConfig(redis_url=redis_url, policy=policy)
    async with proxied(redis_url) as proxy, running(config) as port, client_of(port) as client:
        twice["redis_url"] = proxy.url
        with open_workers(**twice) as workers:
            worker = workers.start()
            await eventually(lambda: worker.is_announced(server), "the worker is ready")
            proxy.limit_rate(2 * _MB)
            job_id = await _completed(client, server, 2 * _MB)
            proxy.limit_rate(math.inf)
            assert await worker.stop() == 0
        _assert_twice(await _read_result(client, job_id), 2 * _MB)
        assert proxy.replies.bytes_sent < 9 * _MB
        assert proxy.requests.bytes_sent < 17 * _MB


# --- a distant Redis -------------------------------------------------------------------------


@pytest.mark.soak
async def test_with_200_ms_more_each_way_16_images_at_once_are_accepted(
    client: httpx2.AsyncClient, proxy: Proxy
) -> None:
    proxy.add_latency(0.2)
    answers = await _submit_all(client, 16, _body(300_000))
    assert [answer.status_code for answer in answers] == [202] * 16


@pytest.mark.soak
async def test_with_200_ms_more_each_way_results_are_read_at_once_and_waited_for(
    client: httpx2.AsyncClient, proxy: Proxy, server: redis.Redis
) -> None:
    job_ids = [await _completed(client, server, count) for count in range(1, 17)]
    proxy.add_latency(0.2)
    async with asyncio.TaskGroup() as group:
        reads = [group.create_task(_read_result(client, job_id)) for job_id in job_ids]
    for count, read in enumerate(reads, start=1):
        _assert_twice(read.result(), count)
    for count in range(1, 4):
        _assert_twice(await _submit(client, _body(count), prefer="wait=20"), count)


@pytest.mark.soak
async def test_an_api_that_starts_with_200_ms_more_each_way_becomes_ready(
    proxy: Proxy, policy: Policy, worker: WorkerChild
) -> None:
    proxy.add_latency(0.2)
    async with _open_api(proxy, policy) as client:

        async def is_ready() -> bool:
            return (await client.get("/health/ready?for=submit")).status_code == 200

        await eventually(is_ready, "the API is ready", 15)
        _assert_twice(await _submit(client, _body(3), prefer="wait=20"), 3)


# --- a link that stands still ----------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("drip", marks=pytest.mark.soak),
        pytest.param("black hole", marks=pytest.mark.soak),
        "refused",
    ],
)
async def test_a_submit_and_a_read_are_503_within_1_5_s_if_redis_is_as_good_as_gone(
    fault: str, client: httpx2.AsyncClient, proxy: Proxy, server: redis.Redis
) -> None:
    job_id = await _completed(client, server, 3)
    await _stop(proxy, fault)
    for request in (
        lambda: _submit(client, _body(3)),
        lambda: _read_result(client, job_id),
        lambda: client.get("/health/ready?for=submit"),
    ):
        assert await _seconds_to_503(request) < _OUTAGE_SECONDS


async def _seconds_to_503(request: Callable[[], Awaitable[httpx2.Response]]) -> float:
    """How long the answer takes, without the time in which the machine was busy otherwise."""
    began = time.monotonic()
    with Halts() as halts:
        answer = await request()
    assert_problem(answer, 503, "redis_unavailable")
    return time.monotonic() - began - halts.seconds


@pytest.mark.parametrize(
    "fault",
    ["refused", *(pytest.param(name, marks=pytest.mark.soak) for name in ("drip", "black hole"))],
)
async def test_a_large_submit_is_503_and_names_its_job_if_the_link_stops_in_its_middle(
    fault: str, client: httpx2.AsyncClient, proxy: Proxy
) -> None:
    proxy.limit_rate(_NARROW)
    before = proxy.requests.bytes_sent
    async with asyncio.TaskGroup() as group:
        submit = group.create_task(_submit(client, _body(2 * _MB)))
        await eventually(lambda: proxy.requests.bytes_sent > before + 2 * _MB, "it is being sent")
        stopped_at = time.monotonic()
        with Halts() as halts:
            await _stop(proxy, fault)
            answer = await submit
    seconds = time.monotonic() - stopped_at - halts.seconds
    problem = assert_problem(answer, 503, "redis_unavailable")
    assert problem["job_id"]
    assert seconds < (_PATIENCE_SECONDS if fault == "drip" else _OUTAGE_SECONDS)


@pytest.mark.parametrize(
    "fault",
    ["refused", *(pytest.param(name, marks=pytest.mark.soak) for name in ("drip", "black hole"))],
)
async def test_a_large_read_is_given_up_if_the_link_stops_in_its_middle(
    fault: str, client: httpx2.AsyncClient, proxy: Proxy, server: redis.Redis
) -> None:
    job_id = await _completed(client, server, 2 * _MB)
    proxy.limit_rate(_NARROW)
    before = proxy.replies.bytes_sent
    async with asyncio.TaskGroup() as group:
        read = group.create_task(_read_result(client, job_id))
        await eventually(lambda: proxy.replies.bytes_sent > before + 2 * _MB, "it is being sent")
        stopped_at = time.monotonic()
        with Halts() as halts:
            await _stop(proxy, fault)
            answer = await read
    assert_problem(answer, 503, "redis_unavailable")
    seconds = time.monotonic() - stopped_at - halts.seconds
    assert seconds < (_PATIENCE_SECONDS if fault == "drip" else _OUTAGE_SECONDS)


@pytest.mark.parametrize(
    ("fault", "silence_seconds"),
    [("none", 0.6), pytest.param("black hole", 1.5, marks=pytest.mark.soak)],
)
async def test_silence_is_counted_from_the_last_byte_of_a_value_that_was_waited_for(
    fault: str, silence_seconds: float, server: redis.Redis, proxy: Proxy
) -> None:
    value = b"v" * 4 * _MB
    link = Link(Endpoint.parse(proxy.url).client("late"), pack=pack_in_pieces)
    loop = asyncio.get_running_loop()
    call = asyncio.ensure_future(link.ask(("BRPOP", "late", 5), silence_seconds))
    await eventually(lambda: server.info("clients")["blocked_clients"] == 1, "it waits")
    blocked_at = loop.time()
    await eventually(lambda: loop.time() > blocked_at + 0.3, "it has waited for a while")
    proxy.limit_rate(_NARROW)

    server.lpush("late", value)

    if fault == "none":
        assert await call == [b"late", value]
        await link.close()
    else:
        await eventually(lambda: proxy.replies.bytes_sent > _MB, "it is being sent")
        stopped_at = loop.time()
        with Halts() as halts:
            await _stop(proxy, fault)
            with pytest.raises(TimeoutError):
                await call
        assert -0.2 < loop.time() - stopped_at - silence_seconds < 0.8 + halts.seconds


async def _stop(proxy: Proxy, fault: str) -> None:
    if fault == "refused":
        await proxy.down()
    elif fault == "drip":
        proxy.drip()
    else:
        proxy.black_hole()


@pytest.mark.soak
async def test_after_a_link_stood_still_redis_has_what_was_accepted_and_no_unnamed_job(
    proxy: Proxy, policy: Policy, worker: WorkerChild, server: redis.Redis
) -> None:
    others = _connections(server)
    async with _open_api(proxy, policy) as client:
        proxy.limit_rate(_NARROW)
        async with asyncio.TaskGroup() as group:
            submits = group.create_task(_submit_all(client, 16, _body(300_000)))
            await eventually(lambda: proxy.requests.bytes_sent > 3 * _MB, "some are being sent")
            proxy.drip()
        answers = submits.result()
    # Redis closes a connection after it has run all that came over it.
    await eventually(lambda: _connections(server) <= others, "all that was sent has arrived")
    assert 503 in {answer.status_code for answer in answers} <= {202, 503}
    accepted = {answer.json()["job_id"] for answer in answers if answer.status_code == 202}
    named = {answer.json().get("job_id") for answer in answers if answer.status_code == 503}
    assert accepted <= _stored(server) <= accepted | named


def _connections(server: redis.Redis) -> set[str]:
    """The ids of Redis's connections, without those of workers."""
    listed: list[dict[str, str]] = server.client_list()
    return {
        connection["id"]
        for connection in listed
        if not connection["name"].startswith("asyncinfer-worker")
    }


def _stored(server: redis.Redis) -> set[str]:
    """The ids of all jobs in Redis."""
    return {name.split(b":")[1].decode() for name in server.scan_iter("job:*:status", count=1000)}
