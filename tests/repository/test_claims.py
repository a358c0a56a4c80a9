"""The calls of a worker: claim, finish, renew and wait for the doorbell."""

import asyncio
from typing import Any

import msgspec
import pytest
import redis

from asyncinfer.errors import RedisUnavailable
from asyncinfer.jobs import JobError, Outcome, encode_record, record_seq
from asyncinfer.repository import keys
from asyncinfer.repository.claims import Claim, ClaimRequest, Finished
from asyncinfer.repository.doorbell import Doorbell
from asyncinfer.repository.leases import Renewals
from asyncinfer.repository.store import Store
from tests.faults.harness import assert_at_rest, eventually
from tests.queue_driver import DATA, ERROR, RESULT, Hands, Q, ids_of, new_job, outcome_of

OTHER = f"{Q}:digits"


@pytest.fixture
def hands(store: Store, server: redis.Redis) -> Hands:
    return Hands(store, server)


async def redelivered(hands: Hands, job_id: str) -> None:
    """Its worker dies once; then the job waits again and is served next."""
    claim = await hands.take(1)
    assert ids_of(claim.jobs) == [job_id]
    hands.let_leases_end(claim.token)
    assert (await hands.sweep()).put_back == 1


# --- order ---------------------------------------------------------------------------------


async def test_jobs_are_served_first_in_first_out(hands: Hands) -> None:
    jobs = [*await hands.some(3), await hands.one(), *await hands.some(2)]
    assert ids_of((await hands.take(4)).jobs) == jobs[:4]
    assert ids_of((await hands.take(4)).jobs) == jobs[4:]


async def test_high_is_served_before_normal_before_low(hands: Hands) -> None:
    low, normal = await hands.one(priority="low"), await hands.one()
    high = await hands.one(priority="high")
    assert ids_of((await hands.take()).jobs) == [high, normal, low]


async def test_low_first_serves_low_before_normal_before_high(hands: Hands) -> None:
    high, normal = await hands.one(priority="high"), await hands.one()
    low = await hands.one(priority="low")
    assert ids_of((await hands.take(low_first=True)).jobs) == [low, normal, high]


async def test_low_is_served_now_and_then_while_high_never_runs_dry(hands: Hands) -> None:
    low = await hands.some(3, priority="low")
    served: list[str] = []
    for turn in range(48):
        await hands.one(priority="high")
        claim = await hands.take(1, low_first=turn % 16 == 0)
        served += ids_of(claim.jobs)
        await hands.finish(claim)
    assert [job_id for job_id in served if job_id in low] == low


async def test_a_claim_returns_all_that_is_needed_to_run_a_job(hands: Hands) -> None:
    job = new_job(b"[[7]]", priority="high")
    await hands.submit(job)
    claim = await hands.take()
    claimed = claim.jobs[0]
    assert (claim.queue, claimed.job_id, claimed.data) == (Q, job.job_id, b"[[7]]")
    assert (claimed.record, claimed.facts.priority) == (job.record, "high")
    assert not claim.exclusive
    assert hands.status(job.job_id) == "processing"


async def test_a_claim_takes_no_more_than_requested(hands: Hands) -> None:
    jobs = await hands.some(5)
    assert ids_of((await hands.take(2)).jobs) == jobs[:2]
    assert hands.waiting() == jobs[2:]


async def test_a_claim_is_bounded_in_bytes_but_takes_one_at_least(hands: Hands) -> None:
    large = [new_job(bytes(5 << 20)) for _ in range(2)]
    for job in large:
        await hands.submit(job)
    assert ids_of((await hands.take()).jobs) == [large[0].job_id]
    huge = new_job(bytes(9 << 20))
    await hands.cancel(large[1].job_id)
    await hands.submit(huge)
    assert ids_of((await hands.take()).jobs) == [huge.job_id]


async def test_a_claim_of_an_empty_queue_leaves_nothing_behind(hands: Hands) -> None:
    assert (await hands.claim()).claim is None
    assert list(hands.redis.scan_iter()) == []


async def test_a_paused_queue_gives_nothing_until_it_is_resumed(hands: Hands) -> None:
    await hands.operations.pause(Q, paused=True)
    jobs = await hands.some(2)
    assert (await hands.claim()).claim is None
    hands.redis.delete(keys.wake(Q))
    await hands.operations.pause(Q, paused=False)
    assert hands.redis.llen(keys.wake(Q)) == 1
    assert await hands.run_all() == jobs


async def test_the_first_queue_with_work_is_served(hands: Hands) -> None:
    job = await hands.one(queue=OTHER)
    claim = await hands.take(queues=(Q, OTHER))
    assert (claim.queue, ids_of(claim.jobs)) == (OTHER, [job])
    assert hands.redis.hkeys(keys.running(OTHER)) == [job.encode()]


async def test_a_paused_queue_does_not_hold_up_the_next(hands: Hands) -> None:
    await hands.one()
    await hands.operations.pause(Q, paused=True)
    job = await hands.one(queue=OTHER)
    assert ids_of((await hands.take(queues=(Q, OTHER))).jobs) == [job]


