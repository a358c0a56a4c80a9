"""The outcomes of jobs as they are stored: the outcome's name, its body, the job's record."""

from collections.abc import Iterable
from typing import Final, Literal

import msgspec

from asyncinfer import jobs
from asyncinfer.errors import AsyncinferError, OutOfMemory, ResultTooLarge
from asyncinfer.repository.claims import ClaimedJob, JobOutcome, error_body
from asyncinfer.repository.store import Store
from asyncinfer.worker.held_claim import BatchRun, HeldClaim

_MAX_COUNT: Final = (1 << 63) - 2
"""The bound of a stored count, so that the next one still fits in a record."""


class OutcomeBuilder:
    """Builds the outcomes of a worker's jobs; stores nothing. `held` is the claim that the job is
    of, and `run` the run that the job was in, None if it did not run."""

    def __init__(self, store: Store, worker_id: str, max_result_bytes: int) -> None:
        self._store = store
        self._worker_id = worker_id
        self._max_result_bytes = max_result_bytes

    def completed(self, held: HeldClaim, job: ClaimedJob, body: bytes, run: BatchRun) -> JobOutcome:
        """The outcome of a job with the result `body`; a failed one where that is too large."""
        if len(body) <= self._max_result_bytes:
            return self._final_outcome(held, job, "completed", body, run)
        error = ResultTooLarge(
            f"The result has {len(body)} bytes; {self._max_result_bytes} are kept "
            "for one job. Send fewer rows a job."
        )
        return self.failed(held, job, error, run)

    def failed(
        self, held: HeldClaim, job: ClaimedJob, error: AsyncinferError, run: BatchRun | None = None
    ) -> JobOutcome:
        """The outcome of a job that cannot be done: "failed". For a lack of memory it is "retry",
        with a random delay, or "dead" after too many tries or if the job has no record."""
        body = error_body(error.code, error.detail)
        if not isinstance(error, OutOfMemory):
            return self._final_outcome(held, job, "failed", body, run)
        errors = (job.record.errors if job.record else 0) + 1
        if jobs.retry_or_dead(errors, self._store.policy.max_errors) == "dead" or not job.record:
            return self._final_outcome(held, job, "dead", body, run)
        return self._handed_back(held, job, "retry", error.code, jobs.backoff_ms(errors), errors)

    def cancelled(self, held: HeldClaim, job: ClaimedJob) -> JobOutcome:
        """The outcome of a cancelled job, without a body."""
        return self._final_outcome(held, job, "cancelled", run=held.run_of(job.job_id))

    def expired(self, held: HeldClaim, job: ClaimedJob) -> JobOutcome:
        """The failed outcome of a job whose deadline passed while it ran."""
        body = error_body("expired", "The deadline passed while the job ran.")
        return self._final_outcome(held, job, "failed", body, held.run_of(job.job_id))

    def released(
        self,
        held: HeldClaim,
        unended: Iterable[ClaimedJob],
        reason: Literal["stopping", "not_loaded"],
        delay_ms: int = 0,
    ) -> list[JobOutcome]:
        """Outcomes that put jobs back into their queue, to be claimed again after `delay_ms`."""
        return [self._handed_back(held, job, "released", reason, delay_ms) for job in unended]

    def suspects(self, held: HeldClaim, stopped: Iterable[ClaimedJob]) -> list[JobOutcome]:
        """Outcomes for jobs of a batch that ran too long: each goes back to its queue, to run alone
        the next time."""
        return [self._handed_back(held, job, "suspect", "timeout") for job in stopped]

    def _handed_back(
        self,
        held: HeldClaim,
        job: ClaimedJob,
        outcome: jobs.Outcome,
        reason: str,
        delay_ms: int = 0,
        errors: int | None = None,
    ) -> JobOutcome:
        """An outcome that makes a job wait again. Its record notes this delivery, and how many
        `errors` there have been, None for as many as before. A record that this release cannot
        read stays as it is."""
        record, meta = job.record, job.meta
        if record:
            ended_ms = held.claim.claimed_ms + held.age_ms()
            past = jobs.PastDelivery(
                reason, ended_ms, self._worker_id, held.claim.claimed_ms, delay_ms
            )
            record = msgspec.structs.replace(
                record,
                errors=record.errors if errors is None else errors,
                past_deliveries=(*record.past_deliveries, past)[-jobs.MAX_HANDED_BACK :],
                handed_back=min(record.handed_back, _MAX_COUNT) + 1,
            )
            meta = jobs.encode_record(record, jobs.record_seq(meta))
        return JobOutcome(job.job_id, outcome, meta=meta, delay_ms=delay_ms)

    def _final_outcome(
        self,
        held: HeldClaim,
        job: ClaimedJob,
        outcome: jobs.Outcome,
        body: bytes = b"",
        run: BatchRun | None = None,
    ) -> JobOutcome:
        """An outcome whose record says when, where and on which version the job ran; `body` is the
        JSON of the result or error. A job without a readable record keeps none."""
        meta = b""
        if job.record:
            ran = run.batch.engine.signature if run else None
            record = msgspec.structs.replace(
                job.record,
                started_ms=held.started_ms,
                finished_ms=jobs.now_ms(),
                worker=self._worker_id,
                claim=held.claim.token,
                ran_version=ran.version if ran else None,
                ran_sha256=ran.sha256 if ran else None,
                delivery=run.delivery if run else held.delivery,
            )
            if job.facts.lost_deliveries:
                past = jobs.with_lost_deliveries(record.past_deliveries, job.facts.lost_deliveries)
                record = msgspec.structs.replace(record, past_deliveries=past)
            meta = jobs.encode_record(record, jobs.record_seq(job.meta))
        return JobOutcome(job.job_id, outcome, body, meta)
