"""The table of all routes, which routing, the OpenAPI document and tests read."""

from collections.abc import Awaitable, Callable
from typing import Any, Final, Literal

from msgspec import Struct

from asyncinfer.api.handlers.admin import clear_jobs, list_queues, list_workers, retry_jobs
from asyncinfer.api.handlers.audit import list_audit
from asyncinfer.api.handlers.autoscaling import read_scale
from asyncinfer.api.handlers.events import follow_job, follow_jobs
from asyncinfer.api.handlers.groups import cancel_group, close_group, read_group
from asyncinfer.api.handlers.health import about, health, live, openapi, ready
from asyncinfer.api.handlers.jobs import cancel_job, list_jobs, read_job, retry_job
from asyncinfer.api.handlers.models import (
    cancel_queue,
    list_models,
    pause_model,
    read_model,
    resume_model,
    validate,
)
from asyncinfer.api.handlers.predict import predict
from asyncinfer.api.handlers.results import BINARY, read_result
from asyncinfer.api.handlers.timeline import read_timeline
from asyncinfer.api.handlers.webhooks import (
    list_webhooks,
    read_group_webhook,
    read_webhook,
    redeliver_group_webhook,
    redeliver_webhook,
    redeliver_webhooks,
)
from asyncinfer.api.http.body import NPY
from asyncinfer.api.http.messages import Reply, Request, Stream
from asyncinfer.api.services import Services
from asyncinfer.api_keys import KeyScope
from asyncinfer.errors import (
    BodyTooLarge,
    DiskFull,
    EncodingRefused,
    GroupClosed,
    GroupNotFound,
    IdempotencyConflict,
    InvalidHeader,
    InvalidInput,
    InvalidJSON,
    InvalidQuery,
    JobCancelled,
    JobExpired,
    JobFailed,
    JobFinished,
    JobNotFinished,
    JobNotFound,
    JobNotRetryable,
    KeptFull,
    MediaTypeRefused,
    ModelLoading,
    ModelNotFound,
    NoModelAnnounced,
    NotAcceptable,
    PermissionDenied,
    QueueFull,
    ReadOnlyReplica,
    RedisUnavailable,
    RequestError,
    ResultDamaged,
    ServerStopping,
    StorageFull,
    TooFewReplicas,
    TooManyDownloads,
    TooManyGroups,
    TooManyStreams,
    TooManyUploads,
    VersionNotFound,
    WebhookNotFound,
    WebhookRefused,
    WebhooksFull,
)
from asyncinfer.schemas.operations import AuditList, QueueList, WorkerList
from asyncinfer.schemas.problems import LineProblem
from asyncinfer.schemas.requests import (
    AuditQuery,
    CancelJobQuery,
    ClearJobsQuery,
    CloseGroupRequest,
    EventsQuery,
    JobEventsQuery,
    JobQuery,
    JobsQuery,
    NoQuery,
    PredictLine,
    PredictRequest,
    ReadyQuery,
    RedeliverJobQuery,
    RedeliverQuery,
    RequestOptions,
    ResultQuery,
    RetryQuery,
    RetryRequest,
    SubmitQuery,
    TensorLine,
    TensorRequest,
    WaitQuery,
    WebhooksQuery,
)
from asyncinfer.schemas.responses import (
    AcceptedJob,
    ClearResult,
    Group,
    GroupCancelResult,
    GroupCloseResult,
    Health,
    Job,
    JobList,
    Liveness,
    Model,
    ModelList,
    Pause,
    QueueCancelResult,
    Readiness,
    RetryResult,
    Scale,
    ServiceInfo,
    ValidationResult,
)
from asyncinfer.schemas.timeline import Timeline
from asyncinfer.schemas.webhook_views import GroupWebhook, JobWebhook, RedeliverResult, WebhookList

Handler = Callable[[Services, Request[Any]], Awaitable[Reply | Stream]]
Errors = tuple[type[RequestError], ...]


class HeaderParameter(Struct, frozen=True):
    """A request header that a route reads; `pattern` is a regular expression for its value."""

    name: str
    description: str
    pattern: str


class Route(Struct, frozen=True):
    """A method on a path. Without a `scope` it needs no API key. `answers` are the bodies by
    status, None for one that no struct describes."""

    method: Literal["GET", "POST", "DELETE"]
    path: str
    handler: Handler
    scope: KeyScope | None
    answers: dict[int, type[Struct] | None]
    errors: Errors = ()
    query: type[Struct] = NoQuery
    headers: tuple[HeaderParameter, ...] = ()
    bodies: tuple[type[Struct], ...] = ()
    """The structs that a JSON body may be."""
    body_required: bool = True
    binary_bodies: tuple[str, ...] = ()
    """Media types of bodies that are not JSON, and of answers."""
    binary_answers: tuple[str, ...] = ()
    media_type: str = "application/json"
    """The media type of answers that are not binary."""
    line_bodies: tuple[type[Struct], ...] = ()
    """The structs that a line of a bulk request may be."""
    line_answers: tuple[type[Struct], ...] = ()
    """The structs that a line of a bulk answer may be."""
    has_large_answers: bool = False
    """Whether its answers have results, so that large ones wait for room in the budget for
    answers. A request is answered a second time then, so it must change nothing."""

    @property
    def all_errors(self) -> Errors:
        """`errors`, and those that follow from its other properties."""
        return (*self.errors, TooManyDownloads) if self.has_large_answers else self.errors


