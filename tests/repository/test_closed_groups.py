"""Closed groups: they refuse submits, and those with a webhook end once, when all jobs have."""

import asyncio
from datetime import datetime
from typing import Any

import msgspec
import pytest

from asyncinfer.repository import keys
from asyncinfer.repository.closed_groups import MAX_CLOSING, ClosedGroups, CountedGroup
from asyncinfer.repository.deliveries import Attempt, Target
from asyncinfer.repository.outbox import Delivery, Outbox
from asyncinfer.repository.store import Store
from asyncinfer.schemas.webhooks import EndedCounts
from asyncinfer.untrusted import decoding
from tests.faults.harness import eventually
from tests.queue_driver import Q, QueueDriver, new_job

TENANT = "default"
WEBHOOK = Target("https://example.com/hook", TENANT, metadata={"order": 7})


@pytest.fixture
def groups(store: Store) -> ClosedGroups:
    return ClosedGroups(store)


async def ended_groups(groups: ClosedGroups) -> list[CountedGroup]:
    """The groups that have ended, which are looked at as if all were due."""
    ended, has_more = await groups.count_ended()
    while has_more:
        more, has_more = await groups.count_ended()
        ended += more
    return ended


def make_due(hands: QueueDriver, group: str = "g") -> None:
    hands.redis.zadd(keys.closing(Q), {keys.group_digest(TENANT, group): 0})


def state_of(hands: QueueDriver, group: str = "g") -> dict[bytes, bytes]:
    state: dict[bytes, bytes] = hands.redis.hgetall(keys.closed_group(Q, TENANT, group))
    return state


# --- submits ---------------------------------------------------------------------------------


async def test_a_closed_group_takes_no_more_jobs_and_others_do(
    hands: QueueDriver, groups: ClosedGroups
) -> None:
    await hands.submit_one(group="g")
    assert await groups.close(TENANT, "g") == "closed"
    jobs = [new_job(group="g"), new_job(group="h"), new_job(), new_job(group="g", tenant="other")]
    assert await hands.submit(*jobs) == ["closed", "ok", "ok", "ok"]
    assert len(hands.waiting_ids()) == 4


async def test_a_submit_that_was_accepted_before_the_close_may_be_sent_again(
    hands: QueueDriver, groups: ClosedGroups
) -> None:
    job = new_job(group="g", key="k")
    await hands.submit(job)
    await groups.close(TENANT, "g")
    assert await hands.submit(job, new_job(group="g", key="k")) == ["dup", "dup"]
    unkeyed = new_job(group="h")
    await hands.submit(unkeyed)
    await groups.close(TENANT, "h")
    assert await hands.submit(unkeyed) == ["exists"]


async def test_a_failed_job_of_a_closed_group_may_be_retried(
    hands: QueueDriver, groups: ClosedGroups
) -> None:
    job_id = await hands.submit_one(group="g")
    await hands.run_all("failed")
    await groups.close(TENANT, "g")
    assert await hands.retry(job_id) == "ok"


# --- closing ---------------------------------------------------------------------------------


async def test_a_group_without_jobs_is_not_closed(groups: ClosedGroups) -> None:
    assert await groups.close(TENANT, "g", WEBHOOK) == "absent"


async def test_a_group_is_closed_once_and_keeps_its_webhook(
    hands: QueueDriver, groups: ClosedGroups
) -> None:
    await hands.submit_one(group="g")
    assert await groups.close(TENANT, "g", WEBHOOK) == "closed"
    state = state_of(hands)
    for webhook in (WEBHOOK, None):
        assert await groups.close(TENANT, "g", webhook) == "closed"
    assert await groups.close(TENANT, "g", Target("https://other", TENANT)) == "other"
    assert state_of(hands) == state


async def test_a_webhook_may_be_given_after_the_close(
    hands: QueueDriver, groups: ClosedGroups
) -> None:
    await hands.submit_one(group="g")
    await groups.close(TENANT, "g")
    await hands.run_all()
    assert await ended_groups(groups) == []
    assert await groups.close(TENANT, "g", WEBHOOK) == "closed"
    (ended,) = await ended_groups(groups)
    assert (ended.name, ended.target) == ("g", WEBHOOK)


