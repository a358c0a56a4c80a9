"""Webhooks: each wanted end is put into the outbox once, and what it reserves is given back."""

from typing import Any

import msgspec
import pytest

from asyncinfer.jobs import Outcome, Webhook, encode_record
from asyncinfer.repository import keys
from asyncinfer.repository.deliveries import Attempt, Member, Target
from asyncinfer.repository.inspect.queue_load import read_depths
from asyncinfer.repository.outbox import Delivery, Outbox
from asyncinfer.repository.store import Store
from asyncinfer.repository.submissions import capacity_arguments, script_options
from tests.queue_driver import ERROR, RESULT, Q, QueueDriver, new_job

HOOK = Webhook(url="https://example.com/hook", metadata={"order": 7})
LEASE_MS = 60_000


@pytest.fixture
def outbox(store: Store) -> Outbox:
    return Outbox(store)


def members(hands: QueueDriver) -> set[str]:
    return {member.decode() for member in hands.redis.zrange(keys.outbox(Q), 0, -1)}


def reserved(hands: QueueDriver) -> int:
    """How many webhooks have room reserved; their bytes and the sum agree."""
    entries = hands.redis.hvals(keys.webhooks(Q))
    assert hands.counter(keys.webhook_bytes(Q)) == sum(map(int, entries))
    return len(entries)


async def take_one(outbox: Outbox) -> Delivery:
    (delivery,) = await outbox.take([Q], 10, LEASE_MS)
    return delivery


def attempt(at_ms: int = 1, status: int = 500) -> Attempt:
    return Attempt(at_ms, status)


async def end_lost(hands: QueueDriver, job_id: str) -> None:
    for _ in range(3):
        await hands.claim_jobs(1)
        hands.expire_leases()
        await hands.sweep()


# --- which ends are told ---------------------------------------------------------------------


async def test_each_way_in_which_a_job_ends_is_told_once(hands: QueueDriver) -> None:
    told = set()
    outcomes: dict[Outcome, str] = {"completed": "completed", "failed": "failed", "dead": "failed"}
    for outcome, event in outcomes.items():
        job_id = await hands.submit_one(webhook=HOOK)
        await hands.finish(await hands.claim_jobs(), outcome)
        told.add(f"{job_id}_1_{event}")
    cancelled = await hands.submit_one(webhook=HOOK)
    await hands.cancel(cancelled)
    purged = await hands.submit_one(webhook=HOOK)
    await hands.operations.cancel_queue(Q)
    lost = await hands.submit_one(webhook=HOOK)
    await end_lost(hands, lost)
    late = await hands.submit_one(webhook=HOOK, start_within_seconds=60)
    hands.make_due(keys.deadlines(Q), late)
    await hands.sweep()
    without_input = await hands.submit_one(webhook=HOOK)
    hands.redis.delete(keys.data(without_input))
    await hands.claim()
    told |= {f"{job_id}_1_cancelled" for job_id in (cancelled, purged)}
    told |= {f"{job_id}_1_failed" for job_id in (lost, late, without_input)}
    assert members(hands) == told
    assert reserved(hands) == len(told)


async def test_an_end_that_the_webhook_does_not_want_is_not_told_and_leaves_nothing(
    hands: QueueDriver,
) -> None:
    hook = msgspec.structs.replace(HOOK, events=("failed",))
    job_id = await hands.submit_one(webhook=hook)
    assert reserved(hands) == 1
    await hands.run_all()
    assert (members(hands), reserved(hands)) == (set(), 0)
    assert not hands.redis.exists(keys.webhook(Q, job_id), keys.webhooks(Q), keys.webhook_bytes(Q))


async def test_a_job_that_goes_back_to_its_queue_is_not_told_of(hands: QueueDriver) -> None:
    await hands.submit_one(webhook=HOOK)
    outcomes: tuple[Outcome, ...] = ("retry", "released", "suspect")
    for outcome in outcomes:
        await hands.finish(await hands.claim_jobs(), outcome)
    assert (members(hands), reserved(hands)) == (set(), 1)