async def test_a_claim_that_leaves_work_behind_rings_once_more(hands: Hands) -> None:
    await hands.some(3)
    hands.redis.delete(keys.wake(Q))
    await hands.take(1)
    assert hands.redis.llen(keys.wake(Q)) == 1
    hands.redis.delete(keys.wake(Q))
    await hands.take()
    assert hands.redis.llen(keys.wake(Q)) == 0


async def test_the_doorbell_never_holds_more_than_64_tokens(hands: Hands) -> None:
    for _ in range(70):
        await hands.one()
    assert hands.redis.llen(keys.wake(Q)) == 64


# --- retried claims ------------------------------------------------------------------------


async def test_a_claim_sent_again_gets_the_same_jobs_and_takes_nothing_twice(hands: Hands) -> None:
    await hands.some(5)
    token = hands.runs.new_token()
    first = await hands.claim(2, token=token)
    assert await hands.claim(2, token=token) == first
    assert len(hands.waiting()) == 3
    assert hands.redis.hlen(keys.running(Q)) == 2


async def test_a_claim_sent_again_renews_its_lease(hands: Hands) -> None:
    await hands.one()
    claim = await hands.take()
    hands.let_leases_end()
    await hands.take(token=claim.token)
    assert hands.redis.zscore(keys.leases(Q), claim.token) > hands.now_ms()


async def test_a_claim_sent_again_leaves_out_what_is_no_longer_its_own(hands: Hands) -> None:
    done, released, kept = await hands.some(3)
    claim = await hands.take()
    await hands.finish(claim, only=[done], last=False)
    await hands.finish(claim, "released", only=[released], last=False)
    await hands.take()
    assert ids_of((await hands.take(token=claim.token)).jobs) == [kept]


async def test_a_claim_over_several_queues_sent_again_takes_nothing_twice(hands: Hands) -> None:
    job = await hands.one(queue=OTHER)
    token = hands.runs.new_token()
    first = await hands.take(token=token, queues=(Q, OTHER))
    late = await hands.one()
    assert await hands.take(token=token, queues=(Q, OTHER)) == first
    assert ids_of(first.jobs) == [job]
    assert hands.waiting() == [late]
    assert not hands.redis.exists(keys.leases(Q))


async def test_a_claim_after_its_time_takes_nothing(hands: Hands) -> None:
    job = await hands.one()
    await hands.claim(0)
    hands.store.saw_server_time(hands.now_ms() - 60_000)
    assert (await hands.claim()).claim is None
    assert hands.waiting() == [job]
    # The reply contained the server's time, so that the next claim is in time.
    assert (await hands.claim()).claim is not None


async def test_a_late_retry_still_gets_the_claim_it_holds(hands: Hands) -> None:
    await hands.one()
    claim = await hands.take()
    hands.store.saw_server_time(hands.now_ms() - 60_000)
    assert await hands.take(token=claim.token) == claim


# --- external jobs -------------------------------------------------------------------------


async def test_an_external_job_is_run_and_its_result_is_under_the_documented_key(
    hands: Hands,
) -> None:
    hands.stranger("theirs")
    claim = await hands.take()
    assert (claim.jobs[0].job_id, claim.jobs[0].record) == ("theirs", None)
    assert hands.redis.get("job:theirs:status") == b"processing"
    await hands.finish(claim)
    assert hands.redis.get("job:theirs:status") == b"completed"
    assert hands.redis.get("job:theirs:result") == RESULT
    assert hands.ttls("theirs") == {"status": 600, "result": 600}


async def test_an_external_job_needs_no_status(hands: Hands) -> None:
    hands.stranger("theirs", status=None)
    assert await hands.run_all() == ["theirs"]


async def test_external_jobs_are_served_in_turn_with_other_jobs(hands: Hands) -> None:
    first = await hands.one()
    hands.stranger("theirs")
    second = await hands.one()
    assert await hands.run_all() == [first, "theirs", second]


async def test_an_id_without_input_or_status_is_dropped_without_a_trace(hands: Hands) -> None:
    hands.stranger("nothing", data=None, status=None)
    job = await hands.one()
    assert await hands.run_all() == [job]
    assert hands.status("nothing") is None


async def test_an_external_pending_job_without_input_fails_as_lost(hands: Hands) -> None:
    hands.stranger("theirs", data=None)
    assert await hands.run_all() == []
    assert (hands.status("theirs"), hands.error_code("theirs")) == ("failed", "input_lost")
    assert hands.ttls("theirs") == {"status": 900, "error": 900}


@pytest.mark.parametrize("status", [b"pending", None])
async def test_an_external_job_with_a_hash_as_data_blocks_no_other_job(
    hands: Hands, status: bytes | None
) -> None:
    hands.redis.hset("job:theirs:data", "rows", "[[1]]")
    hands.stranger("theirs", data=None, status=status)
    job = await hands.one()
    assert await hands.run_all() == [job]
    assert hands.status("theirs") == (None if status is None else "failed")
    hands.redis.delete("job:theirs:data")


async def test_an_external_job_with_a_list_as_status_blocks_no_other_job(hands: Hands) -> None:
    hands.redis.lpush("job:theirs:status", "pending")
    hands.stranger("theirs", status=None)
    job = await hands.one()
    assert await hands.run_all() == ["theirs", job]
    assert hands.status("theirs") == "completed"


