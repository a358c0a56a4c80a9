"""Bodies and queries of requests, checked as they are decoded."""

from typing import Annotated, Any, Final, Literal, TypeAlias, get_args

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from asyncinfer.jobs import (
    GROUP_EXPECTED,
    GROUP_PATTERN,
    MAX_WEBHOOK_URL,
    NAME_PATTERN,
    PATTERN_END,
    Options,
    Status,
    Webhook,
    WebhookEvent,
)

MAX_WAIT_SECONDS: Final = 60
MAX_JOBS_PER_CALL: Final = 1000
ALL_TENANTS: Final = "*"

AuditAction: TypeAlias = Literal[
    "cancel", "cancel_queue", "default", "pause", "purge", "redeliver", "resume", "retry"
]
AUDIT_ACTIONS: Final[tuple[AuditAction, ...]] = get_args(AuditAction)


class RequestWebhook(Webhook, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whom to tell of the end of a job, as a request says it."""


QUERY_OBJECTS: Final = {"webhook": "url"}
"""Options that are objects, and the one member that a query gives of each."""


class RequestOptions(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options of one job, as a request gives them."""

    webhook: (
        Annotated[RequestWebhook, Meta(description="Whom to tell of the end of the job.")] | None
    ) = None
    answer: (
        Annotated[
            Literal["json", "tensors"],
            Meta(
                description="Form of the result. `json`: for people, with labels if the model has "
                "them; `tensors`: named outputs, also in binary. Without it, the form of the input."
            ),
        ]
        | None
    ) = None


class SubmitQuery(RequestOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The query of a submit: the options of its job, and what becomes of its group."""

    close: Annotated[
        bool,
        Meta(
            description="Close the group once the job is accepted: it takes no more jobs. Of many "
            "lines: the group of the query, once all lines are accepted."
        ),
    ] = False


LineKey = (
    Annotated[
        str,
        Meta(
            pattern=f"^[!-~]{{1,255}}{PATTERN_END}",
            description="A request that is sent again with the same key gives the same job.",
            extra={"expected": "1 to 255 visible ASCII characters"},
        ),
    ]
    | UnsetType
)


class PredictRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """An input for a model, and the options of its job."""

    data: Annotated[
        Raw,
        Meta(
            description=(
                "One row of numbers per item, as the model's `example` shows. Float inputs take "
                'also the elements `"NaN"`, `"Infinity"` and `"-Infinity"`; null is NaN.'
            ),
            examples=[[[5.1, 3.5, 1.4, 0.2]]],
        ),
    ]
    options: RequestOptions = RequestOptions()


class PredictLine(PredictRequest, frozen=True, forbid_unknown_fields=True):
    """One line of a request that has many (NDJSON)."""

    idempotency_key: LineKey = UNSET


class RequestParameters(Struct, frozen=True, forbid_unknown_fields=True):
    """Sent by clients of the Open Inference Protocol, and ignored: `Accept` decides the form."""

    binary_data_output: bool = False


class InputParameters(Struct, frozen=True, forbid_unknown_fields=True):
    binary_data_size: (
        Annotated[
            int,
            Meta(ge=0, description="The size of this tensor in the bytes that follow the JSON."),
        ]
        | None
    ) = None


class OutputParameters(Struct, frozen=True, forbid_unknown_fields=True):
    """Sent by clients of the Open Inference Protocol, and ignored: `Accept` decides the form."""

    binary_data: bool = False


class InputTensor(Struct, frozen=True, forbid_unknown_fields=True):
    """A named tensor; its elements are in `data` or in the bytes that follow the JSON."""

    name: str
    shape: Annotated[list[int], Meta(examples=[[1, 4]])]
    datatype: Annotated[str, Meta(examples=["FP32"])]
    data: Annotated[
        Raw | UnsetType,
        Meta(
            description=(
                "Flat in row-major order, or nested. An element of FP16, BF16, FP32 or FP64 may "
                'also be `"NaN"`, `"Infinity"` or `"-Infinity"`; null is NaN.'
            ),
            examples=[[5.1, 3.5, 1.4, 0.2]],
        ),
    ] = UNSET
    parameters: InputParameters = InputParameters()


class RequestedOutput(Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    parameters: OutputParameters = OutputParameters()


class TensorRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Named tensors for a model, and the options of their job."""

    inputs: list[InputTensor]
    outputs: Annotated[
        list[RequestedOutput], Meta(description="The outputs to return; without it, all of them.")
    ] = []
    parameters: RequestParameters = RequestParameters()
    options: RequestOptions = RequestOptions()


class TensorLine(TensorRequest, frozen=True, forbid_unknown_fields=True):
    """One line of a request that has many (NDJSON)."""

    idempotency_key: LineKey = UNSET


class NoQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """The query of routes that take no parameters."""


class ReadyQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """The query of `GET /health/ready`."""

    purpose: Annotated[
        Literal["submit"] | None,
        Meta(description="`submit`: 503 also if new jobs are not accepted."),
    ] = msgspec.field(name="for", default=None)


_TENANT_EXPECTED: Final = {
    "expected": "`*`, or a name of 1 to 64 letters, digits, `_`, `.` and `-` that begins with a "
    "letter or digit"
}

TenantQuery: TypeAlias = (
    Annotated[
        str,
        Meta(
            pattern=rf"^(\*|{NAME_PATTERN}){PATTERN_END}",
            description="Jobs of this tenant, or `*`: of all tenants. Needs the scope `operator`; "
            "inputs, results and error messages are not shown.",
            extra=_TENANT_EXPECTED,
        ),
    ]
    | None
)


_Cursor: TypeAlias = Annotated[str, Meta(description="The `cursor` of the previous page.")] | None
_ModelFilter: TypeAlias = Annotated[str, Meta(description="Only jobs of this model.")] | None
_GroupFilter: TypeAlias = Annotated[str, Meta(description="Only jobs of this group.")] | None
_RequestIdFilter: TypeAlias = (
    Annotated[
        str,
        Meta(
            pattern=f"^[!-~]{{1,128}}{PATTERN_END}",
            description="Only jobs of the request with this `X-Request-ID`.",
            extra={"expected": "1 to 128 visible ASCII characters"},
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
            description="How many seconds the answer may wait for the job to end.",
        ),
    ] = 0.0
    tenant: TenantQuery = None


class ResultQuery(Struct, frozen=True, forbid_unknown_fields=True):
    output: Annotated[str, Meta(description="Only the output of this name.")] | None = None


class JobsQuery(Struct, frozen=True, forbid_unknown_fields=True):
    status: Annotated[Status, Meta(description="Only jobs in this state.")] | None = None
    model: _ModelFilter = None
    dead: Annotated[
        bool,
        Meta(
            description="Only dead letters: jobs that failed, but may succeed if they are retried."
        ),
    ] = False
    group: _GroupFilter = None
    request_id: _RequestIdFilter = None
    limit: Annotated[
        int, Meta(ge=1, le=1000, description="The largest number of jobs in the answer.")
    ] = 100
    cursor: _Cursor = None
    tenant: TenantQuery = None


class AuditQuery(Struct, frozen=True, forbid_unknown_fields=True):
    action: Annotated[AuditAction, Meta(description="Only this action.")] | None = None
    tenant: (
        Annotated[
            str,
            Meta(
                pattern=rf"^(\*|{NAME_PATTERN}){PATTERN_END}",
                description="Only what keys of this tenant did, or was done to its jobs alone.",
                extra=_TENANT_EXPECTED,
            ),
        ]
        | None
    ) = None
    limit: Annotated[
        int, Meta(ge=1, le=1000, description="The largest number of entries in the answer.")
    ] = 100
    cursor: _Cursor = None


class CancelJobQuery(Struct, frozen=True, forbid_unknown_fields=True):
    purge: Annotated[
        bool, Meta(description="Delete an ended job with its data, instead of cancelling it.")
    ] = False
    tenant: TenantQuery = None


class JobQuery(Struct, frozen=True, forbid_unknown_fields=True):
    tenant: TenantQuery = None


class RedeliverJobQuery(Struct, frozen=True, forbid_unknown_fields=True):
    event: (
        Annotated[
            WebhookEvent, Meta(description="The last end of this kind; without it, the last one.")
        ]
        | None
    ) = None
    tenant: TenantQuery = None


class WebhooksQuery(Struct, frozen=True, forbid_unknown_fields=True):
    cursor: _Cursor = None
    tenant: TenantQuery = None


class RedeliverQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which deliveries start anew, of those that were given up or whose last try failed; one field
    besides `cursor` and `tenant` is needed."""

    host: Annotated[str, Meta(description="Only those to this host, as listed.")] | None = None
    model: _ModelFilter = None
    given_up: Annotated[bool, Meta(description="Only those that were given up.")] = False
    cursor: _Cursor = None
    tenant: TenantQuery = None


class RetryQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which of the caller's jobs run again; at least one field is needed, or a body."""

    status: (
        Annotated[Literal["failed", "cancelled"], Meta(description="Only jobs in this state.")]
        | None
    ) = None
    model: _ModelFilter = None
    group: _GroupFilter = None
    dead: Annotated[bool, Meta(description="Only dead letters.")] = False
    tenant: TenantQuery = None


class RetryRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """The ids of jobs to run again."""

    job_ids: Annotated[list[str], Meta(min_length=1, max_length=MAX_JOBS_PER_CALL)]


class GroupWebhook(Struct, frozen=True, forbid_unknown_fields=True):
    """Whom to tell when all jobs of a group have ended."""

    url: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=MAX_WEBHOOK_URL,
            description="Where the end of the group is POSTed to, signed.",
        ),
    ]
    metadata: Annotated[
        dict[str, Any], Meta(description="Sent back with it; at most 4 KiB of JSON.")
    ] = {}


class CloseGroupRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """How a group is closed."""

    webhook: GroupWebhook | None = None


class ClearJobsQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """Which of the caller's jobs are cancelled or deleted; one field besides `purge` is needed."""

    status: (
        Annotated[
            Status | Literal["ended"],
            Meta(
                description="Only jobs in this state; `ended` means completed, failed or cancelled."
            ),
        ]
        | None
    ) = None
    model: _ModelFilter = None
    group: _GroupFilter = None
    dead: Annotated[bool, Meta(description="Only dead letters; with `purge=true`.")] = False
    purge: Annotated[
        bool,
        Meta(
            description="Delete ended jobs with their data, instead of cancelling unfinished ones."
        ),
    ] = False
    tenant: TenantQuery = None


_LastEventId: TypeAlias = (
    Annotated[
        str,
        Meta(description="Continue after this event; the header `Last-Event-ID` wins over it."),
    ]
    | None
)


class JobEventsQuery(Struct, frozen=True, forbid_unknown_fields=True):
    last_event_id: _LastEventId = None


class EventsQuery(Struct, frozen=True, forbid_unknown_fields=True):
    group: (
        Annotated[
            str,
            Meta(
                pattern=GROUP_PATTERN,
                description="Only jobs of this group.",
                extra=GROUP_EXPECTED,
            ),
        ]
        | None
    ) = None
    model: _ModelFilter = None
    last_event_id: _LastEventId = None
