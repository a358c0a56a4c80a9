"""What clients send: bodies and queries, checked when they are decoded."""

from typing import Annotated, Final, Literal, TypeAlias

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from asyncinfer.jobs import (
    GROUP_PATTERN,
    PATTERN_END,
    TENANT_PATTERN,
    Options,
    Status,
)

MAX_WAIT_SECONDS: Final = 60


MOST_JOBS_A_CALL: Final = 1000


ALL_TENANTS: Final = "*"


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
