"""The table of all routes, which routing, the OpenAPI document and tests read."""

from collections.abc import Awaitable, Callable
from typing import Any, Final, Literal

from msgspec import Struct

from asyncinfer.api.handlers.admin import clear_jobs, list_queues, list_workers, retry_jobs
from asyncinfer.api.handlers.autoscaling import read_scale
from asyncinfer.api.handlers.events import follow_job, follow_jobs
from asyncinfer.api.handlers.groups import cancel_group, read_group
from asyncinfer.api.handlers.health import about, health, live, openapi, ready
from asyncinfer.api.handlers.jobs import cancel_job, list_jobs, read_job, retry_job
from asyncinfer.api.handlers.models import (
    list_models,
    pause_model,
    purge_model,
    read_model,
    resume_model,
    validate,
)
from asyncinfer.api.handlers.predict import predict
from asyncinfer.api.handlers.results import BINARY, read_result
from asyncinfer.api.http.body import NPY
from asyncinfer.api.http.messages import Reply, Request, Stream
from asyncinfer.api.services import Services
from asyncinfer.api_keys import KeyScope
from asyncinfer.errors import (
    BodyTooLarge,
    EncodingRefused,
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
    MediaTypeRefused,
    ModelLoading,
    ModelNotFound,
    NoModelAnnounced,
    NotAcceptable,
    QueueFull,
    RedisUnavailable,
    RequestError,
    ResultDamaged,
    StorageFull,
    TooManyStreams,
    VersionNotFound,
    WritesRefused,
)
from asyncinfer.schemas.operations import QueueList, WorkerList
from asyncinfer.schemas.problems import LineProblem
from asyncinfer.schemas.requests import (
    CancelJobQuery,
    ClearJobsQuery,
    EventsQuery,
    JobEventsQuery,
    JobQuery,
    JobsQuery,
    NoQuery,
    PredictLine,
    PredictRequest,
    RequestOptions,
    ResultQuery,
    RetryQuery,
    RetryRequest,
    TensorLine,
    TensorRequest,
    WaitQuery,
)
from asyncinfer.schemas.responses import (
    AcceptedJob,
    ClearResult,
    Group,
    GroupCancelResult,
    Health,
    Job,
    JobList,
    Liveness,
    Model,
    ModelList,
    Pause,
    PurgeResult,
    RetryResult,
    Scale,
    ServiceInfo,
    ValidationResult,
)

Handler = Callable[[Services, Request[Any]], Awaitable[Reply | Stream]]
Errors = tuple[type[RequestError], ...]


class HeaderParameter(Struct, frozen=True):
    """A request header that a route reads; `pattern` is a regular expression for its value."""

    name: str
    description: str
    pattern: str


class Route(Struct, frozen=True, kw_only=True):
    """A method on a path. Without a `scope` it needs no API key. `answers` are the bodies by
    status, None for one that no struct describes."""

    method: Literal["GET", "POST", "DELETE"]
    path: str
    handler: Handler
    scope: KeyScope | None
    answers: dict[int, type[Struct] | None]
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
    query: type[Struct] = NoQuery
    headers: tuple[HeaderParameter, ...] = ()
    errors: Errors = ()


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

_MODEL: Final[Errors] = (ModelNotFound, NoModelAnnounced, ModelLoading)
_JOB: Final[Errors] = (JobNotFound, JobExpired, RedisUnavailable)
_READING: Final[Errors] = (
    InvalidJSON,
    InvalidHeader,
    VersionNotFound,
    BodyTooLarge,
    MediaTypeRefused,
    EncodingRefused,
    InvalidInput,
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
    QueueFull,
    StorageFull,
    WritesRefused,
)

