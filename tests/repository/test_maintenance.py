"""Sweeps, repairs, pauses and purges of queues, and announcements."""

import asyncio

import msgspec
import pytest

from asyncinfer.repository import keys
from asyncinfer.repository.announcements import WorkerAnnouncement
from asyncinfer.repository.leases import Leases
from asyncinfer.repository.maintenance import Maintenance, SweepCounts
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import encode_args
from tests.faults.harness import assert_at_rest, eventually
from tests.queue_driver import DATA, RESULT, Q, QueueDriver, new_job

OTHER = f"{Q}:digits"
PAUSE = 0.02


# --- one sweep a tick ----------------------------------------------------------------------


async def test_any_number_of_callers_make_one_sweep(hands: QueueDriver) -> None:
    hands.change_policy(lease_seconds=60, reap_seconds=60)
    await asyncio.gather(*(Maintenance(hands.store).sweep() for _ in range(20)))
    await hands.submit_many(1, delay_seconds=60)
    hands.make_due(keys.delayed(Q))
    totals = await asyncio.gather(*(Maintenance(hands.store).sweep() for _ in range(20)))
    assert totals == [SweepCounts()] * 20
    hands.redis.delete(keys.reap_gate(Q))
    totals = await asyncio.gather(*(Maintenance(hands.store).sweep() for _ in range(20)))
    assert sorted(total.promoted for total in totals) == [0] * 19 + [1]


async def test_the_gate_opens_after_half_a_tick(hands: QueueDriver) -> None:
    hands.change_policy(lease_seconds=600, reap_seconds=60)
    await hands.maintenance.sweep()
    assert 20_000 < hands.redis.pttl(keys.reap_gate(Q)) <= 30_000


def test_the_tick_is_far_below_the_gap_of_the_outage_guard() -> None:
    assert Policy(lease_seconds=15, reap_seconds=2).tick_ms == 2000
    assert Policy(lease_seconds=3, reap_seconds=2).tick_ms == 500
    assert Policy(lease_seconds=0.001, reap_seconds=2).tick_ms == 1


async def test_every_queue_is_swept_and_the_default_one_always(hands: QueueDriver) -> None:
    queues = [f"{Q}:model{number}" for number in range(40)]
    for queue in queues:
        await hands.submit(new_job(queue=queue, delay_seconds=60))
        hands.make_due(keys.delayed(queue))
    assert await hands.store.queues() == sorted([Q, *queues])
    assert (await hands.sweep()).promoted == 40
    assert hands.redis.exists(keys.swept(Q))


# --- the outage guard ----------------------------------------------------------------------


async def dead_claim(hands: QueueDriver) -> str:
    """Lets the lease of a claimed job end; returns the job's id."""
    job_id = await hands.submit_one()
    await hands.claim_jobs()
    hands.expire_leases()
    return job_id


@pytest.mark.parametrize("gap_ms", [None, 30_001, 100_000, -1_000])
async def test_after_a_gap_no_worker_loses_jobs_for_one_lease(
    hands: QueueDriver, gap_ms: int | None
) -> None:
    job_id = await dead_claim(hands)
    if gap_ms is not None:
        hands.redis.set(keys.swept(Q), hands.now_ms() - gap_ms)
    assert (await hands.maintenance.sweep()).put_back == 0
    assert hands.status(job_id) == "processing"
    assert 50_000 < hands.redis.pttl(keys.hold(Q)) <= 60_000


async def test_sweeps_in_time_arm_no_guard(hands: QueueDriver) -> None:
    job_id = await dead_claim(hands)
    hands.redis.set(keys.swept(Q), hands.now_ms() - 20_000)
    assert (await hands.maintenance.sweep()).put_back == 1
    assert hands.status(job_id) == "pending"


async def test_the_guard_ends_by_itself_and_lost_jobs_are_recovered(hands: QueueDriver) -> None:
    hands.change_policy(lease_seconds=1)
    job_id = await dead_claim(hands)

    async def recovered() -> bool:
        await hands.maintenance.sweep()
        return hands.status(job_id) == "pending"

    await eventually(recovered, "the job waits again")
    assert not hands.redis.exists(keys.hold(Q))


