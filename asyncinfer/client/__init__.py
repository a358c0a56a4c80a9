"""The Python client: `Client` for scripts and notebooks, `AsyncClient` for event loops.

Importing it loads no server, no model runtime, and not yet numpy or an HTTP library.
"""

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
from asyncinfer.client._models import Model, TensorInfo
from asyncinfer.client._protocol import Event
from asyncinfer.client._wait_reasons import WaitingFor
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

__all__ = [
    "AsyncClient",
    "AsyncGroup",
    "AsyncJob",
    "AsyncinferError",
    "BodyTooLarge",
    "CannotSend",
    "Client",
    "ClientClosed",
    "ConnectionFailed",
    "Event",
    "Forbidden",
    "Group",
    "GroupNotFound",
    "IdempotencyConflict",
    "InvalidInput",
    "InvalidQuery",
    "Job",
    "JobCancelled",
    "JobExpired",
    "JobFailed",
    "JobFinished",
    "JobNotFinished",
    "JobNotFound",
    "JobNotRetryable",
    "Model",
    "ModelLoading",
    "ModelNotFound",
    "NoModelAnnounced",
    "NotAsyncinfer",
    "QueueFull",
    "RedisUnavailable",
    "RequestError",
    "SlowMapWarning",
    "TensorInfo",
    "Unauthorized",
    "UnknownAnswer",
    "VersionNotFound",
    "WaitTimeout",
    "WaitingFor",
    "WrongAddress",
]
