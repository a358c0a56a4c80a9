"""The calls of a worker: claim, finish, renew and wait for the doorbell."""

import asyncio
from typing import Any

import msgspec
import pytest

from asyncinfer.errors import RedisUnavailable
from asyncinfer.jobs import JobError, Outcome, encode_record, record_seq
from asyncinfer.repository import keys
from asyncinfer.repository.claims import Claim, ClaimRequest, JobOutcome
from asyncinfer.repository.doorbell import Doorbell
from asyncinfer.repository.leases import Leases
from asyncinfer.repository.store import Store
from tests.faults.harness import assert_at_rest, eventually, wait_for_next_millisecond
from tests.queue_driver import DATA, ERROR, RESULT, Q, QueueDriver, ids_of, new_job, outcome_of

OTHER = f"{Q}:digits"


async def redelivered(hands: QueueDriver, job_id: str) -> None:
    """Its worker dies once; then the job waits again and is served next."""
    claim = await hands.claim_jobs(1)
    assert ids_of(claim.jobs) == [job_id]
    hands.expire_leases(claim.token)
    assert (await hands.sweep()).put_back == 1


def jobs_of(claim: Claim | None) -> tuple[str, str, tuple[bytes | None, ...]]:
    """All that a claim says but its time, which is that of the call that got this reply."""
    assert claim is not None, "nothing was claimed"
    return claim.queue, claim.token, tuple(claim.flat)


# --- order ---------------------------------------------------------------------------------


async def test_jobs_are_served_first_in_first_out(hands: QueueDriver) -> None:
    jobs = [*await hands.submit_many(3), await hands.submit_one(), *await hands.submit_many(2)]
    assert ids_of((await hands.claim_jobs(4)).jobs) == jobs[:4]
    assert ids_of((await hands.claim_jobs(4)).jobs) == jobs[4:]


async def test_high_is_served_before_normal_before_low(hands: QueueDriver) -> None:
    low, normal = await hands.submit_one(priority="low"), await hands.submit_one()
    high = await hands.submit_one(priority="high")
    assert ids_of((await hands.claim_jobs()).jobs) == [high, normal, low]


async def test_low_first_serves_low_before_normal_before_high(hands: QueueDriver) -> None:
    high, normal = await hands.submit_one(priority="high"), await hands.submit_one()
    low = await hands.submit_one(priority="low")
    assert ids_of((await hands.claim_jobs(low_first=True)).jobs) == [low, normal, high]


async def test_low_is_served_now_and_then_while_high_never_runs_dry(hands: QueueDriver) -> None:
    low = await hands.submit_many(3, priority="low")
    served: list[str] = []
    for turn in range(48):
        await hands.submit_one(priority="high")
        claim = await hands.claim_jobs(1, low_first=turn % 16 == 0)
        served += ids_of(claim.jobs)
        await hands.finish(claim)
    assert [job_id for job_id in served if job_id in low] == low


async def test_a_claim_returns_all_that_is_needed_to_run_a_job(hands: QueueDriver) -> None:
    job = new_job(b"[[7]]", priority="high")
    await hands.submit(job)
    claim = await hands.claim_jobs()
    claimed = claim.jobs[0]
    assert (claim.queue, claimed.job_id, claimed.data) == (Q, job.job_id, b"[[7]]")
    assert (claimed.record, claimed.facts.priority) == (job.record, "high")
    assert not claim.exclusive
    assert hands.status(job.job_id) == "processing"


async def test_a_claim_takes_no_more_than_requested(hands: QueueDriver) -> None:
    jobs = await hands.submit_many(5)
    assert ids_of((await hands.claim_jobs(2)).jobs) == jobs[:2]
    assert hands.waiting_ids() == jobs[2:]