async def test_the_guard_holds_up_neither_promotions_nor_deadlines(hands: QueueDriver) -> None:
    await hands.submit_one(delay_seconds=60)
    await hands.submit_one(finish_within_seconds=60)
    hands.make_due(keys.delayed(Q))
    hands.make_due(keys.deadlines(Q))
    swept = await hands.maintenance.sweep()
    assert hands.redis.exists(keys.hold(Q))
    assert (swept.promoted, swept.expired) == (1, 1)


async def test_a_lease_far_in_the_future_is_cut_to_one_lease(hands: QueueDriver) -> None:
    await hands.submit_one()
    claim = await hands.claim_jobs()
    hands.redis.zadd(keys.leases(Q), {claim.token: hands.now_ms() + 3_600_000})
    await hands.sweep()
    assert hands.redis.zscore(keys.leases(Q), claim.token) <= hands.now_ms() + 60_000


async def test_the_lease_of_a_live_worker_is_left_alone(hands: QueueDriver) -> None:
    job_id = await hands.submit_one()
    claim = await hands.claim_jobs()
    before = hands.redis.zscore(keys.leases(Q), claim.token)
    assert await hands.sweep() == SweepCounts()
    assert hands.redis.zscore(keys.leases(Q), claim.token) == before
    assert hands.status(job_id) == "processing"


# --- lost workers --------------------------------------------------------------------------


async def test_a_hundred_expired_claims_come_back_in_order_among_waiting_jobs(
    hands: QueueDriver,
) -> None:
    jobs = [
        *await hands.submit_many(250),
        *await hands.submit_many(250),
        *await hands.submit_many(100),
    ]
    for _ in range(100):
        await hands.claim_jobs(1)
    hands.expire_leases()
    for _ in range(20):
        await hands.sweep()
    assert hands.waiting_ids() == jobs
    assert not hands.redis.exists(keys.running(Q), keys.leases(Q))
    assert list(hands.redis.scan_iter(keys.claim(Q, "*"))) == []


async def test_claims_renewed_together_come_back_in_order(hands: QueueDriver) -> None:
    jobs = await hands.submit_many(20)
    claims = [await hands.claim_jobs(1) for _ in jobs]
    renewals = Leases(hands.store)
    renewals.renew({Q: [claim.token for claim in claims]})
    renewals.close()
    hands.expire_leases()
    await hands.sweep()
    assert hands.waiting_ids() == jobs


async def test_more_claims_than_a_sweep_takes_come_back_in_order_too(hands: QueueDriver) -> None:
    jobs = [job for _ in range(5) for job in await hands.submit_many(250)]
    for _ in range(5):
        await hands.claim_jobs(250)
    hands.expire_leases()
    swept = await hands.sweep()
    assert swept.put_back == 1250
    assert hands.waiting_ids() == jobs


async def test_a_sweep_continues_until_nothing_is_left(hands: QueueDriver) -> None:
    for _ in range(5):
        await hands.submit_many(250)
        await hands.claim_jobs(250)
    hands.expire_leases()
    hands.redis.set(keys.swept(Q), hands.now_ms())
    policy = hands.store.policy
    args = {
        **policy.end_arguments(),
        **{"tick_ms": 60_000, "lease_ms": policy.lease_ms, "max_deliveries": 3},
        **{"dead_letter_ms": 1000, "log_jobs": 1000, "is_continued": False},
    }
    first = await hands.store.call(script("reap"), [Q], [encode_args(args)])
    assert (first[0][0], first[0][5]) == (1000, 1)
    assert await hands.store.call(script("reap"), [Q], [encode_args(args)]) == [None]
    rest = await hands.store.call(
        script("reap"), [Q], [encode_args({**args, "is_continued": True})]
    )
    assert (rest[0][0], rest[0][5]) == (250, 0)


async def test_a_lost_job_keeps_its_priority_and_counts_a_delivery(hands: QueueDriver) -> None:
    low = await hands.submit_one(priority="low")
    claim = await hands.claim_jobs()
    hands.expire_leases()
    await hands.sweep()
    assert hands.redis.lrange(keys.waiting(Q)[2], 0, -1) == [low.encode()]
    assert (hands.facts(low).deliveries, hands.facts(low).priority) == (1, "low")
    assert hands.counter(keys.bytes_waiting(Q)) == len(DATA)
    assert await hands.finish_for_verdicts(claim) == ["stale"]