@pytest.mark.parametrize("job_id", ["", "a\nb", "tab\there", "nul\0", "x" * 129, "del\x7f"])
async def test_a_job_of_a_malformed_id_fails_and_the_rest_is_served(
    hands: Hands, job_id: str
) -> None:
    """Its producer can read why, and does not wait for ever."""
    hands.stranger(job_id)
    job = await hands.one()
    assert await hands.run_all() == [job]
    assert hands.status(job_id) == "failed"
    error = msgspec.json.decode(hands.redis.get(f"job:{job_id}:error") or b"", type=JobError)
    assert error.code == "invalid_id"
    assert 0 < hands.redis.ttl(f"job:{job_id}:data") <= hands.redis.ttl(f"job:{job_id}:status")
    await hands.sweep()
    assert_at_rest(hands.redis, Q)


async def test_an_id_too_long_for_the_log_is_dropped_and_the_rest_is_served(hands: Hands) -> None:
    job_id = "x" * 2000
    hands.stranger(job_id)
    job = await hands.one()
    assert await hands.run_all() == [job]
    hands.redis.delete(f"job:{job_id}:data", f"job:{job_id}:status")


@pytest.mark.parametrize("job_id", ["x" * 128, "a b", "{braces}", "a:data", "ü", "-1", "*", "[a]"])
async def test_unusual_but_valid_ids_are_served(hands: Hands, job_id: str) -> None:
    hands.stranger(job_id)
    assert await hands.run_all() == [job_id]
    assert hands.redis.get(f"job:{job_id}:result") == RESULT
    await hands.sweep()
    assert_at_rest(hands.redis, Q)


async def test_an_id_that_is_not_text_is_served_and_finished(hands: Hands) -> None:
    name = b"\xff\xfe\x80"
    hands.stranger(name)
    claim = await hands.take()
    assert await hands.ended(claim) == ["completed"]
    assert hands.redis.get(b"job:\xff\xfe\x80:result") == RESULT
    assert await hands.ended(claim) == ["already"]


async def test_a_dropped_unknown_id_does_not_change_the_count_of_stale_entries(
    hands: Hands,
) -> None:
    low = await hands.some(14, priority="low")
    await hands.cancel_in_one_call(*low[:13])
    hands.redis.lpush(Q, "a\nb", "nobody", low[0], low[0])
    job = await hands.one()
    assert ids_of((await hands.take(1)).jobs) == [job]
    assert hands.ghosts() == 3
    assert await hands.run_all() == [low[13]]
    assert hands.ghosts() == 0


async def test_an_external_id_pushed_twice_runs_once(hands: Hands) -> None:
    hands.stranger("theirs")
    hands.redis.lpush(Q, "theirs", "theirs")
    assert ids_of((await hands.take(2)).jobs) == ["theirs"]
    assert hands.waiting() == []


async def test_an_id_pushed_again_while_it_runs_is_not_taken(hands: Hands) -> None:
    job_id = await hands.one()
    claim = await hands.take()
    hands.redis.lpush(Q, job_id)
    assert (await hands.claim()).claim is None
    assert await hands.ended(claim) == ["completed"]
    assert_at_rest(hands.redis, Q)


async def test_an_id_pushed_again_after_it_ended_is_not_run_again(hands: Hands) -> None:
    job_id = await hands.one()
    await hands.run_all()
    before = await hands.read(job_id)
    hands.redis.lpush(Q, job_id)
    assert await hands.run_all() == []
    assert await hands.read(job_id) == before


async def test_an_external_producer_may_submit_an_ended_id_again(hands: Hands) -> None:
    hands.stranger("theirs", b"[[1]]")
    await hands.run_all("failed")
    hands.stranger("theirs", b"[[2]]")
    claim = await hands.take()
    assert claim.jobs[0].data == b"[[2]]"
    await hands.finish(claim)
    assert hands.status("theirs") == "completed"


async def test_an_external_consumer_and_our_workers_share_the_list(hands: Hands) -> None:
    jobs = await hands.some(3)
    popped = hands.redis.rpop(Q).decode()
    hands.redis.set(f"job:{popped}:status", "processing")
    assert popped == jobs[0]
    assert await hands.run_all() == jobs[1:]
    hands.redis.mset({f"job:{popped}:result": b"{}", f"job:{popped}:status": "completed"})
    for word in ("data", "status", "result", "meta"):
        hands.redis.expire(f"job:{popped}:{word}", 60)


# --- jobs that run alone -------------------------------------------------------------------


async def test_a_redelivered_job_is_claimed_alone(hands: Hands) -> None:
    poison, innocent = await hands.some(2)
    await redelivered(hands, poison)
    claimed = await hands.claim()
    assert claimed.claim is not None
    assert ids_of(claimed.claim.jobs) == [poison]
    assert claimed.claim.exclusive
    assert claimed.claim.jobs[0].facts.deliveries == 1
    assert hands.waiting() == [innocent]


async def test_a_redelivered_job_is_not_given_to_a_process_that_holds_another_claim(
    hands: Hands,
) -> None:
    poison, innocent = await hands.some(2)
    await redelivered(hands, poison)
    claimed = await hands.claim(held=True)
    assert (claimed.claim, claimed.blocked) == (None, True)
    assert hands.waiting() == [poison, innocent]