async def test_a_claim_is_bounded_in_bytes_but_takes_one_at_least(hands: QueueDriver) -> None:
    # A claim takes 2 MiB: the second and the third of these jobs fit together, no others do.
    mib = 1 << 20
    jobs = [new_job(bytes(size)) for size in (3 * mib // 2, mib, mib, 5 * mib, 1)]
    ids = ids_of(jobs)
    for job in jobs:
        await hands.submit(job)
    claims = [ids_of((await hands.claim_jobs()).jobs) for _ in range(4)]
    assert claims == [ids[:1], ids[1:3], ids[3:4], ids[4:]]


async def test_a_claim_of_an_empty_queue_leaves_nothing_behind(hands: QueueDriver) -> None:
    assert (await hands.claim()).claim is None
    assert list(hands.redis.scan_iter()) == []


async def test_a_paused_queue_gives_nothing_until_it_is_resumed(hands: QueueDriver) -> None:
    await hands.operations.pause(Q, paused=True)
    jobs = await hands.submit_many(2)
    assert (await hands.claim()).claim is None
    hands.redis.delete(keys.wake(Q))
    await hands.operations.pause(Q, paused=False)
    assert hands.redis.llen(keys.wake(Q)) == 1
    assert await hands.run_all() == jobs


async def test_the_first_queue_with_work_is_served(hands: QueueDriver) -> None:
    job = await hands.submit_one(queue=OTHER)
    claim = await hands.claim_jobs(queues=(Q, OTHER))
    assert (claim.queue, ids_of(claim.jobs)) == (OTHER, [job])
    assert hands.redis.hkeys(keys.running(OTHER)) == [job.encode()]


async def test_a_paused_queue_does_not_hold_up_the_next(hands: QueueDriver) -> None:
    await hands.submit_one()
    await hands.operations.pause(Q, paused=True)
    job = await hands.submit_one(queue=OTHER)
    assert ids_of((await hands.claim_jobs(queues=(Q, OTHER))).jobs) == [job]


async def test_a_claim_that_leaves_work_behind_rings_once_more(hands: QueueDriver) -> None:
    await hands.submit_many(3)
    hands.redis.delete(keys.wake(Q))
    await hands.claim_jobs(1)
    assert hands.redis.llen(keys.wake(Q)) == 1
    hands.redis.delete(keys.wake(Q))
    await hands.claim_jobs()
    assert hands.redis.llen(keys.wake(Q)) == 0


async def test_the_doorbell_never_holds_more_than_64_tokens(hands: QueueDriver) -> None:
    for _ in range(70):
        await hands.submit_one()
    assert hands.redis.llen(keys.wake(Q)) == 64


# --- retried claims ------------------------------------------------------------------------


async def test_a_claim_sent_again_gets_the_same_jobs_and_takes_nothing_twice(
    hands: QueueDriver,
) -> None:
    await hands.submit_many(5)
    token = hands.consumer.new_token()
    first = await hands.claim_jobs(2, token=token)
    assert jobs_of(await hands.claim_jobs(2, token=token)) == jobs_of(first)
    assert len(hands.waiting_ids()) == 3
    assert hands.redis.hlen(keys.running(Q)) == 2


async def test_a_claim_sent_again_renews_its_lease(hands: QueueDriver) -> None:
    await hands.submit_one()
    claim = await hands.claim_jobs()
    hands.expire_leases()
    await hands.claim_jobs(token=claim.token)
    assert hands.redis.zscore(keys.leases(Q), claim.token) > hands.now_ms()


async def test_a_claim_sent_again_leaves_out_what_is_no_longer_its_own(hands: QueueDriver) -> None:
    done, released, kept = await hands.submit_many(3)
    claim = await hands.claim_jobs()
    await hands.finish(claim, only=[done], last=False)
    await hands.finish(claim, "released", only=[released], last=False)
    await hands.claim_jobs()
    assert ids_of((await hands.claim_jobs(token=claim.token)).jobs) == [kept]


async def test_a_claim_over_several_queues_sent_again_takes_nothing_twice(
    hands: QueueDriver,
) -> None:
    job = await hands.submit_one(queue=OTHER)
    token = hands.consumer.new_token()
    first = await hands.claim_jobs(token=token, queues=(Q, OTHER))
    late = await hands.submit_one()
    assert jobs_of(await hands.claim_jobs(token=token, queues=(Q, OTHER))) == jobs_of(first)
    assert ids_of(first.jobs) == [job]
    assert hands.waiting_ids() == [late]
    assert not hands.redis.exists(keys.leases(Q))


async def test_a_claim_after_its_time_takes_nothing(hands: QueueDriver) -> None:
    job = await hands.submit_one()
    await hands.claim(0)
    hands.store.note_server_time(hands.now_ms() - 60_000)
    assert (await hands.claim()).claim is None
    assert hands.waiting_ids() == [job]
    # The reply contained the server's time, so that the next claim is in time.
    assert (await hands.claim()).claim is not None


async def test_a_late_retry_still_gets_the_claim_it_holds(hands: QueueDriver) -> None:
    await hands.submit_one()
    claim = await hands.claim_jobs()
    hands.store.note_server_time(hands.now_ms() - 60_000)
    assert jobs_of(await hands.claim_jobs(token=claim.token)) == jobs_of(claim)


# --- external jobs -------------------------------------------------------------------------


async def test_an_external_job_is_run_and_its_result_is_under_the_documented_key(
    hands: QueueDriver,
) -> None:
    hands.add_external_job("theirs")
    claim = await hands.claim_jobs()
    assert (claim.jobs[0].job_id, claim.jobs[0].record) == ("theirs", None)
    assert hands.redis.get("job:theirs:status") == b"processing"
    await hands.finish(claim)
    assert hands.redis.get("job:theirs:status") == b"completed"
    assert hands.redis.get("job:theirs:result") == RESULT
    assert hands.ttls("theirs") == {"status": 600, "result": 600}


async def test_an_external_job_needs_no_status(hands: QueueDriver) -> None:
    hands.add_external_job("theirs", status=None)
    assert await hands.run_all() == ["theirs"]


async def test_external_jobs_are_served_in_turn_with_other_jobs(hands: QueueDriver) -> None:
    first = await hands.submit_one()
    hands.add_external_job("theirs")
    second = await hands.submit_one()
    assert await hands.run_all() == [first, "theirs", second]


async def test_an_id_without_input_or_status_is_dropped_without_a_trace(hands: QueueDriver) -> None:
    hands.add_external_job("nothing", data=None, status=None)
    job = await hands.submit_one()
    assert await hands.run_all() == [job]
    assert hands.status("nothing") is None


async def test_an_external_pending_job_without_input_fails_as_lost(hands: QueueDriver) -> None:
    hands.add_external_job("theirs", data=None)
    assert await hands.run_all() == []
    assert (hands.status("theirs"), hands.error_code("theirs")) == ("failed", "input_lost")
    assert hands.ttls("theirs") == {"status": 900, "error": 900}


@pytest.mark.parametrize("status", [b"pending", None])
async def test_an_external_job_with_a_hash_as_data_blocks_no_other_job(
    hands: QueueDriver, status: bytes | None
) -> None:
    hands.redis.hset("job:theirs:data", "rows", "[[1]]")
    hands.add_external_job("theirs", data=None, status=status)
    job = await hands.submit_one()
    assert await hands.run_all() == [job]
    assert hands.status("theirs") == (None if status is None else "failed")
    hands.redis.delete("job:theirs:data")


async def test_an_external_job_with_a_list_as_status_blocks_no_other_job(
    hands: QueueDriver,
) -> None:
    hands.redis.lpush("job:theirs:status", "pending")
    hands.add_external_job("theirs", status=None)
    job = await hands.submit_one()
    assert await hands.run_all() == ["theirs", job]
    assert hands.status("theirs") == "completed"


@pytest.mark.parametrize("job_id", ["", "a\nb", "tab\there", "nul\0", "x" * 129, "del\x7f"])
async def test_a_job_of_a_malformed_id_fails_and_the_rest_is_served(
    hands: QueueDriver, job_id: str
) -> None:
    """Its producer can read why, and does not wait for ever."""
    hands.add_external_job(job_id)
    job = await hands.submit_one()
    assert await hands.run_all() == [job]
    assert hands.status(job_id) == "failed"
    error = msgspec.json.decode(hands.redis.get(f"job:{job_id}:error") or b"", type=JobError)
    assert error.code == "invalid_id"
    assert 0 < hands.redis.ttl(f"job:{job_id}:data") <= hands.redis.ttl(f"job:{job_id}:status")
    await hands.sweep()
    assert_at_rest(hands.redis, Q)


async def test_an_id_too_long_for_the_log_is_dropped_and_the_rest_is_served(
    hands: QueueDriver,
) -> None:
    job_id = "x" * 2000
    hands.add_external_job(job_id)
    job = await hands.submit_one()
    assert await hands.run_all() == [job]
    hands.redis.delete(f"job:{job_id}:data", f"job:{job_id}:status")


@pytest.mark.parametrize("job_id", ["x" * 128, "a b", "{braces}", "a:data", "ü", "-1", "*", "[a]"])
async def test_unusual_but_valid_ids_are_served(hands: QueueDriver, job_id: str) -> None:
    hands.add_external_job(job_id)
    assert await hands.run_all() == [job_id]
    assert hands.redis.get(f"job:{job_id}:result") == RESULT
    await hands.sweep()
    assert_at_rest(hands.redis, Q)


async def test_an_id_that_is_not_text_is_served_and_finished(hands: QueueDriver) -> None:
    name = b"\xff\xfe\x80"
    hands.add_external_job(name)
    claim = await hands.claim_jobs()
    assert await hands.finish_for_verdicts(claim) == ["completed"]
    assert hands.redis.get(b"job:\xff\xfe\x80:result") == RESULT
    assert await hands.finish_for_verdicts(claim) == ["already"]


async def test_a_dropped_unknown_id_does_not_change_the_count_of_stale_entries(
    hands: QueueDriver,
) -> None:
    low = await hands.submit_many(14, priority="low")
    await hands.cancel_in_one_call(*low[:13])
    hands.redis.lpush(Q, "a\nb", "nobody", low[0], low[0])
    job = await hands.submit_one()
    assert ids_of((await hands.claim_jobs(1)).jobs) == [job]
    assert hands.count_stale_entries() == 3
    assert await hands.run_all() == [low[13]]
    assert hands.count_stale_entries() == 0


async def test_an_external_id_pushed_twice_runs_once(hands: QueueDriver) -> None:
    hands.add_external_job("theirs")
    hands.redis.lpush(Q, "theirs", "theirs")
    assert ids_of((await hands.claim_jobs(2)).jobs) == ["theirs"]
    assert hands.waiting_ids() == []


async def test_an_id_pushed_again_while_it_runs_is_not_taken(hands: QueueDriver) -> None:
    job_id = await hands.submit_one()
    claim = await hands.claim_jobs()
    hands.redis.lpush(Q, job_id)
    assert (await hands.claim()).claim is None
    assert await hands.finish_for_verdicts(claim) == ["completed"]
    assert_at_rest(hands.redis, Q)


async def test_an_id_pushed_again_after_it_ended_is_not_run_again(hands: QueueDriver) -> None:
    job_id = await hands.submit_one()
    await hands.run_all()
    before = await hands.read(job_id)
    hands.redis.lpush(Q, job_id)
    assert await hands.run_all() == []
    assert await hands.read(job_id) == before


async def test_an_external_producer_may_submit_an_ended_id_again(hands: QueueDriver) -> None:
    hands.add_external_job("theirs", b"[[1]]")
    await hands.run_all("failed")
    hands.add_external_job("theirs", b"[[2]]")
    claim = await hands.claim_jobs()
    assert claim.jobs[0].data == b"[[2]]"
    await hands.finish(claim)
    assert hands.status("theirs") == "completed"


async def test_an_external_consumer_and_our_workers_share_the_list(hands: QueueDriver) -> None:
    jobs = await hands.submit_many(3)
    popped = hands.redis.rpop(Q).decode()
    hands.redis.set(f"job:{popped}:status", "processing")
    assert popped == jobs[0]
    assert await hands.run_all() == jobs[1:]
    hands.redis.mset({f"job:{popped}:result": b"{}", f"job:{popped}:status": "completed"})
    for word in ("data", "status", "result", "meta"):
        hands.redis.expire(f"job:{popped}:{word}", 60)


# --- jobs that run alone -------------------------------------------------------------------


async def test_a_redelivered_job_is_claimed_alone(hands: QueueDriver) -> None:
    poison, innocent = await hands.submit_many(2)
    await redelivered(hands, poison)
    claimed = await hands.claim()
    assert claimed.claim is not None
    assert ids_of(claimed.claim.jobs) == [poison]
    assert claimed.claim.exclusive
    assert claimed.claim.jobs[0].facts.deliveries == 1
    assert hands.waiting_ids() == [innocent]


async def test_a_redelivered_job_is_not_given_to_a_process_that_holds_another_claim(
    hands: QueueDriver,
) -> None:
    poison, innocent = await hands.submit_many(2)
    await redelivered(hands, poison)
    claimed = await hands.claim(held=True)
    assert (claimed.claim, claimed.is_blocked) == (None, True)
    assert hands.waiting_ids() == [poison, innocent]


async def test_a_claim_stops_before_a_job_that_must_run_alone(hands: QueueDriver) -> None:
    poison, innocent = await hands.submit_many(2)
    await redelivered(hands, poison)
    urgent = await hands.submit_one(priority="high")
    claimed = await hands.claim()
    assert claimed.claim is not None
    assert (ids_of(claimed.claim.jobs), claimed.is_blocked) == ([urgent], True)
    assert hands.waiting_ids() == [poison, innocent]


async def test_a_claim_blocked_by_one_queue_takes_nothing_of_the_next(hands: QueueDriver) -> None:
    poison = await hands.submit_one()
    await redelivered(hands, poison)
    other = await hands.submit_one(queue=OTHER)
    claimed = await hands.claim(held=True, queues=(Q, OTHER))
    assert (claimed.claim, claimed.is_blocked) == (None, True)
    assert hands.waiting_ids(OTHER) == [other]


async def test_a_suspect_is_claimed_alone_without_a_delivery_counted(hands: QueueDriver) -> None:
    suspects = await hands.submit_many(2)
    await hands.finish(await hands.claim_jobs(), "suspect")
    claims = [await hands.claim_jobs(), await hands.claim_jobs()]
    assert [ids_of(claim.jobs) for claim in claims] == [[job_id] for job_id in suspects]
    assert all(claim.exclusive and claim.jobs[0].facts.deliveries == 0 for claim in claims)


async def test_a_retried_claim_of_an_exclusive_job_gets_it_again(hands: QueueDriver) -> None:
    await redelivered(hands, await hands.submit_one())
    claim = await hands.claim_jobs()
    assert jobs_of(await hands.claim_jobs(token=claim.token, held=True)) == jobs_of(claim)


# --- deadlines and lost inputs at the claim ------------------------------------------------


async def test_a_job_past_its_start_deadline_is_failed_not_run(hands: QueueDriver) -> None:
    late = await hands.submit_one(start_within_seconds=0.001)
    job = await hands.submit_one(start_within_seconds=60)
    due = hands.facts(late).start_by_ms
    await eventually(lambda: hands.now_ms() > due, "the start deadline")
    claim = await hands.claim_jobs()
    assert ids_of(claim.jobs) == [job]
    assert (hands.status(late), hands.error_code(late)) == ("failed", "expired")
    assert hands.count_stale_entries() == 0
    await hands.finish(claim)
    assert_at_rest(hands.redis, Q)


async def test_a_job_past_its_life_deadline_is_failed_not_run(hands: QueueDriver) -> None:
    late = await hands.submit_one(finish_within_seconds=0.001)
    due = hands.facts(late).finish_by_ms
    await eventually(lambda: hands.now_ms() > due, "the life deadline")
    assert await hands.run_all() == []
    assert hands.error_code(late) == "expired"
    assert_at_rest(hands.redis, Q)


async def test_a_start_deadline_that_was_met_is_removed(hands: QueueDriver) -> None:
    job_id = await hands.submit_one(start_within_seconds=60)
    await hands.claim_jobs()
    assert not hands.redis.exists(keys.deadlines(Q), keys.facts(Q))
    assert hands.status(job_id) == "processing"


async def test_the_life_deadline_takes_the_place_of_the_start_deadline(hands: QueueDriver) -> None:
    job_id = await hands.submit_one(
        start_within_seconds=60, finish_within_seconds=120, priority="low"
    )
    due = hands.facts(job_id).finish_by_ms
    assert hands.redis.zscore(keys.deadlines(Q), job_id) == hands.facts(job_id).start_by_ms < due
    claim = await hands.claim_jobs()
    assert (claim.jobs[0].facts.start_by_ms, claim.jobs[0].facts.finish_by_ms) == (0, due)
    assert hands.facts(job_id) == claim.jobs[0].facts
    assert hands.redis.zscore(keys.deadlines(Q), job_id) == due


async def test_a_job_whose_input_is_gone_fails_as_lost(hands: QueueDriver) -> None:
    lost, job = await hands.submit_many(2)
    hands.redis.delete(keys.data(lost))
    assert await hands.run_all() == [job]
    assert (hands.status(lost), hands.error_code(lost)) == ("failed", "input_lost")
    assert_at_rest(hands.redis, Q)


async def test_however_many_have_expired_none_is_lost_and_the_rest_is_served(
    hands: QueueDriver,
) -> None:
    late = [
        job for _ in range(36) for job in await hands.submit_many(250, start_within_seconds=0.001)
    ]
    job = await hands.submit_one()
    due = hands.facts(late[-1]).start_by_ms
    await eventually(lambda: hands.now_ms() > due, "the last start deadline")
    assert (await hands.claim(10)).claim is None
    left = len(hands.waiting_ids())
    assert 7_900 < left < 8_100
    assert hands.status(late[len(late) - left]) == "failed"
    assert hands.redis.hlen(keys.facts(Q)) == left - 1
    while not (claim := (await hands.claim(10)).claim):
        assert len(hands.waiting_ids()) < left
        left = len(hands.waiting_ids())
    assert ids_of(claim.jobs) == [job]
    hands.redis.flushall()


async def test_a_claim_drops_at_most_a_thousand_ids_and_rings_for_the_rest(
    hands: QueueDriver,
) -> None:
    hands.redis.lpush(Q, *(f"stray{number}" for number in range(1500)))
    job = await hands.submit_one()
    hands.redis.delete(keys.wake(Q))
    assert (await hands.claim(1)).claim is None
    assert 1 <= len(hands.waiting_ids()) <= 501
    assert hands.redis.llen(keys.wake(Q)) == 1
    assert ids_of((await hands.claim_jobs(1)).jobs) == [job]


# --- finish --------------------------------------------------------------------------------


async def test_a_completed_job_has_its_result_and_no_input_and_all_keys_end(
    hands: QueueDriver,
) -> None:
    job_id = await hands.submit_one()
    claim = await hands.claim_jobs()
    assert await hands.finish_for_verdicts(claim) == ["completed"]
    stored = await hands.read(job_id)
    assert (stored.status, stored.result, stored.error) == ("completed", RESULT, None)
    assert stored.record is not None
    assert stored.record.claim == claim.token
    assert hands.ttls(job_id) == {"status": 600, "result": 600, "meta": 600}
    assert_at_rest(hands.redis, Q)


async def test_keep_input_keeps_the_input_of_completed_jobs(hands: QueueDriver) -> None:
    hands.change_policy(keep_input=True)
    job_id = await hands.submit_one()
    await hands.run_all()
    assert hands.redis.get(keys.data(job_id)) == DATA
    assert set(hands.ttls(job_id).values()) == {600}


async def test_a_failed_job_has_its_error_and_its_input_for_a_retry(hands: QueueDriver) -> None:
    job_id = await hands.submit_one()
    assert await hands.finish_for_verdicts(await hands.claim_jobs(), "failed") == ["failed"]
    stored = await hands.read(job_id)
    assert (stored.status, stored.result, stored.error) == ("failed", None, ERROR)
    assert hands.ttls(job_id) == {"data": 900, "status": 900, "error": 900, "meta": 900}
    assert not hands.redis.exists(keys.dead(Q))


async def test_a_cancelled_job_has_neither_result_nor_error(hands: QueueDriver) -> None:
    job_id = await hands.submit_one()
    assert await hands.finish_for_verdicts(await hands.claim_jobs(), "cancelled") == ["cancelled"]
    assert hands.ttls(job_id) == {"data": 600, "status": 600, "meta": 600}


async def test_a_dead_job_is_failed_and_a_dead_letter(hands: QueueDriver) -> None:
    job_id = await hands.submit_one()
    assert await hands.finish_for_verdicts(await hands.claim_jobs(), "dead") == ["dead"]
    assert (hands.status(job_id), hands.error_code(job_id)) == ("failed", "model_failed")
    assert hands.redis.zrange(keys.dead(Q), 0, -1) == [job_id.encode()]


async def test_dead_letters_are_capped_and_the_newest_stay(hands: QueueDriver) -> None:
    hands.change_policy(max_dead_letters=3)
    jobs = await hands.submit_many(5)
    for _ in jobs:
        wait_for_next_millisecond()
        await hands.finish(await hands.claim_jobs(1), "dead")
    kept = {job_id.decode() for job_id in hands.redis.zrange(keys.dead(Q), 0, -1)}
    assert len(kept) == 3
    assert jobs[4] in kept


@pytest.mark.parametrize("outcome", ["completed", "failed", "cancelled"])
async def test_a_jobs_own_ttl_overrides_the_policys(hands: QueueDriver, outcome: Outcome) -> None:
    job_id = await hands.submit_one(ttl_seconds=77)
    await hands.finish(await hands.claim_jobs(), outcome)
    assert set(hands.ttls(job_id).values()) == {77}


async def test_a_retry_waits_for_its_delay_and_then_runs_again(hands: QueueDriver) -> None:
    job_id = await hands.submit_one()
    assert await hands.finish_for_verdicts(await hands.claim_jobs(), "retry", delay_ms=60_000) == [
        "retry"
    ]
    assert (hands.status(job_id), hands.waiting_ids()) == ("pending", [])
    assert hands.redis.zscore(keys.delayed(Q), job_id) > hands.now_ms() + 59_000
    assert hands.counter(keys.bytes_waiting(Q)) == len(DATA)
    hands.make_due(keys.delayed(Q))
    assert (await hands.sweep()).promoted == 1
    assert await hands.run_all() == [job_id]
    assert_at_rest(hands.redis, Q)


async def test_a_retry_writes_the_record_in_the_outcome(hands: QueueDriver) -> None:
    job_id = await hands.submit_one()
    claim = await hands.claim_jobs()
    assert claim.jobs[0].record is not None
    record = msgspec.structs.replace(claim.jobs[0].record, errors=1)
    meta = encode_record(record, record_seq(claim.jobs[0].meta))
    await hands.consumer.finish(claim, [JobOutcome(job_id, "retry", meta=meta)], last=True)
    assert (await hands.read(job_id)).record == record
    assert hands.ttls(job_id)["meta"] == -1


async def test_released_jobs_wait_again_at_the_serving_end_in_their_order(
    hands: QueueDriver,
) -> None:
    jobs = await hands.submit_many(6)
    claim = await hands.claim_jobs(4)
    assert await hands.finish_for_verdicts(claim, "released") == ["released"] * 4
    assert hands.waiting_ids() == jobs
    assert hands.counter(keys.bytes_waiting(Q)) == 6 * len(DATA)
    again = await hands.claim_jobs()
    assert all(job.facts.deliveries == 0 for job in again.jobs)


async def test_released_jobs_keep_their_priority(hands: QueueDriver) -> None:
    low, high = await hands.submit_one(priority="low"), await hands.submit_one(priority="high")
    normal = await hands.submit_one()
    await hands.finish(await hands.claim_jobs(), "released")
    assert hands.waiting_ids() == [high, normal, low]


async def test_a_release_rings_the_doorbell(hands: QueueDriver) -> None:
    await hands.submit_one()
    claim = await hands.claim_jobs()
    hands.redis.delete(keys.wake(Q))
    await hands.finish(claim, "released")
    assert hands.redis.llen(keys.wake(Q)) == 1


async def test_a_released_job_may_be_delayed(hands: QueueDriver) -> None:
    job_id = await hands.submit_one()
    await hands.finish(await hands.claim_jobs(), "released", delay_ms=5_000)
    assert hands.waiting_ids() == []
    assert hands.redis.zscore(keys.delayed(Q), job_id) > hands.now_ms()


async def test_one_finish_may_contain_every_outcome(hands: QueueDriver) -> None:
    outcomes: list[Outcome] = [
        *("completed", "failed", "cancelled", "dead", "retry", "released", "suspect"),
    ]
    jobs = await hands.submit_many(len(outcomes))
    claim = await hands.claim_jobs()
    finished = [
        outcome_of(job, claim.token, outcome)
        for job, outcome in zip(claim.jobs, outcomes, strict=True)
    ]
    verdicts, _ = await hands.consumer.finish(claim, finished, last=True)
    assert verdicts == outcomes
    assert hands.waiting_ids() == jobs[4:]


async def test_a_partial_finish_keeps_the_lease_and_the_rest_is_recovered(
    hands: QueueDriver,
) -> None:
    done, first, second = await hands.submit_many(3)
    claim = await hands.claim_jobs()
    assert await hands.finish_for_verdicts(claim, only=[done], last=False) == ["completed"]
    assert hands.redis.zcard(keys.leases(Q)) == 1
    assert hands.redis.exists(keys.claim(Q, claim.token))
    hands.expire_leases()
    assert (await hands.sweep()).put_back == 2
    assert hands.waiting_ids() == [first, second]
    assert hands.status(done) == "completed"


async def test_the_last_finish_may_contain_no_job(hands: QueueDriver) -> None:
    await hands.submit_one()
    claim = await hands.claim_jobs()
    await hands.finish(claim, last=False)
    assert await hands.finish_for_verdicts(claim, only=[]) == []
    assert_at_rest(hands.redis, Q)


async def test_results_beyond_a_script_call_are_stored_in_several(hands: QueueDriver) -> None:
    jobs = await hands.submit_many(3)
    claim = await hands.claim_jobs()
    body = b'"' + b"x" * 900_000 + b'"'
    assert await hands.finish_for_verdicts(claim, body=body) == ["completed"] * 3
    assert {len((await hands.read(job)).result or b"") for job in jobs} == {900_002}
    assert_at_rest(hands.redis, Q)


# --- finishes without a lease --------------------------------------------------------------


async def zombie(hands: QueueDriver) -> tuple[str, Claim, Claim]:
    """A job, the claim that lost it, and the claim that holds it now."""
    job_id = await hands.submit_one()
    lost = await hands.claim_jobs()
    hands.expire_leases()
    await hands.sweep()
    return job_id, lost, await hands.claim_jobs()


@pytest.mark.parametrize(
    "outcome", ["completed", "failed", "cancelled", "dead", "retry", "released", "suspect"]
)
async def test_a_finish_without_a_lease_is_stale_and_changes_nothing(
    hands: QueueDriver, outcome: Outcome
) -> None:
    job_id, lost, mine = await zombie(hands)
    before = (await hands.read(job_id), hands.facts(job_id), hands.waiting_ids())
    assert await hands.finish_for_verdicts(lost, outcome) == ["stale"]
    assert (await hands.read(job_id), hands.facts(job_id), hands.waiting_ids()) == before
    assert await hands.finish_for_verdicts(mine) == ["completed"]


async def test_a_finish_without_a_lease_is_stale_after_the_job_ended_too(
    hands: QueueDriver,
) -> None:
    job_id, lost, mine = await zombie(hands)
    await hands.finish(mine, "failed")
    assert await hands.finish_for_verdicts(lost) == ["stale"]
    assert (await hands.read(job_id)).status == "failed"


async def test_a_last_finish_without_a_lease_does_not_drop_the_new_lease(
    hands: QueueDriver,
) -> None:
    _, lost, mine = await zombie(hands)
    await hands.finish(lost)
    assert hands.redis.zrange(keys.leases(Q), 0, -1) == [mine.token.encode()]
    await hands.finish(mine)


@pytest.mark.parametrize("outcome", ["completed", "failed", "cancelled", "dead"])
async def test_a_finish_sent_again_is_distinguished_from_one_without_a_lease(
    hands: QueueDriver, outcome: Outcome
) -> None:
    job_id = await hands.submit_one()
    claim = await hands.claim_jobs()
    await hands.finish(claim, outcome)
    before = await hands.read(job_id)
    assert await hands.finish_for_verdicts(claim, outcome) == ["already"]
    assert await hands.read(job_id) == before


@pytest.mark.parametrize("outcome", ["completed", "failed"])
async def test_a_finish_of_an_external_job_sent_again_is_recognised(
    hands: QueueDriver, outcome: Outcome
) -> None:
    hands.add_external_job("theirs")
    claim = await hands.claim_jobs()
    await hands.finish(claim, outcome)
    assert await hands.finish_for_verdicts(claim, outcome) == ["already"]
    assert await hands.finish_for_verdicts(claim, outcome, body=b'"another"') == ["stale"]


@pytest.mark.parametrize("outcome", ["retry", "released", "suspect"])
async def test_a_job_that_was_given_back_is_recognised_when_that_is_sent_again(
    hands: QueueDriver, outcome: Outcome
) -> None:
    await hands.submit_one()
    hands.add_external_job("theirs")
    claim = await hands.claim_jobs()
    await hands.finish(claim, outcome)
    before = hands.waiting_ids()
    assert await hands.finish_for_verdicts(claim, outcome) == ["already", "already"]
    assert hands.waiting_ids() == before


async def test_a_finish_of_many_sent_again_is_recognised_for_each_job(hands: QueueDriver) -> None:
    mine, lost = await hands.submit_many(2)
    claim = await hands.claim_jobs()
    await hands.finish(claim, only=[mine], last=False)
    hands.expire_leases()
    await hands.sweep()
    assert await hands.finish_for_verdicts(claim) == ["already", "stale"]
    assert hands.waiting_ids() == [lost]


async def test_a_job_twice_in_one_finish_ends_once(hands: QueueDriver) -> None:
    await hands.submit_one()
    claim = await hands.claim_jobs()
    twice = [outcome_of(claim.jobs[0], claim.token, how) for how in ("completed", "failed")]
    verdicts, _ = await hands.consumer.finish(claim, twice, last=True)
    assert verdicts == ["completed", "already"]
    assert hands.statuses(ids_of(claim.jobs)) == {"completed"}


async def test_a_finish_between_the_end_of_the_lease_and_the_sweep_counts(
    hands: QueueDriver,
) -> None:
    await hands.submit_one()
    claim = await hands.claim_jobs()
    hands.expire_leases()
    assert await hands.finish_for_verdicts(claim) == ["completed"]
    await hands.sweep()
    assert_at_rest(hands.redis, Q)


@pytest.mark.parametrize(
    "outcome", ["completed", "failed", "cancelled", "dead", "retry", "released", "suspect"]
)
async def test_a_cancel_turns_every_outcome_into_cancelled(
    hands: QueueDriver, outcome: Outcome
) -> None:
    job_id = await hands.submit_one()
    claim = await hands.claim_jobs()
    await hands.cancel(job_id)
    assert await hands.finish_for_verdicts(claim, outcome) == ["cancelled"]
    stored = await hands.read(job_id)
    assert (stored.status, stored.result) == ("cancelled", None)
    assert stored.ended_ms
    assert not hands.redis.exists(keys.dead(Q))
    assert_at_rest(hands.redis, Q)


# --- the next claim within a finish --------------------------------------------------------


def next_of(hands: QueueDriver, *queues: str, held: bool = False) -> ClaimRequest:
    return ClaimRequest(queues or (Q,), hands.consumer.new_token(), held, 10)


async def test_a_finish_claims_next_in_the_same_call(hands: QueueDriver) -> None:
    first, second = await hands.submit_many(2)
    verdicts, claimed = await hands.finish(await hands.claim_jobs(1), following=next_of(hands))
    assert verdicts == ["completed"]
    assert claimed.claim is not None
    assert ids_of(claimed.claim.jobs) == [second]
    assert hands.redis.zcard(keys.leases(Q)) == 1
    assert hands.status(first) == "completed"


async def test_the_next_claim_takes_of_the_first_queue_in_turn_with_work(
    hands: QueueDriver,
) -> None:
    await hands.submit_one()
    other = await hands.submit_one(queue=OTHER)
    claim = await hands.claim_jobs()
    _, claimed = await hands.finish(claim, following=next_of(hands, Q, f"{Q}:no", OTHER))
    assert claimed.claim is not None
    assert (claimed.claim.queue, ids_of(claimed.claim.jobs)) == (OTHER, [other])


async def test_a_finish_sent_again_gets_the_same_next_claim(hands: QueueDriver) -> None:
    await hands.submit_many(3)
    claim, following = await hands.claim_jobs(1), next_of(hands)
    _, first = await hands.finish(claim, following=following)
    late = await hands.submit_one()
    verdicts, second = await hands.finish(claim, following=following)
    assert (verdicts, jobs_of(second.claim)) == (["already"], jobs_of(first.claim))
    assert hands.waiting_ids() == [late]


async def test_a_finish_sent_again_gets_the_same_next_claim_of_any_queue(
    hands: QueueDriver,
) -> None:
    await hands.submit_one()
    other = await hands.submit_one(queue=OTHER)
    claim, following = await hands.claim_jobs(), next_of(hands, Q, OTHER)
    _, first = await hands.finish(claim, following=following)
    late = await hands.submit_one()
    _, second = await hands.finish(claim, following=following)
    assert first.claim is not None
    assert jobs_of(second.claim) == jobs_of(first.claim)
    assert (ids_of(first.claim.jobs), hands.waiting_ids()) == ([other], [late])


async def test_what_a_finish_releases_it_may_claim_next(hands: QueueDriver) -> None:
    job_id = await hands.submit_one()
    claim = await hands.claim_jobs()
    _, claimed = await hands.finish(claim, "released", following=next_of(hands))
    assert claimed.claim is not None
    assert ids_of(claimed.claim.jobs) == [job_id]
    assert await hands.finish_for_verdicts(claimed.claim) == ["completed"]


async def test_the_next_claim_respects_jobs_that_run_alone(hands: QueueDriver) -> None:
    poison, job = await hands.submit_many(2)
    await redelivered(hands, poison)
    other = await hands.submit_one(queue=OTHER)
    claim = await hands.claim_jobs(queues=(OTHER,))
    assert ids_of(claim.jobs) == [other]
    _, claimed = await hands.finish(claim, following=next_of(hands, held=True))
    assert (claimed.claim, claimed.is_blocked) == (None, True)
    assert hands.waiting_ids() == [poison, job]


async def test_of_a_finish_in_parts_the_last_call_claims_next(hands: QueueDriver) -> None:
    await hands.submit_many(4)
    claim = await hands.claim_jobs(3)
    body = b'"' + b"x" * 900_000 + b'"'
    verdicts, claimed = await hands.finish(claim, body=body, following=next_of(hands))
    assert verdicts == ["completed"] * 3
    assert claimed.claim is not None
    assert len(claimed.claim.jobs) == 1


# --- renew ---------------------------------------------------------------------------------


@pytest.fixture
def renewals(store: Store) -> Any:
    renewals = Leases(store)
    yield renewals
    renewals.close()


async def test_renewing_extends_the_lease(hands: QueueDriver, renewals: Leases) -> None:
    await hands.submit_one()
    claim = await hands.claim_jobs()
    hands.expire_leases()
    began_ms = hands.now_ms()
    renewal = renewals.renew({Q: [claim.token]})
    assert (renewal.lost, renewal.cancelled, renewal.expired) == ((), (), ())
    end_ms = hands.redis.zscore(keys.leases(Q), claim.token)
    assert began_ms + 59_999 <= end_ms <= hands.now_ms() + 60_001


async def test_a_renewal_returns_the_lost_claims_and_revives_none(
    hands: QueueDriver, renewals: Leases
) -> None:
    await hands.submit_many(2)
    lost, kept = await hands.claim_jobs(1), await hands.claim_jobs(1)
    hands.expire_leases(lost.token)
    await hands.sweep()
    renewal = renewals.renew({Q: [lost.token, kept.token], OTHER: ["nobody"]})
    assert renewal.lost == (lost.token, "nobody")
    assert hands.redis.zrange(keys.leases(Q), 0, -1) == [kept.token.encode()]
    assert not hands.redis.exists(keys.leases(OTHER))


async def test_a_renewal_returns_the_cancelled_jobs(hands: QueueDriver, renewals: Leases) -> None:
    _, cancelled = await hands.submit_many(2)
    claim = await hands.claim_jobs()
    await hands.cancel(cancelled)
    assert renewals.renew({Q: [claim.token]}).cancelled == (cancelled,)
    await hands.finish(claim)


async def test_a_renewal_returns_the_jobs_past_their_deadline(
    hands: QueueDriver, renewals: Leases
) -> None:
    late = await hands.submit_one(finish_within_seconds=60)
    claim = await hands.claim_jobs()
    hands.make_due(keys.deadlines(Q))
    await hands.sweep()
    assert renewals.renew({Q: [claim.token]}).expired == (late,)
    await hands.finish(claim)


async def test_renewing_works_after_the_server_forgot_its_scripts(
    hands: QueueDriver, renewals: Leases
) -> None:
    await hands.submit_one()
    claim = await hands.claim_jobs()
    hands.redis.function_flush("SYNC")
    assert renewals.renew({Q: [claim.token]}).lost == ()


# --- the doorbell --------------------------------------------------------------------------


@pytest.fixture
async def doorbell(store: Store) -> Any:
    doorbell = Doorbell(store)
    yield doorbell
    await doorbell.close()


def blocked(hands: QueueDriver) -> bool:
    return any(client["cmd"] == "brpop" for client in hands.redis.client_list())


async def test_the_doorbell_names_the_queue_that_rang(
    hands: QueueDriver, doorbell: Doorbell
) -> None:
    await hands.submit_one(queue=OTHER)
    assert await doorbell.wait([Q, OTHER], 1) == OTHER


async def test_a_silent_doorbell_gives_up_in_time(doorbell: Doorbell) -> None:
    assert await doorbell.wait([Q], 0.02) is None


async def test_a_waiting_worker_is_woken_by_a_submit(
    hands: QueueDriver, doorbell: Doorbell
) -> None:
    waiting = asyncio.create_task(doorbell.wait([Q], 5))
    await eventually(lambda: blocked(hands), "somebody waits at the bell")
    await hands.submit_one()
    assert await waiting == Q


async def test_a_returned_token_wakes_another_worker(
    hands: QueueDriver, doorbell: Doorbell
) -> None:
    await doorbell.ring(Q)
    assert await doorbell.wait([Q], 1) == Q


async def test_closing_the_doorbell_ends_the_wait(hands: QueueDriver, doorbell: Doorbell) -> None:
    waiting = asyncio.create_task(doorbell.wait([Q], 5))
    await eventually(lambda: blocked(hands), "somebody waits at the bell")
    await doorbell.close()
    with pytest.raises(RedisUnavailable):
        await waiting


async def test_an_idle_worker_sees_an_external_job_pushed_without_a_token(
    hands: QueueDriver,
) -> None:
    assert not await hands.consumer.has_work([Q, OTHER])
    hands.add_external_job("theirs")
    assert await hands.consumer.has_work([OTHER, Q])


async def test_an_external_job_pushed_into_a_second_queue_ends_once(hands: QueueDriver) -> None:
    """The job is claimed in the second queue, cancelled through its record, and then finished."""
    job_id = await hands.submit_one(queue=OTHER)
    hands.redis.lpush(Q, job_id)
    claim = await hands.claim_jobs()
    assert await hands.cancel(job_id) == "cancelled"

    done = [outcome_of(claim.jobs[0], claim.token, "completed")]
    verdicts, _ = await hands.consumer.finish(claim, done, last=True)

    assert verdicts == ["stale"]
    assert (await hands.read(job_id)).status == "cancelled"
    assert (await hands.claim(queues=(Q, OTHER))).claim is None
    assert_at_rest(hands.redis, Q, OTHER)


# --- jobs that cannot share a run --------------------------------------------------------------


async def test_a_queue_whose_jobs_share_no_run_gives_one_job_and_rings_for_the_rest(
    hands: QueueDriver, doorbell: Doorbell
) -> None:
    ids = await hands.submit_many(3)
    request = ClaimRequest((OTHER, Q), hands.consumer.new_token(), False, 100, max_jobs_of={Q: 1})
    first = (await hands.consumer.claim(request)).claim
    assert first
    assert ids_of(first.jobs) == ids[:1]
    assert await doorbell.wait([Q], 1) == Q
    following = ClaimRequest((OTHER, Q), hands.consumer.new_token(), False, 100, max_jobs_of={Q: 1})
    _, claimed = await hands.finish(first, following=following)
    assert claimed.claim
    assert ids_of(claimed.claim.jobs) == ids[1:2]


async def test_a_queue_whose_jobs_share_runs_is_claimed_in_batches_beside_one_whose_do_not(
    hands: QueueDriver,
) -> None:
    ids = await hands.submit_many(3, queue=OTHER)
    request = ClaimRequest((Q, OTHER), hands.consumer.new_token(), False, 100, max_jobs_of={Q: 1})
    claim = (await hands.consumer.claim(request)).claim
    assert claim
    assert ids_of(claim.jobs) == ids


async def test_a_claim_of_all_waiting_jobs_leaves_no_doorbell_token(
    hands: QueueDriver,
) -> None:
    await hands.submit_many(3)
    await hands.submit_many(3)
    await hands.claim_jobs(max_jobs=5)
    assert hands.redis.llen(keys.wake(Q)) > 0
    await hands.claim_jobs(max_jobs=5)
    assert hands.redis.llen(keys.wake(Q)) == 0