async def test_a_job_that_loses_its_worker_too_often_is_a_dead_letter(hands: QueueDriver) -> None:
    job_id = await hands.submit_one()
    for delivery in range(3):
        assert hands.facts(job_id).deliveries == delivery
        await hands.claim_jobs()
        hands.expire_leases()
        swept = await hands.sweep()
    assert (swept.put_back, swept.dead, swept.ended) == (0, 1, 1)
    assert (hands.status(job_id), hands.error_code(job_id)) == ("failed", "worker_lost")
    assert hands.redis.zrange(keys.dead(Q), 0, -1) == [job_id.encode()]
    assert hands.ttls(job_id) == {"data": 900, "status": 900, "error": 900, "meta": 900}
    assert_at_rest(hands.redis, Q)


async def test_an_error_counts_no_delivery_and_a_release_keeps_the_count(
    hands: QueueDriver,
) -> None:
    job_id = await hands.submit_one()
    await hands.claim_jobs()
    hands.expire_leases()
    await hands.sweep()
    await hands.finish(await hands.claim_jobs(), "released")
    await hands.finish(await hands.claim_jobs(), "retry")
    assert hands.facts(job_id).deliveries == 1
    await hands.run_all()
    assert_at_rest(hands.redis, Q)


async def test_a_new_round_begins_without_deliveries(hands: QueueDriver) -> None:
    hands.change_policy(max_deliveries=1)
    job_id = await hands.submit_one()
    await hands.claim_jobs()
    hands.expire_leases()
    await hands.sweep()
    assert await hands.retry(job_id) == "ok"
    assert hands.facts(job_id).deliveries == 0
    assert not hands.redis.exists(keys.dead(Q))


async def test_a_lost_job_that_was_cancelled_ends_cancelled(hands: QueueDriver) -> None:
    job_id = await hands.submit_one()
    await hands.claim_jobs()
    await hands.cancel(job_id)
    hands.expire_leases()
    swept = await hands.sweep()
    assert (swept.put_back, swept.ended) == (0, 1)
    assert hands.status(job_id) == "cancelled"
    assert_at_rest(hands.redis, Q)


async def test_an_external_lost_job_comes_back_too(hands: QueueDriver) -> None:
    hands.add_external_job("theirs")
    await hands.claim_jobs()
    hands.expire_leases()
    await hands.sweep()
    assert hands.waiting_ids() == ["theirs"]
    assert hands.counter(keys.bytes_waiting(Q)) == 0
    assert await hands.run_all() == ["theirs"]


async def test_a_claim_whose_key_is_lost_is_removed(hands: QueueDriver) -> None:
    await hands.submit_one()
    claim = await hands.claim_jobs()
    hands.redis.delete(keys.claim(Q, claim.token))
    hands.expire_leases()
    await hands.sweep()
    assert not hands.redis.exists(keys.leases(Q))
    assert await hands.finish_for_verdicts(claim) == ["completed"]


async def test_old_dead_letters_are_removed(hands: QueueDriver) -> None:
    hands.redis.zadd(keys.dead(Q), {"old": hands.now_ms() - 901_000, "new": hands.now_ms()})
    await hands.sweep()
    assert hands.redis.zrange(keys.dead(Q), 0, -1) == [b"new"]


# --- delayed jobs --------------------------------------------------------------------------


async def test_delayed_jobs_join_their_list_when_due_in_the_order_they_are_due(
    hands: QueueDriver,
) -> None:
    later, sooner = (
        await hands.submit_one(delay_seconds=90),
        await hands.submit_one(delay_seconds=60),
    )
    high = await hands.submit_one(delay_seconds=60, priority="high")
    waiting = await hands.submit_one()
    assert (await hands.sweep()).promoted == 0
    hands.make_due(keys.delayed(Q))
    hands.redis.delete(keys.wake(Q))
    assert (await hands.sweep()).promoted == 3
    assert hands.waiting_ids() == [high, waiting, sooner, later]
    assert hands.redis.llen(keys.wake(Q)) == 1


async def test_a_delayed_job_is_not_claimed_before_its_time(hands: QueueDriver) -> None:
    await hands.submit_one(delay_seconds=60)
    assert (await hands.claim()).claim is None


