"""The lines of a worker's log on jobs that failed."""

import logging

import msgspec
import pytest

from asyncinfer.repository.claims import JobOutcome
from asyncinfer.worker.running.failed_jobs_log import FailedJobsLog
from tests.faults.harness import eventually


def outcome(number: int) -> JobOutcome:
    body = msgspec.json.encode({"code": "model_failed", "message": "it repeats the input: 4815"})
    return JobOutcome(f"job-{number}", "failed", body)


async def test_many_jobs_that_fail_at_once_give_ten_lines_and_their_number(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "asyncinfer.jobs")
    log = FailedJobsLog("host-1-f0fd4a", lambda queue: queue.partition(":")[2])
    for number in range(25):
        log.note("predict_queue:iris", outcome(number))
    assert len(caplog.messages) == 10
    assert caplog.messages[0] == (
        "Job job-0 failed: model_failed (model iris, request -, worker w-f0fd4a)."
    )
    await eventually(lambda: len(caplog.messages) == 11, "the others are counted")
    assert caplog.messages[-1] == "15 more jobs failed within a second."
    assert "4815" not in caplog.text

    log.note("predict_queue:iris", outcome(25))
    assert caplog.messages[-1].startswith("Job job-25 failed")
    log.flush()
    assert len(caplog.messages) == 12