async def test_a_claim_stops_before_a_job_that_must_run_alone(hands: Hands) -> None:
    poison, innocent = await hands.some(2)
    await redelivered(hands, poison)
    urgent = await hands.one(priority="high")
    claimed = await hands.claim()
    assert claimed.claim is not None
    assert (ids_of(claimed.claim.jobs), claimed.blocked) == ([urgent], True)
    assert hands.waiting() == [poison, innocent]


async def test_a_claim_blocked_by_one_queue_takes_nothing_of_the_next(hands: Hands) -> None:
    poison = await hands.one()
    await redelivered(hands, poison)
    other = await hands.one(queue=OTHER)
    claimed = await hands.claim(held=True, queues=(Q, OTHER))
    assert (claimed.claim, claimed.blocked) == (None, True)
    assert hands.waiting(OTHER) == [other]


async def test_a_suspect_is_claimed_alone_without_a_delivery_counted(hands: Hands) -> None:
    suspects = await hands.some(2)
    await hands.finish(await hands.take(), "suspect")
    claims = [await hands.take(), await hands.take()]
    assert [ids_of(claim.jobs) for claim in claims] == [[job_id] for job_id in suspects]
    assert all(claim.exclusive and claim.jobs[0].facts.deliveries == 0 for claim in claims)


async def test_a_retried_claim_of_an_exclusive_job_gets_it_again(hands: Hands) -> None:
    await redelivered(hands, await hands.one())
    claim = await hands.take()
    assert await hands.take(token=claim.token, held=True) == claim


# --- deadlines and lost inputs at the claim ------------------------------------------------


async def test_a_job_past_its_start_deadline_is_failed_not_run(hands: Hands) -> None:
    late = await hands.one(start_within_seconds=0.001)
    job = await hands.one(start_within_seconds=60)
    due = hands.facts(late).start_by_ms
    await eventually(lambda: hands.now_ms() > due, "the start deadline")
    claim = await hands.take()
    assert ids_of(claim.jobs) == [job]
    assert (hands.status(late), hands.error_code(late)) == ("failed", "expired")
    assert hands.ghosts() == 0
    await hands.finish(claim)
    assert_at_rest(hands.redis, Q)


async def test_a_job_past_its_life_deadline_is_failed_not_run(hands: Hands) -> None:
    late = await hands.one(finish_within_seconds=0.001)
    due = hands.facts(late).finish_by_ms
    await eventually(lambda: hands.now_ms() > due, "the life deadline")
    assert await hands.run_all() == []
    assert hands.error_code(late) == "expired"
    assert_at_rest(hands.redis, Q)


async def test_a_start_deadline_that_was_met_is_removed(hands: Hands) -> None:
    job_id = await hands.one(start_within_seconds=60)
    await hands.take()
    assert not hands.redis.exists(keys.deadlines(Q), keys.facts(Q))
    assert hands.status(job_id) == "processing"


async def test_the_life_deadline_takes_the_place_of_the_start_deadline(hands: Hands) -> None:
    job_id = await hands.one(start_within_seconds=60, finish_within_seconds=120, priority="low")
    due = hands.facts(job_id).finish_by_ms
    assert hands.redis.zscore(keys.deadlines(Q), job_id) == hands.facts(job_id).start_by_ms < due
    claim = await hands.take()
    assert (claim.jobs[0].facts.start_by_ms, claim.jobs[0].facts.finish_by_ms) == (0, due)
    assert hands.facts(job_id) == claim.jobs[0].facts
    assert hands.redis.zscore(keys.deadlines(Q), job_id) == due


async def test_a_job_whose_input_is_gone_fails_as_lost(hands: Hands) -> None:
    lost, job = await hands.some(2)
    hands.redis.delete(keys.data(lost))
    assert await hands.run_all() == [job]
    assert (hands.status(lost), hands.error_code(lost)) == ("failed", "input_lost")
    assert_at_rest(hands.redis, Q)


async def test_however_many_have_expired_none_is_lost_and_the_rest_is_served(
    hands: Hands,
) -> None:
    late = [job for _ in range(36) for job in await hands.some(250, start_within_seconds=0.001)]
    job = await hands.one()
    due = hands.facts(late[-1]).start_by_ms
    await eventually(lambda: hands.now_ms() > due, "the last start deadline")
    assert (await hands.claim(10)).claim is None
    left = len(hands.waiting())
    assert 7_900 < left < 8_100
    assert hands.status(late[len(late) - left]) == "failed"
    assert hands.redis.hlen(keys.facts(Q)) == left - 1
    while not (claim := (await hands.claim(10)).claim):
        assert len(hands.waiting()) < left
        left = len(hands.waiting())
    assert ids_of(claim.jobs) == [job]
    hands.redis.flushall()


async def test_a_claim_drops_at_most_a_thousand_ids_and_rings_for_the_rest(hands: Hands) -> None:
    hands.redis.lpush(Q, *(f"stray{number}" for number in range(1500)))
    job = await hands.one()
    hands.redis.delete(keys.wake(Q))
    assert (await hands.claim(1)).claim is None
    assert 1 <= len(hands.waiting()) <= 501
    assert hands.redis.llen(keys.wake(Q)) == 1
    assert ids_of((await hands.take(1)).jobs) == [job]


# --- finish --------------------------------------------------------------------------------