async def test_more_delayed_jobs_than_a_sweep_holds_are_promoted_at_once(
    hands: QueueDriver,
) -> None:
    jobs = [job for _ in range(5) for job in await hands.submit_many(250, delay_seconds=60)]
    assert hands.redis.zcard(keys.delayed(Q)) == 1250
    hands.make_due(keys.delayed(Q))
    assert (await hands.sweep()).promoted == 1250
    assert sorted(hands.waiting_ids()) == sorted(jobs)


async def test_a_delayed_entry_that_is_not_pending_is_dropped(hands: QueueDriver) -> None:
    hands.redis.zadd(keys.delayed(Q), {"nobody": 1})
    assert (await hands.sweep()).promoted == 0
    assert_at_rest(hands.redis, Q)


# --- deadlines -----------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["start_within_seconds", "finish_within_seconds"])
async def test_a_waiting_job_past_its_deadline_fails_and_leaves_a_counted_stale_entry(
    hands: QueueDriver, option: str
) -> None:
    late, job = await hands.submit_one(**{option: 60}), await hands.submit_one()
    hands.make_due(keys.deadlines(Q))
    assert (await hands.sweep()).expired == 1
    assert (hands.status(late), hands.error_code(late)) == ("failed", "expired")
    assert (hands.count_stale_entries(), hands.counter(keys.bytes_waiting(Q))) == (1, len(DATA))
    assert await hands.run_all() == [job]
    assert_at_rest(hands.redis, Q)


async def test_the_cap_is_exact_while_expired_jobs_are_in_the_list(hands: QueueDriver) -> None:
    hands.change_policy(max_queue=3)
    await hands.submit_many(3, start_within_seconds=60)
    hands.make_due(keys.deadlines(Q))
    await hands.sweep()
    assert await hands.submit(*(new_job() for _ in range(4))) == ["ok"] * 3 + ["full"]


async def test_a_delayed_job_past_its_deadline_leaves_no_stale_entry(hands: QueueDriver) -> None:
    late, waiting = (
        await hands.submit_one(delay_seconds=60, finish_within_seconds=30),
        await hands.submit_one(),
    )
    hands.make_due(keys.deadlines(Q))
    await hands.sweep()
    assert (hands.status(late), hands.count_stale_entries()) == ("failed", 0)
    assert await hands.run_all() == [waiting]
    assert_at_rest(hands.redis, Q)


async def test_a_running_job_past_its_deadline_is_flagged_first_and_ends_a_lease_later(
    hands: QueueDriver,
) -> None:
    late = await hands.submit_one(finish_within_seconds=60)
    claim = await hands.claim_jobs()
    hands.make_due(keys.deadlines(Q))
    assert (await hands.sweep()).expired == 0
    assert (hands.status(late), hands.facts(late).expired) == ("processing", 1)
    messages = [fields for _, fields in hands.redis.xrange(keys.control(Q))]
    assert messages == [{b"expire": late.encode()}]
    assert 0 < hands.redis.zscore(keys.deadlines(Q), late) - hands.now_ms() <= 60_000
    hands.make_due(keys.deadlines(Q))
    assert (await hands.sweep()).expired == 1
    assert (hands.status(late), hands.error_code(late)) == ("failed", "expired")
    assert await hands.finish_for_verdicts(claim) == ["stale"]
    assert_at_rest(hands.redis, Q)


async def test_a_flagged_job_that_finishes_within_the_lease_counts(hands: QueueDriver) -> None:
    late = await hands.submit_one(finish_within_seconds=60)
    claim = await hands.claim_jobs()
    hands.make_due(keys.deadlines(Q))
    await hands.sweep()
    assert await hands.finish_for_verdicts(claim) == ["completed"]
    assert (await hands.read(late)).result == RESULT
    assert_at_rest(hands.redis, Q)