_PREFER = HeaderParameter(
    "Prefer", "`wait=N`: answer with the finished job if it takes at most N <= 60 s.", "wait=[0-9]+"
)
_IDEMPOTENCY_KEY = HeaderParameter(
    "Idempotency-Key", "A repeated request with the same key gets the same job.", "[!-~]{1,255}"
)

_JSON_LENGTH = HeaderParameter(
    "Inference-Header-Content-Length",
    "Bytes of JSON that the body begins with; the tensors of the Open Inference Protocol follow.",
    "[0-9]+",
)
_LAST_EVENT_ID = HeaderParameter(
    "Last-Event-ID", "Continues after this event, on any server.", "[A-Za-z0-9_-]+"
)
_INPUTS: Final = (PredictRequest, TensorRequest)
_LINES: Final = (PredictLine, TensorLine)
_LINE_ANSWERS: Final = (AcceptedJob, Job, LineProblem)
_BINARY: Final = (BINARY, NPY)

_REDIS: Final[Errors] = (RedisUnavailable,)
_FULL: Final[Errors] = (
    StorageFull,
    DiskFull,
    ReadOnlyReplica,
    TooFewReplicas,
    PermissionDenied,
)
_MODEL: Final[Errors] = (ModelNotFound, NoModelAnnounced, ModelLoading)
_GROUP: Final[Errors] = (GroupNotFound, RedisUnavailable)
_JOB: Final[Errors] = (JobNotFound, JobExpired, RedisUnavailable)
_READING: Final[Errors] = (
    InvalidJSON,
    InvalidHeader,
    VersionNotFound,
    BodyTooLarge,
    TooManyUploads,
    MediaTypeRefused,
    EncodingRefused,
    InvalidInput,
    WebhookRefused,
    RedisUnavailable,
    *_MODEL,
)
_PREDICT: Final[Errors] = (
    *_READING,
    NotAcceptable,
    JobFailed,
    JobCancelled,
    ResultDamaged,
    IdempotencyConflict,
    GroupNotFound,
    GroupClosed,
    QueueFull,
    KeptFull,
    WebhooksFull,
    *_FULL,
)

