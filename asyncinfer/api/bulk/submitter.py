"""Submits the jobs of a bulk request in batches."""

from collections.abc import Sequence

import msgspec

from asyncinfer.api.bulk.circuit_breaker import CircuitBreaker
from asyncinfer.api.bulk.response_queue import Due
from asyncinfer.api.bulk.writer import accepted_line, problem_line
from asyncinfer.api.inputs.new_job import explain_submit_error, refused_submit_error
from asyncinfer.api.job_lookup import job_absent_error
from asyncinfer.api.services import Services
from asyncinfer.errors import RedisUnavailable, RequestError, WritesRefused
from asyncinfer.jobs import Status, created_ms
from asyncinfer.repository.submissions import NewJob, SubmitReply, with_job_id

NumberedJob = tuple[int, NewJob | RequestError]
"""A line's number, and its job or why it has none."""


class BatchSubmitter:
    """Submits batches of lines. One object for each request."""

    def __init__(self, services: Services, wait_seconds: int | None) -> None:
        """`wait_seconds` is None if every job is answered with its 202."""
        self._services = services
        self._wait_seconds = wait_seconds
        self.refused_jobs = 0
        """How many jobs were not accepted."""
        self._breaker = CircuitBreaker()

    async def submit(self, batch: Sequence[NumberedJob]) -> list[bytes | Due]:
        """Submits the jobs of a batch. Returns the responses of its lines, in their order: text, or
        the job to wait for."""
        jobs = [job for _, job in batch if isinstance(job, NewJob)]
        outcomes = await self._submit(jobs)
        statuses = await self._statuses_of_existing(outcomes)
        remaining_outcomes = iter(outcomes)
        answers: list[bytes | Due] = []
        for number, job in batch:
            if isinstance(job, RequestError):
                answers.append(self._refused(job, number))
                continue
            submitted = self._submitted_job(job, next(remaining_outcomes), statuses)
            if isinstance(submitted, RequestError):
                self.refused_jobs += 1
                answers.append(self._refused(submitted, number))
            elif self._wait_seconds is None:
                answers.append(self._accepted(job, *submitted))
            else:
                answers.append(Due(number, submitted[0]))
        return answers

    def _refused(self, error: RequestError, number: int) -> bytes:
        """The error of a line, which is counted, as the line of its answer."""
        self._services.request_figures.refused(error.code)
        return problem_line(error, number)

    def _accepted(self, job: NewJob, job_id: str, status: Status) -> bytes:
        """The 202 line of a job, which may have been submitted before under another id than
        `job`'s."""
        record = job.record
        if job_id != job.job_id and (made_ms := created_ms(job_id)) is not None:
            # An earlier job with the same options, whose delay began when that job was created.
            record = msgspec.structs.replace(record, created_ms=made_ms)
        return accepted_line(job_id, status, self._services.wait_reasons.of_record(record, status))

    async def _submit(self, jobs: Sequence[NewJob]) -> Sequence[SubmitReply | RequestError]:
        """For each job, in order, the verdict of its submit or the error, which is not raised.
        Submits nothing for a second after Redis did not answer."""
        if self._breaker.is_open:
            error = RedisUnavailable(
                "Redis did not answer a moment ago, so this line was not sent to it. Send it "
                "again in a moment.",
                retry_after_seconds=1,
            )
            return [error] * len(jobs)
        outcomes = await self._services.submissions.submit_all(jobs)
        if any(
            isinstance(outcome, RedisUnavailable) and not isinstance(outcome, WritesRefused)
            for outcome in outcomes
        ):
            self._breaker.open()
        return outcomes

    async def _statuses_of_existing(
        self, outcomes: Sequence[SubmitReply | RequestError]
    ) -> dict[str, Status | RequestError]:
        """The statuses, by id, of jobs that existed before, or the error if one is gone or Redis
        does not answer. Empty if the client waits for jobs, which reads them anyway."""
        ids = [
            outcome.job_id
            for outcome in outcomes
            if isinstance(outcome, SubmitReply) and outcome.verdict == "dup"
        ]
        if not ids or self._wait_seconds is not None:
            return {}
        try:
            statuses = await self._services.submissions.statuses(ids)
        except RedisUnavailable as error:
            return {job_id: with_job_id(error, job_id) for job_id in ids}
        return {
            job_id: status or with_job_id(job_absent_error(self._services, job_id), job_id)
            for job_id, status in zip(ids, statuses, strict=True)
        }

    def _submitted_job(
        self,
        job: NewJob,
        outcome: SubmitReply | RequestError,
        statuses: dict[str, Status | RequestError],
    ) -> tuple[str, Status] | RequestError:
        """Returns the id and status of the job that a line submitted or repeated, or the line's
        error. `statuses` are those of the jobs that existed before."""
        services = self._services
        if isinstance(outcome, RequestError):
            return explain_submit_error(outcome, job)
        if refusal := refused_submit_error(
            outcome, job, services.config.policy, services.wait_reasons, services.queue_looks
        ):
            return refusal
        status = statuses.get(outcome.job_id, "pending")
        return status if isinstance(status, RequestError) else (outcome.job_id, status)
