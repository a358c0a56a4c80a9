"""The spans of a worker's jobs, by the conventions for messaging, in their submits' traces."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import msgspec

from asyncinfer.engine import Stopped
from asyncinfer.errors import AsyncinferError
from asyncinfer.jobs import JobError, TraceContext
from asyncinfer.repository.claims import ClaimedJob, FinishVerdict, JobOutcome
from asyncinfer.telemetry import trace_context
from asyncinfer.worker.held_claim import BatchRun, HeldClaim

if TYPE_CHECKING:
    from asyncinfer.telemetry.tracing import Attributes, Kind, Tracing

_NS_PER_MS: Final = 1_000_000
_MAX_INT: Final = (1 << 63) - 1
"""The largest number in an attribute; one that a damaged record has may be larger."""

_KINDS: Final[dict[str, "Kind"]] = {"queued": "internal", "run": "consumer", "finish": "client"}
_OPERATION_TYPES: Final = {"run": "process", "finish": "settle"}
"""By name of the span; to wait is no operation of the conventions."""


class JobSpans:
    """Makes the spans of one worker: of each job whose trace is recorded one for its wait and one
    for its end, and of each run one. Its methods are called in the event loop."""

    def __init__(self, tracing: "Tracing", worker_id: str) -> None:
        self._tracing = tracing
        self._worker_id = worker_id

    def claimed(self, held: HeldClaim) -> None:
        """Notes which jobs of a claim have a trace, and records how long they waited."""
        for job in held.claim.jobs:
            if (trace := _trace_of(job)) and job.record:
                held.traces[job.job_id] = trace
                # The clock of the API may be ahead of this one, and a record may be damaged.
                start_ms = max(0, min(job.record.created_ms, held.started_ms))
                self._tracing.start(
                    *self._name_and_kind("queued", held),
                    parent=trace,
                    attributes=self._attributes("queued", held, job),
                    start_ns=start_ms * _NS_PER_MS,
                ).end(end_ns=held.started_ms * _NS_PER_MS)

    @contextmanager
    def run(self, held: HeldClaim, run: BatchRun) -> Iterator[None]:
        """Records the run that the block makes. It is in the trace of its jobs if they have one in
        common, else it begins one; it has links to all of theirs."""
        batch = run.batch
        traces = {
            job.job_id: held.traces[job.job_id] for job in batch.jobs if job.job_id in held.traces
        }
        if not traces:
            yield
            return
        links = tuple(dict.fromkeys(traces.values()))
        signature = batch.engine.signature
        count = len(batch.jobs)
        span = self._tracing.start(
            *self._name_and_kind("run", held),
            parent=links[0] if len(links) == 1 else None,
            links=links,
            attributes={
                **self._attributes("run", held, batch.jobs[0] if count == 1 else None),
                **({"messaging.batch.message_count": count} if count > 1 else {}),
                "asyncinfer.batch.jobs": count,
                "asyncinfer.batch.rows": sum(batch.rows),
                "asyncinfer.model.name": signature.model,
                "asyncinfer.model.version": signature.version,
                "asyncinfer.engine.provider": batch.engine.provider,
            },
        )
        if context := span.context:
            held.run_traces.update(dict.fromkeys(traces, context))
        error = ""
        try:
            yield
        except BaseException as failure:
            error = _error_type(failure, run)
            raise
        finally:
            span.end(error=error)

    def finished(
        self,
        held: HeldClaim,
        outcomes: Sequence[JobOutcome],
        verdicts: Sequence[FinishVerdict],
        start_ns: int,
    ) -> None:
        """Records that outcomes were stored between `start_ns` and now, each with a link to the run
        that gave it, if there was one."""
        if not held.traces:
            return
        end_ns = time.time_ns()
        jobs = {job.job_id: job for job in held.claim.jobs}
        for outcome, verdict in zip(outcomes, verdicts, strict=True):
            if trace := held.traces.get(outcome.job_id):
                run = held.run_traces.get(outcome.job_id)
                # `already`: an earlier try has stored it, whose reply was lost.
                ending = outcome.outcome if verdict == "already" else verdict
                self._tracing.start(
                    *self._name_and_kind("finish", held),
                    parent=trace,
                    links=(run,) if run else (),
                    attributes={
                        **self._attributes("finish", held, jobs[outcome.job_id]),
                        "asyncinfer.job.outcome": ending,
                    },
                    start_ns=start_ns,
                ).end(error=_error_code(outcome, ending), end_ns=end_ns)

    def _name_and_kind(self, name: str, held: HeldClaim) -> "tuple[str, Kind]":
        """The name of a span of this claim, which names its queue too, and its kind."""
        return f"{name} {held.claim.queue}", _KINDS[name]

    def _attributes(self, name: str, held: HeldClaim, job: ClaimedJob | None) -> "Attributes":
        """The attributes of messaging; with those of `job` if the span is about one alone."""
        attributes: dict[str, str | int | float | bool] = {
            "messaging.system": "asyncinfer",
            "messaging.operation.name": name,
            "messaging.destination.name": held.claim.queue,
            "messaging.client.id": self._worker_id,
        }
        if name in _OPERATION_TYPES:
            attributes["messaging.operation.type"] = _OPERATION_TYPES[name]
        if job:
            attributes["messaging.message.id"] = job.job_id.encode(errors="replace").decode()
            attributes["asyncinfer.job.delivery"] = min(job.facts.deliveries, _MAX_INT - 1) + 1
        if job and job.record:
            attributes["asyncinfer.job.round"] = min(job.record.round, _MAX_INT)
            attributes["asyncinfer.job.errors"] = min(job.record.errors, _MAX_INT)
        return attributes


def _trace_of(job: ClaimedJob) -> TraceContext | None:
    """The context in a job's record, checked, as other programs may have written it."""
    stored = job.record and job.record.trace
    if not stored:
        return None
    trace = trace_context.read(stored.traceparent, stored.tracestate)
    return trace if trace and trace_context.is_sampled(trace) else None


def _error_type(failure: BaseException, run: BatchRun) -> str:
    """A short word for what ended a run: a job's error code, or why the run was stopped."""
    if isinstance(failure, AsyncinferError):
        return failure.code
    if isinstance(failure, Stopped) and run.stop_reason:
        return run.stop_reason
    return type(failure).__name__


def _error_code(outcome: JobOutcome, ending: str) -> str:
    """The code of a job that failed, else empty. The message stays in Redis: it may quote the
    input."""
    if ending not in ("failed", "dead"):
        return ""
    return msgspec.json.decode(outcome.body, type=JobError).code
