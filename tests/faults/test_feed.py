"""Followers that are slow, and a server that is restarted under them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
import redis

from asyncinfer.api.live.feed import Feed, Follower, Topic
from asyncinfer.api.live.position import Position
from asyncinfer.errors import RedisUnavailable
from asyncinfer.repository import keys
from asyncinfer.repository.inspect.log import Log, LogTrimmed
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from tests.queue_driver import Hands, Q

from .processes import DurableServer

GROUP = Topic("default", group="g")


@asynccontextmanager
async def feeding(store: Store) -> AsyncIterator[Feed]:
    feed = Feed(store)
    async with asyncio.TaskGroup() as group:
        group.create_task(feed.run())
        yield feed
        await feed.close()


async def never() -> None:
    await asyncio.Event().wait()


async def told(follower: Follower, count: int) -> list[tuple[str, str]]:
    """The next so many changes, each a job and what became of it."""
    found: list[tuple[str, str]] = []
    async with asyncio.timeout(30):
        while len(found) < count:
            try:
                news = await follower.more(0.5)
            except RedisUnavailable:
                await follower.pause(0.2)
            else:
                found += [(one.change.job_id, one.change.status) for one in news]
    return found


@pytest.mark.soak
async def test_a_follower_that_is_too_slow_is_told_all_and_once(
    store: Store, server: redis.Redis
) -> None:
    hands = Hands(store, server)
    async with feeding(store) as feed:
        start = Position(await feed.store.time_ms())
        with feed.follow(GROUP, start, never) as follower:
            ids = await hands.some(1, group="g")
            seen = await told(follower, 1)
            ids += [one for _ in range(44) for one in await hands.some(250, group="g")]
            seen += await told(follower, len(ids) - 1)
            assert await follower.more(0.2) == []
            assert [job_id for job_id, _ in seen] == ids


async def test_a_follower_goes_on_after_redis_was_restarted(durable: DurableServer) -> None:
    policy = Policy(job_ttl_seconds=600)
    async with Store.open(durable.url, queue_name=Q, policy=policy, name="test") as store:
        with redis.Redis.from_url(durable.url) as client:
            hands = Hands(store, client)
            async with feeding(store) as feed:
                start = Position(await feed.store.time_ms())
                with feed.follow(GROUP, start, never) as follower:
                    (job_id,) = await hands.some(1, group="g")
                    claim = await hands.take()
                    before = [(job_id, "pending"), (job_id, "processing")]
                    assert await told(follower, 2) == before
                    durable.kill()
                    durable.start()
                    await hands.finish(claim)
                    assert await told(follower, 1) == [(job_id, "completed")]


async def test_a_follower_is_told_of_the_gap_when_the_clock_of_the_redis_that_came_back_is_behind(
    store: Store, server: redis.Redis
) -> None:
    hands = Hands(store, server)
    async with feeding(store) as feed:
        now_ms = await feed.store.time_ms()
        with feed.follow(GROUP, Position(now_ms), never) as follower:
            (before,) = await hands.some(1, group="g")
            ahead = f"{now_ms + 3_600_000}-0"
            server.xadd(keys.log(Q), {"pending": msgspec.msgpack.encode([before])}, id=ahead)
            assert await told(follower, 2) == [(before, "pending")] * 2
            server.flushall()
            await hands.some(1, group="g")
            with pytest.raises(LogTrimmed):
                await told(follower, 1)
            follower.begin_at(Position(await feed.store.time_ms()))
            (after,) = await hands.some(1, group="g")
            assert await told(follower, 1) == [(after, "pending")]


async def test_a_place_ahead_of_the_clock_is_trimmed_and_one_in_a_quiet_log_is_not(
    store: Store, server: redis.Redis
) -> None:
    log = Log(store)
    now_ms = await store.time_ms()
    assert (await log.page(Q, (now_ms, 0, 0))).changes == []
    with pytest.raises(LogTrimmed):
        await log.page(Q, (now_ms + 60_000, 0, 0))
    server.xadd(keys.log(Q), {"pending": msgspec.msgpack.encode(["a"])}, id=f"{now_ms + 60_000}-0")
    # The clock may have been set back under a log that goes on.
    assert (await log.page(Q, (now_ms + 60_000, 1, 0))).changes == []
