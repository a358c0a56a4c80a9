"""The outcomes of jobs as they are stored: the outcome's name, its body, the job's record."""

from collections.abc import Iterable

import msgspec

from asyncinfer import jobs
from asyncinfer.errors import AsyncinferError, OutOfMemory, ResultTooLarge
from asyncinfer.models.signature import Signature
from asyncinfer.repository.claims import ClaimedJob, JobOutcome, error_body
from asyncinfer.repository.store import Store
from asyncinfer.worker.held_claim import HeldClaim


def released_outcomes(waiting: Iterable[ClaimedJob], delay_ms: int = 0) -> list[JobOutcome]:
    """Outcomes that put jobs back into their queue unchanged, to be claimed again after `delay_ms`;
    stores nothing."""
    return [JobOutcome(job.job_id, "released", meta=job.meta, delay_ms=delay_ms) for job in waiting]


def suspect_outcomes(stopped: Iterable[ClaimedJob]) -> list[JobOutcome]:
    """Outcomes for jobs of a batch that ran too long: each goes back to its queue, to run alone the
    next time. Stores nothing."""
    return [JobOutcome(job.job_id, "suspect", meta=job.meta) for job in stopped]


class OutcomeBuilder:
    """Builds the outcomes of a worker's jobs; stores nothing. `held` is the claim that the job is
    of."""

    def __init__(self, store: Store, worker_id: str, max_result_bytes: int) -> None:
        self._store = store
        self._worker_id = worker_id
        self._max_result_bytes = max_result_bytes

    def completed(
        self, held: HeldClaim, job: ClaimedJob, body: bytes, ran: Signature
    ) -> JobOutcome:
        """The outcome of a job with the result `body`; a failed one where that is too large. `ran`
        is the version that it ran on, which the job's record will name."""
        if len(body) <= self._max_result_bytes:
            return self._final_outcome(held, job, "completed", body, ran)
        error = ResultTooLarge(
            f"The result has {len(body)} bytes; {self._max_result_bytes} are kept "
            "for one job. Send fewer rows a job."
        )
        return self.failed(held, job, error)

    def failed(self, held: HeldClaim, job: ClaimedJob, error: AsyncinferError) -> JobOutcome:
        """The outcome of a job that cannot be done: "failed". For a lack of memory it is "retry",
        with a random delay, or "dead" after too many tries or if the job has no record."""
        body = error_body(error.code, error.detail)
        if not isinstance(error, OutOfMemory):
            return self._final_outcome(held, job, "failed", body)
        errors = (job.record.errors if job.record else 0) + 1
        if jobs.retry_or_dead(errors, self._store.policy.max_errors) == "dead" or not job.record:
            return self._final_outcome(held, job, "dead", body)
        record = msgspec.structs.replace(job.record, errors=errors)
        meta = jobs.encode_record(record, jobs.record_seq(job.meta))
        return JobOutcome(job.job_id, "retry", meta=meta, delay_ms=jobs.backoff_ms(errors))

    def cancelled(self, held: HeldClaim, job: ClaimedJob) -> JobOutcome:
        """The outcome of a cancelled job, without a body."""
        return self._final_outcome(held, job, "cancelled")

    def expired(self, held: HeldClaim, job: ClaimedJob) -> JobOutcome:
        """The failed outcome of a job whose deadline passed while it ran."""
        body = error_body("expired", "The deadline passed while the job ran.")
        return self._final_outcome(held, job, "failed", body)

    def _final_outcome(
        self,
        held: HeldClaim,
        job: ClaimedJob,
        outcome: jobs.Outcome,
        body: bytes = b"",
        ran: Signature | None = None,
    ) -> JobOutcome:
        """An outcome whose record says when, where and on which version the job ran; `body` is the
        JSON of the result or error. A job without a readable record keeps none."""
        meta = b""
        if job.record:
            record = msgspec.structs.replace(
                job.record,
                started_ms=held.started_ms,
                finished_ms=jobs.now_ms(),
                worker=self._worker_id,
                claim=held.claim.token,
                ran_version=ran.version if ran else None,
                ran_sha256=ran.sha256 if ran else None,
            )
            meta = jobs.encode_record(record, jobs.record_seq(job.meta))
        return JobOutcome(job.job_id, outcome, body, meta)
