"""Lost replies: every script and the doorbell wait, with one or several replies cut."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import redis

from asyncinfer.errors import RedisUnavailable
from asyncinfer.jobs import Options
from asyncinfer.repository import keys
from asyncinfer.repository.claims import Claim, ClaimRequest, JobOutcome, QueueConsumer
from asyncinfer.repository.doorbell import Doorbell
from asyncinfer.repository.inspect.selection import Filter, Selection
from asyncinfer.repository.leases import Leases
from asyncinfer.repository.maintenance import Maintenance
from asyncinfer.repository.operations import CancelCounts, Operations
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.scripts import library, script
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import StoredJob
from tests.faults.load_client import LoadClient, assert_one_end_each, transitions

from .harness import assert_at_rest, eventually
from .processes import OpenWorkers
from .proxy import Proxy, proxied


@pytest.fixture
async def proxy(redis_url: str, server: redis.Redis) -> AsyncIterator[Proxy]:
    async with proxied(redis_url) as proxy:
        yield proxy


@pytest.fixture
async def proxied_store(proxy: Proxy, policy: Policy) -> AsyncIterator[Store]:
    """A store behind the proxy."""
    async with Store.open(
        proxy.url, queue_name="predict_queue", policy=policy, name="cut"
    ) as store:
        yield store


async def _call_until_answered(
    proxy: Proxy, name: str, times: int, call: Callable[[], Awaitable[object]]
) -> None:
    """Repeats `call`, as its callers do, while its first `times` replies are lost.

    `name` is the script whose replies are cut.
    """
    proxy.cut_reply_to(script(name).function.encode(), times)
    before = proxy.replies_cut
    while True:
        try:
            await call()
        except RedisUnavailable:
            continue
        break
    assert proxy.replies_cut == before + times


async def _claim(runs: QueueConsumer, queue: str, jobs: int) -> Claim:
    claimed = await runs.claim(ClaimRequest((queue,), runs.new_token(), False, jobs))
    assert claimed.claim
    return claimed.claim


async def _read(load_client: LoadClient, job_id: str) -> StoredJob:
    (stored,) = await load_client.read([job_id])
    assert stored
    return stored


@pytest.fixture
async def loaded_store(proxied_store: Store) -> Store:
    """A store behind the proxy; the server has its library."""
    await proxied_store.command("FUNCTION LOAD", "REPLACE", library().text)
    return proxied_store


@pytest.mark.parametrize("times", [1, 3])
async def test_a_submit_whose_reply_is_lost_makes_one_job(
    times: int, proxy: Proxy, loaded_store: Store, server: redis.Redis
) -> None:
    load_client = LoadClient(loaded_store)
    job = load_client.new_job(1.0)
    await _call_until_answered(
        proxy,
        "submit",
        times,
        lambda: load_client.submissions.submit_many(load_client.queue, [job]),
    )
    assert server.lrange(load_client.queue, 0, -1) == [job.job_id.encode()]
    server.flushall()


@pytest.mark.parametrize("times", [1, 3])
async def test_a_claim_whose_reply_is_lost_takes_nothing_twice(
    times: int, proxy: Proxy, loaded_store: Store, server: redis.Redis
) -> None:
    load_client, runs = LoadClient(loaded_store), QueueConsumer(loaded_store, "w")
    ids = await load_client.submit([float(number) for number in range(10)])
    request = ClaimRequest((load_client.queue,), runs.new_token(), False, 4)
    claims: list[Claim | None] = []

    async def call() -> None:
        claims.append((await runs.claim(request)).claim)

    await _call_until_answered(proxy, "claim", times, call)
    (claim,) = claims
    assert claim
    assert [job.job_id for job in claim.jobs] == ids[:4]
    assert server.llen(load_client.queue) == 6
    assert server.hlen(keys.running(load_client.queue)) == 4
    server.flushall()


@pytest.mark.parametrize("times", [1, 3])
async def test_a_finish_whose_reply_is_lost_stores_once_and_returns_the_next_claim_once(
    times: int, proxy: Proxy, loaded_store: Store, server: redis.Redis
) -> None:
    load_client, runs = LoadClient(loaded_store), QueueConsumer(loaded_store, "w")
    ids = await load_client.submit([float(number) for number in range(6)])
    claim = await _claim(runs, load_client.queue, 2)
    following = ClaimRequest((load_client.queue,), runs.new_token(), False, 2)
    finished = [JobOutcome(job.job_id, "completed", b"{}", b"") for job in claim.jobs]
    claims: list[Claim | None] = []

    async def call() -> None:
        claims.append((await runs.finish(claim, finished, last=True, following=following))[1].claim)

    await _call_until_answered(proxy, "finish", times, call)
    (second,) = claims
    assert second
    assert [job.job_id for job in second.jobs] == ids[2:4]
    assert server.hlen(keys.running(load_client.queue)) == 2
    assert server.llen(load_client.queue) == 2
    assert_one_end_each(server, load_client.queue)
    server.flushall()


@pytest.mark.parametrize("times", [1, 3])
async def test_a_released_job_whose_reply_is_lost_waits_once(
    times: int, proxy: Proxy, loaded_store: Store, server: redis.Redis
) -> None:
    load_client, runs = LoadClient(loaded_store), QueueConsumer(loaded_store, "w")
    (job_id,) = await load_client.submit([1.0])
    claim = await _claim(runs, load_client.queue, 1)
    released = [JobOutcome(job_id, "released", b"", claim.jobs[0].meta)]
    await _call_until_answered(
        proxy, "finish", times, lambda: runs.finish(claim, released, last=True)
    )
    assert server.lrange(load_client.queue, 0, -1) == [job_id.encode()]
    assert not server.exists(keys.running(load_client.queue), keys.leases(load_client.queue))
    server.flushall()


@pytest.mark.parametrize("times", [1, 3])
async def test_cancel_and_retry_whose_replies_are_lost_happen_once(
    times: int, proxy: Proxy, loaded_store: Store, server: redis.Redis
) -> None:
    load_client = LoadClient(loaded_store)
    (job_id,) = await load_client.submit([1.0])
    stored = await _read(load_client, job_id)
    await _call_until_answered(
        proxy, "cancel", times, lambda: load_client.operations.cancel(stored)
    )
    assert server.llen(load_client.queue) == 0
    stored = await _read(load_client, job_id)
    await _call_until_answered(
        proxy, "retry", times, lambda: load_client.operations.retry(stored, 1)
    )
    assert server.lrange(load_client.queue, 0, -1) == [job_id.encode()]
    retried = await _read(load_client, job_id)
    assert retried.record
    assert retried.record.round == 2
    assert transitions(server, load_client.queue)[job_id]["cancelled"] == 1
    server.flushall()


@pytest.mark.parametrize("times", [1, 3])
async def test_a_watch_whose_reply_is_lost_registers_once(
    times: int, proxy: Proxy, loaded_store: Store, server: redis.Redis
) -> None:
    load_client, runs = LoadClient(loaded_store), QueueConsumer(loaded_store, "w")
    (job_id,) = await load_client.submit([1.0])
    inbox = keys.inbox("predict_queue", "mine")
    server.xadd(inbox, {"": "alive"})
    server.expire(inbox, 60)
    await _call_until_answered(
        proxy,
        "watch",
        times,
        lambda: load_client.submissions.watch(load_client.queue, inbox, [job_id]),
    )
    claim = await _claim(runs, load_client.queue, 1)
    await runs.finish(claim, [JobOutcome(job_id, "completed", b"{}", b"")], last=True)
    assert server.xlen(inbox) == 2
    assert_at_rest(server, load_client.queue)


@pytest.mark.parametrize("times", [1, 3])
async def test_a_sweep_whose_reply_is_lost_puts_each_job_back_once(
    times: int, proxy: Proxy, loaded_store: Store, server: redis.Redis
) -> None:
    load_client, runs, maintenance = (
        LoadClient(loaded_store),
        QueueConsumer(loaded_store, "w"),
        Maintenance(loaded_store),
    )
    ids = await load_client.submit([1.0, 2.0, 3.0])
    await load_client.submit([4.0], Options(delay_seconds=0.01))
    claim = await _claim(runs, load_client.queue, 3)
    server.set(keys.swept(load_client.queue), int(server.time()[0]) * 1000, px=60_000)
    server.zadd(keys.leases(load_client.queue), {claim.token: 1})
    await _call_until_answered(proxy, "reap", times, maintenance.sweep)

    async def all_wait() -> bool:
        await maintenance.sweep()
        return server.llen(load_client.queue) == 4

    await eventually(all_wait, "all four wait")
    waiting = server.lrange(load_client.queue, 0, -1)
    assert len(set(waiting)) == 4
    assert waiting[::-1][:3] == [job_id.encode() for job_id in ids]
    server.flushall()


@pytest.mark.parametrize("times", [1, 3])
async def test_a_renewal_whose_reply_is_lost_keeps_the_lease(
    times: int, proxy: Proxy, loaded_store: Store, server: redis.Redis
) -> None:
    load_client, runs, renewals = (
        LoadClient(loaded_store),
        QueueConsumer(loaded_store, "w"),
        Leases(loaded_store),
    )
    await load_client.submit([1.0])
    claim = await _claim(runs, load_client.queue, 1)
    server.zadd(keys.leases(load_client.queue), {claim.token: 1})
    held = {load_client.queue: [claim.token]}
    await _call_until_answered(
        proxy, "renew", times, lambda: asyncio.to_thread(renewals.renew, held)
    )
    assert (server.zscore(keys.leases(load_client.queue), claim.token) or 0) > 1
    renewals.close()
    server.flushall()


@pytest.mark.parametrize("times", [1, 3])
async def test_pause_and_purge_whose_replies_are_lost_end_each_waiting_job_once(
    times: int, proxy: Proxy, loaded_store: Store, server: redis.Redis
) -> None:
    load_client, operations = LoadClient(loaded_store), Operations(loaded_store)
    await load_client.submit([1.0, 2.0, 3.0])
    await _call_until_answered(
        proxy, "pause", times, lambda: operations.pause(load_client.queue, paused=True)
    )
    assert server.exists(keys.paused(load_client.queue))
    await _call_until_answered(
        proxy, "cancel_queue", times, lambda: operations.cancel_queue(load_client.queue)
    )
    assert {job.status for job in await load_client.wait_until_all_ended()} == {"cancelled"}
    assert_one_end_each(server, load_client.queue)
    assert_at_rest(server, load_client.queue)


@pytest.mark.parametrize("times", [1, 3])
async def test_a_bulk_cancel_and_a_purge_whose_replies_are_lost_count_each_job_once(
    times: int, proxy: Proxy, loaded_store: Store, server: redis.Redis
) -> None:
    load_client, operations, selection = (
        LoadClient(loaded_store),
        Operations(loaded_store),
        Selection(loaded_store),
    )
    ids = await load_client.submit([1.0, 2.0, 3.0])
    waiting = Filter(tenant="default", statuses=frozenset({"pending"}))
    jobs = (await selection.jobs(waiting, 1000)).jobs
    counts: list[object] = []

    async def cancel() -> None:
        counts.append(await operations.cancel_all(jobs))

    async def purge() -> None:
        counts.append(await operations.forget_all(jobs))

    await _call_until_answered(proxy, "cancel", times, cancel)
    assert_one_end_each(server, load_client.queue)
    await _call_until_answered(proxy, "forget", times, purge)
    assert counts == [CancelCounts(ended=3, stopping=0), 3]
    assert await load_client.read(ids) == [None] * 3


async def test_a_retry_whose_reply_is_lost_starts_one_round_and_reports_it(
    proxy: Proxy, loaded_store: Store, server: redis.Redis
) -> None:
    load_client, operations = LoadClient(loaded_store), Operations(loaded_store)
    ids = await load_client.submit([1.0, 2.0])
    await operations.cancel_queue(load_client.queue)
    jobs = [await _read(load_client, job_id) for job_id in ids]
    verdicts: list[object] = []

    async def retry() -> None:
        verdicts.append(await operations.retry_all(jobs, 1))

    await _call_until_answered(proxy, "retry", 1, retry)
    assert verdicts == [dict.fromkeys(ids, "ok")]
    assert [job.record and job.record.round for job in await load_client.read(ids) if job] == [2, 2]
    assert server.llen(load_client.queue) == 2
    server.flushall()


@pytest.mark.parametrize("times", [1, 2])
async def test_a_repair_whose_reply_is_lost_puts_a_job_back_once(
    times: int, proxy: Proxy, loaded_store: Store, server: redis.Redis
) -> None:
    load_client, maintenance = LoadClient(loaded_store), Maintenance(loaded_store)
    (job_id,) = await load_client.submit([1.0])
    server.delete(load_client.queue)
    gate = keys.repair_gate("predict_queue")

    async def repair() -> None:
        server.delete(gate)
        await maintenance.repair(0.001)

    await repair()
    await _call_until_answered(proxy, "repair", times, repair)
    assert server.lrange(load_client.queue, 0, -1) == [job_id.encode()]
    server.flushall()


async def test_a_token_whose_reply_is_lost_loses_no_job(
    proxy: Proxy, loaded_store: Store, server: redis.Redis
) -> None:
    load_client, runs, doorbell = (
        LoadClient(loaded_store),
        QueueConsumer(loaded_store, "w"),
        Doorbell(loaded_store),
    )
    proxy.cut_reply_to(b"BRPOP")

    async def submit_while_waiting() -> None:
        await eventually(lambda: _has_blocked_client(server), "the worker waits")
        await load_client.submit([1.0])

    async with asyncio.TaskGroup() as group:
        group.create_task(submit_while_waiting())
        with pytest.raises(RedisUnavailable):
            await doorbell.wait([load_client.queue], 5)
    assert server.llen(keys.wake(load_client.queue)) == 0
    assert len((await _claim(runs, load_client.queue, 1)).jobs) == 1
    await doorbell.close()
    server.flushall()


def _has_blocked_client(client: redis.Redis) -> bool:
    return bool(client.info("clients")["blocked_clients"])


@pytest.mark.soak
async def test_workers_whose_replies_are_often_lost_neither_lose_nor_repeat_a_job(
    open_workers: OpenWorkers, load_client: LoadClient, proxy: Proxy, server: redis.Redis
) -> None:
    chance = random.Random(5)
    with open_workers(
        redis_url=proxy.url,
        policy=Policy(lease_seconds=1.0, reap_seconds=0.1, job_ttl_seconds=600, max_deliveries=99),
    ) as workers:
        started = [workers.start() for _ in range(2)]
        await eventually(
            lambda: all(worker.is_announced(server) for worker in started), "they are ready"
        )
        proxy.cut_replies_if(lambda: chance.random() < 0.2)
        for number in range(30):
            await load_client.submit([float(number % 7)] * 3)
            await load_client.assert_all_completed(60)
        proxy.cut_replies_if(lambda: False)
        assert [await worker.stop() for worker in started] == [0, 0]
    assert proxy.replies_cut > 5
    assert_one_end_each(server, load_client.queue)
    assert_at_rest(server, load_client.queue)