async def test_a_completed_job_has_its_result_and_no_input_and_all_keys_end(hands: Hands) -> None:
    job_id = await hands.one()
    claim = await hands.take()
    assert await hands.ended(claim) == ["completed"]
    stored = await hands.read(job_id)
    assert (stored.status, stored.result, stored.error) == ("completed", RESULT, None)
    assert stored.record is not None
    assert stored.record.claim == claim.token
    assert hands.ttls(job_id) == {"status": 600, "result": 600, "meta": 600}
    assert_at_rest(hands.redis, Q)


async def test_keep_input_keeps_the_input_of_completed_jobs(hands: Hands) -> None:
    hands.policy(keep_input=True)
    job_id = await hands.one()
    await hands.run_all()
    assert hands.redis.get(keys.data(job_id)) == DATA
    assert set(hands.ttls(job_id).values()) == {600}


async def test_a_failed_job_has_its_error_and_its_input_for_a_retry(hands: Hands) -> None:
    job_id = await hands.one()
    assert await hands.ended(await hands.take(), "failed") == ["failed"]
    stored = await hands.read(job_id)
    assert (stored.status, stored.result, stored.error) == ("failed", None, ERROR)
    assert hands.ttls(job_id) == {"data": 900, "status": 900, "error": 900, "meta": 900}
    assert not hands.redis.exists(keys.dead(Q))


async def test_a_cancelled_job_has_neither_result_nor_error(hands: Hands) -> None:
    job_id = await hands.one()
    assert await hands.ended(await hands.take(), "cancelled") == ["cancelled"]
    assert hands.ttls(job_id) == {"data": 600, "status": 600, "meta": 600}


async def test_a_dead_job_is_failed_and_a_dead_letter(hands: Hands) -> None:
    job_id = await hands.one()
    assert await hands.ended(await hands.take(), "dead") == ["dead"]
    assert (hands.status(job_id), hands.error_code(job_id)) == ("failed", "model_failed")
    assert hands.redis.zrange(keys.dead(Q), 0, -1) == [job_id.encode()]


async def test_dead_letters_are_capped_and_the_newest_stay(hands: Hands) -> None:
    hands.policy(max_dead=3)
    jobs = await hands.some(5)
    for _ in jobs:
        await hands.finish(await hands.take(1), "dead")
    kept = {job_id.decode() for job_id in hands.redis.zrange(keys.dead(Q), 0, -1)}
    assert len(kept) == 3
    assert jobs[4] in kept


@pytest.mark.parametrize("outcome", ["completed", "failed", "cancelled"])
async def test_a_jobs_own_ttl_overrides_the_policys(hands: Hands, outcome: Outcome) -> None:
    job_id = await hands.one(ttl_seconds=77)
    await hands.finish(await hands.take(), outcome)
    assert set(hands.ttls(job_id).values()) == {77}


async def test_a_retry_waits_for_its_delay_and_then_runs_again(hands: Hands) -> None:
    job_id = await hands.one()
    assert await hands.ended(await hands.take(), "retry", delay_ms=60_000) == ["retry"]
    assert (hands.status(job_id), hands.waiting()) == ("pending", [])
    assert hands.redis.zscore(keys.delayed(Q), job_id) > hands.now_ms() + 59_000
    assert hands.counter(keys.bytes_waiting(Q)) == len(DATA)
    hands.let_come_due(keys.delayed(Q))
    assert (await hands.sweep()).promoted == 1
    assert await hands.run_all() == [job_id]
    assert_at_rest(hands.redis, Q)


async def test_a_retry_writes_the_record_in_the_outcome(hands: Hands) -> None:
    job_id = await hands.one()
    claim = await hands.take()
    assert claim.jobs[0].record is not None
    record = msgspec.structs.replace(claim.jobs[0].record, errors=1)
    meta = encode_record(record, record_seq(claim.jobs[0].meta))
    await hands.runs.finish(claim, [Finished(job_id, "retry", meta=meta)], last=True)
    assert (await hands.read(job_id)).record == record
    assert hands.ttls(job_id)["meta"] == -1


async def test_released_jobs_wait_again_at_the_serving_end_in_their_order(hands: Hands) -> None:
    jobs = await hands.some(6)
    claim = await hands.take(4)
    assert await hands.ended(claim, "released") == ["released"] * 4
    assert hands.waiting() == jobs
    assert hands.counter(keys.bytes_waiting(Q)) == 6 * len(DATA)
    again = await hands.take()
    assert all(job.facts.deliveries == 0 for job in again.jobs)


async def test_released_jobs_keep_their_priority(hands: Hands) -> None:
    low, high = await hands.one(priority="low"), await hands.one(priority="high")
    normal = await hands.one()
    await hands.finish(await hands.take(), "released")
    assert hands.waiting() == [high, normal, low]


async def test_a_release_rings_the_doorbell(hands: Hands) -> None:
    await hands.one()
    claim = await hands.take()
    hands.redis.delete(keys.wake(Q))
    await hands.finish(claim, "released")
    assert hands.redis.llen(keys.wake(Q)) == 1


async def test_a_released_job_may_be_delayed(hands: Hands) -> None:
    job_id = await hands.one()
    await hands.finish(await hands.take(), "released", delay_ms=5_000)
    assert hands.waiting() == []
    assert hands.redis.zscore(keys.delayed(Q), job_id) > hands.now_ms()


