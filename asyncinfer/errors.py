"""All errors of the package: one class per cause, each with a stable code.

AsyncinferError
|-- RequestError              answers an HTTP request with its status; a client raises it again
|   |-- InternalError         500
|   |-- MalformedRequest, InvalidJSON, InvalidHeader, InvalidQuery                        400
|   |-- Unauthorized          401
|   |-- Forbidden, HostRefused, OriginRefused                                             403
|   |-- RouteNotFound, JobNotFound, ModelNotFound, VersionNotFound, GroupNotFound         404
|   |-- WebhookNotFound       404
|   |-- MethodNotAllowed, NotAcceptable, RequestTimeout                         405, 406, 408
|   |-- JobFinished, JobNotFinished, JobCancelled, JobNotRetryable                        409
|   |-- GroupClosed, GroupNotClosed                                                       409
|   |-- JobExpired, ResultDamaged                                                         410
|   |-- BodyTooLarge          413
|   |-- MediaTypeRefused, EncodingRefused                                                 415
|   |-- InvalidInput, JobFailed, IdempotencyConflict, TooManyRefusedLines                 422
|   |-- WebhookRefused        422
|   |-- QueueFull, HeadersTooLarge                                                   429, 431
|   |   |-- KeptFull          429
|   |   `-- WebhooksFull      429
|   |-- TooManyGroups         429
|   |-- ServerStopping, TooManyConnections, TooManyStreams, TooManyUploads              503
|   |-- TooManyDownloads, NotReady, StorageFull                                         503
|   |-- RedisUnavailable      503
|   |   |-- WritesRefused
|   |   |   `-- DiskFull, ReadOnlyReplica, TooFewReplicas
|   |   `-- RedisRefused
|   |       `-- WrongKeyType, PermissionDenied
|   `-- NoModelAnnounced      503
|       `-- ModelLoading
|-- JobError                  ends a job as failed; stored in `job:{id}:error`
|   |-- ModelFailed, OutOfMemory, PredictionTimeout, UnknownModel, ResultTooLarge
|   `-- UnreadableRecord
|       `-- LaterRecord
|-- StartError                stops a command, with exit code 2
|   `-- InvalidSetting, ServerRefused, DataDirBusy, DefaultModelChanged, ModelRefused,
|       ModelDirUnreadable, FileRefused, KeyFileRefused, SecretsFileRefused
|-- WebhookNotVerified        raised to the receiver of a webhook
|-- InvalidSecret             so too, for a wrong secret of its own; also a ValueError
`-- NotDrained                raised to a test; also a TimeoutError

`asyncinfer.client` adds what only a client can meet: ConnectionFailed, WaitTimeout and others.
"""

from collections.abc import Sequence
from typing import ClassVar

from msgspec import Struct


class InputError(Struct, frozen=True):
    """One thing that is wrong with an input: its place (a JSON pointer, RFC 6901) and what is
    expected there."""

    pointer: str
    detail: str


