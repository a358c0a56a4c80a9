"""The feed of job events: slow followers, and a Redis that restarts while they follow."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
import redis

from asyncinfer.api.live.feed import Feed
from asyncinfer.api.live.follower import Follower
from asyncinfer.api.live.position import Position
from asyncinfer.api.live.shared_reads import Topic
from asyncinfer.errors import RedisUnavailable
from asyncinfer.repository import keys
from asyncinfer.repository.inspect.log import Log, LogTrimmed
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from tests.queue_driver import Q, QueueDriver

from .processes import DurableServer

GROUP = Topic("default", group="g")


@asynccontextmanager
async def running_feed(store: Store) -> AsyncIterator[Feed]:
    feed = Feed(store)
    async with asyncio.TaskGroup() as group:
        group.create_task(feed.run())
        yield feed
        await feed.close()


async def never() -> None:
    await asyncio.Event().wait()


async def read_changes(follower: Follower, count: int) -> list[tuple[str, str]]:
    """Waits for the next `count` changes; returns the job id and the new status of each."""
    changes: list[tuple[str, str]] = []
    async with asyncio.timeout(30):
        while len(changes) < count:
            try:
                events = await follower.next_changes(0.5)
            except RedisUnavailable:
                await follower.pause(0.2)
            else:
                changes += [(event.change.job_id, event.change.status) for event in events]
    return changes


@pytest.mark.soak
async def test_a_slow_follower_gets_every_change_once(store: Store, server: redis.Redis) -> None:
    driver = QueueDriver(store, server)
    async with running_feed(store) as feed:
        start = Position(await store.time_ms())
        with feed.follow(GROUP, start, never) as follower:
            ids = await driver.submit_many(1, group="g")
            changes = await read_changes(follower, 1)
            ids += [
                job_id for _ in range(44) for job_id in await driver.submit_many(250, group="g")
            ]
            changes += await read_changes(follower, len(ids) - 1)
            assert await follower.next_changes(0.2) == []
            assert [job_id for job_id, _ in changes] == ids


async def test_a_follower_that_reads_the_log_gets_changes_of_its_own_tenant_only(
    store: Store, server: redis.Redis
) -> None:
    """The reader begins with the first follower, and passes on only what comes later."""
    driver = QueueDriver(store, server)
    async with running_feed(store) as feed:
        start = Position(await store.time_ms())
        await driver.submit_many(2, tenant="other", group="g")
        mine = await driver.submit_one(group="g")
        with feed.follow(GROUP, start, never) as follower:
            assert await read_changes(follower, 1) == [(mine, "pending")]


async def test_a_follower_goes_on_after_a_restart_of_redis(durable: DurableServer) -> None:
    policy = Policy(job_ttl_seconds=600)
    async with Store.open(durable.url, queue_name=Q, policy=policy, name="test") as store:
        with redis.Redis.from_url(durable.url) as client:
            driver = QueueDriver(store, client)
            async with running_feed(store) as feed:
                start = Position(await store.time_ms())
                with feed.follow(GROUP, start, never) as follower:
                    (job_id,) = await driver.submit_many(1, group="g")
                    claim = await driver.claim_jobs()
                    before = [(job_id, "pending"), (job_id, "processing")]
                    assert await read_changes(follower, 2) == before
                    durable.kill()
                    durable.start()
                    await driver.finish(claim)
                    assert await read_changes(follower, 1) == [(job_id, "completed")]


async def test_a_follower_is_told_of_a_gap_if_the_clock_of_an_emptied_redis_is_behind(
    store: Store, server: redis.Redis
) -> None:
    driver = QueueDriver(store, server)
    async with running_feed(store) as feed:
        now_ms = await store.time_ms()
        with feed.follow(GROUP, Position(now_ms), never) as follower:
            (before,) = await driver.submit_many(1, group="g")
            ahead = f"{now_ms + 3_600_000}-0"
            server.xadd(keys.log(Q), {"pending": msgspec.msgpack.encode([before])}, id=ahead)
            assert await read_changes(follower, 2) == [(before, "pending")] * 2
            server.flushall()
            await driver.submit_many(1, group="g")
            with pytest.raises(LogTrimmed):
                await read_changes(follower, 1)
            follower.begin_at(Position(await store.time_ms()))
            (after,) = await driver.submit_many(1, group="g")
            assert await read_changes(follower, 1) == [(after, "pending")]


async def test_a_position_ahead_of_the_clock_is_a_gap_and_one_in_a_quiet_log_is_not(
    store: Store, server: redis.Redis
) -> None:
    log = Log(store)
    now_ms = await store.time_ms()
    assert (await log.page(Q, (now_ms, 0, 0))).changes == []
    with pytest.raises(LogTrimmed):
        await log.page(Q, (now_ms + 60_000, 0, 0))
    server.xadd(keys.log(Q), {"pending": msgspec.msgpack.encode(["a"])}, id=f"{now_ms + 60_000}-0")
    # The clock may have been set back while the log goes on.
    assert (await log.page(Q, (now_ms + 60_000, 1, 0))).changes == []
