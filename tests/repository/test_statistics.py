"""The statistics of queues and workers, and what reading them costs."""

from typing import Any

import msgspec
import pytest

from asyncinfer.jobs import encode_record, record_seq
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.claims import Claim, ClaimedJob, JobOutcome
from asyncinfer.repository.inspect.overview import read_overview
from asyncinfer.repository.inspect.statistics import Statistics
from asyncinfer.repository.store import Store
from asyncinfer.schemas.operations import (
    JobsDone,
    Percentiles,
    Queue,
    QueueWebhooks,
    WaitingJobs,
    percentiles,
)
from tests.queue_driver import RESULT, Q, QueueDriver, new_job

OTHER = f"{Q}:digits"


@pytest.fixture
def observation(store: Store) -> Statistics:
    return Statistics(store)


async def queue_statistics(observation: Statistics, name: str = Q) -> Queue:
    return next(queue for queue in await observation.queues() if queue.queue == name)


# --- depth ---------------------------------------------------------------------------------


async def test_an_empty_system_has_an_empty_queue(observation: Statistics) -> None:
    (queue,) = await observation.queues()
    assert msgspec.to_builtins(queue) == {
        **{"model": None, "queue": Q, "paused": False, "delayed": 0, "running": 0, "dead": 0},
        "starved": 0,
        **{"waiting": {"high": 0, "normal": 0, "low": 0}, "oldest_age_seconds": None},
        "webhooks": msgspec.to_builtins(QueueWebhooks()),
        **{"workers": 0, "slots": 0, "seconds_per_job": None, "backlog_seconds": 0.0},
        **{"window_seconds": 60.0, "submitted_per_second": 0.0, "completed_per_second": 0.0},
        **{"failed_per_second": 0.0, "wait_seconds": None, "run_seconds": None},
    }


async def test_a_queue_shows_how_many_jobs_are_in_each_state(
    hands: QueueDriver, observation: Statistics
) -> None:
    await hands.store.claim_default_model("iris")
    await hands.submit_many(2)
    await hands.claim_jobs(1)
    await hands.submit_many(3, priority="high")
    await hands.submit_many(4, priority="low")
    await hands.submit_many(5, delay_seconds=60)
    await hands.submit_many(6, queue=OTHER)
    await hands.operations.pause(OTHER, paused=True)
    iris, digits = await observation.queues()
    assert (iris.model, iris.queue, iris.paused) == ("iris", Q, False)
    assert iris.waiting == WaitingJobs(high=3, normal=1, low=4)
    assert (iris.delayed, iris.running, iris.dead) == (5, 1, 0)
    assert iris.oldest_age_seconds is not None
    assert (digits.model, digits.paused, digits.waiting.normal) == ("digits", True, 6)


async def test_cancelled_jobs_do_not_wait_in_the_priority_they_had(
    hands: QueueDriver, observation: Statistics
) -> None:
    await hands.submit_many(3)
    gone = await hands.submit_many(50, priority="low")
    few = await hands.submit_many(20, priority="high")
    await hands.cancel_in_one_call(*gone[:40], *few[:15])
    assert len(hands.waiting_ids()) > 18
    assert (await queue_statistics(observation)).waiting == WaitingJobs(high=5, normal=3, low=10)


async def test_dead_letters_are_counted(hands: QueueDriver, observation: Statistics) -> None:
    await hands.submit_many(2)
    await hands.finish(await hands.claim_jobs(2), "dead")
    assert (await queue_statistics(observation)).dead == 2


async def test_a_backlog_is_the_waiting_jobs_times_the_time_of_a_job(
    hands: QueueDriver, observation: Statistics
) -> None:
    await hands.store.claim_default_model("iris")
    await hands.submit_many(10)
    assert (await queue_statistics(observation)).backlog_seconds is None
    about = {"concurrency": 4, "models": ["iris"], "state": "ready"}
    await hands.announcements.announce_worker("w", {**about, "seconds_per_job": {"iris": 0.5}}, 10)
    queue = await queue_statistics(observation)
    assert (queue.workers, queue.slots, queue.backlog_seconds) == (1, 4, 5.0)


async def test_a_damaged_pace_hides_no_queue(hands: QueueDriver, observation: Statistics) -> None:
    await hands.store.claim_default_model("iris")
    hands.redis.set(keys.pace(Q, "iris"), b"soon", ex=60)
    assert (await queue_statistics(observation)).seconds_per_job is None


# --- throughput ----------------------------------------------------------------------------


async def test_rates_count_the_changes_of_the_last_minute(
    hands: QueueDriver, observation: Statistics
) -> None:
    await hands.submit_many(120)
    await hands.finish(await hands.claim_jobs(60))
    await hands.finish(await hands.claim_jobs(30), "failed")
    hands.add_external_job("theirs")
    await hands.claim_jobs(31)
    queue = await queue_statistics(observation)
    assert queue.window_seconds == 60
    assert queue.submitted_per_second * 60 == pytest.approx(121)
    assert queue.completed_per_second * 60 == pytest.approx(60)
    assert queue.failed_per_second * 60 == pytest.approx(30)


