"""What ended jobs keep is counted by the minute in which it expires, and bounded for each queue."""

import pytest

from asyncinfer.jobs import Outcome
from asyncinfer.repository import keys
from tests.queue_driver import Q, QueueDriver, new_job

KIB = 1024
LARGE = 8 << 20
ALLOCATED = 1.35 * LARGE
"""What a large value takes of the server's memory, at the most."""

END = len('{"at_ms":1796002885346}')
"""What is kept of the end of a cancelled job."""


def kept(hands: QueueDriver) -> int:
    """The counted bytes that ended jobs keep; their minutes and their sum agree."""
    counts = hands.redis.hgetall(keys.kept(Q))
    assert hands.counter(keys.bytes_kept(Q)) == sum(map(int, counts.values()))
    return hands.counter(keys.bytes_kept(Q))


def is_input_kept(hands: QueueDriver, job_id: str) -> bool:
    return bool(hands.redis.exists(keys.data(job_id)))


async def complete(hands: QueueDriver, result: bytes) -> str:
    job_id = await hands.submit_one()
    await hands.finish(await hands.claim_jobs(), body=result)
    return job_id


async def cancel_new(hands: QueueDriver, data: bytes) -> str:
    job_id = await hands.submit_one(data=data)
    assert await hands.cancel(job_id) == "cancelled"
    return job_id


async def expire_new(hands: QueueDriver, data: bytes) -> str:
    job_id = await hands.submit_one(data=data, start_within_seconds=60)
    hands.make_due(keys.deadlines(Q), job_id)
    await hands.sweep()
    assert hands.error_code(job_id) == "expired"
    return job_id


# --- the bound -------------------------------------------------------------------------------


async def test_who_submits_and_cancels_large_jobs_fills_no_redis_and_stops_no_other(
    hands: QueueDriver,
) -> None:
    hands.change_policy(max_kept_bytes=4 * LARGE + 4 * END)
    before = hands.redis.info("memory")["used_memory"]
    made = [await cancel_new(hands, b"x" * LARGE) for _ in range(12)]
    assert hands.redis.info("memory")["used_memory"] < before + 3 * ALLOCATED
    assert [is_input_kept(hands, job_id) for job_id in made] == [True] * 2 + [False] * 10
    assert kept(hands) == 2 * LARGE + 2 * END


async def test_jobs_that_expire_or_fail_keep_no_more_inputs_than_those_that_are_cancelled(
    hands: QueueDriver,
) -> None:
    hands.change_policy(max_kept_bytes=10 * KIB)
    made = [await expire_new(hands, b"x" * KIB) for _ in range(4)]
    failed = await hands.submit_many(4, data=b"x" * KIB)
    await hands.finish(await hands.claim_jobs(), "failed", body=b"{}")
    inputs = [is_input_kept(hands, job_id) for job_id in [*made, *failed]]
    assert inputs == sorted(inputs, reverse=True)
    assert 2 <= sum(inputs) <= 5


@pytest.mark.parametrize("outcome", ["completed", "failed"])
async def test_large_results_and_errors_stop_new_jobs_and_accepted_ones_run_to_their_end(
    hands: QueueDriver, outcome: Outcome
) -> None:
    hands.change_policy(max_kept_bytes=4 * LARGE)
    await hands.submit_many(6)
    before = hands.redis.info("memory")["used_memory"]
    ended = 0
    while ended < 12 and await hands.submit(new_job()) == ["ok"]:
        await hands.finish(await hands.claim_jobs(1), outcome, body=b"x" * LARGE)
        ended += 1
    assert await hands.submit(new_job(), new_job()) == ["kept_full", "kept_full"]
    assert ended == 4
    assert hands.redis.info("memory")["used_memory"] < before + 5 * ALLOCATED
    assert len(await hands.run_all()) == 6


async def test_a_full_queue_of_ended_jobs_answers_a_repeated_submit_as_before(
    hands: QueueDriver,
) -> None:
    hands.change_policy(max_kept_bytes=KIB)
    job = new_job(key="k")
    assert await hands.submit(job) == ["ok"]
    await complete(hands, b"x" * KIB)
    assert await hands.submit(job, new_job(key="k"), new_job()) == ["dup", "dup", "kept_full"]


