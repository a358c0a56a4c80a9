"""An Idempotency-Key is kept as long as it can matter: a day at first, then as long as its job."""

from typing import Any

import msgspec
import pytest

from asyncinfer.jobs import Options, Outcome, Record, decode_record, encode_record
from asyncinfer.repository import keys
from asyncinfer.repository.submissions import SubmitReply
from tests.faults.harness import eventually
from tests.queue_driver import Q, QueueDriver, new_job

KEY = keys.idempotency(Q, "k")
A_DAY = 24 * 3600


@pytest.fixture(autouse=True)
def short_ttls(hands: QueueDriver) -> None:
    hands.change_policy(job_ttl_seconds=300, failed_ttl_seconds=700)


async def submit_again(hands: QueueDriver, **options: Any) -> SubmitReply:
    """The reply to a new submit with the same key."""
    return (await hands.submit_jobs(new_job(key="k", **options)))[0]


def assert_kept_for_a_day(hands: QueueDriver) -> None:
    assert A_DAY - 10 <= hands.redis.ttl(KEY) <= A_DAY


def assert_kept_as_long_as(hands: QueueDriver, job_id: str, seconds: int) -> None:
    """The key and all that is kept of the job expire in the same millisecond."""
    assert seconds - 10 <= hands.redis.ttl(KEY) <= seconds
    expires_ms = hands.redis.pexpiretime(KEY)
    assert expires_ms == hands.redis.pexpiretime(keys.status(job_id))
    assert expires_ms == hands.redis.pexpiretime(keys.meta(job_id))


async def take_over(hands: QueueDriver) -> str:
    """Lets the key expire before its job, and a later job take it over; returns that job's id."""
    hands.redis.delete(KEY)
    later = new_job(key="k", delay_seconds=3600)
    assert await hands.submit(later) == ["ok"]
    return later.job_id


def assert_taken_over_by(hands: QueueDriver, job_id: str) -> None:
    assert hands.redis.get(KEY).split()[0].decode() == job_id
    assert_kept_for_a_day(hands)


# --- how long --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "seconds"), [("completed", 300), ("cancelled", 300), ("failed", 700), ("dead", 700)]
)
async def test_a_key_is_kept_as_long_as_its_ended_job(
    hands: QueueDriver, outcome: Outcome, seconds: int
) -> None:
    job_id = await hands.submit_one(key="k")
    await hands.finish(await hands.claim_jobs(), outcome)
    assert_kept_as_long_as(hands, job_id, seconds)


@pytest.mark.parametrize("seconds", [20, 2 * A_DAY])
async def test_a_key_is_kept_for_the_ttl_that_its_job_was_given(
    hands: QueueDriver, seconds: int
) -> None:
    job_id = await hands.submit_one(key="k", ttl_seconds=seconds)
    await hands.run_all()
    assert_kept_as_long_as(hands, job_id, seconds)


async def test_a_key_is_kept_for_a_day_while_its_job_waits_runs_and_is_handed_back(
    hands: QueueDriver,
) -> None:
    await hands.submit_one(key="k")
    assert_kept_for_a_day(hands)
    for outcome in ("released", "suspect", "retry"):
        claim = await hands.claim_jobs()
        assert_kept_for_a_day(hands)
        await hands.finish(claim, outcome)
        assert_kept_for_a_day(hands)


async def test_the_keys_of_many_jobs_that_end_together_are_kept_each_as_its_job(
    hands: QueueDriver,
) -> None:
    made = [new_job(key=f"k{i}" if i % 3 else "", ttl_seconds=100 + i) for i in range(60)]
    await hands.submit(*made)
    await hands.run_all()
    for i, job in enumerate(made):
        name = keys.idempotency(Q, f"k{i}")
        expected = hands.redis.pexpiretime(keys.status(job.job_id)) if i % 3 else -2
        assert hands.redis.pexpiretime(name) == expected


async def test_the_key_of_a_waiting_job_that_is_cancelled_is_kept_as_long_as_the_job(
    hands: QueueDriver,
) -> None:
    job_id = await hands.submit_one(key="k")
    assert await hands.cancel(job_id) == "cancelled"
    assert_kept_as_long_as(hands, job_id, 300)


@pytest.mark.parametrize("outcome", ["completed", "released", "retry"])
async def test_the_key_of_a_running_job_that_is_cancelled_is_kept_as_long_as_the_job(
    hands: QueueDriver, outcome: Outcome
) -> None:
    job_id = await hands.submit_one(key="k")
    claim = await hands.claim_jobs()
    assert await hands.cancel(job_id) == "stopping"
    assert await hands.finish_for_verdicts(claim, outcome) == ["cancelled"]
    assert_kept_as_long_as(hands, job_id, 300)