async def test_groups_that_are_followed_are_bounded(
    hands: QueueDriver, groups: ClosedGroups
) -> None:
    await hands.submit_one(group="g")
    hands.redis.zadd(keys.closing(Q), {f"{n}": 2**52 for n in range(MAX_CLOSING)})
    assert await groups.close(TENANT, "g", WEBHOOK) == "full"
    assert await hands.submit(new_job(group="g")) == ["ok"]
    assert await groups.close(TENANT, "g") == "closed"


async def test_a_tenant_leaves_others_as_many_groups_as_it_has(
    hands: QueueDriver,
) -> None:
    groups = ClosedGroups(hands.store, max_closing=10)
    for tenant in ("acme", "bob"):
        await hands.submit(*(new_job(group=f"g{n}", tenant=tenant) for n in range(8)))

    async def close_all(tenant: str) -> list[str]:
        return [await groups.close(tenant, f"g{n}", WEBHOOK) for n in range(8)]

    assert await close_all("acme") == ["closed"] * 5 + ["tenant_full"] * 3
    assert await close_all("bob") == ["closed"] * 3 + ["tenant_full"] * 5
    assert await groups.close("acme", "g7") == "closed", "without a webhook it is not followed"
    await hands.run_all()
    for digest in hands.redis.zrange(keys.closing(Q), 0, -1):
        hands.redis.zadd(keys.closing(Q), {digest: 0})
    assert await groups.follow() == 8
    assert not hands.redis.exists(keys.closing(Q), keys.closers(Q))
    assert await groups.close("bob", "g6", WEBHOOK) == "closed"


async def test_the_count_of_a_tenant_is_corrected_where_it_was_not_kept(
    hands: QueueDriver,
) -> None:
    groups = ClosedGroups(hands.store, max_closing=10)
    await hands.submit(*(new_job(group=f"g{n}") for n in range(9)))
    for number in range(5):
        assert await groups.close(TENANT, f"g{number}", WEBHOOK) == "closed"
    # As an older release ends them.
    hands.redis.zremrangebyrank(keys.closing(Q), 0, 3)
    assert [await groups.close(TENANT, f"g{n}", WEBHOOK) for n in range(5, 9)] == ["closed"] * 4
    assert hands.redis.hget(keys.closers(Q), f":{TENANT}") == b"5"
    hands.redis.delete(keys.closers(Q))
    hands.redis.rpush(keys.closers(Q), "x")
    await hands.submit_one(group="h")
    assert await groups.close(TENANT, "h", WEBHOOK) == "closed"


async def test_a_closed_group_is_forgotten_a_week_after_its_close(
    hands: QueueDriver, groups: ClosedGroups
) -> None:
    await hands.submit_one(group="g")
    names = [keys.group(Q, TENANT, "g"), keys.closed_group(Q, TENANT, "g")]
    hands.redis.expire(names[0], 10)
    await groups.close(TENANT, "g")
    first, second = (hands.redis.pexpiretime(name) for name in names)
    assert first == second > hands.now_ms() + 7 * 86_400_000 - 60_000


async def test_a_group_with_a_webhook_is_kept_for_as_long_as_it_has_unfinished_jobs(
    hands: QueueDriver, groups: ClosedGroups
) -> None:
    await hands.submit_one(group="g", delay_seconds=30 * 86_400)
    await groups.close(TENANT, "g", WEBHOOK)
    names = [keys.group(Q, TENANT, "g"), keys.closed_group(Q, TENANT, "g")]
    for name in names:
        hands.redis.expire(name, 10)
    make_due(hands)
    await ended_groups(groups)
    assert all(hands.redis.ttl(name) > 7 * 86_400 - 60 for name in names)


# --- following -------------------------------------------------------------------------------


async def test_a_group_ends_when_all_its_jobs_of_all_queues_have(
    hands: QueueDriver, groups: ClosedGroups
) -> None:
    other = f"{Q}:digits"
    await hands.submit_many(3, group="g")
    await hands.submit_many(2, group="g", queue=other)
    await groups.close(TENANT, "g", WEBHOOK)
    assert await ended_groups(groups) == []
    await hands.run_all()
    make_due(hands)
    assert await ended_groups(groups) == []
    await hands.finish(await hands.claim_jobs(queues=[other]), "failed")
    assert await ended_groups(groups) == [], "it was looked at a moment ago"
    make_due(hands)
    (ended,) = await ended_groups(groups)
    assert ended.counts == EndedCounts(completed=3, failed=2, cancelled=0, expired=0)