async def test_one_finish_may_contain_every_outcome(hands: Hands) -> None:
    outcomes: list[Outcome] = [
        *("completed", "failed", "cancelled", "dead", "retry", "released", "suspect"),
    ]
    jobs = await hands.some(len(outcomes))
    claim = await hands.take()
    finished = [
        outcome_of(job, claim.token, outcome)
        for job, outcome in zip(claim.jobs, outcomes, strict=True)
    ]
    verdicts, _ = await hands.runs.finish(claim, finished, last=True)
    assert verdicts == outcomes
    assert hands.waiting() == jobs[4:]


async def test_a_partial_finish_keeps_the_lease_and_the_rest_is_recovered(hands: Hands) -> None:
    done, first, second = await hands.some(3)
    claim = await hands.take()
    assert await hands.ended(claim, only=[done], last=False) == ["completed"]
    assert hands.redis.zcard(keys.leases(Q)) == 1
    assert hands.redis.exists(keys.claim(Q, claim.token))
    hands.let_leases_end()
    assert (await hands.sweep()).put_back == 2
    assert hands.waiting() == [first, second]
    assert hands.status(done) == "completed"


async def test_the_last_finish_may_contain_no_job(hands: Hands) -> None:
    await hands.one()
    claim = await hands.take()
    await hands.finish(claim, last=False)
    assert await hands.ended(claim, only=[]) == []
    assert_at_rest(hands.redis, Q)


async def test_results_beyond_a_script_call_are_stored_in_several(hands: Hands) -> None:
    jobs = await hands.some(3)
    claim = await hands.take()
    body = b'"' + b"x" * 900_000 + b'"'
    assert await hands.ended(claim, body=body) == ["completed"] * 3
    assert {len((await hands.read(job)).result or b"") for job in jobs} == {900_002}
    assert_at_rest(hands.redis, Q)


# --- finishes without a lease --------------------------------------------------------------


async def zombie(hands: Hands) -> tuple[str, Claim, Claim]:
    """A job, the claim that lost it, and the claim that holds it now."""
    job_id = await hands.one()
    lost = await hands.take()
    hands.let_leases_end()
    await hands.sweep()
    return job_id, lost, await hands.take()


@pytest.mark.parametrize(
    "outcome", ["completed", "failed", "cancelled", "dead", "retry", "released", "suspect"]
)
async def test_a_finish_without_a_lease_is_stale_and_changes_nothing(
    hands: Hands, outcome: Outcome
) -> None:
    job_id, lost, mine = await zombie(hands)
    before = (await hands.read(job_id), hands.facts(job_id), hands.waiting())
    assert await hands.ended(lost, outcome) == ["stale"]
    assert (await hands.read(job_id), hands.facts(job_id), hands.waiting()) == before
    assert await hands.ended(mine) == ["completed"]


async def test_a_finish_without_a_lease_is_stale_after_the_job_ended_too(hands: Hands) -> None:
    job_id, lost, mine = await zombie(hands)
    await hands.finish(mine, "failed")
    assert await hands.ended(lost) == ["stale"]
    assert (await hands.read(job_id)).status == "failed"


async def test_a_last_finish_without_a_lease_does_not_drop_the_new_lease(hands: Hands) -> None:
    _, lost, mine = await zombie(hands)
    await hands.finish(lost)
    assert hands.redis.zrange(keys.leases(Q), 0, -1) == [mine.token.encode()]
    await hands.finish(mine)


@pytest.mark.parametrize("outcome", ["completed", "failed", "cancelled", "dead"])
async def test_a_finish_sent_again_is_distinguished_from_one_without_a_lease(
    hands: Hands, outcome: Outcome
) -> None:
    job_id = await hands.one()
    claim = await hands.take()
    await hands.finish(claim, outcome)
    before = await hands.read(job_id)
    assert await hands.ended(claim, outcome) == ["already"]
    assert await hands.read(job_id) == before


@pytest.mark.parametrize("outcome", ["completed", "failed"])
async def test_a_finish_of_an_external_job_sent_again_is_recognised(
    hands: Hands, outcome: Outcome
) -> None:
    hands.stranger("theirs")
    claim = await hands.take()
    await hands.finish(claim, outcome)
    assert await hands.ended(claim, outcome) == ["already"]
    assert await hands.ended(claim, outcome, body=b'"another"') == ["stale"]


async def test_a_finish_of_many_sent_again_is_recognised_for_each_job(hands: Hands) -> None:
    mine, lost = await hands.some(2)
    claim = await hands.take()
    await hands.finish(claim, only=[mine], last=False)
    hands.let_leases_end()
    await hands.sweep()
    assert await hands.ended(claim) == ["already", "stale"]
    assert hands.waiting() == [lost]


async def test_a_job_twice_in_one_finish_ends_once(hands: Hands) -> None:
    await hands.one()
    claim = await hands.take()
    twice = [outcome_of(claim.jobs[0], claim.token, how) for how in ("completed", "failed")]
    verdicts, _ = await hands.runs.finish(claim, twice, last=True)
    assert verdicts == ["completed", "already"]
    assert hands.statuses(ids_of(claim.jobs)) == {"completed"}


async def test_a_finish_between_the_end_of_the_lease_and_the_sweep_counts(hands: Hands) -> None:
    await hands.one()
    claim = await hands.take()
    hands.let_leases_end()
    assert await hands.ended(claim) == ["completed"]
    await hands.sweep()
    assert_at_rest(hands.redis, Q)