async def test_jobs_without_a_webhook_cost_no_command_and_no_byte(hands: QueueDriver) -> None:
    """The commands are those of the release before there were webhooks, and the time of a
    cancel."""
    await hands.submit_one()
    await hands.run_all()
    hands.redis.config_resetstat()
    job_ids = await hands.submit_many(2)
    await hands.finish(await hands.claim_jobs(), "failed")
    await hands.retry(job_ids[0])
    await hands.cancel(job_ids[0])
    await hands.operations.forget(await hands.read(job_ids[0]))
    stats = hands.redis.info("commandstats")
    calls = {name.removeprefix("cmdstat_"): row["calls"] for name, row in stats.items()}
    words = ("exists", "incrby", "llen", "persist", "time", "unlink")
    assert [calls.get(word) for word in words] == [6, 3, 9, 1, 4, 1]
    tables = {name: count for name, count in calls.items() if name[0] in "hz"}
    assert tables == {"hdel": 2, "hget": 1, "hmget": 3, "hset": 1, "zadd": 1, "zcard": 1, "zrem": 4}
    job = new_job()
    assert b"webhook" not in encode_record(job.record)
    assert script_options(job, Q) == {}
    assert "max_webhooks" not in capacity_arguments(hands.store, [job])


# --- room ------------------------------------------------------------------------------------


async def test_a_submit_with_a_webhook_is_refused_where_there_is_no_room_for_it(
    hands: QueueDriver, outbox: Outbox
) -> None:
    hands.change_policy(max_webhooks=2)
    first = new_job(webhook=HOOK)
    assert await hands.submit(first, new_job(webhook=HOOK), new_job(webhook=HOOK), new_job()) == [
        *("ok", "ok", "webhooks_full", "ok"),
    ]
    await hands.cancel(first.job_id)
    assert await hands.submit(new_job(webhook=HOOK)) == ["webhooks_full"]
    await outbox.note(await take_one(outbox), attempt(status=204), None, "delivered")
    assert await hands.submit(new_job(webhook=HOOK)) == ["ok"]
    hands.change_policy(max_webhooks=10, max_webhook_bytes=1024)
    assert await hands.submit(new_job(webhook=HOOK)) == ["webhooks_full"]


async def test_a_body_with_a_result_for_which_there_is_no_room_is_kept_without_it(
    hands: QueueDriver, outbox: Outbox
) -> None:
    await hands.submit_many(2, webhook=HOOK)
    hands.change_policy(max_webhook_bytes=hands.counter(keys.webhook_bytes(Q)) + 15_000)
    await hands.run_all()
    first, second = await outbox.take([Q], 10, LEASE_MS)
    large, short = b"x" * 15_000, b"s" * 2000
    assert await outbox.keep_body(first, large, short) == large
    assert await outbox.keep_body(second, large, short) == short
    assert reserved(hands) == 2
    assert hands.counter(keys.webhook_bytes(Q)) <= hands.store.policy.max_webhook_bytes
    for delivery in (first, second):
        await outbox.note(delivery, attempt(status=200), None, "delivered")
    assert reserved(hands) == 0


# --- taking and noting -----------------------------------------------------------------------


async def test_a_delivery_has_the_job_as_it_ended_and_where_it_goes(
    hands: QueueDriver, outbox: Outbox
) -> None:
    job_id = await hands.submit_one(webhook=HOOK, tenant="acme")
    await hands.run_all()
    delivery = await take_one(outbox)
    assert delivery.webhook_id == f"msg_{job_id}_1_completed"
    assert (delivery.target.url, delivery.target.tenant) == (HOOK.url, "acme")
    assert delivery.target.metadata == {"order": 7}
    assert delivery.job
    assert delivery.job.result == RESULT
    assert delivery.body is None


async def test_a_large_result_is_not_read(hands: QueueDriver, outbox: Outbox) -> None:
    await hands.submit_one(webhook=HOOK)
    await hands.finish(await hands.claim_jobs(), body=b"1" * 30_000)
    (delivery,) = await outbox.take([Q], 10, LEASE_MS, max_result_bytes=20_000)
    assert delivery.job
    assert (delivery.job.status, delivery.job.result) == ("completed", None)


async def test_a_job_that_is_gone_is_still_told_of(hands: QueueDriver, outbox: Outbox) -> None:
    job_id = await hands.submit_one(webhook=HOOK)
    await hands.run_all()
    hands.redis.delete(*hands.redis.keys(f"job:{job_id}:*"))
    delivery = await take_one(outbox)
    assert (delivery.job, delivery.target.url) == (None, HOOK.url)
    await outbox.note(delivery, attempt(status=200), None, "delivered")
    assert reserved(hands) == 0
    assert not hands.redis.exists(keys.webhook(Q, job_id))


