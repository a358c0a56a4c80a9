"""What travels over HTTP: the body of every request and answer, and every query."""

from datetime import datetime
from typing import Annotated, Any, Final, Literal

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from asyncinfer.jobs import (
    JobError,
    Options,
    Priority,
    Status,
)
from asyncinfer.schemas.operations import Backlog, LivingWorkers, OldestAge, SecondsPerJob, Slots
from asyncinfer.tensors.datatypes import TensorSpec
from asyncinfer.untrusted import decoding

# --- asked ---------------------------------------------------------------------------------


# --- answered ------------------------------------------------------------------------------


class WaitingFor(Struct, frozen=True):
    """Why a job is not run now, and what would change that."""

    code: Annotated[
        Literal["no_worker", "paused", "starting", "delayed", "retry", "storage_full", "disk_full"],
        Meta(description="Stable, for machines."),
    ]
    message: Annotated[str, Meta(description="For people: since when, and what to do.")]


_WAITING_FOR: Final = Meta(
    description="Why the job is not run now; null while it only waits for its turn, or runs."
)


class Accepted(Struct, frozen=True):
    """A job that is stored and will run."""

    job_id: str
    status: Status
    url: Annotated[str, Meta(description="Where the job's state and result are.")]
    waiting_for: Annotated[WaitingFor | UnsetType | None, _WAITING_FOR] = None


class Job(Struct, frozen=True, kw_only=True):
    """A job as it stands; what is not known of it is left out."""

    job_id: str
    tenant: Annotated[str, Meta(description="Whose it is; where an operator asks.")] | UnsetType = (
        UNSET
    )
    status: Status
    result: Annotated[
        Raw | UnsetType | None,
        Meta(description="Null until the job is completed; left out in lists."),
    ] = None
    error: Annotated[JobError, Meta(description="Why a failed job failed.")] | UnsetType = UNSET
    model: str | UnsetType = UNSET
    version: str | UnsetType = UNSET
    sha256: Annotated[str, Meta(description="Of the model file that ran.")] | UnsetType = UNSET
    group: str | UnsetType = UNSET
    priority: Annotated[Priority, Meta(description="When not normal.")] | UnsetType = UNSET
    worker: Annotated[str, Meta(description="Who ran it, as w-f0fd4a.")] | UnsetType = UNSET
    round: Annotated[int, Meta(description="Counts a person's retries.")] | UnsetType = UNSET
    created_at: datetime | UnsetType = UNSET
    started_at: datetime | UnsetType = UNSET
    finished_at: datetime | UnsetType = UNSET
    waiting_for: Annotated[WaitingFor | UnsetType | None, _WAITING_FOR] = UNSET
    """Left out once the job has ended."""


class TensorShape(Struct, frozen=True):
    name: str
    datatype: str
    shape: tuple[int, ...]


class Validated(Struct, frozen=True, kw_only=True):
    """A request that would be taken, as it was understood; nothing is stored."""

    valid: Literal[True] = True
    model: str
    version: Annotated[str, Meta(description="The version that would run.")]
    inputs: list[TensorShape]
    outputs: Annotated[list[str], Meta(description="Names of the outputs it would give.")]
    rows: Annotated[
        int | None,
        Meta(description="How many rows the inputs have; null where their number is fixed."),
    ]
    options: Options


class JobList(Struct, frozen=True):
    jobs: list[Job]
    cursor: Annotated[str, Meta(description="Asks for the next page; null on the last.")] | None


class Refused(Struct, frozen=True):
    """A job that was not retried, and why."""

    job_id: str
    code: str
    detail: str


_MORE: Final = Meta(description="Some may be left: call again, as long as a call does something.")


class Retried(Struct, frozen=True):
    """At most 1,000 jobs a call."""

    retried: Annotated[list[str], Meta(description="Their ids; they run again.")]
    refused: list[Refused]
    more: Annotated[bool, _MORE]


class Cleared(Struct, frozen=True):
    """At most 1,000 jobs a call."""

    cancelled: int
    stopping: Annotated[int, Meta(description="Running jobs that were told to stop.")]
    purged: Annotated[int, Meta(description="Ended ones that were deleted with their data.")]
    more: Annotated[bool, _MORE]


class Purged(Struct, frozen=True):
    """How many jobs no longer wait for a model, of all tenants."""

    model: str
    cancelled: int


class GroupCounts(Struct, frozen=True, kw_only=True):
    pending: int
    processing: int
    completed: int
    failed: int
    cancelled: int
    expired: Annotated[int, Meta(description="Ended, and no longer kept.")]