def logged(hands: QueueDriver, count: int, newest_ms: int, step_ms: int) -> None:
    """Writes a log as if a job had been submitted every `step_ms` until `newest_ms`."""
    pipe = hands.redis.pipeline(transaction=False)
    for step in range(count - 1, -1, -1):
        packed = msgspec.msgpack.encode(["x"])
        pipe.xadd(keys.log(Q), {"submitted": packed}, id=f"{newest_ms - step * step_ms}-1")
    pipe.execute()


async def test_older_changes_are_not_counted(hands: QueueDriver, observation: Statistics) -> None:
    logged(hands, 50, hands.now_ms() - 61_000, 10)
    logged(hands, 30, hands.now_ms(), 10)
    queue = await queue_statistics(observation)
    assert (queue.window_seconds, queue.submitted_per_second) == (60, 0.5)


async def test_a_busy_queue_is_counted_over_a_shorter_window_which_is_returned(
    hands: QueueDriver, observation: Statistics
) -> None:
    logged(hands, 5000, hands.now_ms(), 10)
    queue = await queue_statistics(observation)
    # 2000 entries of 10 ms are read, and writing them takes a busy machine some seconds.
    assert 19 < queue.window_seconds < 60
    assert queue.submitted_per_second * queue.window_seconds == pytest.approx(2000, rel=0.1)


async def test_a_damaged_log_hides_no_other_queue(
    hands: QueueDriver, observation: Statistics
) -> None:
    hands.redis.xadd(keys.log(Q), {"completed": b"\xdc", "submitted": b"", "failed": b"\xff"})
    hands.redis.xadd(keys.log(Q), {"completed": b"\xdc\x00\x05x"})
    queue = await queue_statistics(observation)
    assert (queue.submitted_per_second, queue.failed_per_second) == (0, 0)


# --- times ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([], None),
        ([2.0], Percentiles(2.0, 2.0, 2.0)),
        ([4.0, 1.0], Percentiles(1.0, 4.0, 4.0)),
        ([float(value) for value in range(100, 0, -1)], Percentiles(50.0, 95.0, 99.0)),
    ],
)
def test_percentiles_are_measured_values(
    seconds: list[float], expected: Percentiles | None
) -> None:
    assert percentiles(seconds) == expected


def timed(job: ClaimedJob, claim: Claim, wait_ms: int, run_ms: int) -> JobOutcome:
    """Submits a job and completes it with a record of these times."""
    assert job.record
    started_ms = job.record.created_ms + int(job.record.options.delay_seconds * 1000) + wait_ms
    record = msgspec.structs.replace(
        job.record, started_ms=started_ms, finished_ms=started_ms + run_ms, claim=claim.token
    )
    return JobOutcome(job.job_id, "completed", RESULT, encode_record(record, record_seq(job.meta)))


async def ended_after(hands: QueueDriver, wait_ms: int, run_ms: int, count: int = 1) -> None:
    await hands.submit_many(count)
    claim = await hands.claim_jobs(count)
    ends = [timed(job, claim, wait_ms, run_ms) for job in claim.jobs]
    await hands.consumer.finish(claim, ends, last=True)


async def test_times_are_those_of_jobs_that_ended(
    hands: QueueDriver, observation: Statistics
) -> None:
    for _ in range(9):
        await ended_after(hands, 200, 30)
    await ended_after(hands, 5000, 4000)
    await hands.cancel(await hands.submit_one())
    queue = await queue_statistics(observation)
    assert queue.wait_seconds == Percentiles(0.2, 5.0, 5.0)
    assert queue.run_seconds == Percentiles(0.03, 4.0, 4.0)


async def test_only_the_last_jobs_count_for_times(
    hands: QueueDriver, observation: Statistics
) -> None:
    await ended_after(hands, 9000, 9000, 100)
    await ended_after(hands, 10, 20, 100)
    await ended_after(hands, 10, 20, 100)
    assert (await queue_statistics(observation)).run_seconds == Percentiles(0.02, 0.02, 0.02)


async def test_a_requested_delay_is_no_wait(hands: QueueDriver, observation: Statistics) -> None:
    await hands.submit_one(delay_seconds=50)
    hands.make_due(keys.delayed(Q))
    await hands.sweep()
    claim = await hands.claim_jobs()
    await hands.consumer.finish(claim, [timed(claim.jobs[0], claim, 100, 5)], last=True)
    assert (await queue_statistics(observation)).wait_seconds == Percentiles(0.1, 0.1, 0.1)


async def test_a_queue_at_rest_still_shows_what_its_last_jobs_took(
    hands: QueueDriver, observation: Statistics
) -> None:
    await ended_after(hands, 10, 20)
    entries = hands.redis.xrange(keys.log(Q))
    hands.redis.delete(keys.log(Q))
    for place, (_, fields) in enumerate(entries):
        hands.redis.xadd(keys.log(Q), fields, id=f"{hands.now_ms() - 100_000}-{place + 1}")
    queue = await queue_statistics(observation)
    assert queue.run_seconds == Percentiles(0.02, 0.02, 0.02)
    assert queue.completed_per_second == 0


