"""Replies that never arrive: every script and the wait, each cut once and cut twice."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import redis

from asyncinfer.errors import RedisUnavailable
from asyncinfer.jobs import Options
from asyncinfer.repository import keys
from asyncinfer.repository.claims import Claim, ClaimRequest, Finished, Runs
from asyncinfer.repository.doorbell import Doorbell
from asyncinfer.repository.inspect.selection import Filter, Selection
from asyncinfer.repository.leases import Renewals
from asyncinfer.repository.maintenance import Maintenance
from asyncinfer.repository.operations import Cancelled, Operations
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.scripts import NAMES, script
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import Stored
from tests.faults.load_client import Customer, assert_one_end_each, transitions

from .harness import assert_at_rest, eventually
from .processes import OpenCrew
from .proxy import Proxy, proxied


@pytest.fixture
async def proxy(redis_url: str, server: redis.Redis) -> AsyncIterator[Proxy]:
    async with proxied(redis_url) as it:
        yield it


@pytest.fixture
async def cut_off(proxy: Proxy, policy: Policy) -> AsyncIterator[Store]:
    """A store behind the proxy, its scripts loaded."""
    async with Store.open(proxy.url, queue_name="predict_queue", policy=policy, name="cut") as it:
        yield it


async def _through(
    proxy: Proxy, name: str, times: int, call: Callable[[], Awaitable[object]]
) -> None:
    """Makes a call whose first replies are lost, and repeats it as its caller does."""
    proxy.cut_reply_to(script(name).sha.encode(), times)
    before = proxy.cut
    while True:
        try:
            await call()
        except RedisUnavailable:
            continue
        break
    assert proxy.cut == before + times


async def _claimed(runs: Runs, queue: str, jobs: int) -> Claim:
    claimed = await runs.claim(ClaimRequest((queue,), runs.new_token(), False, jobs))
    assert claimed.claim
    return claimed.claim


async def _stored(customer: Customer, job_id: str) -> Stored:
    (stored,) = await customer.read([job_id])
    assert stored
    return stored


@pytest.fixture
async def loaded(cut_off: Store) -> Store:
    for name in NAMES:
        await cut_off.redis.script_load(script(name).text)
    return cut_off


@pytest.mark.parametrize("times", [1, 3])
async def test_a_submit_whose_reply_is_lost_makes_one_job(
    times: int, proxy: Proxy, loaded: Store, server: redis.Redis
) -> None:
    customer = Customer(loaded)
    job = customer.job(1.0)
    await _through(
        proxy, "submit", times, lambda: customer.submissions.submit_many(customer.queue, [job])
    )
    assert server.lrange(customer.queue, 0, -1) == [job.job_id.encode()]
    server.flushall()


@pytest.mark.parametrize("times", [1, 3])
async def test_a_claim_whose_reply_is_lost_takes_nothing_twice(
    times: int, proxy: Proxy, loaded: Store, server: redis.Redis
) -> None:
    customer, runs = Customer(loaded), Runs(loaded, "w")
    ids = await customer.submit([float(number) for number in range(10)])
    request = ClaimRequest((customer.queue,), runs.new_token(), False, 4)
    claims: list[Claim | None] = []

    async def call() -> None:
        claims.append((await runs.claim(request)).claim)

    await _through(proxy, "claim", times, call)
    (claim,) = claims
    assert claim
    assert [job.job_id for job in claim.jobs] == ids[:4]
    assert server.llen(customer.queue) == 6
    assert server.hlen(keys.running(customer.queue)) == 4
    server.flushall()


@pytest.mark.parametrize("times", [1, 3])
async def test_a_finish_whose_reply_is_lost_stores_once_and_brings_the_next_claim_once(
    times: int, proxy: Proxy, loaded: Store, server: redis.Redis
) -> None:
    customer, runs = Customer(loaded), Runs(loaded, "w")
    ids = await customer.submit([float(number) for number in range(6)])
    claim = await _claimed(runs, customer.queue, 2)
    following = ClaimRequest((customer.queue,), runs.new_token(), False, 2)
    done = [Finished(job.job_id, "completed", b"{}", b"") for job in claim.jobs]
    answers: list[Claim | None] = []

    async def call() -> None:
        answers.append((await runs.finish(claim, done, last=True, following=following))[1].claim)

    await _through(proxy, "finish", times, call)
    (second,) = answers
    assert second
    assert [job.job_id for job in second.jobs] == ids[2:4]
    assert server.hlen(keys.running(customer.queue)) == 2
    assert server.llen(customer.queue) == 2
    assert_one_end_each(server, customer.queue)
    server.flushall()


@pytest.mark.parametrize("times", [1, 3])
async def test_a_released_job_whose_reply_is_lost_waits_once(
    times: int, proxy: Proxy, loaded: Store, server: redis.Redis
) -> None:
    customer, runs = Customer(loaded), Runs(loaded, "w")
    (job_id,) = await customer.submit([1.0])
    claim = await _claimed(runs, customer.queue, 1)
    released = [Finished(job_id, "released", b"", claim.jobs[0].meta)]
    await _through(proxy, "finish", times, lambda: runs.finish(claim, released, last=True))
    assert server.lrange(customer.queue, 0, -1) == [job_id.encode()]
    assert not server.exists(keys.running(customer.queue), keys.leases(customer.queue))
    server.flushall()


@pytest.mark.parametrize("times", [1, 3])
async def test_cancel_and_retry_whose_replies_are_lost_happen_once(
    times: int, proxy: Proxy, loaded: Store, server: redis.Redis
) -> None:
    customer = Customer(loaded)
    (job_id,) = await customer.submit([1.0])
    stored = await _stored(customer, job_id)
    await _through(proxy, "cancel", times, lambda: customer.operations.cancel(stored))
    assert server.llen(customer.queue) == 0
    stored = await _stored(customer, job_id)
    await _through(proxy, "retry", times, lambda: customer.operations.retry(stored, 1))
    assert server.lrange(customer.queue, 0, -1) == [job_id.encode()]
    again = await _stored(customer, job_id)
    assert again.record
    assert again.record.round == 2
    assert transitions(server, customer.queue)[job_id]["cancelled"] == 1
    server.flushall()


@pytest.mark.parametrize("times", [1, 3])
async def test_a_watch_whose_reply_is_lost_signs_up_once(
    times: int, proxy: Proxy, loaded: Store, server: redis.Redis
) -> None:
    customer, runs = Customer(loaded), Runs(loaded, "w")
    (job_id,) = await customer.submit([1.0])
    inbox = keys.inbox("predict_queue", "mine")
    server.xadd(inbox, {"": "alive"})
    server.expire(inbox, 60)
    await _through(
        proxy,
        "watch",
        times,
        lambda: customer.submissions.watch(customer.queue, inbox, [job_id]),
    )
    claim = await _claimed(runs, customer.queue, 1)
    await runs.finish(claim, [Finished(job_id, "completed", b"{}", b"")], last=True)
    assert server.xlen(inbox) == 2
    assert_at_rest(server, customer.queue)


@pytest.mark.parametrize("times", [1, 3])
async def test_a_sweep_whose_reply_is_lost_puts_each_job_back_once(
    times: int, proxy: Proxy, loaded: Store, server: redis.Redis
) -> None:
    customer, runs, maintenance = Customer(loaded), Runs(loaded, "w"), Maintenance(loaded)
    ids = await customer.submit([1.0, 2.0, 3.0])
    await customer.submit([4.0], Options(delay_seconds=0.01))
    claim = await _claimed(runs, customer.queue, 3)
    server.set(keys.swept(customer.queue), int(server.time()[0]) * 1000, px=60_000)
    server.zadd(keys.leases(customer.queue), {claim.token: 1})
    await _through(proxy, "reap", times, maintenance.sweep)

    async def all_back() -> bool:
        await maintenance.sweep()
        return server.llen(customer.queue) == 4

    await eventually(all_back, "all four wait")
    waiting = server.lrange(customer.queue, 0, -1)
    assert len(set(waiting)) == 4
    assert waiting[::-1][:3] == [one.encode() for one in ids]
    server.flushall()


@pytest.mark.parametrize("times", [1, 3])
async def test_a_renewal_whose_reply_is_lost_keeps_the_lease(
    times: int, proxy: Proxy, loaded: Store, server: redis.Redis
) -> None:
    customer, runs, renewals = Customer(loaded), Runs(loaded, "w"), Renewals(loaded)
    await customer.submit([1.0])
    claim = await _claimed(runs, customer.queue, 1)
    server.zadd(keys.leases(customer.queue), {claim.token: 1})
    held = {customer.queue: [claim.token]}
    await _through(proxy, "renew", times, lambda: asyncio.to_thread(renewals.renew, held))
    assert (server.zscore(keys.leases(customer.queue), claim.token) or 0) > 1
    renewals.close()
    server.flushall()


@pytest.mark.parametrize("times", [1, 3])
async def test_pause_and_purge_whose_replies_are_lost_end_each_waiting_job_once(
    times: int, proxy: Proxy, loaded: Store, server: redis.Redis
) -> None:
    customer, operations = Customer(loaded), Operations(loaded)
    await customer.submit([1.0, 2.0, 3.0])
    await _through(proxy, "pause", times, lambda: operations.pause(customer.queue, paused=True))
    assert server.exists(keys.paused(customer.queue))
    await _through(proxy, "purge", times, lambda: operations.purge(customer.queue))
    assert {one.status for one in await customer.all_ended()} == {"cancelled"}
    assert_one_end_each(server, customer.queue)
    assert_at_rest(server, customer.queue)


@pytest.mark.parametrize("times", [1, 3])
async def test_a_bulk_cancel_and_a_purge_whose_replies_are_lost_count_each_job_once(
    times: int, proxy: Proxy, loaded: Store, server: redis.Redis
) -> None:
    customer, operations, found = Customer(loaded), Operations(loaded), Selection(loaded)
    ids = await customer.submit([1.0, 2.0, 3.0])
    waiting = Filter(tenant="default", statuses=frozenset({"pending"}))
    jobs = (await found.jobs(waiting, 1000)).jobs
    counts: list[object] = []

    async def cancel() -> None:
        counts.append(await operations.cancel_all(jobs))

    async def purge() -> None:
        counts.append(await operations.forget_all(jobs))

    await _through(proxy, "cancel", times, cancel)
    assert_one_end_each(server, customer.queue)
    await _through(proxy, "forget", times, purge)
    assert counts == [Cancelled(ended=3, asked=0), 3]
    assert await customer.read(ids) == [None] * 3


async def test_a_retry_whose_reply_is_lost_opens_one_round_and_says_so(
    proxy: Proxy, loaded: Store, server: redis.Redis
) -> None:
    customer, operations = Customer(loaded), Operations(loaded)
    ids = await customer.submit([1.0, 2.0])
    await operations.purge(customer.queue)
    jobs = [await _stored(customer, one) for one in ids]
    verdicts: list[object] = []

    async def retry() -> None:
        verdicts.append(await operations.retry_all(jobs, 1))

    await _through(proxy, "retry", 1, retry)
    assert verdicts == [dict.fromkeys(ids, "ok")]
    assert [one.record and one.record.round for one in await customer.read(ids) if one] == [2, 2]
    assert server.llen(customer.queue) == 2
    server.flushall()


@pytest.mark.parametrize("times", [1, 2])
async def test_a_repair_whose_reply_is_lost_puts_a_job_back_once(
    times: int, proxy: Proxy, loaded: Store, server: redis.Redis
) -> None:
    customer, maintenance = Customer(loaded), Maintenance(loaded)
    (job_id,) = await customer.submit([1.0])
    server.delete(customer.queue)
    gate = keys.repair_gate("predict_queue")

    async def passes() -> None:
        server.delete(gate)
        await maintenance.repair(0.001)

    await passes()
    await _through(proxy, "repair", times, passes)
    assert server.lrange(customer.queue, 0, -1) == [job_id.encode()]
    server.flushall()


async def test_a_token_whose_reply_is_lost_loses_no_job(
    proxy: Proxy, loaded: Store, server: redis.Redis
) -> None:
    customer, runs, bell = Customer(loaded), Runs(loaded, "w"), Doorbell(loaded)
    proxy.cut_reply_to(b"BRPOP")

    async def arrives() -> None:
        await eventually(lambda: _blocked(server), "the worker waits")
        await customer.submit([1.0])

    async with asyncio.TaskGroup() as group:
        group.create_task(arrives())
        with pytest.raises(RedisUnavailable):
            await bell.wait([customer.queue], 5)
    assert server.llen(keys.wake(customer.queue)) == 0
    assert len((await _claimed(runs, customer.queue, 1)).jobs) == 1
    await bell.close()
    server.flushall()


def _blocked(client: redis.Redis) -> bool:
    return bool(client.info("clients")["blocked_clients"])


@pytest.mark.soak
async def test_workers_behind_a_line_that_keeps_cutting_lose_and_double_nothing(
    crew: OpenCrew, customer: Customer, proxy: Proxy, server: redis.Redis
) -> None:
    chance = random.Random(5)
    with crew(
        redis_url=proxy.url,
        policy=Policy(lease_seconds=1.0, reap_seconds=0.1, job_ttl_seconds=600, max_deliveries=99),
    ) as workers:
        crewed = [workers.hire() for _ in range(2)]
        await eventually(lambda: all(one.announced(server) for one in crewed), "they are ready")
        proxy.cut_replies_if(lambda: chance.random() < 0.2)
        for number in range(30):
            await customer.submit([float(number % 7)] * 3)
            await customer.all_completed(60)
        proxy.cut_replies_if(lambda: False)
        assert [await one.stop() for one in crewed] == [0, 0]
    assert proxy.cut > 5
    assert_one_end_each(server, customer.queue)
    assert_at_rest(server, customer.queue)