async def test_a_flagged_job_whose_worker_dies_expires(hands: QueueDriver) -> None:
    late = await hands.submit_one(finish_within_seconds=0.001)
    hands.redis.hset(keys.facts(Q), late, msgspec.msgpack.encode({"l": hands.now_ms() + 60_000}))
    hands.redis.zadd(keys.deadlines(Q), {late: hands.now_ms() + 60_000})
    await hands.claim_jobs()
    hands.make_due(keys.deadlines(Q))
    await hands.sweep()
    hands.expire_leases()
    await hands.sweep()
    hands.make_due(keys.deadlines(Q))
    await hands.sweep()
    assert (hands.status(late), hands.error_code(late)) == ("failed", "expired")
    assert await hands.run_all() == []
    assert_at_rest(hands.redis, Q)


async def test_a_deadline_of_a_job_that_ended_without_a_script_is_removed(
    hands: QueueDriver,
) -> None:
    job_id = await hands.submit_one(finish_within_seconds=60)
    hands.redis.rpop(Q)
    hands.redis.set(keys.status(job_id), "completed", ex=60)
    for word in ("data", "meta"):
        hands.redis.expire(f"job:{job_id}:{word}", 60)
    hands.make_due(keys.deadlines(Q))
    assert (await hands.sweep()).expired == 0
    assert not hands.redis.exists(keys.deadlines(Q))
    assert hands.status(job_id) == "completed"


@pytest.mark.soak
async def test_thousands_of_deadlines_are_kept_in_one_sweep(hands: QueueDriver) -> None:
    jobs = [job for _ in range(5) for job in await hands.submit_many(250, start_within_seconds=60)]
    hands.make_due(keys.deadlines(Q))
    assert (await hands.sweep()).expired == 1250
    assert hands.statuses(jobs) == {"failed"}
    assert await hands.run_all() == []


# --- the log -------------------------------------------------------------------------------


def jobs_in_log(hands: QueueDriver) -> int:
    return sum(
        len(msgspec.msgpack.decode(fields[b"submitted"]))
        for _, fields in hands.redis.xrange(keys.log(Q))
        if b"submitted" in fields
    )