async def test_a_leased_delivery_is_taken_by_no_other_sender_until_the_lease_ends(
    hands: QueueDriver, outbox: Outbox
) -> None:
    await hands.submit_one(webhook=HOOK)
    await hands.run_all()
    first = await take_one(outbox)
    assert await outbox.take([Q], 10, LEASE_MS) == []
    assert await outbox.keep_body(first, b"{}") == b"{}"
    hands.make_due(keys.outbox(Q))
    second = await take_one(outbox)
    assert (second.webhook_id, second.body) == (first.webhook_id, b"{}")
    assert await outbox.keep_body(second, b"other") == b"{}"


async def test_a_try_that_failed_is_due_again_when_its_sender_says(
    hands: QueueDriver, outbox: Outbox
) -> None:
    job_id = await hands.submit_one(webhook=HOOK)
    await hands.run_all()
    delivery = await take_one(outbox)
    due_ms = hands.now_ms() + 5000
    for _ in range(2):  # The reply of the first may be lost.
        await outbox.note(delivery, attempt(), due_ms)
    (seen,) = (await outbox.state_of(await hands.read(job_id))).deliveries
    assert seen.due_ms == due_ms
    assert (seen.state.attempts, seen.state.tries) == ((attempt(),), 1)


async def test_a_slow_sender_adds_its_attempt_and_takes_no_lease_from_the_next(
    hands: QueueDriver, outbox: Outbox
) -> None:
    job_id = await hands.submit_one(webhook=HOOK)
    await hands.run_all()
    slow = await take_one(outbox)
    hands.make_due(keys.outbox(Q))
    quick = (await outbox.take([Q], 10, 2 * LEASE_MS))[0]
    await outbox.note(slow, attempt(1), hands.now_ms())
    assert await outbox.take([Q], 10, LEASE_MS) == []
    await outbox.note(quick, attempt(2, 200), None, "delivered")
    await outbox.note(slow, attempt(3), None, "given_up")
    (seen,) = (await outbox.state_of(await hands.read(job_id))).deliveries
    assert [one.at_ms for one in seen.state.attempts] == [1, 2, 3]
    assert (seen.state.outcome, seen.due_ms) == ("delivered", None)
    assert hands.redis.zcard(keys.undelivered(Q)) == 0
    assert reserved(hands) == 0


async def test_postponed_deliveries_come_back_without_an_attempt(
    hands: QueueDriver, outbox: Outbox
) -> None:
    await hands.submit_many(3, webhook=HOOK)
    await hands.run_all()
    taken = await outbox.take([Q], 10, LEASE_MS)
    await outbox.postpone(taken[:2], hands.now_ms())
    again = await outbox.take([Q], 10, LEASE_MS)
    assert {one.webhook_id for one in again} == {one.webhook_id for one in taken[:2]}
    assert [one.state.tries for one in again] == [0, 0]


async def test_what_was_given_up_is_sent_again_though_its_job_is_gone(
    hands: QueueDriver, outbox: Outbox
) -> None:
    job_id = await hands.submit_one(webhook=HOOK, ttl_seconds=5)
    await hands.run_all()
    await outbox.note(await take_one(outbox), attempt(), None, "given_up")
    assert reserved(hands) == 0
    assert hands.redis.ttl(keys.webhook(Q, job_id)) > 800
    hands.redis.delete(*hands.redis.keys(f"job:{job_id}:*"))
    for _ in range(2):
        assert await outbox.redeliver_in(Q, job_id, now_ms=9) == "ok"
    assert (reserved(hands), hands.redis.zcard(keys.undelivered(Q))) == (1, 0)
    assert hands.redis.ttl(keys.webhook(Q, job_id)) == -1
    delivery = await take_one(outbox)
    assert (delivery.state.tries, delivery.state.attempts) == (0, (attempt(),))


async def test_a_delivery_is_not_sent_again_where_there_is_no_room(
    hands: QueueDriver, outbox: Outbox
) -> None:
    job_id = await hands.submit_one(webhook=HOOK)
    await hands.run_all()
    await outbox.note(await take_one(outbox), attempt(status=200), None, "delivered")
    await hands.submit_one(webhook=HOOK)
    hands.change_policy(max_webhooks=1)
    stored = await hands.read(job_id)
    assert await outbox.redeliver(stored, now_ms=1) == "webhooks_full"
    assert await outbox.redeliver(stored, "failed", now_ms=1) == "absent"


# --- rounds, and the end ---------------------------------------------------------------------