@pytest.mark.parametrize(
    "outcome", ["completed", "failed", "cancelled", "dead", "retry", "released", "suspect"]
)
async def test_a_cancel_turns_every_outcome_into_cancelled(hands: Hands, outcome: Outcome) -> None:
    job_id = await hands.one()
    claim = await hands.take()
    await hands.cancel(job_id)
    assert await hands.ended(claim, outcome) == ["cancelled"]
    stored = await hands.read(job_id)
    assert (stored.status, stored.result, stored.error) == ("cancelled", None, None)
    assert not hands.redis.exists(keys.dead(Q))
    assert_at_rest(hands.redis, Q)


# --- the next claim within a finish --------------------------------------------------------


def next_of(hands: Hands, *queues: str, held: bool = False) -> ClaimRequest:
    return ClaimRequest(queues or (Q,), hands.runs.new_token(), held, 10)


async def test_a_finish_claims_next_in_the_same_call(hands: Hands) -> None:
    first, second = await hands.some(2)
    verdicts, claimed = await hands.finish(await hands.take(1), following=next_of(hands))
    assert verdicts == ["completed"]
    assert claimed.claim is not None
    assert ids_of(claimed.claim.jobs) == [second]
    assert hands.redis.zcard(keys.leases(Q)) == 1
    assert hands.status(first) == "completed"


async def test_the_next_claim_takes_of_the_first_queue_in_turn_with_work(hands: Hands) -> None:
    await hands.one()
    other = await hands.one(queue=OTHER)
    claim = await hands.take()
    _, claimed = await hands.finish(claim, following=next_of(hands, Q, f"{Q}:no", OTHER))
    assert claimed.claim is not None
    assert (claimed.claim.queue, ids_of(claimed.claim.jobs)) == (OTHER, [other])


async def test_a_finish_sent_again_gets_the_same_next_claim(hands: Hands) -> None:
    await hands.some(3)
    claim, following = await hands.take(1), next_of(hands)
    _, first = await hands.finish(claim, following=following)
    late = await hands.one()
    verdicts, second = await hands.finish(claim, following=following)
    assert (verdicts, second) == (["already"], first)
    assert hands.waiting() == [late]


async def test_a_finish_sent_again_gets_the_same_next_claim_of_any_queue(hands: Hands) -> None:
    await hands.one()
    other = await hands.one(queue=OTHER)
    claim, following = await hands.take(), next_of(hands, Q, OTHER)
    _, first = await hands.finish(claim, following=following)
    late = await hands.one()
    assert (await hands.finish(claim, following=following))[1] == first
    assert first.claim is not None
    assert (ids_of(first.claim.jobs), hands.waiting()) == ([other], [late])


async def test_what_a_finish_releases_it_may_claim_next(hands: Hands) -> None:
    job_id = await hands.one()
    claim = await hands.take()
    _, claimed = await hands.finish(claim, "released", following=next_of(hands))
    assert claimed.claim is not None
    assert ids_of(claimed.claim.jobs) == [job_id]
    assert await hands.ended(claimed.claim) == ["completed"]


async def test_the_next_claim_respects_jobs_that_run_alone(hands: Hands) -> None:
    poison, job = await hands.some(2)
    await redelivered(hands, poison)
    other = await hands.one(queue=OTHER)
    claim = await hands.take(queues=(OTHER,))
    assert ids_of(claim.jobs) == [other]
    _, claimed = await hands.finish(claim, following=next_of(hands, held=True))
    assert (claimed.claim, claimed.blocked) == (None, True)
    assert hands.waiting() == [poison, job]


async def test_of_a_finish_in_parts_the_last_call_claims_next(hands: Hands) -> None:
    await hands.some(4)
    claim = await hands.take(3)
    body = b'"' + b"x" * 900_000 + b'"'
    verdicts, claimed = await hands.finish(claim, body=body, following=next_of(hands))
    assert verdicts == ["completed"] * 3
    assert claimed.claim is not None
    assert len(claimed.claim.jobs) == 1


# --- renew ---------------------------------------------------------------------------------


@pytest.fixture
def renewals(store: Store) -> Any:
    renewals = Renewals(store)
    yield renewals
    renewals.close()


async def test_renewing_extends_the_lease(hands: Hands, renewals: Renewals) -> None:
    await hands.one()
    claim = await hands.take()
    hands.let_leases_end()
    renewal = renewals.renew({Q: [claim.token]})
    assert (renewal.lost, renewal.cancelled, renewal.expired) == ((), (), ())
    end = hands.redis.zscore(keys.leases(Q), claim.token)
    assert 0 < end - hands.now_ms() <= 501


async def test_a_renewal_returns_the_lost_claims_and_revives_none(
    hands: Hands, renewals: Renewals
) -> None:
    await hands.some(2)
    lost, kept = await hands.take(1), await hands.take(1)
    hands.let_leases_end(lost.token)
    await hands.sweep()
    renewal = renewals.renew({Q: [lost.token, kept.token], OTHER: ["nobody"]})
    assert renewal.lost == (lost.token, "nobody")
    assert hands.redis.zrange(keys.leases(Q), 0, -1) == [kept.token.encode()]
    assert not hands.redis.exists(keys.leases(OTHER))


