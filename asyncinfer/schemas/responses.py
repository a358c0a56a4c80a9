"""Bodies of answers."""

from datetime import datetime
from typing import Annotated, Any, Final, Literal

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from asyncinfer.jobs import JobError, Options, Priority, Status
from asyncinfer.schemas.operations import Backlog, LivingWorkers, OldestAge, SecondsPerJob, Slots
from asyncinfer.tensors.datatypes import TensorSpec
from asyncinfer.untrusted import decoding


class WaitingFor(Struct, frozen=True):
    """Why a job does not run now, and what to do about it."""

    code: Annotated[
        Literal[
            "no_worker",
            "paused",
            "starting",
            "delayed",
            "retry",
            "worker_lost",
            "no_free_slot",
            "queue",
            "storage_full",
            "disk_full",
            "redis_read_only",
            "too_few_replicas",
        ],
        Meta(description="Stable, for machines."),
    ]
    message: Annotated[str, Meta(description="For people: since when, and what to do.")]


_WAITING_FOR: Final = Meta(
    description="Why the job does not run now; null if it only waits for its turn, or runs. Only "
    "GET /job/{id} without `wait` has the codes `worker_lost`, `no_free_slot` and `queue`."
)


class Position(Struct, frozen=True):
    """Where a waiting job is in its queue."""

    ahead: Annotated[int, Meta(ge=0, description="How many jobs are served before it.")]
    about: Annotated[
        bool, Meta(description="True: an estimate, since 1,000 jobs or more are ahead.")
    ]


class AcceptedJob(Struct, frozen=True):
    """A job that was stored and will run."""

    job_id: str
    status: Status
    url: Annotated[str, Meta(description="The address of the job's state and result.")]
    waiting_for: Annotated[WaitingFor | UnsetType | None, _WAITING_FOR] = None


class Job(Struct, frozen=True, kw_only=True):
    """The state of a job; a field that is unknown is left out."""

    job_id: str
    tenant: (
        Annotated[str, Meta(description="The tenant that owns it; shown if an operator asks.")]
        | UnsetType
    ) = UNSET
    status: Status
    result: Annotated[
        Raw | UnsetType | None,
        Meta(description="Null until the job is completed; left out in lists."),
    ] = None
    error: Annotated[JobError, Meta(description="Why a failed job failed.")] | UnsetType = UNSET
    model: str | UnsetType = UNSET
    version: str | UnsetType = UNSET
    sha256: (
        Annotated[str, Meta(description="The SHA-256 of the model file that ran.")] | UnsetType
    ) = UNSET
    group: str | UnsetType = UNSET
    priority: Annotated[Priority, Meta(description="Left out if it is normal.")] | UnsetType = UNSET
    worker: Annotated[str, Meta(description="The worker that ran it, as w-f0fd4a.")] | UnsetType = (
        UNSET
    )
    round: (
        Annotated[int, Meta(description="How often the job was retried by request.")] | UnsetType
    ) = UNSET
    request_id: (
        Annotated[str, Meta(description="The X-Request-ID of the request that submitted it.")]
        | UnsetType
    ) = UNSET
    created_at: datetime | UnsetType = UNSET
    started_at: datetime | UnsetType = UNSET
    finished_at: datetime | UnsetType = UNSET
    waiting_for: Annotated[WaitingFor | UnsetType | None, _WAITING_FOR] = UNSET
    """Left out once the job has ended."""
    position: (
        Annotated[
            Position | None,
            Meta(
                description="Shown by GET /job/{id} without `wait` of a waiting job; null if it is "
                "in no list, as a delayed one."
            ),
        ]
        | UnsetType
    ) = UNSET
    eta_seconds: (
        Annotated[
            float | None,
            Meta(
                description="Shown with `position`: an estimate of the seconds until the job has "
                "ended; null if nothing is known."
            ),
        ]
        | UnsetType
    ) = UNSET


class TensorShape(Struct, frozen=True):
    name: str
    datatype: str
    shape: tuple[int, ...]


class ValidationResult(Struct, frozen=True, kw_only=True):
    """A request that would be accepted, as the server reads it. Nothing was stored."""

    valid: Annotated[bool, Meta(extra_json_schema={"const": True})] = True
    model: str
    version: Annotated[str, Meta(description="The version that would run.")]
    inputs: list[TensorShape]
    outputs: Annotated[list[str], Meta(description="Names of the outputs in the result.")]
    rows: Annotated[
        int | None,
        Meta(description="How many rows the inputs have; null if the model fixes their number."),
    ]
    options: Options