# --- workers -------------------------------------------------------------------------------


async def test_workers_are_shown_with_their_identity_and_load(
    hands: QueueDriver, observation: Statistics
) -> None:
    about: dict[str, Any] = {
        **{"host": "h", "pid": 7, "concurrency": 4, "busy": 3, "state": "ready"},
        **{"started_ms": hands.now_ms() - 90_000, "jobs_done": {"completed": 5, "failed": 1}},
        **{"models": ["iris"], "loaded": ["iris/1"], "versions": {"iris": {"1": "a" * 64}}},
    }
    await hands.announcements.announce_worker("w", about, 10)
    (worker,) = await observation.workers()
    assert (worker.worker, worker.host, worker.pid) == ("w", "h", 7)
    assert (worker.slots, worker.busy, worker.state) == (4, 3, "ready")
    assert worker.uptime_seconds == pytest.approx(90, abs=5)
    assert worker.jobs_done == JobsDone(completed=5, failed=1, cancelled=0)
    assert (worker.models, worker.loaded) == (["iris"], ["iris/1"])
    assert worker.heard_seconds < 5
    assert msgspec.json.encode(worker)


async def test_a_worker_of_an_older_release_is_shown_with_what_it_announces(
    hands: QueueDriver, observation: Statistics
) -> None:
    about = {"host": "h", "pid": 7, "concurrency": 2, "state": "ready", "models": ["iris"]}
    await hands.announcements.announce_worker("old", about, 10)
    (worker,) = await observation.workers()
    assert (worker.slots, worker.models) == (2, ["iris"])
    assert (worker.busy, worker.started_at, worker.uptime_seconds, worker.jobs_done) == (
        *(None, None),
        *(None, None),
    )


async def test_a_damaged_announcement_hides_no_other(
    hands: QueueDriver, observation: Statistics
) -> None:
    await hands.announcements.announce_worker("a", {}, 10)
    await hands.announcements.announce_worker("b", {"started_ms": 10**40}, 10)
    await hands.announcements.announce_worker("c", {"started_ms": 9 * 10**18, "pid": 1}, 10)
    hands.redis.set(keys.worker(Q, "a"), b"\xff", px=9000)
    assert [worker.worker for worker in await observation.workers()] == ["a", "b", "c"]
    assert (await observation.workers())[2].started_at is None


async def test_a_worker_that_left_is_not_shown(hands: QueueDriver, observation: Statistics) -> None:
    await hands.announcements.announce_worker("w", {}, 10)
    await hands.announcements.retract_worker("w")
    assert await observation.workers() == []


# --- cost ----------------------------------------------------------------------------------


@pytest.mark.soak
async def test_two_hundred_busy_queues_are_read_in_a_few_short_calls(
    hands: QueueDriver, observation: Statistics
) -> None:
    for number in range(200):
        queue = f"{Q}:m{number}"
        await hands.submit_many(20, queue=queue)
        await hands.finish(await hands.claim_jobs(10, queues=(queue,)))
    hands.redis.config_resetstat()
    assert len(await observation.queues()) == 201
    stats = hands.redis.info("commandstats")["cmdstat_fcall"]
    assert stats["calls"] < 40
    assert stats["usec_per_call"] < 50_000


async def test_a_long_log_costs_no_more_than_a_part_of_it(
    hands: QueueDriver, observation: Statistics
) -> None:
    async def entries_read() -> int:
        hands.redis.config_resetstat()
        await observation.queues()
        return int(hands.redis.info("commandstats")["cmdstat_xrevrange"]["calls"])

    logged(hands, 2500, hands.now_ms(), 1)
    few = await entries_read()
    logged(hands, 10_000, hands.now_ms() + 20_000, 1)
    assert await entries_read() == few


async def test_jobs_of_every_kind_are_encodable(
    hands: QueueDriver, observation: Statistics
) -> None:
    await hands.submit(new_job(tenant="t"), new_job(priority="low"))
    assert msgspec.json.decode(msgspec.json.encode(await observation.queues()))


async def test_an_overview_takes_six_calls_and_one_for_each_40_models(
    store: Store, hands: QueueDriver
) -> None:
    models = [f"model-{number}" for number in range(200)]
    queues = [keys.queue(Q, model, None) for model in models]
    await Announcements(store).announce_models({model: {"1": b"{}"} for model in models})
    await Announcements(store).announce_queues(queues)
    await read_overview(store)
    hands.redis.config_resetstat()
    overview = await read_overview(store)
    assert overview.loads
    assert len(overview.loads.queues) == 201
    assert overview.is_accepting
    assert overview.memory
    assert overview.memory.used_bytes > 0
    stats = hands.redis.info("commandstats")
    # Empty queues, so that of the scripts only that of submits calls one of these.
    commands = ("fcall", "smembers", "mget", "info")
    assert {name: stats[f"cmdstat_{name}"]["calls"] for name in commands} == {
        **{"fcall": 7, "smembers": 2, "mget": 3, "info": 1}
    }