async def test_a_job_that_ended_without_its_input_cannot_be_retried(hands: QueueDriver) -> None:
    hands.change_policy(max_kept_bytes=4 * KIB)
    with_input = await cancel_new(hands, b"x" * 2 * KIB)
    without = await cancel_new(hands, b"x" * KIB)
    assert [await hands.retry(with_input), await hands.retry(without)] == ["ok", "no_input"]


async def test_the_input_of_a_completed_job_is_counted_where_it_is_kept(
    hands: QueueDriver,
) -> None:
    hands.change_policy(keep_input=True)
    await hands.submit_one(data=b"x" * 5 * KIB)
    await hands.finish(await hands.claim_jobs(), body=b"r" * 7 * KIB)
    assert kept(hands) == 12 * KIB


async def test_jobs_that_keep_less_than_a_kibibyte_are_neither_counted_nor_deprived_of_their_input(
    hands: QueueDriver,
) -> None:
    hands.change_policy(max_kept_bytes=KIB)
    await complete(hands, b"x" * KIB)
    assert kept(hands) == KIB
    hands.change_policy(max_kept_bytes=2 * KIB)
    small = await cancel_new(hands, b"x" * (KIB - 1 - END))
    await complete(hands, b"x" * (KIB - 1))
    assert kept(hands) == KIB
    assert await hands.retry(small) == "ok"


async def test_what_one_queue_keeps_stops_no_other_queue(hands: QueueDriver) -> None:
    hands.change_policy(max_kept_bytes=KIB)
    await complete(hands, b"x" * KIB)
    assert await hands.submit(new_job()) == ["kept_full"]
    assert await hands.submit(new_job(queue=f"{Q}:digits")) == ["ok"]


# --- giving back -----------------------------------------------------------------------------


async def test_a_deleted_job_makes_room_for_new_ones(hands: QueueDriver) -> None:
    hands.change_policy(max_kept_bytes=KIB)
    job_id = await complete(hands, b"x" * KIB)
    assert await hands.submit(new_job()) == ["kept_full"]
    stored = await hands.read(job_id)
    assert await hands.operations.forget(stored) == "forgotten"
    assert await hands.operations.forget(stored) == "absent"
    assert kept(hands) == 0
    assert await hands.submit(new_job()) == ["ok"]


async def test_a_retried_job_keeps_nothing_until_it_ends_again(hands: QueueDriver) -> None:
    job_id = await hands.submit_one(data=b"x" * 5 * KIB)
    await hands.finish(await hands.claim_jobs(), "failed", body=b"{}")
    assert kept(hands) == 5 * KIB + 2
    assert await hands.retry(job_id) == "ok"
    assert (kept(hands), hands.counter(keys.bytes_waiting(Q))) == (0, 5 * KIB)
    await hands.run_all("cancelled")
    assert kept(hands) == 5 * KIB


async def test_a_job_that_an_older_release_ended_makes_no_count_negative(
    hands: QueueDriver,
) -> None:
    for act in (hands.operations.forget, lambda stored: hands.operations.retry(stored, 1)):
        counted = await cancel_new(hands, b"x" * 2 * KIB)
        uncounted = await cancel_new(hands, b"x" * 100 * KIB)
        hands.redis.hincrby(keys.kept(Q), minute_of(hands, uncounted), -100 * KIB)
        hands.redis.decrby(keys.bytes_kept(Q), 100 * KIB)
        await act(await hands.read(uncounted))
        assert kept(hands) in (0, 2 * KIB)
        await act(await hands.read(counted))
        assert kept(hands) == 0


def minute_of(hands: QueueDriver, job_id: str) -> int:
    """The minute in which the job's keys expire."""
    return int(hands.redis.pexpiretime(keys.status(job_id))) // 60_000


# --- the passing of time ---------------------------------------------------------------------


async def sweep_in_the_next_minute(hands: QueueDriver) -> None:
    """Sweeps as the first sweep of a minute."""
    hands.redis.delete(keys.reap_gate(Q))
    hands.redis.set(keys.swept(Q), hands.now_ms() - 60_000)
    await hands.maintenance.sweep()