class AsyncinferError(Exception):
    """The base of every error that this package raises. `code` is stable, for programs."""

    code: ClassVar[str] = "internal_error"
    row: int | None = None
    """In a client's map, the number of the row that the error belongs to."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


# --- answered over HTTP ------------------------------------------------------------------


class RequestError(AsyncinferError):
    """A request that is answered with an error (RFC 9457).

    `faults` lists everything that is wrong with an input, `headers` are added to the answer.
    """

    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"

    def __init__(
        self,
        detail: str,
        *,
        faults: Sequence[InputError] = (),
        retry_after_seconds: float | None = None,
        job_id: str | None = None,
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(detail)
        self.faults = tuple(faults)
        self.retry_after_seconds = retry_after_seconds
        self.job_id = job_id
        self.headers = tuple(headers)


class InternalError(RequestError):
    """A bug in asyncinfer; the log has its traceback."""


class MalformedRequest(RequestError):
    code, status, title = "malformed_request", 400, "This is not HTTP"


class InvalidJSON(RequestError):
    code, status, title = "invalid_json", 400, "The body is not valid JSON"


class InvalidHeader(RequestError):
    code, status, title = "invalid_header", 400, "A header is not valid"


class InvalidQuery(RequestError):
    code, status, title = "invalid_query", 400, "A query parameter is not valid"


class Unauthorized(RequestError):
    code, status, title = "unauthorized", 401, "An API key is needed"


class Forbidden(RequestError):
    code, status, title = "forbidden", 403, "The API key lacks a scope"


class HostRefused(RequestError):
    code, status, title = "host_refused", 403, "The Host header is not allowed"


class OriginRefused(RequestError):
    code, status, title = "origin_refused", 403, "The Origin header is not allowed"


class RouteNotFound(RequestError):
    code, status, title = "route_not_found", 404, "No such route"


class JobNotFound(RequestError):
    code, status, title = "job_not_found", 404, "No such job"


class ModelNotFound(RequestError):
    code, status, title = "model_not_found", 404, "No such model"


class VersionNotFound(RequestError):
    code, status, title = "version_not_found", 404, "The model has no such version"


class WebhookNotFound(RequestError):
    """The job has no webhook, or no delivery that could be sent again."""

    code, status, title = "webhook_not_found", 404, "No such webhook"


class GroupNotFound(RequestError):
    code, status, title = "group_not_found", 404, "No such group"


class MethodNotAllowed(RequestError):
    code, status, title = "method_not_allowed", 405, "The route has no such method"


class NotAcceptable(RequestError):
    code, status, title = "not_acceptable", 406, "The result has no such form"


class RequestTimeout(RequestError):
    code, status, title = "request_timeout", 408, "The request took too long to arrive"


class GroupClosed(RequestError):
    """The group takes no more jobs, and no other webhook than the one it was closed with."""

    code, status, title = "group_closed", 409, "The group is closed"


class GroupNotClosed(RequestError):
    """Ends the answer to a request of many lines that was to close their group, if not all of them
    were accepted."""

    code, status, title = "group_not_closed", 409, "The group was not closed"


class JobFinished(RequestError):
    code, status, title = "job_finished", 409, "The job has already ended"


class JobNotFinished(RequestError):
    code, status, title = "job_not_finished", 409, "The job has not ended yet"


class JobCancelled(RequestError):
    code, status, title = "job_cancelled", 409, "The job was cancelled"


class JobNotRetryable(RequestError):
    code, status, title = "job_not_retryable", 409, "The job cannot be retried"


class JobExpired(RequestError):
    code, status, title = "job_expired", 410, "The job is no longer kept"


class ResultDamaged(RequestError):
    """The bytes in Redis are not a result as a worker stores it."""

    code, status, title = "result_damaged", 410, "The result is damaged"


class BodyTooLarge(RequestError):
    code, status, title = "body_too_large", 413, "The body is too large"


class MediaTypeRefused(RequestError):
    code, status, title = "media_type_refused", 415, "The content type is not supported"


class EncodingRefused(RequestError):
    code, status, title = "encoding_refused", 415, "The content encoding is not supported"


class InvalidInput(RequestError):
    """The body is readable, but does not fit the model or route; also ends a job as failed."""

    code, status, title = "invalid_input", 422, "The input does not fit"


class JobFailed(RequestError):
    """The answer for a failed job; `job_error` is the code and message that are stored with it."""

    code, status, title = "job_failed", 422, "The job failed"

    def __init__(self, job_error: tuple[str, str], job_id: str) -> None:
        super().__init__(f"{job_error[0]}: {job_error[1]}", job_id=job_id)
        self.job_error = job_error


class IdempotencyConflict(RequestError):
    code, status, title = "idempotency_conflict", 422, "The Idempotency-Key was used before"


class WebhookRefused(RequestError):
    """A webhook's URL is not allowed, or its tenant has no secret to sign it with."""

    code, status, title = "webhook_refused", 422, "The webhook is refused"


class QueueFull(RequestError):
    code, status, title = "queue_full", 429, "The queue is full"


class KeptFull(QueueFull):
    """Ended jobs of the queue keep as many bytes as they may; it takes no jobs meanwhile."""

    code, title = "kept_full", "The queue's ended jobs keep too much"


class WebhooksFull(QueueFull):
    """The queue has as many webhooks to deliver as it may; it takes jobs without one."""

    code, title = "webhooks_full", "Too many webhooks are to be delivered"


class TooManyGroups(RequestError):
    """As many closed groups with a webhook are followed as may be."""

    code, status, title = "too_many_groups", 429, "Too many closed groups have not ended"


class ServerStopping(RequestError):
    """The answer to requests that the server has not read yet when it is told to stop."""

    code, status, title = "server_stopping", 503, "The server stops"


class TooManyRefusedLines(RequestError):
    """Ends a request of many lines if nearly all of them are rejected."""

    code, status, title = "too_many_refused_lines", 422, "Nearly every line is refused"


class HeadersTooLarge(RequestError):
    code, status, title = "headers_too_large", 431, "The headers are too large"


class TooManyConnections(RequestError):
    code, status, title = "too_many_connections", 503, "There are too many connections"


class TooManyStreams(RequestError):
    code, status, title = "too_many_streams", 503, "There are too many event streams"


class TooManyUploads(RequestError):
    """There is no room for a large body; or this one came too slowly while others waited."""

    code, status, title = "too_many_uploads", 503, "Too many large bodies are being received"


class TooManyDownloads(RequestError):
    """There is no room for a large answer: others are being sent, and their clients are slow."""

    code, status, title = "too_many_downloads", 503, "Too many large answers are being sent"


class RedisUnavailable(RequestError):
    code, status, title = "redis_unavailable", 503, "Redis does not answer"
    may_have_run = True
    """Whether Redis may have carried out the call, in whole or in part. False if it refused all of
    it, or if the call was certainly not sent."""