class Group(Struct, frozen=True, kw_only=True):
    """How far the jobs of a group are."""

    group: str
    jobs: Annotated[int, Meta(description="All of them; of more than 1,000,000 the newest.")]
    counts: GroupCounts
    progress: Annotated[float, Meta(ge=0, le=1, description="The part of them that has ended.")]
    eta_seconds: (
        Annotated[
            float,
            Meta(
                description="Until all have ended, at the pace since the first was made; null "
                "while none has ended."
            ),
        ]
        | None
    )
    created_at: Annotated[datetime, Meta(description="When its first job was made.")] | None
    first_failed: Annotated[list[str], Meta(description="Up to 10 ids of failed jobs.")]


class GroupCancelled(Struct, frozen=True):
    group: str
    cancelled: Annotated[int, Meta(description="Jobs that waited, and have ended now.")]
    stopping: Annotated[int, Meta(description="Running jobs that were told to stop.")]


class ModelProblem(Struct, frozen=True, kw_only=True):
    """Why a version is not served, or not as its file is now."""

    model: str
    version: Annotated[
        str | None, Meta(description="null: what is wrong with its model.toml, for all versions.")
    ]
    worker: Annotated[str, Meta(description="Who says so; others may serve it.")]
    reason: str


class Model(Struct, frozen=True, kw_only=True):
    """A model that workers serve: what it takes, what it gives."""

    model: str
    version: Annotated[str, Meta(description="The version that is served.")]
    versions: Annotated[list[str], Meta(description="All announced versions, newest first.")]
    version_sha256: Annotated[dict[str, str], Meta(description="Of each version's model file.")]
    default: Annotated[bool, Meta(description="Whether POST /predict means this model.")]
    url: Annotated[str, Meta(description="Where to POST inputs.")]
    description: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    input_axes: Annotated[
        tuple[int | None, ...],
        Meta(description="Where jobs share runs: per input the axis that counts rows."),
    ]
    output_axes: Annotated[tuple[int | None, ...], Meta(description="The same of the outputs.")]
    symbols: Annotated[
        dict[str, list[str]],
        Meta(description="Open dimensions by name: where they are, equal in one request."),
    ]
    labels: tuple[str, ...]
    batched: Annotated[bool, Meta(description="Whether several jobs may share a run.")]
    batching: Annotated[str, Meta(description="Why they may or may not.")]
    max_rows: Annotated[int, Meta(description="How many rows one job may have.")]
    sha256: Annotated[str, Meta(description="Of the model file.")]
    example: Annotated[Any, Meta(description="A request body that works; null if unknown.")]
    paused: Annotated[bool, Meta(description="While true jobs are taken in, and none is run.")]
    workers: Annotated[int, Meta(description="Living workers that serve it.")]
    problems: Annotated[
        list[ModelProblem], Meta(description="Versions that a worker found and does not serve.")
    ]
    run_times: Annotated[
        dict[str, dict[str, float]],
        Meta(description="By worker, the seconds of a run by its number of rows, as measured."),
    ]


class ModelList(Struct, frozen=True):
    models: list[Model]
    problems: Annotated[
        list[ModelProblem], Meta(description="Of models that no worker serves in any version.")
    ]
    loading: Annotated[
        list[str], Meta(description="Models that a worker has in its folder and has yet to load.")
    ]


class Pause(Struct, frozen=True):
    """Whether a model's jobs are run; they are taken in either way."""

    model: str
    paused: bool


class Scale(Struct, frozen=True, kw_only=True):
    """How much work waits for a model. S slots work off S seconds of backlog a second."""

    model: str
    waiting_jobs: Annotated[int, Meta(description="Due to run; cancelled ones do not count.")]
    running_jobs: int
    paused: Annotated[bool, Meta(description="While true nothing is due.")]
    oldest_age_seconds: OldestAge
    seconds_per_job: SecondsPerJob
    backlog_seconds: Backlog
    workers: LivingWorkers
    slots: Slots
    starved: Annotated[
        int, Meta(ge=0, le=1, description="1: jobs are due and no worker is there for them.")
    ]


class Alive(Struct, frozen=True):
    status: Literal["ok"] = "ok"


class Health(Struct, frozen=True, kw_only=True):
    """Where API keys are in use, one with the scope `read` is shown more than the status."""

    status: Literal["ok"] = "ok"
    redis: Annotated[str, Meta(description="The server's name and version.")] | UnsetType = UNSET
    queues: Annotated[dict[str, int], Meta(description="Waiting jobs by queue.")] | UnsetType = (
        UNSET
    )
    workers: Annotated[int, Meta(description="Workers heard of lately.")] | UnsetType = UNSET
    starved: (
        Annotated[
            list[str], Meta(description="Models with due jobs that no living worker has or loads.")
        ]
        | UnsetType
    ) = UNSET


class About(Struct, frozen=True):
    name: str
    version: str
    links: dict[str, str]


def at(time_ms: int | None) -> datetime | UnsetType:
    """A time in a record as an answer shows it; one that no answer can show is left out."""
    return decoding.time(time_ms) or UNSET
