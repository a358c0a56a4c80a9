"""The lines of a log on jobs that failed."""

import logging
from typing import Any

import msgspec
import pytest

from asyncinfer.monitoring.counts import Counts
from asyncinfer.repository import keys
from asyncinfer.repository.claims import JobOutcome
from asyncinfer.repository.failed_jobs_log import FailedJobsLog
from tests.faults.harness import eventually
from tests.queue_driver import Q, QueueDriver, new_job

WORKER = "host-1-f0fd4a"
SECRET = "it repeats the input: 4815"


@pytest.fixture
def counts() -> Counts:
    return Counts()


@pytest.fixture
def failed_jobs(
    hands: QueueDriver, counts: Counts, caplog: pytest.LogCaptureFixture
) -> FailedJobsLog:
    caplog.set_level(logging.WARNING, "asyncinfer.jobs")
    return FailedJobsLog(hands.store, lambda _: "iris", counts, WORKER)


async def log_swept(hands: QueueDriver, failed_jobs: FailedJobsLog) -> None:
    await failed_jobs.note_failed_by_script((await hands.sweep()).failed)


async def log_claimed(hands: QueueDriver, failed_jobs: FailedJobsLog) -> None:
    await failed_jobs.note_failed_by_script((await hands.claim()).failed)


def outcome(number: int) -> JobOutcome:
    body = msgspec.json.encode({"code": "model_failed", "message": SECRET})
    return JobOutcome(f"job-{number}", "failed", body)


async def submit_named(hands: QueueDriver, job_id: str, **options: Any) -> None:
    """A job whose request had the id `req-1`."""
    job = new_job(job_id=job_id, **options)
    record = msgspec.structs.replace(job.record, request_id="req-1")
    assert await hands.submit(msgspec.structs.replace(job, record=record)) == ["ok"]


async def test_many_jobs_that_fail_at_once_give_ten_lines_and_their_number(
    failed_jobs: FailedJobsLog, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(25):
        failed_jobs.note_outcome(Q, outcome(number))
    assert len(caplog.messages) == 10
    assert caplog.messages[0] == (
        "Job job-0 failed: model_failed (model iris, request -, worker w-f0fd4a)."
    )
    await eventually(lambda: len(caplog.messages) == 11, "the others are counted")
    assert caplog.messages[-1] == "15 more jobs failed within a second."
    assert "4815" not in caplog.text

    failed_jobs.note_outcome(Q, outcome(25))
    assert caplog.messages[-1].startswith("Job job-25 failed")
    failed_jobs.flush()
    assert len(caplog.messages) == 12


async def test_a_job_that_lost_its_last_worker_has_a_line_that_names_that_worker(
    hands: QueueDriver,
    failed_jobs: FailedJobsLog,
    counts: Counts,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await submit_named(hands, "poison")
    for number in range(3):
        assert caplog.messages == []
        await hands.claim_jobs(token=f"host-7-{number}{number}{number}aaa:0123")
        hands.expire_leases()
        await log_swept(hands, failed_jobs)
    assert caplog.messages == [
        "Job poison failed: worker_lost (model iris, request req-1, worker w-222aaa)."
    ]
    assert counts == {("iris", "dead", "worker_lost"): 1}


async def test_a_thousand_jobs_that_expire_at_once_give_ten_lines_and_their_number(
    hands: QueueDriver,
    failed_jobs: FailedJobsLog,
    counts: Counts,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for _ in range(4):
        await hands.submit_many(250, start_within_seconds=60)
    hands.make_due(keys.deadlines(Q))
    await log_swept(hands, failed_jobs)
    assert len(caplog.messages) == 10
    assert all("failed: expired (model iris" in line for line in caplog.messages)
    assert counts == {("iris", "failed", "expired"): 1000}
    failed_jobs.flush()
    assert caplog.messages[10:] == ["990 more jobs failed within a second."]
    hands.redis.flushall()


async def test_jobs_that_cannot_be_claimed_have_a_line_each(
    hands: QueueDriver,
    failed_jobs: FailedJobsLog,
    counts: Counts,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await submit_named(hands, "lost")
    hands.redis.delete(keys.data("lost"))
    await submit_named(hands, "late", start_within_seconds=0.001)
    due = hands.facts("late").start_by_ms
    await eventually(lambda: hands.now_ms() > due, "the deadline has passed")
    await log_claimed(hands, failed_jobs)
    assert caplog.messages == [
        "Job lost failed: input_lost (model iris, request req-1, worker -).",
        "Job late failed: expired (model iris, request req-1, worker -).",
    ]
    assert set(counts) == {("iris", "failed", "input_lost"), ("iris", "failed", "expired")}


async def test_jobs_of_other_programs_are_named_by_their_ids_and_no_id_can_fake_a_line(
    hands: QueueDriver, failed_jobs: FailedJobsLog, caplog: pytest.LogCaptureFixture
) -> None:
    hands.add_external_job(b"order-\xff", data=None)
    hands.add_external_job("faked\n2026 ERROR \x1b[31m")
    hands.add_external_job("x" * 500)
    await log_claimed(hands, failed_jobs)
    assert caplog.messages == [
        "Job order-\\xff failed: input_lost (model iris, request -, worker -).",
        "Job faked\\n2026 ERROR \\x1b[31m failed: invalid_id (model iris, request -, worker -).",
        f"Job {'x' * 128}… failed: invalid_id (model iris, request -, worker -).",
    ]


async def test_a_call_that_fails_no_job_names_none(hands: QueueDriver) -> None:
    cancelled, _ = await hands.submit_many(2)
    reply = await hands.claim()
    assert not reply.failed
    await hands.cancel(cancelled)
    hands.expire_leases()
    swept = await hands.sweep()
    assert (swept.put_back, swept.ended, swept.failed) == (1, 1, [])
    await hands.run_all()