class WritesRefused(RedisUnavailable):
    """Redis answered that it accepts no writes in its present state; the call changed nothing. Each
    reason has a class of its own."""

    may_have_run = False
    reason: ClassVar[str] = ""
    """Why it accepts none, with the remedy."""


class DiskFull(WritesRefused):
    """Redis cannot save to its disk (MISCONF)."""

    code, title = "disk_full", "Redis cannot save to its disk"
    reason = (
        "it cannot save to its disk. Free space there, or make its folder writable; its log says "
        "more"
    )


class ReadOnlyReplica(WritesRefused):
    """The server is a replica (READONLY)."""

    code, title = "redis_read_only", "Redis is a replica"
    reason = "it is a replica. That passes after a fail-over; else point REDIS_URL at the primary"


class TooFewReplicas(WritesRefused):
    """The server has fewer replicas than its min-replicas-to-write (NOREPLICAS)."""

    code, title = "too_few_replicas", "Redis has too few replicas"
    reason = (
        "it has fewer replicas than its min-replicas-to-write. Start some, or lower that setting"
    )


class RedisRefused(RedisUnavailable):
    """Redis rejected the command: a key of another type, corrupt content, a missing right."""

    code, title = "redis_refused", "Redis refused a command"


class WrongKeyType(RedisRefused):
    """A key does not have the type that asyncinfer uses; the detail names it if it is known."""


class PermissionDenied(RedisRefused):
    """The ACL of the Redis user lacks a right (NOPERM); the detail names it."""

    code, title = "redis_permission_denied", "The Redis user lacks a permission"


class NotReady(RequestError):
    """The answer of a worker's monitor port; the detail says why the worker cannot claim."""

    code, status, title = "not_ready", 503, "The worker cannot claim jobs"


class StorageFull(RequestError):
    code, status, title = "storage_full", 503, "Redis has no memory left"


class NoModelAnnounced(RequestError):
    code, status, title = "no_model_announced", 503, "No worker has announced a model yet"


class ModelLoading(NoModelAnnounced):
    """The model is in the folder of a living worker that has not loaded it yet."""

    code, title = "model_loading", "The model is being loaded"


# --- stored with a job -------------------------------------------------------------------


class JobError(AsyncinferError):
    """An error that ends a job as failed; it is stored as `{"code", "message"}`."""

    code: ClassVar[str] = "model_failed"


class ModelFailed(JobError):
    """ONNX Runtime could not run the model on this input."""


class OutOfMemory(JobError):
    """A run was out of memory; a retry may succeed."""

    code = "out_of_memory"


class PredictionTimeout(JobError):
    """A run took longer than PREDICTION_TIMEOUT."""

    code = "timeout"


class UnknownModel(JobError):
    """The job names a model that this worker has no file for."""

    code = "unknown_model"


class ResultTooLarge(JobError):
    """The model's output is larger than the limit for one result."""

    code = "result_too_large"


class UnreadableRecord(JobError):
    """A job's record or payload has a format that this release does not know."""

    code = "unreadable_record"


class LaterRecord(UnreadableRecord):
    """A later release wrote the job's record; the job is left to a worker of that release."""


# The Lua scripts also store the codes worker_lost, input_lost and expired.


# --- stops a command ---------------------------------------------------------------------


class StartError(AsyncinferError):
    """A command cannot start; the detail says what to do."""

    code = "cannot_start"


class InvalidSetting(StartError):
    code = "invalid_setting"


class ServerRefused(StartError):
    """The Redis server cannot be used until a person changes something: it is too old, evicts keys,
    refuses the login, lacks a right, or has a certificate that is not trusted."""

    code = "server_refused"


class DataDirBusy(StartError):
    code = "data_dir_busy"


class DefaultModelChanged(StartError):
    code = "default_model_changed"


class ModelRefused(StartError):
    """A model file cannot be served; the detail says why."""

    code = "model_refused"


class ModelDirUnreadable(StartError):
    """The model folder is missing, is not a folder, or is not readable."""


class FileRefused(StartError):
    """A file of rows or of results cannot be read or written."""

    code = "file_refused"


class KeyFileRefused(StartError):
    """The API_KEYS file cannot be read; the detail says which line or why."""

    code = "key_file_refused"


class SecretsFileRefused(StartError):
    """The WEBHOOK_SECRETS file cannot be used; the detail says why, and repeats no secret."""

    code = "secrets_file_refused"


# --- raised to the receiver of a webhook -------------------------------------------------


class WebhookNotVerified(AsyncinferError):
    """What was received is no webhook of the sender: its signature does not match, or it is old."""

    code = "webhook_not_verified"


class InvalidSecret(AsyncinferError, ValueError):
    """What a receiver verifies webhooks with is no secret; the message does not repeat it."""

    code = "invalid_secret"


# --- raised to a test --------------------------------------------------------------------


class NotDrained(AsyncinferError, TimeoutError):
    """Jobs still wait or run when a test expects them to have ended; the detail says how many."""

    code = "not_drained"