async def test_a_renewal_returns_the_cancelled_jobs(hands: Hands, renewals: Renewals) -> None:
    _, cancelled = await hands.some(2)
    claim = await hands.take()
    await hands.cancel(cancelled)
    assert renewals.renew({Q: [claim.token]}).cancelled == (cancelled,)
    await hands.finish(claim)


async def test_a_renewal_returns_the_jobs_past_their_deadline(
    hands: Hands, renewals: Renewals
) -> None:
    late = await hands.one(finish_within_seconds=60)
    claim = await hands.take()
    hands.let_come_due(keys.deadlines(Q))
    await hands.sweep()
    assert renewals.renew({Q: [claim.token]}).expired == (late,)
    await hands.finish(claim)


async def test_renewing_works_after_the_server_forgot_its_scripts(
    hands: Hands, renewals: Renewals
) -> None:
    await hands.one()
    claim = await hands.take()
    hands.redis.script_flush()
    assert renewals.renew({Q: [claim.token]}).lost == ()


# --- the doorbell --------------------------------------------------------------------------


@pytest.fixture
async def doorbell(store: Store) -> Any:
    doorbell = Doorbell(store)
    yield doorbell
    await doorbell.close()


def blocked(hands: Hands) -> bool:
    return any(client["cmd"] == "brpop" for client in hands.redis.client_list())


async def test_the_doorbell_names_the_queue_that_rang(hands: Hands, doorbell: Doorbell) -> None:
    await hands.one(queue=OTHER)
    assert await doorbell.wait([Q, OTHER], 1) == OTHER


async def test_a_silent_doorbell_gives_up_in_time(doorbell: Doorbell) -> None:
    assert await doorbell.wait([Q], 0.02) is None


async def test_a_waiting_worker_is_woken_by_a_submit(hands: Hands, doorbell: Doorbell) -> None:
    waiting = asyncio.create_task(doorbell.wait([Q], 5))
    await eventually(lambda: blocked(hands), "somebody waits at the bell")
    await hands.one()
    assert await waiting == Q


async def test_a_returned_token_wakes_another_worker(hands: Hands, doorbell: Doorbell) -> None:
    await doorbell.ring(Q)
    assert await doorbell.wait([Q], 1) == Q


async def test_closing_the_doorbell_ends_the_wait(hands: Hands, doorbell: Doorbell) -> None:
    waiting = asyncio.create_task(doorbell.wait([Q], 5))
    await eventually(lambda: blocked(hands), "somebody waits at the bell")
    await doorbell.close()
    with pytest.raises(RedisUnavailable):
        await waiting


async def test_an_idle_worker_sees_an_external_job_pushed_without_a_token(hands: Hands) -> None:
    assert not await hands.runs.has_work([Q, OTHER])
    hands.stranger("theirs")
    assert await hands.runs.has_work([OTHER, Q])


async def test_an_external_job_pushed_into_a_second_queue_ends_once(hands: Hands) -> None:
    """The job is claimed in the second queue, cancelled through its record, and then finished."""
    job_id = await hands.one(queue=OTHER)
    hands.redis.lpush(Q, job_id)
    claim = await hands.take()
    assert await hands.cancel(job_id) == "cancelled"

    done = [outcome_of(claim.jobs[0], claim.token, "completed")]
    verdicts, _ = await hands.runs.finish(claim, done, last=True)

    assert verdicts == ["stale"]
    assert (await hands.read(job_id)).status == "cancelled"
    assert (await hands.claim(queues=(Q, OTHER))).claim is None
    assert_at_rest(hands.redis, Q, OTHER)


# --- jobs that cannot share a run --------------------------------------------------------------


async def test_a_queue_whose_jobs_share_no_run_gives_one_job_and_rings_for_the_rest(
    hands: Hands, doorbell: Doorbell
) -> None:
    ids = await hands.some(3)
    request = ClaimRequest((OTHER, Q), hands.runs.new_token(), False, 100, unshared=(Q,))
    first = (await hands.runs.claim(request)).claim
    assert first
    assert ids_of(first.jobs) == ids[:1]
    assert await doorbell.wait([Q], 1) == Q
    following = ClaimRequest((OTHER, Q), hands.runs.new_token(), False, 100, unshared=(Q,))
    _, claimed = await hands.finish(first, following=following)
    assert claimed.claim
    assert ids_of(claimed.claim.jobs) == ids[1:2]


async def test_a_queue_whose_jobs_share_runs_is_claimed_in_batches_beside_one_whose_do_not(
    hands: Hands,
) -> None:
    ids = await hands.some(3, queue=OTHER)
    request = ClaimRequest((Q, OTHER), hands.runs.new_token(), False, 100, unshared=(Q,))
    claim = (await hands.runs.claim(request)).claim
    assert claim
    assert ids_of(claim.jobs) == ids


async def test_a_claim_of_all_waiting_jobs_leaves_no_doorbell_token(
    hands: Hands,
) -> None:
    await hands.some(3)
    await hands.some(3)
    await hands.take(max_jobs=5)
    assert hands.redis.llen(keys.wake(Q)) > 0
    await hands.take(max_jobs=5)
    assert hands.redis.llen(keys.wake(Q)) == 0
