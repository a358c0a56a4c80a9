"""The calls of an API: submit, read, watch, cancel and retry jobs."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pytest
import redis

from asyncinfer.errors import RedisUnavailable, StorageFull, WritesRefused
from asyncinfer.repository import keys
from asyncinfer.repository.claims import JobOutcome
from asyncinfer.repository.doorbell import Doorbell
from asyncinfer.repository.maintenance import SweepCounts
from asyncinfer.repository.stored_jobs import StoredJob, parse_inbox_entry
from tests.faults.harness import assert_at_rest
from tests.queue_driver import DATA, ERROR, RESULT, Q, QueueDriver, ids_of, new_job

INBOX = keys.inbox(Q, "api")


@pytest.fixture
async def sender(hands: QueueDriver) -> AsyncIterator[None]:
    """Runs `Submissions.run`, as an API does."""
    task = asyncio.create_task(hands.submissions.run())
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def open_inbox(hands: QueueDriver) -> None:
    hands.redis.xadd(INBOX, {"open": "1"})


def notified(hands: QueueDriver, inbox: str = INBOX) -> dict[str, str]:
    """The ended jobs in an inbox: {id: status}."""
    entries = hands.redis.xrange(inbox)
    notices = {key: value for _, fields in entries for key, value in fields.items()}
    return {key.decode(): notices[key].decode() for key in notices if key != b"open" and key[0] > 1}


# --- submit --------------------------------------------------------------------------------


async def test_a_submitted_job_has_all_its_keys_in_the_patterns_layout(hands: QueueDriver) -> None:
    job = new_job(b"[[5.1]]")
    assert await hands.submit(job) == ["ok"]
    assert hands.redis.get(f"job:{job.job_id}:data") == b"[[5.1]]"
    assert hands.redis.get(f"job:{job.job_id}:status") == b"pending"
    assert hands.redis.lrange("predict_queue", 0, -1) == [job.job_id.encode()]
    stored = await hands.read(job.job_id)
    assert (stored.status, stored.record, stored.result) == ("pending", job.record, None)
    assert hands.ttls(job.job_id) == {"data": -1, "status": -1, "meta": -1}
    assert hands.redis.smembers(keys.queues(Q)) == {Q.encode()}


async def test_jobs_carry_the_sequence_in_which_they_were_queued(hands: QueueDriver) -> None:
    first, second = await hands.submit_many(2)
    third = await hands.submit_one()
    seqs = [
        int.from_bytes((await hands.read(job_id)).meta[:8]) for job_id in (first, second, third)
    ]
    assert seqs == [1, 2, 3]


async def test_a_submit_sent_again_is_the_same_job(hands: QueueDriver) -> None:
    job = new_job()
    assert await hands.submit(job) == ["ok"]
    assert await hands.submit(job) == ["exists"]
    assert hands.waiting_ids() == [job.job_id]


async def test_a_submit_sent_again_after_the_job_ended_changes_nothing(hands: QueueDriver) -> None:
    job = new_job()
    await hands.submit(job)
    await hands.run_all()
    assert await hands.submit(job) == ["exists"]
    assert (await hands.read(job.job_id)).result == RESULT
    assert hands.waiting_ids() == []


async def test_an_id_twice_in_one_call_is_one_job(hands: QueueDriver) -> None:
    job = new_job()
    assert await hands.submit(job, job) == ["ok", "exists"]
    assert hands.waiting_ids() == [job.job_id]
    assert hands.counter(keys.bytes_waiting(Q)) == len(DATA)


async def test_a_full_queue_refuses_exactly_the_job_beyond_its_cap(hands: QueueDriver) -> None:
    hands.change_policy(max_queue=5)
    jobs = [new_job() for _ in range(7)]
    assert await hands.submit(*jobs) == ["ok"] * 5 + ["full"] * 2
    assert await hands.submit(jobs[5]) == ["full"]
    await hands.claim_jobs(1)
    assert await hands.submit(jobs[5], jobs[6]) == ["ok", "full"]


@pytest.mark.soak
async def test_a_full_group_drops_its_oldest_ids_and_refuses_no_job(hands: QueueDriver) -> None:
    members = keys.group(Q, "default", "g")
    for _ in range(10):
        hands.redis.rpush(members, *["0" * 32] * 100_000)
    ids = await hands.submit_many(3, group="g")
    assert hands.redis.llen(members) == 1_000_000
    assert [job_id.decode() for job_id in hands.redis.lrange(members, -3, -1)] == ids


async def test_a_refused_job_leaves_no_key(hands: QueueDriver) -> None:
    hands.change_policy(max_queue=0)
    job = new_job(priority="high", key="k", ttl_seconds=5, inbox=INBOX)
    assert await hands.submit(job) == ["full"]
    assert list(hands.redis.scan_iter(f"*{job.job_id}*")) == []
    assert not hands.redis.exists(keys.facts(Q), keys.idempotency(Q, "k"), keys.wake(Q))


async def test_a_repeat_in_one_call_takes_no_room(hands: QueueDriver) -> None:
    hands.change_policy(max_queue=2)
    first, second = new_job(), new_job()
    assert await hands.submit(first, first, second) == ["ok", "exists", "ok"]


async def test_a_retried_submit_to_a_full_queue_is_still_a_success(hands: QueueDriver) -> None:
    hands.change_policy(max_queue=1)
    job = new_job()
    await hands.submit(job)
    assert await hands.submit(job, new_job()) == ["exists", "full"]


async def test_bytes_are_capped_like_jobs(hands: QueueDriver) -> None:
    hands.change_policy(max_queue_bytes=30)
    assert await hands.submit(*(new_job(b"x" * 10) for _ in range(4))) == ["ok"] * 3 + ["full"]
    await hands.claim_jobs(1)
    assert await hands.submit(new_job(b"x" * 11), new_job(b"x" * 10)) == ["full", "ok"]


async def test_delayed_jobs_count_towards_the_cap(hands: QueueDriver) -> None:
    hands.change_policy(max_queue=2)
    await hands.submit_many(2, delay_seconds=60)
    assert await hands.submit(new_job()) == ["full"]


async def test_external_jobs_count_towards_the_cap(hands: QueueDriver) -> None:
    hands.change_policy(max_queue=2)
    hands.add_external_job("theirs")
    assert await hands.submit(new_job(), new_job()) == ["ok", "full"]


async def test_running_jobs_do_not_count_towards_the_cap(hands: QueueDriver) -> None:
    hands.change_policy(max_queue=2)
    await hands.submit_many(2)
    claim = await hands.claim_jobs()
    assert await hands.submit(new_job(), new_job(), new_job()) == ["ok", "ok", "full"]
    await hands.finish(claim)


async def test_each_queue_has_a_cap_of_its_own(hands: QueueDriver) -> None:
    hands.change_policy(max_queue=1)
    other = f"{Q}:digits"
    assert await hands.submit(new_job()) == ["ok"]
    assert await hands.submit(new_job(queue=other), new_job(queue=other)) == ["ok", "full"]
    assert hands.redis.smembers(keys.queues(Q)) == {Q.encode(), other.encode()}


# --- idempotency ---------------------------------------------------------------------------


async def test_an_idempotency_key_stands_for_the_first_job(hands: QueueDriver) -> None:
    first, second = new_job(key="k", fingerprint="one"), new_job(key="k", fingerprint="one")
    await hands.submit(first)
    again = (await hands.submit_jobs(second))[0]
    assert (again.verdict, again.job_id, again.fingerprint) == ("dup", first.job_id, "one")
    assert hands.waiting_ids() == [first.job_id]


async def test_a_key_used_for_something_else_shows_the_first_fingerprint(
    hands: QueueDriver,
) -> None:
    await hands.submit(new_job(key="k", fingerprint="one"))
    again = (await hands.submit_jobs(new_job(key="k", fingerprint="two")))[0]
    assert (again.verdict, again.fingerprint) == ("dup", "one")


async def test_two_submits_with_one_key_in_one_call_are_one_job(hands: QueueDriver) -> None:
    first, second = new_job(key="k"), new_job(key="k")
    verdicts = await hands.submit_jobs(first, second)
    assert [reply.verdict for reply in verdicts] == ["ok", "dup"]
    assert verdicts[1].job_id == first.job_id
    assert hands.waiting_ids() == [first.job_id]


async def test_a_retried_submit_with_a_key_names_its_own_job(hands: QueueDriver) -> None:
    job = new_job(key="k")
    await hands.submit(job)
    again = (await hands.submit_jobs(job))[0]
    assert (again.verdict, again.job_id) == ("dup", job.job_id)


async def test_a_key_answers_dup_when_the_queue_is_full(hands: QueueDriver) -> None:
    hands.change_policy(max_queue=1)
    await hands.submit(new_job(key="k"))
    assert await hands.submit(new_job(key="k"), new_job()) == ["dup", "full"]


async def test_a_key_whose_job_is_gone_is_free(hands: QueueDriver) -> None:
    first, second = new_job(key="k"), new_job(key="k")
    await hands.submit(first)
    await hands.run_all()
    hands.redis.delete(*(f"job:{first.job_id}:{word}" for word in ("status", "result", "meta")))
    assert await hands.submit(second) == ["ok"]
    assert (await hands.submit_jobs(new_job(key="k")))[0].job_id == second.job_id


async def test_a_key_of_a_job_refused_by_a_full_queue_is_free_in_the_same_call(
    hands: QueueDriver,
) -> None:
    hands.change_policy(max_queue_bytes=5)
    large, small = new_job(b"123456", key="k"), new_job(b"1", key="k")
    assert await hands.submit(large, small) == ["full", "ok"]


async def test_keys_are_kept_as_long_as_jobs_and_a_day_at_least(hands: QueueDriver) -> None:
    await hands.submit(new_job(key="k"))
    hands.change_policy(job_ttl_seconds=200_000)
    await hands.submit(new_job(key="long"))
    assert 86_390 <= hands.redis.ttl(keys.idempotency(Q, "k")) <= 86_400
    assert 199_990 <= hands.redis.ttl(keys.idempotency(Q, "long")) <= 200_000


# --- submits of one tick -------------------------------------------------------------------


async def test_submits_of_one_tick_share_calls_and_each_gets_its_own_answer(
    hands: QueueDriver, sender: None
) -> None:
    hands.change_policy(max_queue=550)
    before = hands.redis.info("commandstats").get("cmdstat_fcall", {"calls": 0})["calls"]
    jobs = [new_job() for _ in range(600)]
    verdicts = await asyncio.gather(*(hands.submissions.submit(job) for job in jobs))
    calls = hands.redis.info("commandstats")["cmdstat_fcall"]["calls"] - before
    assert [reply.job_id for reply in verdicts] == ids_of(jobs)
    assert sum(reply.verdict == "ok" for reply in verdicts) == 550
    assert calls <= 4


async def test_a_burst_of_large_submits_is_split_by_bytes(hands: QueueDriver, sender: None) -> None:
    jobs = [new_job(b"x" * 700_000) for _ in range(4)]
    verdicts = await asyncio.gather(*(hands.submissions.submit(job) for job in jobs))
    assert {reply.verdict for reply in verdicts} == {"ok"}
    assert hands.waiting_ids() == ids_of(jobs)


async def test_submits_to_several_queues_share_a_tick(hands: QueueDriver, sender: None) -> None:
    jobs = [new_job(queue=f"{Q}:{model}") for model in ("a", "b") for _ in range(2)]
    verdicts = await asyncio.gather(*(hands.submissions.submit(job) for job in jobs))
    assert {reply.verdict for reply in verdicts} == {"ok"}
    assert hands.waiting_ids(f"{Q}:a") + hands.waiting_ids(f"{Q}:b") == ids_of(jobs)


async def test_a_submit_that_is_never_sent_says_that_nothing_was_stored(hands: QueueDriver) -> None:
    hands.store.call_seconds = 0.01
    with pytest.raises(RedisUnavailable, match="Nothing was stored") as caught:
        await hands.submissions.submit(new_job())
    assert caught.value.job_id is None


async def test_scripts_forgotten_by_the_server_are_sent_again(hands: QueueDriver) -> None:
    hands.redis.function_flush("SYNC")
    await hands.submit_many(2)
    hands.redis.function_flush("SYNC")
    claim = await hands.claim_jobs()
    hands.redis.function_flush("SYNC")
    assert await hands.finish_for_verdicts(claim) == ["completed", "completed"]
    hands.redis.function_flush("SYNC")
    await hands.sweep()
    assert_at_rest(hands.redis, Q)


# --- a server that refuses -----------------------------------------------------------------


@pytest.fixture
def memory_full(server: redis.Redis) -> Iterator[Any]:
    """A function that leaves the server no memory."""
    yield lambda: server.config_set("maxmemory", "1mb")
    server.config_set("maxmemory", "0")


async def test_with_memory_full_only_submits_are_refused(
    hands: QueueDriver, memory_full: Any
) -> None:
    waiting, running, other = await hands.submit_many(3)
    claim = await hands.claim_jobs(2)
    memory_full()
    with pytest.raises(StorageFull, match="maxmemory"):
        await hands.submit(new_job())
    assert await hands.finish_for_verdicts(claim) == ["completed", "completed"]
    assert await hands.cancel(other) == "cancelled"
    assert await hands.retry(other) == "ok"
    assert await hands.run_all() == [other]
    await hands.maintenance.sweep()
    assert hands.statuses([waiting, running, other]) == {"completed"}


async def test_with_memory_full_maintenance_goes_on(hands: QueueDriver, memory_full: Any) -> None:
    memory_full()
    assert await hands.maintenance.repair(60) is None
    assert await hands.maintenance.sweep() == SweepCounts()
    doorbell = Doorbell(hands.store)
    await doorbell.ring(Q)
    assert await doorbell.wait([Q], 0.02) is None
    await doorbell.close()


async def test_a_submit_refused_for_memory_names_no_job_and_goes_through_later(
    hands: QueueDriver, sender: None, memory_full: Any
) -> None:
    job = new_job()
    memory_full()
    with pytest.raises(StorageFull) as caught:
        await hands.submissions.submit(job)
    assert caught.value.job_id is None
    assert await hands.submissions.read(job.job_id) is None
    hands.redis.config_set("maxmemory", "0")
    assert (await hands.submissions.submit(job)).verdict == "ok"


async def test_a_server_that_cannot_save_refuses_a_submit_and_recovers(
    hands: QueueDriver, sender: None, disk_full: Any
) -> None:
    await disk_full()
    job = new_job()
    with pytest.raises(WritesRefused, match="cannot save to its disk") as caught:
        await hands.submissions.submit(job)
    assert caught.value.job_id is None
    assert await hands.submissions.read(job.job_id) is None
    hands.redis.config_set("save", "")
    assert (await hands.submissions.submit(job)).verdict == "ok"


# --- read ----------------------------------------------------------------------------------


async def test_an_absent_job_reads_as_none(hands: QueueDriver) -> None:
    assert await hands.submissions.read("nobody") is None
    assert await hands.submissions.read_many([]) == []


async def test_jobs_are_read_in_the_requested_order(hands: QueueDriver) -> None:
    first, second = await hands.submit_many(2)
    read = await hands.submissions.read_many([second, "nobody", first])
    assert [job and job.job_id for job in read] == [second, None, first]


async def test_an_external_job_reads_without_a_record(hands: QueueDriver) -> None:
    hands.add_external_job("theirs")
    stored = await hands.read("theirs")
    assert (stored.status, stored.record, stored.meta) == ("pending", None, b"")


@pytest.mark.parametrize(
    "meta", [b"", b"x", b"12345678", b"12345678\x91\xa2\xff\xfe", b"\xff" * 40]
)
async def test_a_job_with_a_damaged_record_cannot_be_read(hands: QueueDriver, meta: bytes) -> None:
    job_id = await hands.submit_one()
    hands.redis.set(keys.meta(job_id), meta)
    stored = await hands.submissions.read(job_id)
    assert stored is None or meta == b""
    await hands.run_all()
    hands.redis.delete(keys.meta(job_id))


# --- cancel --------------------------------------------------------------------------------


async def test_a_waiting_job_is_cancelled_at_once_and_its_input_kept(hands: QueueDriver) -> None:
    first, second, third = await hands.submit_many(3)
    assert await hands.cancel(second) == "cancelled"
    assert hands.waiting_ids() == [first, third]
    assert hands.status(second) == "cancelled"
    assert hands.redis.get(keys.data(second)) == DATA
    assert set(hands.ttls(second).values()) == {600}
    assert hands.counter(keys.bytes_waiting(Q)) == 2 * len(DATA)


@pytest.mark.parametrize("priority", ["high", "low"])
async def test_a_waiting_job_of_any_priority_leaves_its_list(
    hands: QueueDriver, priority: str
) -> None:
    job_id = await hands.submit_one(priority=priority)
    assert await hands.cancel(job_id) == "cancelled"
    assert_at_rest(hands.redis, Q)


async def test_a_delayed_job_is_cancelled_at_once(hands: QueueDriver) -> None:
    job_id = await hands.submit_one(delay_seconds=60, finish_within_seconds=120)
    assert await hands.cancel(job_id) == "cancelled"
    assert_at_rest(hands.redis, Q)


async def test_a_bulk_cancel_of_delayed_jobs_leaves_no_stale_entry(hands: QueueDriver) -> None:
    await hands.submit_one()
    delayed = await hands.submit_many(25, delay_seconds=60)
    assert await hands.cancel_in_one_call(*delayed) == ["cancelled"] * 25
    assert hands.count_stale_entries() == 0


@pytest.mark.soak
async def test_a_cancel_in_a_long_list_does_not_search_it(hands: QueueDriver) -> None:
    """The id stays in the list as a stale entry, which a claim removes: searching a list of a
    million ids blocked Redis for 22 ms."""
    for _ in range(41):
        await hands.submit_many(250)
    last = await hands.submit_one()
    assert await hands.cancel(last) == "cancelled"
    assert hands.status(last) == "cancelled"
    assert (hands.redis.llen(Q), hands.redis.scard(keys.stale_entries(Q))) == (10_251, 1)


async def test_cancelling_a_running_job_notifies_its_worker(hands: QueueDriver) -> None:
    job_id = await hands.submit_one()
    claim = await hands.claim_jobs()
    assert await hands.cancel(job_id) == "stopping"
    assert hands.facts(job_id).cancel_requested == 1
    messages = [fields for _, fields in hands.redis.xrange(keys.control(Q))]
    assert messages == [{b"cancel": job_id.encode()}]
    assert 0 < hands.redis.ttl(keys.control(Q)) <= 3600
    await hands.finish(claim, "cancelled")
    assert hands.status(job_id) == "cancelled"


async def test_cancelling_twice_returns_the_same_and_notifies_the_worker_once(
    hands: QueueDriver,
) -> None:
    job_id = await hands.submit_one()
    claim = await hands.claim_jobs()
    assert [await hands.cancel(job_id), await hands.cancel(job_id)] == ["stopping", "stopping"]
    assert hands.redis.xlen(keys.control(Q)) == 1
    await hands.finish(claim)
    assert await hands.cancel(job_id) == "cancelled"


async def test_a_cancelled_job_that_waited_stays_cancelled(hands: QueueDriver) -> None:
    job_id = await hands.submit_one()
    assert await hands.cancel(job_id) == "cancelled"
    before = await hands.read(job_id)
    assert await hands.cancel(job_id) == "cancelled"
    assert await hands.read(job_id) == before
    assert await hands.run_all() == []


@pytest.mark.parametrize("outcome", ["completed", "failed", "dead"])
async def test_an_ended_job_cannot_be_cancelled(hands: QueueDriver, outcome: str) -> None:
    job_id = await hands.submit_one()
    await hands.finish(await hands.claim_jobs(), outcome)  # type: ignore[arg-type]
    before = await hands.read(job_id)
    assert await hands.cancel(job_id) == "finished"
    assert await hands.read(job_id) == before


async def test_cancelling_an_ended_job_takes_no_doorbell_token(hands: QueueDriver) -> None:
    job_id = await hands.submit_one()
    await hands.run_all()
    for paused in (True, False):
        await hands.operations.pause(Q, paused=paused)
    assert hands.redis.llen(keys.wake(Q)) == 1

    assert await hands.cancel(job_id) == "finished"

    assert hands.redis.llen(keys.wake(Q)) == 1


async def test_cancelling_an_unknown_job_changes_nothing(hands: QueueDriver) -> None:
    before = set(hands.redis.scan_iter())
    assert await hands.cancel_in_one_call("nobody") == ["absent"]
    assert set(hands.redis.scan_iter()) == before


async def test_an_external_waiting_job_can_be_cancelled(hands: QueueDriver) -> None:
    hands.add_external_job("theirs")
    assert await hands.cancel("theirs") == "cancelled"
    assert_at_rest(hands.redis, Q)


async def test_an_external_job_run_by_an_external_consumer_can_be_cancelled(
    hands: QueueDriver,
) -> None:
    hands.add_external_job("theirs", status=b"processing")
    hands.redis.lpop(Q)
    assert await hands.cancel("theirs") == "cancelled"
    assert hands.ttls("theirs") == {"data": 600, "status": 600, "error": 600}


async def test_a_bulk_cancel_leaves_counted_stale_entries_and_the_cap_stays_exact(
    hands: QueueDriver,
) -> None:
    hands.change_policy(max_queue=30)
    jobs = await hands.submit_many(30)
    assert await hands.cancel_in_one_call(*jobs[:25]) == ["cancelled"] * 25
    assert (len(hands.waiting_ids()), hands.count_stale_entries()) == (20, 15)
    verdicts = await hands.submit(*(new_job() for _ in range(27)))
    assert verdicts == ["ok"] * 25 + ["full"] * 2
    assert len(await hands.run_all()) == 30
    assert_at_rest(hands.redis, Q)


async def test_a_claim_removes_stale_entries_and_subtracts_them(hands: QueueDriver) -> None:
    jobs = await hands.submit_many(30)
    await hands.cancel_in_one_call(*jobs[:20])
    claim = await hands.claim_jobs(1)
    assert ids_of(claim.jobs) == [jobs[20]]
    assert hands.count_stale_entries() == 0
    assert hands.waiting_ids() == jobs[21:]


async def test_a_stale_entry_whose_job_is_no_longer_kept_is_subtracted_too(
    hands: QueueDriver,
) -> None:
    jobs = await hands.submit_many(13)
    await hands.cancel_in_one_call(*jobs[:12])
    for ghost in jobs[10:12]:
        hands.redis.delete(*(f"job:{ghost}:{word}" for word in ("data", "status", "meta")))
    await hands.submit_one()
    assert ids_of((await hands.claim_jobs(1)).jobs) == [jobs[12]]
    assert hands.count_stale_entries() == 0


async def test_a_job_twice_in_one_cancel_is_cancelled_once(hands: QueueDriver) -> None:
    job_id = await hands.submit_one()
    assert await hands.cancel_in_one_call(job_id, job_id) == ["cancelled", "cancelled"]
    assert hands.counter(keys.bytes_waiting(Q)) == 0


# --- retry ---------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["failed", "cancelled", "dead"])
async def test_a_retry_opens_a_new_round(hands: QueueDriver, outcome: str) -> None:
    job_id = await hands.submit_one()
    await hands.finish(await hands.claim_jobs(), outcome)  # type: ignore[arg-type]
    assert await hands.retry(job_id) == "ok"
    stored = await hands.read(job_id)
    assert stored.record is not None
    assert (stored.status, stored.record.round, stored.error) == ("pending", 2, None)
    assert hands.ttls(job_id) == {"data": -1, "status": -1, "meta": -1}
    assert not hands.redis.exists(keys.dead(Q))
    assert hands.counter(keys.bytes_waiting(Q)) == len(DATA)
    assert await hands.run_all() == [job_id]
    assert (await hands.read(job_id)).result == RESULT


async def test_a_retry_keeps_the_options_of_the_job(hands: QueueDriver) -> None:
    job_id = await hands.submit_one(priority="high", ttl_seconds=7, finish_within_seconds=60)
    await hands.cancel(job_id)
    assert await hands.retry(job_id) == "ok"
    facts = hands.facts(job_id)
    assert (facts.priority, facts.ttl_seconds) == ("high", 7)
    assert hands.redis.lrange(keys.waiting(Q)[0], 0, -1) == [job_id.encode()]
    assert hands.redis.zscore(keys.deadlines(Q), job_id) == facts.finish_by_ms
    await hands.run_all()
    assert hands.ttls(job_id)["result"] == 7


async def test_a_completed_job_is_not_retried(hands: QueueDriver) -> None:
    job_id = await hands.submit_one()
    await hands.run_all()
    assert await hands.retry(job_id) == "not_retryable"


async def test_a_waiting_or_running_job_is_not_retried(hands: QueueDriver) -> None:
    job_id = await hands.submit_one()
    assert await hands.retry(job_id) == "not_retryable"
    claim = await hands.claim_jobs()
    assert await hands.retry(job_id) == "not_retryable"
    await hands.finish(claim)


async def test_a_retry_of_an_older_round_is_refused(hands: QueueDriver) -> None:
    job_id = await hands.submit_one()
    await hands.cancel(job_id)
    seen = await hands.read(job_id)
    assert await hands.operations.retry(seen, 1) == "ok"
    await hands.cancel(job_id)
    assert await hands.operations.retry(seen, 1) == "changed"
    assert hands.waiting_ids() == []


async def test_a_retry_sent_twice_opens_one_round(hands: QueueDriver) -> None:
    job_id = await hands.submit_one()
    await hands.cancel(job_id)
    seen = await hands.read(job_id)
    verdicts = [await hands.operations.retry(seen, 1) for _ in range(2)]
    assert verdicts == ["ok", "changed"]
    assert hands.waiting_ids() == [job_id]


async def test_a_retry_without_input_is_refused(hands: QueueDriver) -> None:
    job_id = await hands.submit_one()
    await hands.cancel(job_id)
    hands.redis.delete(keys.data(job_id))
    assert await hands.retry(job_id) == "no_input"


async def test_a_retry_into_a_full_queue_is_refused(hands: QueueDriver) -> None:
    job_id = await hands.submit_one()
    await hands.cancel(job_id)
    hands.change_policy(max_queue=1)
    await hands.submit_one()
    assert await hands.retry(job_id) == "full"
    assert hands.status(job_id) == "cancelled"


async def test_an_absent_job_is_not_retried(hands: QueueDriver) -> None:
    job_id = await hands.submit_one()
    await hands.cancel(job_id)
    seen = await hands.read(job_id)
    hands.redis.delete(*(f"job:{job_id}:{word}" for word in ("data", "status", "meta")))
    assert await hands.operations.retry(seen, 1) == "absent"


async def test_an_external_job_can_be_retried(hands: QueueDriver) -> None:
    hands.add_external_job("theirs")
    await hands.finish(await hands.claim_jobs(), "failed")
    assert await hands.retry("theirs") == "ok"
    assert await hands.run_all() == ["theirs"]
    assert_at_rest(hands.redis, Q)


async def test_a_retried_job_with_a_stale_entry_is_in_its_list_once(hands: QueueDriver) -> None:
    jobs = await hands.submit_many(12, priority="low")
    await hands.cancel_in_one_call(*jobs)
    assert hands.count_stale_entries() == 2
    assert await hands.retry(jobs[11]) == "ok"
    assert hands.waiting_ids() == [jobs[10], jobs[11]]
    assert hands.count_stale_entries() == 1
    assert await hands.run_all() == [jobs[11]]
    assert_at_rest(hands.redis, Q)


async def test_a_job_that_expired_while_waiting_and_is_retried_waits_once(
    hands: QueueDriver,
) -> None:
    job_id = await hands.submit_one(start_within_seconds=60)
    hands.make_due(keys.deadlines(Q))
    assert (await hands.sweep()).expired == 1
    assert await hands.retry(job_id) == "ok"
    assert hands.waiting_ids() == [job_id]
    assert hands.count_stale_entries() == 0


async def test_a_finish_of_an_earlier_round_does_not_touch_the_new_round(
    hands: QueueDriver,
) -> None:
    job_id = await hands.submit_one()
    zombie = await hands.claim_jobs()
    hands.expire_leases()
    await hands.sweep()
    await hands.cancel(job_id)
    await hands.retry(job_id)
    assert await hands.finish_for_verdicts(zombie) == ["stale"]
    assert hands.status(job_id) == "pending"


# --- watch and inboxes ---------------------------------------------------------------------


async def test_watch_returns_the_ended_jobs_and_registers_for_the_others(
    hands: QueueDriver,
) -> None:
    ended, waiting = await hands.submit_many(2)
    await hands.finish(await hands.claim_jobs(1), "failed")
    watched = await hands.submissions.watch(Q, INBOX, [ended, "nobody", waiting])
    assert watched[0] == await hands.read(ended)
    assert watched[0] is not None
    assert watched[0].error == ERROR
    assert watched[1] is None
    assert watched[2] is not None
    assert watched[2].status == "pending"
    assert hands.facts(waiting).inboxes == (INBOX,)
    assert hands.facts(ended).inboxes == hands.facts("nobody").inboxes == ()


async def test_an_inbox_is_registered_once(hands: QueueDriver) -> None:
    job_id = await hands.submit_one(inbox=INBOX)
    await hands.submissions.watch(Q, INBOX, [job_id, job_id])
    assert hands.facts(job_id).inboxes == (INBOX,)


async def test_the_watchers_of_a_job_are_capped_and_the_newest_stays(hands: QueueDriver) -> None:
    job_id = await hands.submit_one()
    inboxes = [keys.inbox(Q, str(number)) for number in range(40)]
    for inbox in inboxes:
        await hands.submissions.watch(Q, inbox, [job_id])
    assert hands.facts(job_id).inboxes == tuple(inboxes[-32:])


async def test_watching_keeps_the_other_facts_of_a_job(hands: QueueDriver) -> None:
    job_id = await hands.submit_one(priority="low", ttl_seconds=9)
    await hands.submissions.watch(Q, INBOX, [job_id])
    facts = hands.facts(job_id)
    assert (facts.priority, facts.ttl_seconds, facts.inboxes) == ("low", 9, (INBOX,))


@pytest.mark.parametrize("outcome", ["completed", "failed", "cancelled", "dead"])
async def test_an_inbox_is_notified_of_a_finish(hands: QueueDriver, outcome: str) -> None:
    open_inbox(hands)
    job_id = await hands.submit_one(inbox=INBOX)
    await hands.finish(await hands.claim_jobs(), outcome)  # type: ignore[arg-type]
    assert notified(hands) == {job_id: "failed" if outcome == "dead" else outcome}


def notices(hands: QueueDriver) -> list[tuple[str, StoredJob | None]]:
    entries = hands.redis.xrange(INBOX)
    return [
        notice
        for _, fields in entries
        if b"open" not in fields
        for notice in parse_inbox_entry(fields)
    ]


@pytest.mark.parametrize("outcome", ["completed", "failed"])
async def test_a_notice_of_a_small_job_contains_the_job(hands: QueueDriver, outcome: str) -> None:
    open_inbox(hands)
    job_id = await hands.submit_one(inbox=INBOX)
    await hands.finish(await hands.claim_jobs(), outcome)  # type: ignore[arg-type]
    assert notices(hands) == [(job_id, await hands.read(job_id))]


async def test_a_notice_of_a_large_job_contains_no_result(hands: QueueDriver) -> None:
    open_inbox(hands)
    job_id = await hands.submit_one(inbox=INBOX)
    claim = await hands.claim_jobs()
    large = JobOutcome(job_id, "completed", b'"' + b"x" * 5000 + b'"', claim.jobs[0].meta)
    await hands.consumer.finish(claim, [large], last=True)
    assert notices(hands) == [(job_id, None)]


@pytest.mark.parametrize("junk", [b"", b"x", b"9 ", b"-1 {}", b"5", b"99999 x", b"2 {}\xff\xff"])
def test_a_damaged_notice_gives_no_job(junk: bytes) -> None:
    assert list(parse_inbox_entry({b"a": b"completed", b"\1a": junk})) == [("a", None)]


async def test_the_ends_of_many_jobs_are_a_few_entries_of_an_inbox(hands: QueueDriver) -> None:
    open_inbox(hands)
    job_ids = await hands.submit_many(40, inbox=INBOX)
    await hands.finish(await hands.claim_jobs())
    assert hands.redis.xlen(INBOX) == 1 + 3
    assert notices(hands) == [(job_id, await hands.read(job_id)) for job_id in job_ids]


async def test_an_inbox_is_notified_of_a_cancel(hands: QueueDriver) -> None:
    open_inbox(hands)
    job_id = await hands.submit_one(inbox=INBOX)
    await hands.cancel(job_id)
    assert notified(hands) == {job_id: "cancelled"}


async def test_an_inbox_is_notified_of_a_purge(hands: QueueDriver) -> None:
    open_inbox(hands)
    job_id = await hands.submit_one(inbox=INBOX)
    await hands.operations.cancel_queue(Q)
    assert notified(hands) == {job_id: "cancelled"}


async def test_an_inbox_is_notified_of_a_passed_deadline(hands: QueueDriver) -> None:
    open_inbox(hands)
    swept, claimed = await hands.submit_many(2, inbox=INBOX, start_within_seconds=60)
    hands.make_due(keys.deadlines(Q), swept)
    await hands.sweep()
    packed = msgspec.msgpack.encode({"b": 1, "w": [INBOX]})
    hands.redis.hset(keys.facts(Q), claimed, packed)
    assert (await hands.claim()).claim is None
    assert notified(hands) == {swept: "failed", claimed: "failed"}


async def test_an_inbox_is_notified_of_a_dead_letter(hands: QueueDriver) -> None:
    hands.change_policy(max_deliveries=1)
    open_inbox(hands)
    job_id = await hands.submit_one(inbox=INBOX)
    await hands.claim_jobs()
    hands.expire_leases()
    await hands.sweep()
    assert notified(hands) == {job_id: "failed"}


async def test_an_inbox_is_notified_of_a_lost_input(hands: QueueDriver) -> None:
    open_inbox(hands)
    job_id = await hands.submit_one(inbox=INBOX)
    hands.redis.delete(keys.data(job_id))
    await hands.claim()
    assert notified(hands) == {job_id: "failed"}


async def test_every_inbox_of_a_job_is_notified_and_only_at_its_end(hands: QueueDriver) -> None:
    other = keys.inbox(Q, "other")
    open_inbox(hands)
    hands.redis.xadd(other, {"open": "1"})
    job_id = await hands.submit_one(inbox=INBOX)
    await hands.submissions.watch(Q, other, [job_id])
    await hands.finish(await hands.claim_jobs(), "released")
    assert notified(hands) == notified(hands, other) == {}
    await hands.run_all()
    assert notified(hands) == notified(hands, other) == {job_id: "completed"}


async def test_the_inbox_of_an_ended_api_is_not_recreated(hands: QueueDriver) -> None:
    await hands.submit_one(inbox=INBOX)
    await hands.run_all()
    assert not hands.redis.exists(INBOX)


async def test_a_duplicate_submit_does_not_register_its_inbox(hands: QueueDriver) -> None:
    job = new_job(key="k")
    await hands.submit(job)
    await hands.submit(new_job(key="k", inbox=INBOX))
    assert hands.facts(job.job_id).inboxes == ()