def expire(hands: QueueDriver, job_id: str) -> None:
    """Deletes the keys of an ended job, and moves what they keep into a minute that is over."""
    words = ("data", "status", "result", "error", "meta")
    size = sum(hands.redis.strlen(f"job:{job_id}:{word}") for word in ("data", "result", "error"))
    minute = minute_of(hands, job_id)
    if hands.redis.hincrby(keys.kept(Q), minute, -size) == 0:
        hands.redis.hdel(keys.kept(Q), minute)
    hands.redis.hincrby(keys.kept(Q), hands.now_ms() // 60_000 - 1, size)
    hands.redis.delete(*(f"job:{job_id}:{word}" for word in words))


async def test_what_has_expired_makes_room_for_new_jobs(hands: QueueDriver) -> None:
    hands.change_policy(max_kept_bytes=3 * KIB)
    first = await complete(hands, b"x" * 2 * KIB)
    second = await complete(hands, b"x" * KIB)
    expire(hands, first)
    assert await hands.submit(new_job()) == ["kept_full"]
    await sweep_in_the_next_minute(hands)
    assert kept(hands) == KIB
    assert await hands.submit(new_job()) == ["ok"]
    await hands.operations.cancel_queue(Q)
    expire(hands, second)


async def test_nothing_is_left_of_the_counts_once_all_jobs_have_expired(
    hands: QueueDriver,
) -> None:
    for _ in range(3):
        expire(hands, await cancel_new(hands, b"x" * 2 * KIB))
    assert kept(hands) == 6 * KIB + 3 * END
    await sweep_in_the_next_minute(hands)
    assert not hands.redis.exists(keys.kept(Q), keys.bytes_kept(Q))


async def test_what_expired_during_an_outage_makes_room_after_it(hands: QueueDriver) -> None:
    await complete(hands, b"x" * KIB)
    now = hands.now_ms() // 60_000
    hands.redis.hset(keys.kept(Q), mapping={str(now - ago): KIB for ago in range(1, 3001)})
    hands.redis.incrby(keys.bytes_kept(Q), 3000 * KIB)
    assert kept(hands) == 3001 * KIB
    hands.redis.delete(keys.reap_gate(Q), keys.swept(Q))
    await hands.maintenance.sweep()
    assert kept(hands) == KIB


async def test_a_job_is_counted_until_its_own_ttl_ends(hands: QueueDriver) -> None:
    for ttl_seconds in (1, 77, 86_400):
        job_id = await hands.submit_one(data=b"x" * KIB, ttl_seconds=ttl_seconds)
        await hands.cancel(job_id)
        assert int(hands.redis.hget(keys.kept(Q), minute_of(hands, job_id))) >= KIB
        assert hands.ttls(job_id)["data"] in (ttl_seconds, ttl_seconds - 1)


# --- damage ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [keys.kept(Q), keys.bytes_kept(Q)])
async def test_a_damaged_count_stops_no_job_and_no_sweep(hands: QueueDriver, name: str) -> None:
    hands.redis.rpush(name, "damage")
    await complete(hands, b"x")
    job_id = await cancel_new(hands, b"x" * 2 * KIB)
    assert await hands.retry(job_id) == "ok"
    assert len(await hands.run_all()) == 1
    await sweep_in_the_next_minute(hands)
    assert await hands.submit(new_job()) == ["ok"]
    await hands.run_all()


@pytest.mark.parametrize("damage", ["x", "-5", None])
async def test_a_damaged_sum_is_made_anew_within_a_minute(
    hands: QueueDriver, damage: str | None
) -> None:
    await complete(hands, b"x" * KIB)
    hands.redis.delete(keys.bytes_kept(Q))
    if damage:
        hands.redis.set(keys.bytes_kept(Q), damage)
    await sweep_in_the_next_minute(hands)
    assert kept(hands) == KIB


async def test_a_sum_that_is_too_large_ends_with_the_jobs(hands: QueueDriver) -> None:
    job_id = await complete(hands, b"x" * KIB)
    hands.redis.set(keys.bytes_kept(Q), 1 << 50)
    assert await hands.submit(new_job()) == ["kept_full"]
    expire(hands, job_id)
    await sweep_in_the_next_minute(hands)
    assert await hands.submit(new_job()) == ["ok"]
