"""The course of a job, as answers and the client show it."""

from datetime import datetime
from typing import Annotated, TypeAlias

from msgspec import Meta, Struct

Seconds: TypeAlias = Annotated[float, Meta(ge=0)] | None


class TimelineEvent(Struct, frozen=True, kw_only=True, omit_defaults=True, repr_omit_defaults=True):
    """Something that happened to a job. A field that does not apply or is not known is left out;
    the first four are always there."""

    event: Annotated[
        str,
        Meta(
            description="submitted, claimed, running, handed_back, worker_lost, redelivered, "
            "finished, webhook; and now, for a job that has not ended."
        ),
    ]
    at: Annotated[datetime | None, Meta(description="When, in UTC; null where it is not known.")]
    at_ms: Annotated[int | None, Meta(description="The same in milliseconds since 1970.")]
    seconds: Annotated[
        Seconds, Meta(description="Since the last event before it whose time is known.")
    ]
    clock: (
        Annotated[
            str,
            Meta(
                description="By whose clock: redis, api (that took the submit), or worker (jobs "
                "that an earlier release ran)."
            ),
        ]
        | None
    ) = None
    delivery: (
        Annotated[int, Meta(ge=1, description="The number of the delivery in this round.")] | None
    ) = None
    worker: Annotated[str, Meta(description="The worker, as w-f0fd4a.")] | None = None
    jobs: (
        Annotated[
            int,
            Meta(
                description="claimed: jobs that the worker took together; running: jobs of the run."
            ),
        ]
        | None
    ) = None
    rows: Annotated[int, Meta(description="running: rows of these jobs.")] | None = None
    version: str | None = None
    sha256: Annotated[str, Meta(description="The SHA-256 of the model file.")] | None = None
    provider: (
        Annotated[str, Meta(description="ONNX Runtime's execution provider, as CPU or CUDA.")]
        | None
    ) = None
    reason: (
        Annotated[
            str,
            Meta(
                description="handed_back: out_of_memory, timeout (it runs alone next), stopping "
                "(the worker) or not_loaded (its version); the last webhook: delivered, gone or "
                "given_up."
            ),
        ]
        | None
    ) = None
    delay_seconds: (
        Annotated[
            float, Meta(description="handed_back, webhook: time until the next try at least.")
        ]
        | None
    ) = None
    status: Annotated[str, Meta(description="finished, now: the job's status.")] | None = None
    code: Annotated[str, Meta(description="finished: the code of a failed job's error.")] | None = (
        None
    )
    http_status: Annotated[int, Meta(description="webhook: the status of the answer.")] | None = (
        None
    )
    error: Annotated[str, Meta(description="webhook: why no answer came.")] | None = None
    duration_seconds: (
        Annotated[float, Meta(description="webhook: how long the attempt took.")] | None
    ) = None


class Timeline(Struct, frozen=True, kw_only=True):
    """What has happened to a job in its present round, in order."""

    job_id: str
    status: str
    round: Annotated[int, Meta(description="Each retry begins another; it has its own timeline.")]
    seconds: Annotated[
        Seconds, Meta(description="From the submit to the end, or to now; null if not known.")
    ]
    omitted: Annotated[
        int, Meta(description="How many early deliveries are not listed: only 16 are kept.")
    ]
    events: list[TimelineEvent]