@pytest.mark.parametrize("deadline", ["start_within_seconds", "finish_within_seconds"])
@pytest.mark.parametrize("found_by", ["a sweep", "a claim"])
async def test_the_key_of_a_job_whose_deadline_passes_is_kept_as_long_as_the_job(
    hands: QueueDriver, deadline: str, found_by: str
) -> None:
    job_id = await hands.submit_one(key="k", **{deadline: 0.001})
    await eventually(lambda: hands.now_ms() > _due_ms(hands, job_id), "it is due")
    if found_by == "a sweep":
        await hands.sweep()
    else:
        assert (await hands.claim()).claim is None
    assert hands.error_code(job_id) == "expired"
    assert_kept_as_long_as(hands, job_id, 700)


def _due_ms(hands: QueueDriver, job_id: str) -> int:
    return int(hands.redis.zscore(keys.deadlines(Q), job_id) or 0)


async def test_the_key_of_a_running_job_that_does_not_stop_at_its_deadline_is_kept_as_the_job(
    hands: QueueDriver,
) -> None:
    job_id = await hands.submit_one(key="k", start_within_seconds=60, finish_within_seconds=60)
    await hands.claim_jobs()
    for _ in range(2):
        hands.make_due(keys.deadlines(Q), job_id)
        await hands.sweep()
    assert hands.error_code(job_id) == "expired"
    assert_kept_as_long_as(hands, job_id, 700)


@pytest.mark.parametrize("options", [{}, {"start_within_seconds": 60}])
@pytest.mark.parametrize("end", ["purged", "worker_lost", "input_lost"])
async def test_a_key_whose_job_ends_where_no_record_is_read_is_kept_for_a_day_but_with_a_deadline(
    hands: QueueDriver, end: str, options: dict[str, Any]
) -> None:
    """The page on the protocol names these ends."""
    job_id = await hands.submit_one(key="k", **options)
    if end == "purged":
        assert await hands.operations.cancel_queue(Q) == 1
    elif end == "worker_lost":
        hands.change_policy(max_deliveries=1)
        await hands.claim_jobs()
        hands.expire_leases()
        await hands.sweep()
    else:
        hands.redis.delete(keys.data(job_id))
        await hands.claim()
    assert hands.status(job_id) == ("cancelled" if end == "purged" else "failed")
    if options:
        assert_kept_as_long_as(hands, job_id, 300 if end == "purged" else 700)
    else:
        assert_kept_for_a_day(hands)


# --- what a submit with the key gets ---------------------------------------------------------


async def test_a_key_names_its_job_as_long_as_that_is_kept_and_then_a_new_one(
    hands: QueueDriver,
) -> None:
    job_id = await hands.submit_one(key="k", ttl_seconds=1)
    await hands.run_all()
    again = await submit_again(hands)
    assert (again.verdict, again.job_id) == ("dup", job_id)
    await eventually(lambda: not hands.redis.exists(KEY), "the key is gone")
    assert hands.status(job_id) is None
    assert (await submit_again(hands)).verdict == "ok"


async def test_keys_take_no_memory_once_their_jobs_are_gone(hands: QueueDriver) -> None:
    for i in range(50):
        await hands.submit_one(key=f"k{i}", ttl_seconds=1)
    await hands.run_all()
    name = keys.idempotency(Q, "*")
    await eventually(lambda: not hands.redis.keys(name), "the keys are gone")


# --- forget and retry ------------------------------------------------------------------------


async def test_who_deletes_a_job_deletes_its_key(hands: QueueDriver) -> None:
    job_id = await hands.submit_one(key="k")
    await hands.run_all()
    assert await hands.operations.forget(await hands.read(job_id)) == "forgotten"
    assert not hands.redis.exists(KEY)
    assert (await submit_again(hands)).verdict == "ok"


async def test_a_job_that_has_not_ended_keeps_its_key_when_it_is_not_deleted(
    hands: QueueDriver,
) -> None:
    job_id = await hands.submit_one(key="k")
    assert await hands.operations.forget(await hands.read(job_id)) == "unfinished"
    assert_kept_for_a_day(hands)


@pytest.mark.parametrize("options", [{}, {"priority": "low", "finish_within_seconds": 60}])
async def test_the_key_of_a_retried_job_is_kept_for_a_day_again_and_then_as_its_job(
    hands: QueueDriver, options: dict[str, Any]
) -> None:
    job_id = await hands.submit_one(key="k", **options)
    await hands.run_all("failed")
    assert await hands.retry(job_id) == "ok"
    assert_kept_for_a_day(hands)
    assert (await submit_again(hands)).job_id == job_id
    await hands.run_all()
    assert_kept_as_long_as(hands, job_id, 300)