ROUTES: Final = (
    Route(
        method="POST",
        path="/predict",
        handler=predict,
        scope="submit",
        bodies=_INPUTS,
        binary_bodies=_BINARY,
        binary_answers=_BINARY,
        line_bodies=_LINES,
        line_answers=_LINE_ANSWERS,
        query=RequestOptions,
        headers=(_PREFER, _IDEMPOTENCY_KEY, _JSON_LENGTH),
        answers={200: Job, 202: AcceptedJob},
        errors=_PREDICT,
    ),
    Route(
        method="POST",
        path="/predict/{model}",
        handler=predict,
        scope="submit",
        bodies=_INPUTS,
        binary_bodies=_BINARY,
        binary_answers=_BINARY,
        line_bodies=_LINES,
        line_answers=_LINE_ANSWERS,
        query=RequestOptions,
        headers=(_PREFER, _IDEMPOTENCY_KEY, _JSON_LENGTH),
        answers={200: Job, 202: AcceptedJob},
        errors=_PREDICT,
    ),
    Route(
        method="GET",
        path="/job/{id}",
        handler=read_job,
        scope="read",
        query=WaitQuery,
        answers={200: Job},
        errors=_JOB,
    ),
    Route(
        method="GET",
        path="/job/{id}/result",
        handler=read_result,
        scope="read",
        query=ResultQuery,
        answers={200: None},
        binary_answers=_BINARY,
        errors=(*_JOB, NotAcceptable, JobNotFinished, JobCancelled, JobFailed, ResultDamaged),
    ),
    Route(
        method="GET",
        path="/job/{id}/events",
        handler=follow_job,
        scope="read",
        query=JobEventsQuery,
        headers=(_LAST_EVENT_ID,),
        media_type="text/event-stream",
        answers={200: None, 204: None},
        errors=(*_JOB, TooManyStreams),
    ),
    Route(
        method="DELETE",
        path="/job/{id}",
        handler=cancel_job,
        scope="submit",
        query=CancelJobQuery,
        answers={200: Job, 202: Job},
        errors=(*_JOB, JobFinished, JobNotFinished),
    ),
    Route(
        method="POST",
        path="/job/{id}/retry",
        handler=retry_job,
        scope="submit",
        query=JobQuery,
        answers={202: AcceptedJob},
        errors=(*_JOB, JobNotRetryable, QueueFull, StorageFull, WritesRefused),
    ),
    Route(
        method="GET",
        path="/jobs",
        handler=list_jobs,
        scope="read",
        query=JobsQuery,
        answers={200: JobList},
        errors=(RedisUnavailable,),
    ),
    Route(
        method="DELETE",
        path="/jobs",
        handler=clear_jobs,
        scope="submit",
        query=ClearJobsQuery,
        answers={200: ClearResult},
        errors=(RedisUnavailable,),
    ),
    Route(
        method="POST",
        path="/jobs/retry",
        handler=retry_jobs,
        scope="submit",
        bodies=(RetryRequest,),
        body_required=False,
        query=RetryQuery,
        answers={200: RetryResult},
        errors=(
            *(InvalidJSON, InvalidHeader, BodyTooLarge, MediaTypeRefused, EncodingRefused),
            *(InvalidInput, RedisUnavailable, StorageFull, WritesRefused),
        ),
    ),
    Route(
        method="GET",
        path="/queues",
        handler=list_queues,
        scope="read",
        answers={200: QueueList},
        errors=(RedisUnavailable,),
    ),
    Route(
        method="GET",
        path="/workers",
        handler=list_workers,
        scope="admin",
        answers={200: WorkerList},
        errors=(RedisUnavailable,),
    ),
    Route(
        method="GET",
        path="/events",
        handler=follow_jobs,
        scope="read",
        query=EventsQuery,
        headers=(_LAST_EVENT_ID,),
        media_type="text/event-stream",
        answers={200: None},
        errors=(*_MODEL, RedisUnavailable, TooManyStreams),
    ),
    Route(
        method="GET",
        path="/group/{group}",
        handler=read_group,
        scope="read",
        answers={200: Group},
        errors=(GroupNotFound, RedisUnavailable),
    ),
    Route(
        method="DELETE",
        path="/group/{group}",
        handler=cancel_group,
        scope="submit",
        answers={200: GroupCancelResult},
        errors=(GroupNotFound, RedisUnavailable),
    ),
    Route(
        method="GET",
        path="/models",
        handler=list_models,
        scope="read",
        answers={200: ModelList},
        errors=(RedisUnavailable,),
    ),
    Route(
        method="GET",
        path="/models/{model}",
        handler=read_model,
        scope="read",
        answers={200: Model},
        errors=(*_MODEL, RedisUnavailable),
    ),
    Route(
        method="POST",
        path="/models/{model}/validate",
        handler=validate,
        scope="submit",
        bodies=_INPUTS,
        binary_bodies=_BINARY,
        query=RequestOptions,
        headers=(_JSON_LENGTH,),
        answers={200: ValidationResult},
        errors=_READING,
    ),
    Route(
        method="POST",
        path="/models/{model}/pause",
        handler=pause_model,
        scope="admin",
        answers={200: Pause},
        errors=(*_MODEL, RedisUnavailable),
    ),
    Route(
        method="POST",
        path="/models/{model}/resume",
        handler=resume_model,
        scope="admin",
        answers={200: Pause},
        errors=(*_MODEL, RedisUnavailable),
    ),
    Route(
        method="POST",
        path="/models/{model}/purge",
        handler=purge_model,
        scope="operator",
        answers={200: PurgeResult},
        errors=(*_MODEL, RedisUnavailable),
    ),
    Route(
        method="GET",
        path="/scale/{model}",
        handler=read_scale,
        scope="read",
        answers={200: Scale},
        errors=(*_MODEL, RedisUnavailable),
    ),
    Route(
        method="GET",
        path="/health",
        handler=health,
        scope=None,
        answers={200: Health},
        errors=(RedisUnavailable,),
    ),
    Route(method="GET", path="/health/live", handler=live, scope=None, answers={200: Liveness}),
    Route(
        method="GET",
        path="/health/ready",
        handler=ready,
        scope=None,
        answers={200: Liveness},
        errors=(RedisUnavailable, WritesRefused),
    ),
    Route(method="GET", path="/openapi.json", handler=openapi, scope=None, answers={200: None}),
    Route(method="GET", path="/", handler=about, scope=None, answers={200: ServiceInfo}),
)

EVERYWHERE: Final[Errors] = (InvalidQuery,)
"""Errors that every route may raise."""