class JobList(Struct, frozen=True):
    jobs: list[Job]
    cursor: (
        Annotated[
            str, Meta(description="The parameter `cursor` of the next page; null on the last page.")
        ]
        | None
    )


class RetryRefusal(Struct, frozen=True):
    """A job that was not retried, and why."""

    job_id: str
    code: str
    detail: str


_MORE: Final = Meta(description="Jobs may be left: call again, until a call changes nothing.")


class RetryResult(Struct, frozen=True):
    """What one call retried: at most 1,000 jobs."""

    retried: Annotated[list[str], Meta(description="Ids of the jobs that run again.")]
    refused: list[RetryRefusal]
    more: Annotated[bool, _MORE]


class ClearResult(Struct, frozen=True):
    """How many jobs one call cancelled or deleted: at most 1,000."""

    cancelled: int
    stopping: Annotated[int, Meta(description="Running jobs that were told to stop.")]
    purged: Annotated[int, Meta(description="Ended jobs that were deleted with their data.")]
    more: Annotated[bool, _MORE]


class QueueCancelResult(Struct, frozen=True):
    """How many waiting jobs of a model were cancelled, of all tenants."""

    model: str
    cancelled: int


class GroupCounts(Struct, frozen=True, kw_only=True):
    pending: int
    processing: int
    completed: int
    failed: int
    cancelled: int
    expired: Annotated[int, Meta(description="Jobs that ended and are no longer kept.")]


class Group(Struct, frozen=True, kw_only=True):
    """The progress of a group of jobs."""

    group: str
    jobs: Annotated[
        int, Meta(description="How many jobs it has; only the newest 1,000,000 are counted.")
    ]
    counts: GroupCounts
    progress: Annotated[float, Meta(ge=0, le=1, description="The part of its jobs that has ended.")]
    eta_seconds: (
        Annotated[
            float,
            Meta(
                description="Estimate until all have ended: that of the last job that waits, else "
                "at the rate since the first was created; null while none has ended, or none runs."
            ),
        ]
        | None
    )
    created_at: Annotated[datetime, Meta(description="When its first job was created.")] | None
    first_failed: Annotated[list[str], Meta(description="Up to 10 ids of failed jobs.")]
    closed: Annotated[bool, Meta(description="It takes no more jobs.")] = False
    ended_at: (
        Annotated[
            datetime,
            Meta(
                description="When all its jobs had ended; null before, and of a group that was "
                "closed without a webhook."
            ),
        ]
        | None
    ) = None


class GroupCloseResult(Struct, frozen=True):
    group: str
    closed: Annotated[bool, Meta(description="Always true.")] = True


class GroupCancelResult(Struct, frozen=True):
    group: str
    cancelled: Annotated[int, Meta(description="Waiting jobs that were cancelled.")]
    stopping: Annotated[int, Meta(description="Running jobs that were told to stop.")]


class ModelProblem(Struct, frozen=True, kw_only=True):
    """Why a version is not served, or why an older file of it is served."""

    model: str
    version: Annotated[
        str | None, Meta(description="null: the problem is in its model.toml, for all versions.")
    ]
    worker: Annotated[
        str, Meta(description="The worker that reports it; other workers may serve the version.")
    ]
    reason: str


