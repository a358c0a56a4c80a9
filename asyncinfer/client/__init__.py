"""The Python client: `Client` for scripts and notebooks, `AsyncClient` for event loops.

Importing it loads no server, no model runtime, and not yet numpy or an HTTP library.
"""

from asyncinfer.client._answers import (
    AuditLog,
    ClearedJobs,
    GroupCounts,
    Health,
    PausedState,
    RefusedJob,
    RetriedJobs,
    ValidInput,
)
from asyncinfer.client._async_client import AsyncClient
from asyncinfer.client._client import Client
from asyncinfer.client._errors import (
    CannotSend,
    ClientClosed,
    ConnectionFailed,
    NotAsyncinfer,
    SlowMapWarning,
    UnknownAnswer,
    WaitTimeout,
    WrongAddress,
)
from asyncinfer.client._groups import AsyncGroup, Group
from asyncinfer.client._jobs import AsyncJob, Job
from asyncinfer.client._models import Catalog, Model, ModelProblem, TensorInfo
from asyncinfer.client._progress import ProgressBar
from asyncinfer.client._protocol import Event
from asyncinfer.client._wait_reasons import Cadence, WaitingFor
from asyncinfer.errors import (
    AsyncinferError,
    BodyTooLarge,
    Forbidden,
    GroupNotFound,
    IdempotencyConflict,
    InvalidInput,
    InvalidQuery,
    JobCancelled,
    JobExpired,
    JobFailed,
    JobFinished,
    JobNotFinished,
    JobNotFound,
    JobNotRetryable,
    ModelLoading,
    ModelNotFound,
    NoModelAnnounced,
    QueueFull,
    RedisUnavailable,
    RequestError,
    Unauthorized,
    VersionNotFound,
)
from asyncinfer.jobs import JobError
from asyncinfer.schemas.operations import (
    AuditEntry,
    JobsDone,
    Percentiles,
    Queue,
    WaitingJobs,
    Worker,
)

__all__ = [
    "AsyncClient",
    "AsyncGroup",
    "AsyncJob",
    "AsyncinferError",
    "AuditEntry",
    "AuditLog",
    "BodyTooLarge",
    "Cadence",
    "CannotSend",
    "Catalog",
    "ClearedJobs",
    "Client",
    "ClientClosed",
    "ConnectionFailed",
    "Event",
    "Forbidden",
    "Group",
    "GroupCounts",
    "GroupNotFound",
    "Health",
    "IdempotencyConflict",
    "InvalidInput",
    "InvalidQuery",
    "Job",
    "JobCancelled",
    "JobError",
    "JobExpired",
    "JobFailed",
    "JobFinished",
    "JobNotFinished",
    "JobNotFound",
    "JobNotRetryable",
    "JobsDone",
    "Model",
    "ModelLoading",
    "ModelNotFound",
    "ModelProblem",
    "NoModelAnnounced",
    "NotAsyncinfer",
    "PausedState",
    "Percentiles",
    "ProgressBar",
    "Queue",
    "QueueFull",
    "RedisUnavailable",
    "RefusedJob",
    "RequestError",
    "RetriedJobs",
    "SlowMapWarning",
    "TensorInfo",
    "Unauthorized",
    "UnknownAnswer",
    "ValidInput",
    "VersionNotFound",
    "WaitTimeout",
    "WaitingFor",
    "WaitingJobs",
    "Worker",
    "WrongAddress",
]