ROUTES: Final = (
    *(
        Route(
            "POST",
            path,
            predict,
            "submit",
            {200: Job, 202: AcceptedJob},
            _PREDICT,
            query=SubmitQuery,
            headers=(_PREFER, _IDEMPOTENCY_KEY, _JSON_LENGTH),
            bodies=_INPUTS,
            binary_bodies=_BINARY,
            binary_answers=_BINARY,
            line_bodies=_LINES,
            line_answers=_LINE_ANSWERS,
        )
        for path in ("/predict", "/predict/{model}")
    ),
    Route(
        "GET",
        "/job/{id}",
        read_job,
        "read",
        {200: Job},
        _JOB,
        query=WaitQuery,
        has_large_answers=True,
    ),
    Route(
        "GET",
        "/job/{id}/result",
        read_result,
        "read",
        {200: None},
        (*_JOB, NotAcceptable, JobNotFinished, JobCancelled, JobFailed, ResultDamaged),
        query=ResultQuery,
        binary_answers=_BINARY,
        has_large_answers=True,
    ),
    Route(
        "GET", "/job/{id}/timeline", read_timeline, "read", {200: Timeline}, _JOB, query=JobQuery
    ),
    Route(
        "GET",
        "/job/{id}/events",
        follow_job,
        "read",
        {200: None, 204: None},
        (*_JOB, TooManyStreams),
        query=JobEventsQuery,
        headers=(_LAST_EVENT_ID,),
        media_type="text/event-stream",
    ),
    Route(
        "DELETE",
        "/job/{id}",
        cancel_job,
        "submit",
        {200: Job, 202: Job},
        (*_JOB, JobFinished, JobNotFinished),
        query=CancelJobQuery,
    ),
    Route(
        "POST",
        "/job/{id}/retry",
        retry_job,
        "submit",
        {202: AcceptedJob},
        (*_JOB, JobNotRetryable, QueueFull, WebhooksFull, *_FULL),
        query=JobQuery,
    ),
    Route(
        "GET",
        "/job/{id}/webhook",
        read_webhook,
        "read",
        {200: JobWebhook},
        (*_JOB, WebhookNotFound),
        query=JobQuery,
    ),
    Route(
        "POST",
        "/job/{id}/webhook/redeliver",
        redeliver_webhook,
        "submit",
        {202: JobWebhook},
        (*_JOB, WebhookNotFound, WebhooksFull),
        query=RedeliverJobQuery,
    ),
    Route("GET", "/jobs", list_jobs, "read", {200: JobList}, _REDIS, query=JobsQuery),
    Route(
        "DELETE", "/jobs", clear_jobs, "submit", {200: ClearResult}, _REDIS, query=ClearJobsQuery
    ),
    Route(
        "POST",
        "/jobs/retry",
        retry_jobs,
        "submit",
        {200: RetryResult},
        (
            *(InvalidJSON, InvalidHeader, BodyTooLarge, MediaTypeRefused, EncodingRefused),
            *(TooManyUploads, InvalidInput, RedisUnavailable),
            *_FULL,
        ),
        query=RetryQuery,
        bodies=(RetryRequest,),
        body_required=False,
    ),
    Route(
        "GET", "/webhooks", list_webhooks, "read", {200: WebhookList}, _REDIS, query=WebhooksQuery
    ),
    Route(
        "POST",
        "/webhooks/redeliver",
        redeliver_webhooks,
        "submit",
        {200: RedeliverResult},
        _REDIS,
        query=RedeliverQuery,
    ),
    Route("GET", "/queues", list_queues, "read", {200: QueueList}, _REDIS),
    Route("GET", "/workers", list_workers, "admin", {200: WorkerList}, _REDIS),
    Route(
        "GET",
        "/events",
        follow_jobs,
        "read",
        {200: None},
        (*_MODEL, *_REDIS, TooManyStreams),
        query=EventsQuery,
        headers=(_LAST_EVENT_ID,),
        media_type="text/event-stream",
    ),
    Route("GET", "/group/{group}", read_group, "read", {200: Group}, _GROUP),
    Route("DELETE", "/group/{group}", cancel_group, "submit", {200: GroupCancelResult}, _GROUP),
    Route(
        "POST",
        "/group/{group}/close",
        close_group,
        "submit",
        {200: GroupCloseResult},
        (
            *(InvalidJSON, InvalidHeader, BodyTooLarge, MediaTypeRefused, EncodingRefused),
            *(TooManyUploads, InvalidInput, WebhookRefused),
            *(GroupClosed, TooManyGroups, WebhooksFull),
            *_GROUP,
        ),
        bodies=(CloseGroupRequest,),
        body_required=False,
    ),
    Route(
        "GET",
        "/group/{group}/webhook",
        read_group_webhook,
        "read",
        {200: GroupWebhook},
        (*_GROUP, WebhookNotFound),
    ),
    Route(
        "POST",
        "/group/{group}/webhook/redeliver",
        redeliver_group_webhook,
        "submit",
        {202: GroupWebhook},
        (*_GROUP, WebhookNotFound, WebhooksFull),
    ),
    Route("GET", "/models", list_models, "read", {200: ModelList}, _REDIS),
    Route("GET", "/models/{model}", read_model, "read", {200: Model}, _MODEL + _REDIS),
    Route(
        "POST",
        "/models/{model}/validate",
        validate,
        "submit",
        {200: ValidationResult},
        _READING,
        query=RequestOptions,
        headers=(_JSON_LENGTH,),
        bodies=_INPUTS,
        binary_bodies=_BINARY,
    ),
    Route("POST", "/models/{model}/pause", pause_model, "admin", {200: Pause}, _MODEL + _REDIS),
    Route("POST", "/models/{model}/resume", resume_model, "admin", {200: Pause}, _MODEL + _REDIS),
    Route(
        "POST",
        "/models/{model}/cancel",
        cancel_queue,
        "operator",
        {200: QueueCancelResult},
        _MODEL + _REDIS,
    ),
    Route("GET", "/audit", list_audit, "operator", {200: AuditList}, _REDIS, query=AuditQuery),
    Route("GET", "/scale/{model}", read_scale, "read", {200: Scale}, _MODEL + _REDIS),
    Route("GET", "/health", health, None, {200: Health}, _REDIS),
    Route("GET", "/health/live", live, None, {200: Liveness}),
    Route(
        "GET",
        "/health/ready",
        ready,
        None,
        {200: Readiness},
        (RedisUnavailable, *_FULL, ServerStopping),
        query=ReadyQuery,
    ),
    Route("GET", "/openapi.json", openapi, None, {200: None}),
    Route("GET", "/", about, None, {200: ServiceInfo}),
)

EVERYWHERE: Final[Errors] = (InvalidQuery,)
"""Errors that every route may raise."""