@pytest.mark.parametrize("jobs_a_sweep", [3, 20, 70])
async def test_the_log_is_bounded_in_jobs(hands: QueueDriver, jobs_a_sweep: int) -> None:
    hands.change_policy(max_log_jobs=100)
    for _ in range(600 // jobs_a_sweep):
        await hands.submit_many(jobs_a_sweep)
        await hands.sweep()
    assert 100 <= jobs_in_log(hands) <= 100 + 10 + 2 * jobs_a_sweep
    assert hands.redis.llen(keys.log_marks(Q)) <= 12


async def test_the_log_stays_bounded_when_the_count_of_jobs_restarts(hands: QueueDriver) -> None:
    hands.change_policy(max_log_jobs=100)
    for round_number in range(60):
        if round_number == 30:
            hands.redis.delete(keys.seq(Q))
        await hands.submit_many(20)
        await hands.sweep()
    assert 100 <= jobs_in_log(hands) <= 100 + 10 + 2 * 20


async def test_a_batch_of_transitions_is_one_entry(hands: QueueDriver) -> None:
    jobs = await hands.submit_many(50)
    claim = await hands.claim_jobs()
    await hands.finish(claim)
    entries = [fields for _, fields in hands.redis.xrange(keys.log(Q))]
    assert [list(fields) for fields in entries] == [[b"submitted"], [b"processing"], [b"completed"]]
    assert msgspec.msgpack.decode(entries[2][b"completed"]) == jobs


# --- repair --------------------------------------------------------------------------------


async def repaired(hands: QueueDriver) -> int:
    """Repairs even if another process has repaired lately."""
    hands.redis.delete(keys.repair_gate(Q))
    back = await hands.maintenance.repair(PAUSE)
    assert back is not None
    return back


async def pause_passes(hands: QueueDriver) -> None:
    end = hands.now_ms() + PAUSE * 1000
    await eventually(lambda: hands.now_ms() > end, "the pause between two passes")


async def pop_as_external_consumer(hands: QueueDriver, status: str = "processing") -> str:
    job_id = str(hands.redis.rpop(Q).decode())
    hands.redis.set(keys.status(job_id), status)
    return job_id


@pytest.mark.parametrize("status", ["processing", "pending"])
async def test_a_job_out_of_place_in_two_passes_is_put_back(
    hands: QueueDriver, status: str
) -> None:
    first, second = await hands.submit_many(2)
    assert await pop_as_external_consumer(hands, status) == first
    assert await repaired(hands) == 0
    await pause_passes(hands)
    hands.redis.delete(keys.wake(Q))
    assert await repaired(hands) == 1
    assert hands.waiting_ids() == [first, second]
    assert (hands.status(first), hands.redis.llen(keys.wake(Q))) == ("pending", 1)
    assert hands.counter(keys.bytes_waiting(Q)) == 2 * len(DATA)
    assert not hands.redis.exists(keys.out_of_place(Q))


async def test_an_external_job_in_the_queue_of_a_model_is_not_put_into_that_of_the_default(
    hands: QueueDriver,
) -> None:
    """The default model would run it, and give a wrong answer."""
    of_digits = f"{Q}:digits"
    await hands.announcements.announce_queues([of_digits])
    hands.redis.set("job:theirs:data", DATA)
    hands.redis.set("job:theirs:status", "pending")
    hands.redis.lpush(of_digits, "theirs")
    assert await repaired(hands) == 0
    await pause_passes(hands)
    assert await repaired(hands) == 0
    assert (hands.waiting_ids(), hands.redis.lrange(of_digits, 0, -1)) == ([], [b"theirs"])

    hands.redis.rpop(of_digits)
    assert await repaired(hands) == 0
    await pause_passes(hands)
    assert await repaired(hands) == 1
    assert hands.waiting_ids() == ["theirs"]


async def test_between_two_repairs_the_job_of_a_live_external_consumer_is_left_alone(
    hands: QueueDriver,
) -> None:
    job_id = await hands.submit_one()
    await pop_as_external_consumer(hands)
    hands.change_policy()
    for _ in range(3):
        hands.redis.delete(keys.repair_gate(Q))
        assert await hands.maintenance.repair(60) == 0
    assert hands.status(job_id) == "processing"
    assert hands.waiting_ids() == []
    assert 0 < hands.redis.ttl(keys.out_of_place(Q)) <= 86_400


async def test_a_job_found_in_place_again_is_not_put_back(hands: QueueDriver) -> None:
    job_id = await hands.submit_one()
    await pop_as_external_consumer(hands)
    await repaired(hands)
    await pause_passes(hands)
    hands.redis.mset({keys.status(job_id): "pending"})
    hands.redis.rpush(Q, job_id)
    assert await repaired(hands) == 0
    assert hands.waiting_ids() == [job_id]


async def test_a_job_that_came_back_between_the_check_and_the_script_stays_once(
    hands: QueueDriver,
) -> None:
    job_id = await hands.submit_one(priority="low")
    hands.redis.zadd(keys.out_of_place(Q), {job_id: 1})
    args = [encode_args({"pause_ms": 1, "ttl_ms": 1000}), job_id]
    assert await hands.store.call(script("repair"), [Q, keys.out_of_place(Q)], args) == [0, 0]
    assert hands.waiting_ids() == [job_id]
    assert not hands.redis.exists(keys.out_of_place(Q))


async def test_waiting_running_and_delayed_jobs_are_in_place(hands: QueueDriver) -> None:
    for priority in ("high", "normal", "low"):
        await hands.submit_many(2, priority=priority)
    await hands.submit_one(delay_seconds=60)
    claim = await hands.claim_jobs(3)
    for _ in range(2):
        assert await repaired(hands) == 0
        await pause_passes(hands)
    assert not hands.redis.exists(keys.out_of_place(Q))
    await hands.finish(claim)


async def test_a_job_is_put_back_into_its_own_queue_and_priority(hands: QueueDriver) -> None:
    job_id = await hands.submit_one(queue=OTHER, priority="high")
    hands.redis.rpop(keys.waiting(OTHER)[0])
    await repaired(hands)
    await pause_passes(hands)
    assert await repaired(hands) == 1
    assert hands.redis.lrange(keys.waiting(OTHER)[0], 0, -1) == [job_id.encode()]
    assert hands.waiting_ids() == []


async def test_a_job_put_back_into_an_empty_queue_counts_its_bytes_again(
    hands: QueueDriver,
) -> None:
    lost, _ = await hands.submit_many(2)
    await pop_as_external_consumer(hands)
    await hands.run_all()
    assert not hands.redis.exists(keys.bytes_waiting(Q))
    await repaired(hands)
    await pause_passes(hands)
    assert await repaired(hands) == 1
    assert hands.counter(keys.bytes_waiting(Q)) == len(DATA)
    assert await hands.run_all() == [lost]


async def test_a_repair_lists_a_queue_again_that_only_records_name(hands: QueueDriver) -> None:
    (job,) = await hands.submit_many(1, queue=OTHER, start_within_seconds=60)
    hands.redis.delete(keys.queues(Q))
    hands.make_due(keys.deadlines(OTHER))
    await hands.sweep()
    assert hands.status(job) == "pending"
    await repaired(hands)
    await hands.sweep()
    assert hands.status(job) == "failed"


async def test_jobs_put_back_by_repair_keep_their_order(hands: QueueDriver) -> None:
    jobs = await hands.submit_many(250)
    for _ in jobs:
        await pop_as_external_consumer(hands)
    await repaired(hands)
    await pause_passes(hands)
    assert await repaired(hands) == 250
    ages = [job_id[:12] for job_id in hands.waiting_ids()]
    assert ages == sorted(ages)


async def test_an_external_lost_job_is_put_back_too(hands: QueueDriver) -> None:
    hands.add_external_job("theirs")
    await pop_as_external_consumer(hands)
    await repaired(hands)
    await pause_passes(hands)
    assert await repaired(hands) == 1
    assert await hands.run_all() == ["theirs"]


async def test_a_job_whose_claim_was_closed_too_early_is_put_back(hands: QueueDriver) -> None:
    done, stranded = await hands.submit_many(2)
    claim = await hands.claim_jobs()
    await hands.finish(claim, only=[done])
    await repaired(hands)
    await pause_passes(hands)
    assert await repaired(hands) == 1
    assert hands.waiting_ids() == [stranded]
    assert await hands.finish_for_verdicts(claim, only=[stranded]) == ["stale"]
    assert await hands.run_all() == [stranded]


async def test_one_process_repairs_at_a_time(hands: QueueDriver) -> None:
    assert await hands.maintenance.repair(60) == 0
    assert await Maintenance(hands.store).repair(60) is None


async def test_facts_of_a_job_that_ended_without_a_script_are_removed(hands: QueueDriver) -> None:
    job_id = await hands.submit_one(priority="high", queue=OTHER)
    kept = await hands.submit_one(priority="high", queue=OTHER)
    hands.redis.rpop(keys.waiting(OTHER)[0])
    hands.redis.set(keys.status(job_id), "completed", ex=60)
    for word in ("data", "meta"):
        hands.redis.expire(f"job:{job_id}:{word}", 60)
    await repaired(hands)
    assert hands.redis.hkeys(keys.facts(OTHER)) == [kept.encode()]


async def test_any_number_of_stray_facts_is_removed_even_without_unfinished_jobs(
    hands: QueueDriver,
) -> None:
    facts = {f"gone{number}": msgspec.msgpack.encode({"d": 1}) for number in range(3000)}
    hands.redis.hset(keys.facts(Q), mapping=facts)
    await repaired(hands)
    assert not hands.redis.exists(keys.facts(Q))


# --- pause and purge -----------------------------------------------------------------------


async def test_pausing_notifies_the_workers_and_returns_whether_it_changed_anything(
    hands: QueueDriver,
) -> None:
    pause = hands.operations.pause
    changed = [await pause(Q, paused=paused) for paused in (True, True, False, False)]
    assert changed == [True, False, True, False]
    messages = [list(fields) for _, fields in hands.redis.xrange(keys.control(Q))]
    assert messages == [[b"pause"], [b"resume"]]


async def test_running_jobs_of_a_paused_queue_finish(hands: QueueDriver) -> None:
    await hands.submit_one()
    claim = await hands.claim_jobs()
    await hands.operations.pause(Q, paused=True)
    assert await hands.finish_for_verdicts(claim) == ["completed"]


async def test_a_purge_ends_all_waiting_jobs_and_no_running_one(hands: QueueDriver) -> None:
    running = await hands.submit_one()
    claim = await hands.claim_jobs()
    waiting = [await hands.submit_one(priority=priority) for priority in ("high", "normal", "low")]
    delayed = await hands.submit_one(delay_seconds=60)
    assert await hands.operations.cancel_queue(Q) == 4
    assert hands.statuses([*waiting, delayed]) == {"cancelled"}
    assert hands.status(running) == "processing"
    assert hands.waiting_ids() == []
    assert await hands.finish_for_verdicts(claim) == ["completed"]
    assert_at_rest(hands.redis, Q)


async def test_a_purge_of_more_than_a_thousand_jobs_ends_them_all(hands: QueueDriver) -> None:
    jobs = [job for _ in range(3) for job in await hands.submit_many(250)]
    jobs += [job for _ in range(3) for job in await hands.submit_many(250, delay_seconds=60)]
    assert await hands.operations.cancel_queue(Q) == 1500
    assert hands.statuses(jobs) == {"cancelled"}
    assert_at_rest(hands.redis, Q)


async def test_a_purge_subtracts_the_stale_entries_it_removes(hands: QueueDriver) -> None:
    stale = await hands.submit_many(60)
    await hands.cancel_in_one_call(*stale)
    for _ in range(10):
        await hands.submit_many(100)
    ended, left = await hands.store.call(
        script("cancel_queue"), [Q], [encode_args(hands.store.policy.end_arguments())]
    )
    assert (ended, left) == (200, 800)
    assert hands.count_stale_entries() == 0
    assert hands.counter(keys.bytes_waiting(Q)) == 800 * len(DATA)


async def test_a_purge_ends_external_jobs_with_and_without_a_status(hands: QueueDriver) -> None:
    hands.add_external_job("one")
    hands.add_external_job("two", status=None)
    hands.add_external_job("nothing", data=None, status=None)
    hands.redis.lpush(Q, "one")
    assert await hands.operations.cancel_queue(Q) == 2
    assert hands.statuses(["one", "two"]) == {"cancelled"}
    assert hands.status("nothing") is None
    assert_at_rest(hands.redis, Q)


async def test_a_purged_job_can_be_retried(hands: QueueDriver) -> None:
    job_id = await hands.submit_one()
    await hands.operations.cancel_queue(Q)
    assert await hands.retry(job_id) == "ok"
    assert await hands.run_all() == [job_id]


async def test_an_external_job_with_a_list_as_status_does_not_stop_a_purge(
    hands: QueueDriver,
) -> None:
    hands.redis.lpush("job:theirs:status", "pending")
    hands.add_external_job("theirs", status=None)
    job_id = await hands.submit_one()
    await hands.operations.cancel_queue(Q)
    assert hands.status(job_id) == "cancelled"
    assert hands.waiting_ids() == []


# --- announcements -------------------------------------------------------------------------


async def test_models_are_announced_for_good_and_versions_side_by_side(hands: QueueDriver) -> None:
    await hands.announcements.announce_models({"iris": {"1": b"one"}, "digits": {"1": b"d"}})
    await hands.announcements.announce_models({"iris": {"2": b"two"}})
    await hands.announcements.announce_models({})
    announced = await hands.announcements.read_models()
    assert announced.models == {"iris": {"1": b"one", "2": b"two"}, "digits": {"1": b"d"}}
    assert hands.redis.ttl(keys.model(Q, "iris")) == -1


async def test_a_worker_is_announced_until_it_is_silent_or_retracts(hands: QueueDriver) -> None:
    await hands.announcements.announce_worker("w1", {"pid": 1}, 60)
    await hands.announcements.announce_worker("w2", {"pid": 2}, 60)
    assert set(await hands.announcements.read_workers()) == {"w1", "w2"}
    assert 0 < hands.redis.ttl(keys.worker(Q, "w1")) <= 60
    hands.redis.delete(keys.worker(Q, "w1"))
    assert (await hands.announcements.read_workers()) == {"w2": WorkerAnnouncement(pid=2)}
    await hands.announcements.retract_worker("w2")
    assert await hands.announcements.read_workers() == {}


async def test_silent_workers_leave_the_list_of_workers(hands: QueueDriver) -> None:
    hands.redis.zadd(keys.workers(Q), {"old": 1})
    await hands.announcements.announce_worker("new", {}, 60)
    assert hands.redis.zrange(keys.workers(Q), 0, -1) == [b"new"]