async def test_a_job_whose_key_is_gone_is_retried_without_it(hands: QueueDriver) -> None:
    job_id = await hands.submit_one(key="k")
    await hands.run_all("failed")
    hands.redis.delete(KEY)
    assert await hands.retry(job_id) == "ok"
    await hands.run_all()
    assert not hands.redis.exists(KEY)


# --- a key that a later job has --------------------------------------------------------------


async def test_the_end_of_a_job_leaves_a_key_alone_that_a_later_job_has(
    hands: QueueDriver,
) -> None:
    first = await hands.submit_one(key="k")
    later = await take_over(hands)
    await hands.finish(await hands.claim_jobs())
    assert hands.status(first) == "completed"
    assert_taken_over_by(hands, later)


async def test_cancel_retry_and_forget_leave_a_key_alone_that_a_later_job_has(
    hands: QueueDriver,
) -> None:
    first = await hands.submit_one(key="k")
    later = await take_over(hands)
    hands.redis.expire(KEY, A_DAY - 5)
    assert await hands.cancel(first) == "cancelled"
    assert await hands.retry(first) == "ok"
    assert hands.redis.ttl(KEY) <= A_DAY - 5
    assert await hands.cancel(first) == "cancelled"
    assert await hands.operations.forget(await hands.read(first)) == "forgotten"
    assert_taken_over_by(hands, later)


async def test_a_job_whose_id_begins_as_that_of_the_keys_job_does_not_own_the_key(
    hands: QueueDriver,
) -> None:
    first = await hands.submit_one(key="k", job_id="job-1")
    hands.redis.set(KEY, "job-10 f", ex=A_DAY)
    await hands.run_all()
    assert hands.status(first) == "completed"
    assert_taken_over_by(hands, "job-10")


# --- other releases and damage ---------------------------------------------------------------


async def test_a_job_of_a_release_that_did_not_record_keys_ends_and_leaves_its_key(
    hands: QueueDriver,
) -> None:
    job_id = await hands.submit_one(key="k")
    meta = hands.redis.get(keys.meta(job_id))
    fields = msgspec.msgpack.decode(meta[8:])
    older = fields[: Record.__struct_fields__.index("idempotency_digest")]
    hands.redis.set(keys.meta(job_id), meta[:8] + msgspec.msgpack.encode(older))
    assert (await hands.read(job_id)).record is not None
    await hands.run_all()
    assert hands.status(job_id) == "completed"
    assert_kept_for_a_day(hands)


@pytest.mark.parametrize("outcome", ["completed", "failed"])
async def test_a_key_of_another_type_stops_no_end_no_retry_and_no_deletion(
    hands: QueueDriver, outcome: Outcome
) -> None:
    job_id = await hands.submit_one(key="k")
    hands.redis.delete(KEY)
    hands.redis.lpush(KEY, "x")
    await hands.run_all(outcome)
    assert hands.status(job_id) == outcome
    if outcome == "failed":
        assert await hands.retry(job_id) == "ok"
        await hands.run_all()
    assert await hands.operations.forget(await hands.read(job_id)) == "forgotten"
    hands.redis.delete(KEY)


async def test_a_damaged_key_stays_as_it_is(hands: QueueDriver) -> None:
    job_id = await hands.submit_one(key="k")
    hands.redis.set(KEY, b"\xff", ex=A_DAY)
    await hands.run_all()
    assert await hands.operations.forget(await hands.read(job_id)) == "forgotten"
    assert hands.redis.get(KEY) == b"\xff"
    assert_kept_for_a_day(hands)


async def test_a_job_without_a_key_costs_no_more_commands_than_before_there_were_keys(
    hands: QueueDriver,
) -> None:
    await hands.submit_many(3)
    claim = await hands.claim_jobs()
    hands.redis.config_resetstat()
    await hands.finish(claim)
    used = hands.redis.info("commandstats")
    assert "cmdstat_expire" not in used
    assert used["cmdstat_mget"]["calls"] == 1


async def test_the_record_of_a_job_with_a_key_has_its_digest_and_survives_a_new_round(
    hands: QueueDriver,
) -> None:
    job = new_job(key="k")
    assert job.record.options == Options()
    await hands.submit(job)
    await hands.run_all("failed")
    assert await hands.retry(job.job_id) == "ok"
    stored = await hands.read(job.job_id)
    assert stored.record is not None
    assert stored.record.idempotency_digest == "k"
    assert decode_record(bytes(8) + encode_record(stored.record)) == stored.record