async def test_a_running_job_of_a_group_is_awaited(
    hands: QueueDriver, groups: ClosedGroups
) -> None:
    done, running = await hands.submit_many(2, group="g")
    claim = await hands.claim_jobs()
    await hands.finish(claim, only=[done], last=False)
    await groups.close(TENANT, "g", WEBHOOK)
    assert await ended_groups(groups) == []
    make_due(hands)
    assert await ended_groups(groups) == []
    await hands.finish(claim, "failed", only=[running])
    make_due(hands)
    (ended,) = await ended_groups(groups)
    assert ended.counts == EndedCounts(completed=1, failed=1, cancelled=0, expired=0)


async def test_jobs_count_as_they_were_when_they_had_ended(
    hands: QueueDriver, groups: ClosedGroups
) -> None:
    gone, cancelled = await hands.submit_many(2, group="g")
    await hands.cancel(cancelled)
    await hands.run_all()
    await hands.operations.forget(await hands.read(gone))
    last = await hands.submit_one(group="g")
    await groups.close(TENANT, "g", WEBHOOK)
    await ended_groups(groups)
    # What was counted stays counted, whatever becomes of the job.
    await hands.operations.forget(await hands.read(cancelled))
    await hands.cancel(last)
    make_due(hands)
    (ended,) = await ended_groups(groups)
    assert ended.counts == EndedCounts(completed=0, failed=0, cancelled=2, expired=1)


async def test_a_group_ends_once_however_many_processes_follow_it(
    hands: QueueDriver, groups: ClosedGroups
) -> None:
    for name in ("g", "h"):
        await hands.submit_many(3, group=name)
        await groups.close(TENANT, name, WEBHOOK)
    await hands.run_all()
    ends = await asyncio.gather(*(ClosedGroups(hands.store).follow() for _ in range(20)))
    assert sum(ends) == 2
    assert b"ended_ms" in state_of(hands)
    assert not hands.redis.exists(keys.closing(Q))


async def ended_but_not_noted(hands: QueueDriver, groups: ClosedGroups) -> CountedGroup:
    """A group that one process found ended a moment ago, and another may take up now."""
    await hands.submit_one(group="g")
    await groups.close(TENANT, "g", WEBHOOK)
    await hands.run_all()
    (counted,) = await ended_groups(groups)
    await eventually(lambda: hands.now_ms() > counted.ended_ms, "a later time")
    make_due(hands)
    return counted


async def test_a_group_whose_follower_died_is_ended_by_another(
    hands: QueueDriver, groups: ClosedGroups
) -> None:
    lost = await ended_but_not_noted(hands, groups)
    assert await ClosedGroups(hands.store).follow() == 1
    assert not await groups.end(lost)
    assert state_of(hands)[b"ended_ms"] == str(lost.ended_ms).encode()


async def test_one_time_is_told_whichever_process_makes_the_delivery_or_notes_the_end(
    hands: QueueDriver, groups: ClosedGroups
) -> None:
    first = await ended_but_not_noted(hands, groups)
    (second,) = await ended_groups(groups)
    assert await groups.end(second)
    (delivery,) = await deliveries(hands)
    told = msgspec.json.decode(delivery.body or b"")["data"]["ended_at"]
    noted = decoding.time(int(state_of(hands)[b"ended_ms"]))
    assert datetime.fromisoformat(told) == noted == decoding.time(first.ended_ms)


async def test_a_group_that_was_closed_anew_is_not_ended_by_a_late_call(
    hands: QueueDriver, groups: ClosedGroups
) -> None:
    await hands.submit_one(group="g")
    await groups.close(TENANT, "g", WEBHOOK)
    await hands.run_all()
    (late,) = await ended_groups(groups)
    hands.redis.flushall()
    await hands.submit_one(group="g")
    await groups.close(TENANT, "g", WEBHOOK)
    assert not await groups.end(late)
    assert await ended_groups(groups) == []