async def test_a_retried_job_has_a_delivery_of_its_own_while_that_of_the_round_before_goes_on(
    hands: QueueDriver, outbox: Outbox
) -> None:
    job_id = await hands.submit_one(webhook=HOOK)
    await hands.run_all("failed")
    first = await take_one(outbox)
    await outbox.keep_body(first, ERROR)
    assert await hands.retry(job_id) == "ok"
    assert reserved(hands) == 2
    await hands.run_all()
    assert members(hands) == {f"{job_id}_1_failed", f"{job_id}_2_completed"}
    hands.make_due(keys.outbox(Q), f"{job_id}_1_failed")
    by_id = {one.round: one for one in await outbox.take([Q], 10, LEASE_MS)}
    assert by_id[1].body == ERROR
    assert by_id[2].job
    assert by_id[2].job.result == RESULT
    for delivery in by_id.values():
        await outbox.note(delivery, attempt(status=200), None, "delivered")
    assert reserved(hands) == 0
    webhook = await outbox.state_of(await hands.read(job_id))
    assert [one.member.field for one in webhook.deliveries] == ["1_failed", "2_completed"]


async def test_a_round_that_was_retried_before_its_first_try_is_told_without_the_job(
    hands: QueueDriver, outbox: Outbox
) -> None:
    job_id = await hands.submit_one(webhook=HOOK)
    await hands.run_all("failed")
    await hands.retry(job_id)
    assert (await take_one(outbox)).job is None


async def test_a_job_cannot_be_retried_without_room_for_its_webhook(hands: QueueDriver) -> None:
    job_id = await hands.submit_one(webhook=HOOK)
    await hands.run_all("failed")
    hands.change_policy(max_webhooks=1)
    assert await hands.retry(job_id) == "webhooks_full"


async def test_few_deliveries_of_a_job_are_remembered_however_often_it_is_retried(
    hands: QueueDriver, outbox: Outbox
) -> None:
    job_id = await hands.submit_one(webhook=HOOK)
    for _ in range(20):
        await hands.run_all("failed")
        await outbox.note(await take_one(outbox), attempt(status=200), None, "delivered")
        assert await hands.retry(job_id) == "ok"
    webhook = await outbox.state_of(await hands.read(job_id))
    assert [one.member.round for one in webhook.deliveries] == list(range(5, 21))


async def test_a_job_takes_no_more_rounds_than_it_can_have_deliveries(hands: QueueDriver) -> None:
    job_id = await hands.submit_one(webhook=HOOK)
    verdicts = set()
    for _ in range(70):
        await hands.run_all("failed")
        verdicts.add(await hands.retry(job_id))
    assert verdicts == {"ok", "webhooks_full"}
    assert len(members(hands)) < 64


async def test_a_forgotten_job_is_not_told_of_any_more(hands: QueueDriver, outbox: Outbox) -> None:
    job_id = await hands.submit_one(webhook=HOOK)
    await hands.run_all("failed")
    delivery = await take_one(outbox)
    assert await hands.operations.forget(await hands.read(job_id)) == "forgotten"
    assert (members(hands), reserved(hands)) == (set(), 0)
    assert await outbox.keep_body(delivery, b"{}") is None
    await outbox.note(delivery, attempt(status=200), None, "delivered")
    assert not [name for name in hands.redis.scan_iter() if b"webhook" in name]


async def test_what_is_no_job_has_a_delivery_with_its_body_once(
    hands: QueueDriver, outbox: Outbox
) -> None:
    target = Target("https://example.com/group", "acme")
    member = Member("group-1", 1, "ended")
    added = [await outbox.add(Q, member, target, b'{"n":1}', 600) for _ in range(2)]
    assert added == [True, False]
    delivery = await take_one(outbox)
    assert (delivery.webhook_id, delivery.body) == ("msg_group-1_1_ended", b'{"n":1}')
    await outbox.note(delivery, attempt(status=200), None, "delivered")
    assert reserved(hands) == 0
    assert 0 < hands.redis.ttl(keys.webhook(Q, "group-1")) <= 600


async def test_the_counts_say_how_many_are_due_and_for_how_long(
    hands: QueueDriver, outbox: Outbox
) -> None:
    await hands.submit_many(4, webhook=HOOK)
    claim = await hands.claim_jobs(3)
    await hands.finish(claim)
    oldest, later, given_up = await outbox.take([Q], 3, LEASE_MS)
    await outbox.postpone([oldest], hands.now_ms() - 5000)
    await outbox.note(given_up, attempt(), None, "given_up")
    await outbox.postpone([later], hands.now_ms() + 50_000)
    depth = (await read_depths(hands.store, [Q])).depths[0]
    assert depth is not None
    counts = depth.webhooks
    assert (counts.reserved, counts.open, counts.due, counts.given_up) == (3, 2, 1, 1)
    assert counts.oldest_due_seconds is not None
    assert 5 <= counts.oldest_due_seconds < 60
    assert counts.reserved_bytes == hands.counter(keys.webhook_bytes(Q))


