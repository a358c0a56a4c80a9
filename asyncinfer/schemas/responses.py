"""What travels over HTTP: the body of every request and answer, and every query."""

from datetime import datetime
from typing import Annotated, Any, Final, Literal, TypeAlias

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from asyncinfer.errors import Fault, JobFailed, RequestError
from asyncinfer.jobs import (
    GROUP_PATTERN,
    PATTERN_END,
    TENANT_PATTERN,
    JobError,
    Options,
    Priority,
    Status,
)
from asyncinfer.schemas.operations import Backlog, LivingWorkers, OldestAge, SecondsPerJob, Slots
from asyncinfer.tensors.datatypes import TensorSpec
from asyncinfer.untrusted import decoding

MAX_WAIT_SECONDS: Final = 60
MOST_JOBS_A_CALL: Final = 1000
ALL_TENANTS: Final = "*"

# --- asked ---------------------------------------------------------------------------------


class AskedOptions(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that can be asked of one job."""

    answer: (
        Annotated[
            Literal["json", "tensors"],
            Meta(
                description="`json`: as people read it, a labelled result where there are labels; "
                "`tensors`: named outputs, also as binary. Without it, as the input was sent."
            ),
        ]
        | None
    ) = None


LineKey = (
    Annotated[
        str,
        Meta(
            pattern=f"^[!-~]{{1,255}}{PATTERN_END}",
            description="Sent again with the same request, gives the same job.",
        ),
    ]
    | UnsetType
)


class PredictRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """An input for a model, and what is asked of its job."""

    data: Annotated[
        Raw,
        Meta(
            description=(
                "One row of numbers per item, as the model's `example` shows. Where it takes "
                'floats, `"NaN"`, `"Infinity"` and `"-Infinity"` are elements too, and null is NaN.'
            ),
            examples=[[[5.1, 3.5, 1.4, 0.2]]],
        ),
    ]
    options: AskedOptions = AskedOptions()


class PredictLine(PredictRequest, frozen=True, forbid_unknown_fields=True):
    """One of many requests, each on a line of its own."""

    idempotency_key: LineKey = UNSET


class AskedParameters(Struct, frozen=True, forbid_unknown_fields=True):
    """What clients of the Open Inference Protocol say; `Accept` decides here."""

    binary_data_output: bool = False


class InputParameters(Struct, frozen=True, forbid_unknown_fields=True):
    binary_data_size: (
        Annotated[
            int,
            Meta(ge=0, description="Bytes of this tensor among those that follow the JSON."),
        ]
        | None
    ) = None


class OutputParameters(Struct, frozen=True, forbid_unknown_fields=True):
    """What clients of the Open Inference Protocol say; `Accept` decides here."""

    binary_data: bool = False


class AskedInput(Struct, frozen=True, forbid_unknown_fields=True):
    """A named tensor, with its elements in `data` or among the bytes that follow the JSON."""

    name: str
    shape: Annotated[list[int], Meta(examples=[[1, 4]])]
    datatype: Annotated[str, Meta(examples=["FP32"])]
    data: Annotated[
        Raw | UnsetType,
        Meta(
            description=(
                "Flat in row-major order, or nested. Of FP16, BF16, FP32 and FP64 an element may "
                'be `"NaN"`, `"Infinity"` or `"-Infinity"`, and null is NaN.'
            ),
            examples=[[5.1, 3.5, 1.4, 0.2]],
        ),
    ] = UNSET
    parameters: InputParameters = InputParameters()


class AskedOutput(Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    parameters: OutputParameters = OutputParameters()


class TensorRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Named tensors for a model, and what is asked of their job."""

    inputs: list[AskedInput]
    outputs: Annotated[
        list[AskedOutput], Meta(description="Those that are wanted; without it, all.")
    ] = []
    parameters: AskedParameters = AskedParameters()
    options: AskedOptions = AskedOptions()


class TensorLine(TensorRequest, frozen=True, forbid_unknown_fields=True):
    """One of many requests, each on a line of its own."""

    idempotency_key: LineKey = UNSET


class NoQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """For routes that take no query parameters."""


TenantQuery: TypeAlias = (
    Annotated[
        str,
        Meta(
            pattern=rf"^(\*|{TENANT_PATTERN}){PATTERN_END}",
            description="Jobs of this tenant, or of all: `*`. Needs the scope `operator`; inputs, "
            "results and messages of errors are not shown.",
        ),
    ]
    | None
)


class WaitQuery(Struct, frozen=True, forbid_unknown_fields=True):
    wait: Annotated[
        float,
        Meta(
            ge=0,
            le=MAX_WAIT_SECONDS,
            description="How many seconds to hold the answer back while the job is unfinished.",
        ),
    ] = 0.0
    tenant: TenantQuery = None


class ResultQuery(Struct, frozen=True, forbid_unknown_fields=True):
    output: Annotated[str, Meta(description="Only the output of this name.")] | None = None


class JobsQuery(Struct, frozen=True, forbid_unknown_fields=True):
    status: Annotated[Status, Meta(description="Only jobs in this state.")] | None = None
    model: Annotated[str, Meta(description="Only jobs of this model.")] | None = None
    dead: Annotated[
        bool, Meta(description="Only dead letters: given up though another try may have helped.")
    ] = False
    group: Annotated[str, Meta(description="Only jobs of this group.")] | None = None
    limit: Annotated[int, Meta(ge=1, le=1000, description="How many jobs at most.")] = 100
    cursor: Annotated[str, Meta(description="Where the page before this one ended.")] | None = None
    tenant: TenantQuery = None


class EndQuery(Struct, frozen=True, forbid_unknown_fields=True):
    purge: Annotated[
        bool, Meta(description="Delete an ended job with its data, instead of cancelling it.")
    ] = False
    tenant: TenantQuery = None


class OneQuery(Struct, frozen=True, forbid_unknown_fields=True):
    tenant: TenantQuery = None


_OF_MODEL: Final = Meta(description="Only jobs of this model.")
_OF_GROUP: Final = Meta(description="Only jobs of this group.")


class RetryQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which of the caller's jobs run again; at least one of them is needed, or a body."""

    status: (
        Annotated[Literal["failed", "cancelled"], Meta(description="Only jobs in this state.")]
        | None
    ) = None
    model: Annotated[str, _OF_MODEL] | None = None
    group: Annotated[str, _OF_GROUP] | None = None
    dead: Annotated[bool, Meta(description="Only dead letters.")] = False
    tenant: TenantQuery = None


class RetryRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Jobs to run again, by name."""

    job_ids: Annotated[list[str], Meta(min_length=1, max_length=MOST_JOBS_A_CALL)]


class ClearQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which of the caller's jobs end or are deleted; at least one besides `purge` is needed."""

    status: (
        Annotated[
            Status | Literal["ended"],
            Meta(description="Only jobs in this state; `ended` is any of the last three."),
        ]
        | None
    ) = None
    model: Annotated[str, _OF_MODEL] | None = None
    group: Annotated[str, _OF_GROUP] | None = None
    dead: Annotated[bool, Meta(description="Only dead letters; with `purge=true`.")] = False
    purge: Annotated[
        bool,
        Meta(description="Delete ended jobs with their data, instead of cancelling others."),
    ] = False
    tenant: TenantQuery = None


class JobEventsQuery(Struct, frozen=True, forbid_unknown_fields=True):
    last_event_id: (
        Annotated[str, Meta(description="Goes on after this event, where the header is not sent.")]
        | None
    ) = None


class EventsQuery(Struct, frozen=True, forbid_unknown_fields=True):
    group: (
        Annotated[str, Meta(pattern=GROUP_PATTERN, description="Only jobs of this group.")] | None
    ) = None
    model: Annotated[str, Meta(description="Only jobs of this model.")] | None = None
    last_event_id: (
        Annotated[str, Meta(description="Goes on after this event, where the header is not sent.")]
        | None
    ) = None


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
    asked: Annotated[int, Meta(description="Running ones that were told to stop.")]
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
    asked: Annotated[int, Meta(description="Jobs that run, and were told to stop.")]


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


class Problem(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What went wrong (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    code: Annotated[str, Meta(description="Stable, for machines.")]
    instance: str = ""
    errors: Annotated[tuple[Fault, ...], Meta(description="Every fault found, by place.")] = ()
    job_id: str | None = None
    error: Annotated[JobError, Meta(description="Why the job failed.")] | None = None


class LineProblem(Problem, frozen=True, kw_only=True, omit_defaults=True):
    """What went wrong with one line of many (RFC 9457)."""

    line: Annotated[int, Meta(description="Which line of the request, counted from 1.")]
    retry_after_seconds: Annotated[
        float | None, Meta(description="When to send this line again.")
    ] = None


def problem_of(error: RequestError, path: str = "") -> Problem:
    return Problem(
        type=f"urn:asyncinfer:problem:{error.code}",
        title=error.title,
        status=error.status,
        detail=error.detail,
        code=error.code,
        instance=path,
        errors=error.faults,
        job_id=error.job_id,
        error=JobError(*error.job_error) if isinstance(error, JobFailed) else None,
    )


def line_problem_of(error: RequestError, line: int) -> LineProblem:
    problem = problem_of(error)
    members = {name: getattr(problem, name) for name in problem.__struct_fields__}
    return LineProblem(line=line, retry_after_seconds=error.retry_after_seconds, **members)


def at(time_ms: int | None) -> datetime | UnsetType:
    """A time in a record as an answer shows it; one that no answer can show is left out."""
    return decoding.time(time_ms) or UNSET