async def test_a_group_that_is_gone_is_followed_no_more(
    hands: QueueDriver, groups: ClosedGroups
) -> None:
    for name, lost in (("g", keys.group), ("h", keys.closed_group)):
        await hands.submit_one(group=name)
        await groups.close(TENANT, name, WEBHOOK)
        hands.redis.delete(lost(Q, TENANT, name))
    await hands.run_all()
    assert await ended_groups(groups) == []
    assert not hands.redis.exists(keys.closing(Q))


async def test_a_group_with_a_key_of_another_type_holds_up_no_other(
    hands: QueueDriver, groups: ClosedGroups
) -> None:
    for name in ("damaged", "whole"):
        await hands.submit_one(group=name)
        await groups.close(TENANT, name, WEBHOOK)
    await hands.run_all()
    list_name = keys.group(Q, TENANT, "damaged")
    hands.redis.delete(list_name)
    hands.redis.set(list_name, "x", ex=60)
    assert [group.name for group in await ended_groups(groups)] == ["whole"]


# --- the webhook -----------------------------------------------------------------------------


async def deliveries(hands: QueueDriver) -> list[Delivery]:
    """The deliveries that are due, each once."""
    return await Outbox(hands.store).take([Q], 100, 60_000)


async def test_the_webhook_of_a_group_is_due_once_when_it_has_ended_and_has_the_counts(
    hands: QueueDriver, groups: ClosedGroups
) -> None:
    await hands.submit_many(3, group="g")
    await groups.close(TENANT, "g", WEBHOOK)
    await groups.follow()
    assert await deliveries(hands) == []
    await hands.run_all()
    make_due(hands)
    await asyncio.gather(*(ClosedGroups(hands.store).follow() for _ in range(20)))
    (delivery,) = await deliveries(hands)
    assert delivery.target == WEBHOOK
    assert delivery.webhook_id.startswith(f"msg_group{keys.group_digest(TENANT, 'g')}_")
    assert "." not in delivery.webhook_id
    body = msgspec.json.decode(delivery.body or b"")
    data = body.pop("data")
    assert body == {
        "type": "group.ended",
        "timestamp": data.pop("ended_at"),
        "metadata": {"order": 7},
    }
    assert data.pop("closed_at") < body["timestamp"]
    counts = {"completed": 3, "failed": 0, "cancelled": 0, "expired": 0}
    assert data == {"group": "g", "jobs": 3, "counts": counts}
    assert (await groups.close(TENANT, "g", WEBHOOK), await groups.follow()) == ("closed", 0)
    assert await deliveries(hands) == []


async def test_a_process_that_dies_before_it_notes_the_end_makes_no_second_delivery(
    hands: QueueDriver, groups: ClosedGroups
) -> None:
    await hands.submit_one(group="g")
    await groups.close(TENANT, "g", WEBHOOK)
    await hands.run_all()
    (counted,) = await ended_groups(groups)
    outbox = Outbox(hands.store)
    assert counted.target
    assert await outbox.add(Q, counted.delivery, counted.target, b"{}", 60)
    (delivery,) = await deliveries(hands)
    await outbox.note(delivery, Attempt(1, 200), None, "delivered")
    make_due(hands)
    assert await groups.follow() == 1
    assert await deliveries(hands) == []


async def test_the_room_of_a_groups_webhook_is_reserved_by_its_close(
    hands: QueueDriver, groups: ClosedGroups
) -> None:
    for name in ("g", "h"):
        await hands.submit_one(group=name)
    hands.change_policy(max_webhooks=1)
    assert await groups.close(TENANT, "g", WEBHOOK) == "closed"
    assert await groups.close(TENANT, "h", WEBHOOK) == "webhooks_full"
    assert await hands.submit(new_job(group="h")) == ["ok"]
    await hands.maintenance.repair(600)
    assert hands.redis.hlen(keys.webhooks(Q)) == 1
    await hands.run_all()
    make_due(hands)
    await groups.follow()
    (delivery,) = await deliveries(hands)
    assert hands.redis.hlen(keys.webhooks(Q)) == 1
    await Outbox(hands.store).note(delivery, Attempt(1, 200), None, "delivered")
    assert not hands.redis.exists(keys.webhooks(Q), keys.webhook_bytes(Q))
    assert await groups.close(TENANT, "h", WEBHOOK) == "closed"