# --- damage ----------------------------------------------------------------------------------


async def test_reservations_of_jobs_that_are_gone_are_given_back_by_a_repair(
    hands: QueueDriver, outbox: Outbox
) -> None:
    deleted, unseen, waiting, due = await hands.submit_many(4, webhook=HOOK)
    await hands.cancel(due)
    hands.redis.delete(*hands.redis.keys(f"job:{deleted}:*"))
    hands.redis.hdel(keys.facts(Q), unseen)
    await hands.maintenance.repair(600)
    assert reserved(hands) == 2
    assert set(hands.redis.hkeys(keys.webhooks(Q))) == {f"{i}_1".encode() for i in (waiting, due)}
    assert not hands.redis.exists(keys.webhook(Q, deleted))
    assert (await take_one(outbox)).job_id == due


@pytest.mark.parametrize("target", [None, b"", b"\xff", b"[1]", b'["u"]'])
async def test_a_delivery_without_a_target_is_dropped_with_what_it_reserved(
    hands: QueueDriver, outbox: Outbox, target: bytes | None
) -> None:
    job_id = await hands.submit_one(webhook=HOOK)
    await hands.run_all()
    hands.redis.hdel(keys.webhook(Q, job_id), "target")
    if target is not None:
        hands.redis.hset(keys.webhook(Q, job_id), "target", target)
    hands.redis.zadd(keys.outbox(Q), {b"\xff": 1, "no_delivery": 2, "x_1_completed": 3})
    assert await outbox.take([Q], 10, LEASE_MS) == []
    assert (members(hands), reserved(hands)) == (set(), 0)


@pytest.mark.parametrize("state", [b"\xff", b"\x93", b"\xc0", b"[" * 5000])
async def test_a_damaged_state_or_job_is_delivered_as_if_it_were_new(
    hands: QueueDriver, outbox: Outbox, state: bytes
) -> None:
    job_id = await hands.submit_one(webhook=HOOK)
    await hands.run_all()
    hands.redis.hset(keys.webhook(Q, job_id), "1_completed", state)
    hands.redis.set(keys.meta(job_id), b"junk", keepttl=True)
    hands.redis.set(keys.webhook_bytes(Q), b"junk")
    delivery = await take_one(outbox)
    assert (delivery.state.tries, delivery.job) == (0, None)
    await outbox.note(delivery, attempt(status=200), None, "delivered")
    assert (members(hands), reserved(hands)) == (set(), 0)


@pytest.mark.parametrize("name", ["outbox", "undelivered", "webhooks", "webhook_bytes", "webhook"])
async def test_a_key_of_another_type_keeps_no_job_from_ending(
    hands: QueueDriver, outbox: Outbox, name: str
) -> None:
    job_id, _ = await hands.submit_many(2, webhook=HOOK)
    claim = await hands.claim_jobs()
    key = keys.webhook(Q, job_id) if name == "webhook" else getattr(keys, name)(Q)
    hands.redis.delete(key)
    hands.redis.rpush(key, "junk")
    assert await hands.finish_for_verdicts(claim) == ["completed", "completed"]
    assert await hands.submit(new_job()) == ["ok"]
    await hands.run_all()
    assert await outbox.take([f"{Q}:other"], 10, LEASE_MS) == []
    assert await hands.operations.forget(await hands.read(job_id)) == "forgotten"
    hands.redis.delete(key)
    await hands.maintenance.repair(600)
    for delivery in await outbox.take([Q], 10, LEASE_MS):
        await outbox.note(delivery, attempt(status=200), None, "delivered")
    assert (members(hands), reserved(hands)) == (set(), 0)


@pytest.mark.parametrize(
    "facts", [{"h": 7, "n": 9}, {"h": 2**53}, {"h": 1.5}, {"h": "7"}, {"n": -1, "h": 7}]
)
async def test_facts_that_another_program_wrote_do_no_harm(
    hands: QueueDriver, outbox: Outbox, facts: dict[str, Any]
) -> None:
    job_id = await hands.submit_one()
    hands.redis.hset(keys.facts(Q), job_id, msgspec.msgpack.encode(facts))
    await hands.run_all()
    assert hands.status(job_id) == "completed"
    assert await outbox.take([Q], 10, LEASE_MS) == []
    assert (members(hands), reserved(hands)) == (set(), 0)
    assert not hands.redis.exists(keys.webhook(Q, job_id))