class Model(Struct, frozen=True, kw_only=True):
    """A model that workers serve: its versions, inputs and outputs."""

    model: str
    version: Annotated[str, Meta(description="The version that is served.")]
    versions: Annotated[list[str], Meta(description="All announced versions, newest first.")]
    version_sha256: Annotated[
        dict[str, str], Meta(description="By version, the SHA-256 of the model file.")
    ]
    default: Annotated[
        bool, Meta(description="Whether POST /predict without a name uses this model.")
    ]
    url: Annotated[str, Meta(description="The address to POST inputs to.")]
    description: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    input_axes: Annotated[
        tuple[int | None, ...],
        Meta(description="For each input, the axis along which jobs are batched."),
    ]
    output_axes: Annotated[
        tuple[int | None, ...],
        Meta(description="For each output, the axis along which it is split into jobs."),
    ]
    symbols: Annotated[
        dict[str, list[str]],
        Meta(
            description="Names of dynamic dimensions, and where each occurs; equal in one request."
        ),
    ]
    labels: tuple[str, ...]
    batched: Annotated[bool, Meta(description="Whether several jobs may run as one batch.")]
    batching: Annotated[str, Meta(description="Why jobs may or may not be batched.")]
    max_rows: Annotated[int, Meta(description="The largest number of rows of one job.")]
    max_ttl_seconds: Annotated[
        int, Meta(description="The longest `ttl_seconds` of a job: MAX_TTL of this server.")
    ]
    sha256: Annotated[str, Meta(description="The SHA-256 of the model file.")]
    example: Annotated[Any, Meta(description="A request body that works; null if none is known.")]
    paused: Annotated[bool, Meta(description="True: jobs are accepted, but none is run.")]
    workers: Annotated[int, Meta(description="Living workers that serve it.")]
    problems: Annotated[
        list[ModelProblem], Meta(description="Versions that a worker found but does not serve.")
    ]
    run_times: Annotated[
        dict[str, dict[str, float]],
        Meta(description="By worker and number of rows, the measured seconds of a run."),
    ]


class ModelList(Struct, frozen=True):
    models: list[Model]
    problems: Annotated[
        list[ModelProblem],
        Meta(description="Problems of models that no worker serves in any version."),
    ]
    loading: Annotated[
        list[str],
        Meta(description="Models in the folder of a worker that has not loaded them yet."),
    ]


class Pause(Struct, frozen=True):
    """Whether a model's jobs are run; they are accepted in both cases."""

    model: str
    paused: bool


class Scale(Struct, frozen=True, kw_only=True):
    """The backlog of a model. S slots work off S seconds of backlog per second."""

    model: str
    waiting_jobs: Annotated[
        int, Meta(description="Jobs that are due to run, without cancelled ones.")
    ]
    running_jobs: int
    paused: Annotated[bool, Meta(description="While it is true, no job is due.")]
    oldest_age_seconds: OldestAge
    seconds_per_job: SecondsPerJob
    backlog_seconds: Backlog
    workers: LivingWorkers
    slots: Slots
    starved: Annotated[
        int, Meta(ge=0, le=1, description="1: jobs are due and no living worker can run them.")
    ]


class Liveness(Struct, frozen=True):
    status: Literal["ok"] = "ok"


class NotAccepting(Struct, frozen=True):
    """Why no new jobs are accepted."""

    code: Annotated[str, Meta(description="The code with which a submit is refused.")]
    message: Annotated[str, Meta(description="For people: the reason and its remedy.")]


_ACCEPTING: Final = Meta(description="Whether Redis takes new jobs.")
_NOT_ACCEPTING: Final = Meta(description="Why it takes none; left out if it does.")


class Readiness(Struct, frozen=True, kw_only=True):
    """An API that can serve something; reads work even if no new jobs are accepted."""

    status: Literal["ok"] = "ok"
    accepting: Annotated[bool, _ACCEPTING] = True
    reason: Annotated[NotAccepting, _NOT_ACCEPTING] | UnsetType = UNSET


class Health(Struct, frozen=True, kw_only=True):
    """With API keys in use, only a key with the scope `read` gets more than the first three."""

    status: Literal["ok"] = "ok"
    accepting: Annotated[bool, _ACCEPTING] = True
    reason: Annotated[NotAccepting, _NOT_ACCEPTING] | UnsetType = UNSET
    redis: Annotated[str, Meta(description="The server's name and version.")] | UnsetType = UNSET
    queues: Annotated[dict[str, int], Meta(description="Waiting jobs by queue.")] | UnsetType = (
        UNSET
    )
    workers: Annotated[int, Meta(description="Living workers.")] | UnsetType = UNSET
    starved: (
        Annotated[
            list[str], Meta(description="Models with due jobs that no living worker has or loads.")
        ]
        | UnsetType
    ) = UNSET


class ServiceInfo(Struct, frozen=True):
    name: str
    version: str
    links: dict[str, str]


def to_datetime(time_ms: int | None) -> datetime | UnsetType:
    """The time in an answer for milliseconds since 1970; UNSET if it is missing or out of range."""
    return decoding.time(time_ms) or UNSET