async def test_the_room_of_a_group_that_is_gone_is_given_back(
    hands: QueueDriver, groups: ClosedGroups
) -> None:
    await hands.submit_one(group="g")
    await groups.close(TENANT, "g", WEBHOOK)
    hands.redis.delete(keys.closed_group(Q, TENANT, "g"))
    await ended_groups(groups)
    await hands.maintenance.repair(600)
    assert not hands.redis.exists(keys.webhooks(Q), keys.webhook_bytes(Q))


async def test_a_group_whose_webhook_is_damaged_ends_without_one(
    hands: QueueDriver, groups: ClosedGroups
) -> None:
    await hands.submit_one(group="g")
    await groups.close(TENANT, "g", WEBHOOK)
    hands.redis.hset(keys.closed_group(Q, TENANT, "g"), "webhook", "x")
    await hands.run_all()
    assert await groups.follow() == 1
    assert await deliveries(hands) == []


# --- the cost --------------------------------------------------------------------------------


async def test_a_group_that_has_ended_is_found_at_once_behind_many_that_have_not(
    hands: QueueDriver, groups: ClosedGroups
) -> None:
    waiting = [f"w{number}" for number in range(250)]
    for name in (*waiting, "g"):
        await hands.submit_one(group=name, delay_seconds=0 if name == "g" else 86_400)
        await groups.close(TENANT, name, WEBHOOK)
    await hands.run_all()
    for name in waiting:
        make_due(hands, name)
    assert await groups.follow() == 1
    assert hands.redis.zcount(keys.closing(Q), 0, hands.now_ms()) == 0


async def test_a_look_at_a_group_that_waits_writes_only_when_it_is_due_next(
    hands: QueueDriver, groups: ClosedGroups
) -> None:
    count = 50
    for number in range(count):
        await hands.submit_one(group=f"g{number}")
        await groups.close(TENANT, f"g{number}", WEBHOOK)
    looks = []
    for _ in range(3):
        for number in range(count):
            make_due(hands, f"g{number}")
        before = commands_run(hands.redis)
        assert await groups.count_ended() == ([], False)
        looks.append(commands_run(hands.redis) - before)
    # The first one may open connections.
    assert min(looks) < 3 * count + 15


def commands_run(server: Any) -> int:
    """How many commands the server has run, those of scripts among them."""
    stats = server.info("commandstats")
    return sum(of["calls"] for name, of in stats.items() if name != "cmdstat_info")


async def test_a_look_at_a_group_costs_the_same_however_many_jobs_it_has(
    hands: QueueDriver, groups: ClosedGroups
) -> None:
    costs = []
    for count in (2, 2000):
        group = f"g{count}"
        jobs = [new_job(group=group) for _ in range(count)]
        for start in range(0, count, 250):
            await hands.submit(*jobs[start : start + 250])
        await groups.close(TENANT, group, WEBHOOK)
        looks = []
        for _ in range(3):
            make_due(hands, group)
            before = commands_run(hands.redis)
            assert await groups.count_ended() == ([], False)
            looks.append(commands_run(hands.redis) - before)
        # The first one may open connections.
        costs.append(min(looks))
    assert max(costs) < 20


@pytest.mark.soak
async def test_the_jobs_of_a_large_group_are_read_once(
    hands: QueueDriver, groups: ClosedGroups
) -> None:
    count = 100_000
    hands.change_policy(max_queue=2 * count)
    for _ in range(count // 250):
        await hands.submit_many(250, group="g")
    await groups.close(TENANT, "g", WEBHOOK)
    before = commands_run(hands.redis)
    for _ in range(100):
        make_due(hands)
        assert await groups.count_ended() == ([], False)
    assert (commands_run(hands.redis) - before) / 100 < 15
    await hands.run_all()
    make_due(hands)
    before = commands_run(hands.redis)
    (ended,) = await ended_groups(groups)
    assert ended.counts.completed == count
    assert commands_run(hands.redis) - before < 20 * count / 1000
