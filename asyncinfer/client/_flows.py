"""The conversations with a server, each written once for threads and event loops."""

import math
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypedDict

import msgspec
from msgspec import Struct

from asyncinfer import jobs
from asyncinfer.client._decoding import decode_binary_result, decode_result
from asyncinfer.client._encoding import BINARY, RequestBody, array_body, is_json_value, json_body
from asyncinfer.client._errors import (
    NotAsyncinfer,
    WaitTimeout,
    error_of_response,
    job_failed_error,
    not_asyncinfer_error,
    reject_unreadable,
    retry_reason,
)
from asyncinfer.client._models import Model
from asyncinfer.client._protocol import Flow, Lost, Request, Response, T, exchange
from asyncinfer.client._requests import (
    FIRST_WORKER_RETRIES,
    RETRYABLE_STATUSES,
    RemoteServer,
    backoff_seconds,
    call,
    decode_json,
    fetch,
    fetch_json,
    get,
    path_part,
    query_text,
    wait_before_retry,
    with_client_headers,
)
from asyncinfer.client._wait_reasons import WaitingFor
from asyncinfer.errors import (
    Forbidden,
    InvalidInput,
    JobCancelled,
    JobFinished,
    JobNotRetryable,
    ModelLoading,
    ModelNotFound,
    NoModelAnnounced,
)

Priority = Literal["high", "normal", "low"]
Status = Literal["pending", "processing", "completed", "failed", "cancelled"]
View = dict[str, Any]
"""A job as the server shows it."""

_KEY: Final = re.compile(r"[!-~]{1,255}")
_WAIT_SECONDS: Final = 30
"""The longest wait of one request; proxies cut silent connections, often after 60 s."""
_MARGIN_SECONDS: Final = 15.0
_MODEL_CACHE_SECONDS: Final = 30.0
_REASON_JOBS: Final = 32
"""Jobs that a request for a reason reads: mostly more than a map has in flight."""
_REASON_TIMEOUT_SECONDS: Final = 2.0
"""A request for the reason of a wait must not delay the awaited result."""
_PAGE: Final = 1000


class _Error(Struct, frozen=True):
    code: str
    message: str


class _View(Struct, frozen=True, kw_only=True):
    """The fields of a job that a client reads; a newer server may show more."""

    job_id: str
    status: str
    tenant: str | None = None
    model: str | None = None
    version: str | None = None
    group: str | None = None
    round: int | None = None
    error: _Error | None = None
    waiting_for: WaitingFor | None = None
    created_at: str | None = None
    started_at: str | None = None
    finished_at: str | None = None


class _Retried(Struct, frozen=True):
    retried: list[str] = []
    refused: list[dict[str, Any]] = []


class JobOptions(TypedDict, total=False):
    """The options of one job; `Client` describes them."""

    priority: Priority
    delay_seconds: float
    start_within_seconds: float
    finish_within_seconds: float
    ttl_seconds: int
    version: str
    group: str
    answer: Literal["json", "tensors"]


class NewJob(Struct, frozen=True, kw_only=True):
    """A job to submit."""

    value: Any
    model: str | None
    options: Mapping[str, Any]
    key: str
    """Its Idempotency-Key."""
    queue_full_seconds: float = 0.0
    """How long a full queue is awaited, beyond all retries."""


# --- models ------------------------------------------------------------------------------------


def models(server: RemoteServer) -> Flow[list[Model]]:
    """All models that workers serve, as the server lists them; they are also cached."""
    return (yield from _list_models(server)).models


class _Models(Struct, frozen=True):
    models: list[Model]
    loading: list[str] = []
    problems: list[dict[str, Any]] = []


def _list_models(server: RemoteServer) -> Flow[_Models]:
    """The models, those that are loading, and problems; caches the models."""
    answer = yield from get(server, "/models")
    _require_member(server, answer, "models")
    listed = _convert(server, answer, _Models)
    for model in listed.models:
        _cache_model(server, model)
    return listed


def model(server: RemoteServer, name: str | None) -> Flow[Model]:
    """The model called `name`, or the default one, read from the server and cached.

    Raises ModelNotFound, and for the default one NoModelAnnounced and ModelLoading after all
    retries.
    """
    if name is None:
        return (yield from _default_model(server))
    answer = yield from get(server, f"/models/{path_part(name)}")
    _require_member(server, answer, "model")
    model = _convert(server, answer, Model)
    _cache_model(server, model)
    return model


def cached_model(server: RemoteServer, name: str | None) -> Flow[Model]:
    """The model as it was at most 30 s ago, which saves a request; else as `model` reads it."""
    read_at, cached = server.models.get(name, (-math.inf, None))
    if cached is not None and time.monotonic() - read_at < _MODEL_CACHE_SECONDS:
        return cached
    return (yield from model(server, name))


def _cache_model(server: RemoteServer, model: Model) -> None:
    """Keeps the model by its name, and as the default one if it is."""
    now = time.monotonic()
    server.models[model.model] = (now, model)
    if model.default:
        server.models[None] = (now, model)


def _default_model(server: RemoteServer) -> Flow[Model]:
    """The default model, or the only one; waits for one that is still being loaded.

    Raises ModelNotFound, NoModelAnnounced or ModelLoading if there is none after all retries.
    """
    attempt = 0
    while True:
        listed = yield from _list_models(server)
        is_only = len(listed.models) == 1 and not listed.loading
        for model in listed.models:
            if model.default or is_only:
                server.models[None] = (time.monotonic(), model)
                return model
        error, is_temporary = _no_default_error(listed)
        attempt += 1
        retries = server.retries if listed.loading else FIRST_WORKER_RETRIES
        is_awaited = bool(listed.loading) and server.waits_for_models
        if not is_temporary or (attempt > retries and not is_awaited):
            raise error
        yield from wait_before_retry(
            server, backoff_seconds(attempt), WaitingFor(error.code, error.detail)
        )


def _no_default_error(
    listed: _Models,
) -> tuple[ModelLoading | ModelNotFound | NoModelAnnounced, bool]:
    """The error for there being no default model, and whether there may be one soon."""
    if listed.loading:
        names = ", ".join(listed.loading[:3])
        detail = f"No model is the default yet; a worker is loading {names}. Retry in a moment."
        return ModelLoading(detail), True
    if listed.models:
        names = ", ".join(model.model for model in listed.models)
        return ModelNotFound(f"No model is the default; give model= one of: {names}."), False
    if listed.problems:
        detail = f"No worker serves any model. {listed.problems[0].get('reason')}"
        return NoModelAnnounced(detail), False
    detail = (
        "No worker serves any model. Start one with `asyncinfer work`, or look at the log of those "
        "that run."
    )
    return NoModelAnnounced(detail), True


def _convert(server: RemoteServer, value: Any, kind: type[T]) -> T:
    """`value` as `kind`; raises NotAsyncinfer if it has another form."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise NotAsyncinfer(
            f"{server.url} does not answer as this release of asyncinfer does ({error}). Give the "
            "address that `asyncinfer serve` shows as its URL, or install the server's release."
        ) from error


def is_job_view(answer: Any) -> bool:
    """Whether decoded JSON shows a job."""
    try:
        msgspec.convert(answer, _View)
    except msgspec.ValidationError:
        return False
    return True


def _check_view(server: RemoteServer, answer: Any) -> None:
    """Raises NotAsyncinfer if the answer does not show a job."""
    _require_member(server, answer, "job_id")
    _convert(server, answer, _View)


def _require_member(server: RemoteServer, answer: Any, name: str) -> Any:
    """The answer's member `name`; raises NotAsyncinfer if the answer is no object that has it."""
    if not isinstance(answer, dict) or name not in answer:
        raise not_asyncinfer_error(Response(200, {"content-type": "other JSON"}, b""), server.url)
    return answer[name]


# --- submitting and waiting --------------------------------------------------------------------


def new_job(value: Any, model: str | None, key: str | None, options: Any) -> NewJob:
    """A job with the given idempotency key, or a random one; it is not sent.

    Options that are None are left out. Raises InvalidInput if the key is malformed.
    """
    if key is not None and not _KEY.fullmatch(key):
        raise InvalidInput("idempotency_key takes 1 to 255 visible ASCII characters.")
    options = {name: option for name, option in options.items() if option is not None}
    return NewJob(value=value, model=model, options=options, key=key or uuid.uuid4().hex)


def predict(
    server: RemoteServer,
    job: NewJob,
    timeout: float | None = None,
    *,
    cancel_on_timeout: bool = False,
) -> Flow[Any]:
    """Submits a job, waits for it, and returns its decoded result.

    `timeout` is in seconds, None the client's own. Raises WaitTimeout past it, and cancels the job
    first if `cancel_on_timeout`. Raises JobFailed, JobCancelled, CannotSend, and the error with
    which the server refuses the job.
    """
    until = deadline(server, timeout)
    body = yield from body_of(server, job)
    response = yield from _post(server, job, body, until, wait=True)
    if response.headers.get("content-type", "").startswith(BINARY):
        return decode_binary_result(response)
    view = decode_json(server, response)
    _check_view(server, view)
    if response.status == 200:
        return outcome(view)
    return (yield from result(server, view, until, cancel_on_timeout=cancel_on_timeout))


def submit(server: RemoteServer, job: NewJob) -> Flow[View]:
    """Submits a job, and returns its view as the server accepted it: with id, status and no result.

    Raises CannotSend, and the error with which the server refuses the job.
    """
    body = yield from body_of(server, job)
    until = time.monotonic() + server.timeout_seconds
    response = yield from _post(server, job, body, until, wait=False)
    view: View = decode_json(server, response)
    _check_view(server, view)
    return view


def body_of(server: RemoteServer, job: NewJob) -> Flow[RequestBody]:
    """A list as JSON; other inputs as the bytes of tensors, in the datatypes of the model.

    The model is read from the server for this, unless it was lately. Raises CannotSend.
    """
    if is_json_value(job.value) and (body := json_body(job.value, job.options)):
        return body
    model = yield from cached_model(server, job.model)
    return array_body(job.value, model, job.options)


def validate(
    server: RemoteServer, value: Any, name: str | None, options: Any
) -> Flow[dict[str, Any]]:
    """How the server would understand an input, as `Client.validate` says; raises its error."""
    body = yield from body_of(server, new_job(value, name, None, options))
    if name is None:
        name = (yield from cached_model(server, None)).model
    path = f"/models/{path_part(name)}/validate"
    request = Request(method="POST", path=path, headers=body.headers, body=body.content)
    answer: dict[str, Any] = yield from fetch_json(server, request)
    return answer


def _post(
    server: RemoteServer, job: NewJob, body: RequestBody, until: float, *, wait: bool
) -> Flow[Response]:
    """Submits a job, and returns the response, whose status is below 400; raises its error else.

    With `wait` the server holds the response back until the job has ended: at most 30 s, and not
    past `until`.
    """
    path = "/predict" if job.model is None else f"/predict/{path_part(job.model)}"
    headers = {**body.headers, "idempotency-key": job.key}
    seconds = math.floor(min(_WAIT_SECONDS, max(until - time.monotonic(), 0))) if wait else 0
    if wait:
        headers |= {"prefer": f"wait={seconds}", "accept": body.accept}
    request = Request(
        method="POST",
        path=path,
        headers=headers,
        body=body.content,
        timeout_seconds=seconds + _MARGIN_SECONDS,
    )
    response = yield from fetch(
        server, request, until=until, queue_full_seconds=job.queue_full_seconds
    )
    if response.status == 422:
        # The model may have changed since it was cached.
        server.models.pop(job.model, None)
    if response.status >= 400:
        raise error_of_response(response, server.url)
    return response


def read(
    server: RemoteServer, job_id: str, wait_seconds: float = 0, tenant: str | None = None
) -> Flow[View]:
    """The view of a job as soon as it has ended, or as it is after `wait_seconds`.

    `tenant` names the tenant of a job that an operator reads. Raises JobNotFound and JobExpired.
    """
    wait = f"{wait_seconds:g}" if wait_seconds else None
    request = Request(
        method="GET",
        path=_job_path(job_id) + query_text({"wait": wait, "tenant": tenant}),
        timeout_seconds=wait_seconds + _MARGIN_SECONDS,
    )
    view: View = yield from fetch_json(server, request)
    _check_view(server, view)
    return view


def wait(
    server: RemoteServer, view: View, until: float, *, cancel_on_timeout: bool = False
) -> Flow[View]:
    """The view of a job once it has ended, with its result; at once if `view` shows that.

    Past `until`, on the monotonic clock, raises WaitTimeout, and cancels the job first if
    requested. Raises JobNotFound and JobExpired.
    """
    until = min(until, server.until)
    left = until - time.monotonic()
    while not has_outcome(view):
        seconds = round(min(_WAIT_SECONDS, max(left, 0)), 3)
        view = yield from read(server, view["job_id"], seconds, view.get("tenant"))
        left = until - time.monotonic()
        if left <= 0 and view["status"] not in jobs.TERMINAL:
            return (yield from _time_out(server, view, cancel=cancel_on_timeout))
    return view


def as_unfinished(view: View) -> View:
    """A view to `wait` with, as an ended job may have been retried since it was read.

    A completed job has still ended, so its view is unchanged.
    """
    is_final = view["status"] == "completed"
    kept: View = {name: view[name] for name in ("job_id", "tenant") if name in view}
    return view if is_final else {**kept, "status": "pending"}


def has_outcome(view: View) -> bool:
    """Whether a view shows how the job ended, so that `outcome` may be called.

    Lists leave out results, and operators never see them.
    """
    return view["status"] in ("failed", "cancelled") or (
        view["status"] == "completed" and ("result" in view or "tenant" in view)
    )


def result(
    server: RemoteServer, view: View, until: float, *, cancel_on_timeout: bool = False
) -> Flow[Any]:
    """Waits as `wait` does, and returns or raises as `outcome` does."""
    return outcome((yield from wait(server, view, until, cancel_on_timeout=cancel_on_timeout)))


def outcome(view: View) -> Any:
    """The decoded result of a job that has ended, from its view.

    Raises JobFailed, JobCancelled, or Forbidden for a job that an operator reads.
    """
    if view["status"] == "failed":
        raise job_failed_error(view.get("error") or {}, view["job_id"])
    if view["status"] == "cancelled":
        raise JobCancelled(
            "The job was cancelled; retry it to have a result.", job_id=view["job_id"]
        )
    if "tenant" in view:
        raise Forbidden(
            f"The result is shown only to keys of its tenant, {view['tenant']}; an operator sees "
            "that the job is completed.",
            job_id=view["job_id"],
        )
    return decode_result(view.get("result"))


def deadline(server: RemoteServer, timeout: float | None) -> float:
    """The end of a wait on the monotonic clock; not later than the client's own deadline.

    `timeout` is in seconds; None stands for the client's own timeout.
    """
    seconds = server.timeout_seconds if timeout is None else timeout
    return min(time.monotonic() + seconds, server.until)


def _time_out(server: RemoteServer, view: View, *, cancel: bool) -> Flow[View]:
    """Raises WaitTimeout, after a cancel if requested; returns the view if it has just ended."""
    job_id, what_now = view["job_id"], "it goes on: client.job(id) finds it again"
    if cancel:
        try:
            view = yield from cancel_job(server, job_id, view.get("tenant"))
        except JobFinished:
            return (yield from read(server, job_id, tenant=view.get("tenant")))
        what_now = "it was cancelled"
    reason = waiting_for(view)
    why = f": {reason.message.rstrip('.')}" if reason else ""
    hint = "" if reason else ", or check whether there are workers: client.health()"
    raise WaitTimeout(
        f"Job {job_id} has not ended in time ({view['status']}{why}); {what_now}. Give a longer "
        f"timeout={hint}.",
        job_id=job_id,
        waiting_for=reason,
    )


def waiting_for(view: View) -> WaitingFor | None:
    """Why a job is not run now, from a view that was checked; None if nothing is wrong."""
    reason = view.get("waiting_for")
    return msgspec.convert(reason, WaitingFor) if reason else None


def why_waiting(server: RemoteServer, group: str) -> Flow[WaitingFor | None]:
    """Why jobs of a group make no progress, from its newest ones that have not ended.

    None if nothing is wrong, or if it cannot be known. Sent once, without retries, for at most 2 s.
    A server that does not answer, or not now, is a reason too.
    """
    newest = yield from _list_once(server, group=group, limit=_REASON_JOBS)
    if isinstance(newest, list) and not any(map(_is_unfinished, newest)):
        # Those of a map that was resumed may be older; finding them costs more.
        newest = yield from _list_once(server, group=group, status="pending", limit=1)
    if not isinstance(newest, list):
        return newest
    reasons = [job.waiting_for for job in newest if _is_unfinished(job)]
    return next(filter(None, reasons), None)


def _is_unfinished(view: _View) -> bool:
    """Whether the job has not ended in this view."""
    return view.status not in jobs.TERMINAL


def _list_once(server: RemoteServer, **query: Any) -> Flow[list[_View] | WaitingFor | None]:
    """Jobs, or the reason why there is no answer; None if the server refuses to list them."""
    left = server.until - time.monotonic()
    request = Request(
        method="GET",
        path=f"/jobs{query_text(query)}",
        timeout_seconds=max(1.0, min(_REASON_TIMEOUT_SECONDS, left)),
    )
    reply = yield from exchange(with_client_headers(server, request))
    if isinstance(reply, Lost) or reply.status in RETRYABLE_STATUSES:
        return retry_reason(reply, server.url)
    if reply.status >= 400:
        # If anything is wrong, the request that waits raises it.
        return None
    return _convert(
        server, _require_member(server, decode_json(server, reply), "jobs"), list[_View]
    )


# --- jobs --------------------------------------------------------------------------------------


def cancel_job(server: RemoteServer, job_id: str, tenant: str | None = None) -> Flow[View]:
    """Cancels a job, and returns its view: cancelled, or still stopping. Raises JobFinished.

    If the first answer was lost and the retried cancel finds the job cancelled, that is success.
    """
    try:
        view: View = yield from call(server, "DELETE", _job_path(job_id), tenant=tenant)
        _check_view(server, view)
    except JobFinished as error:
        view = yield from read(server, job_id, tenant=tenant)
        if view["status"] != "cancelled":
            raise error from None
    return view


def retry_job(server: RemoteServer, job_id: str, tenant: str | None = None) -> Flow[View]:
    """Retries a job, and returns its view; raises JobNotRetryable for one that has not failed.

    A cancelled job can be retried too. If the first answer was lost and the second try finds the
    job retried, that is success.
    """
    try:
        view: View = yield from call(server, "POST", f"{_job_path(job_id)}/retry", tenant=tenant)
        _check_view(server, view)
    except JobNotRetryable as error:
        view = yield from read(server, job_id, tenant=tenant)
        if view["status"] in jobs.TERMINAL or view.get("round", 1) == 1:
            raise error from None
    return {**view, "tenant": tenant} if tenant else view


def list_jobs(server: RemoteServer, limit: int, query: Mapping[str, Any]) -> Flow[list[View]]:
    """The views of jobs that match the query, the newest first, at most `limit`; no results."""
    views: list[View] = []
    cursor: str | None = None
    while len(views) < limit:
        answer = yield from get(
            server, "/jobs", **query, limit=min(_PAGE, limit - len(views)), cursor=cursor
        )
        page = _convert(server, _require_member(server, answer, "jobs"), list[View])
        for view in page:
            _check_view(server, view)
        views += page
        cursor = answer.get("cursor")
        if not cursor:
            break
    return views


def call_until_done(
    server: RemoteServer, method: str, path: str, query: Mapping[str, Any]
) -> Flow[dict[str, Any]]:
    """Repeats a request while the server has `more` to do; returns the sums of its counts.

    Lists of ids are joined. It also ends when a request has changed nothing.
    """
    total: dict[str, Any] = {}
    while True:
        answer = yield from call(server, method, path, **query)
        counts = _convert(server, answer, dict[str, Any])
        has_more = counts.pop("more", False)
        with reject_unreadable("An answer"):
            for name, count in counts.items():
                total[name] = total[name] + count if name in total else count
        if not has_more or not any(counts.values()):
            return total


def _job_path(job_id: str) -> str:
    """The path of a job; raises InvalidInput if it can be no id."""
    return f"/job/{path_part(job_id)}"


def purge_job(server: RemoteServer, job_id: str, tenant: str | None = None) -> Flow[None]:
    """Deletes a job that has ended; raises JobNotFinished, JobNotFound and JobExpired."""
    yield from call(server, "DELETE", _job_path(job_id), purge=True, tenant=tenant)


# --- groups ------------------------------------------------------------------------------------


def group(server: RemoteServer, name: str) -> Flow[dict[str, Any]]:
    """The view of a group; raises GroupNotFound."""
    view: dict[str, Any] = yield from get(server, f"/group/{path_part(name)}")
    _require_member(server, view, "group")
    return view


def cancel_group(server: RemoteServer, name: str) -> Flow[dict[str, Any]]:
    """Cancels the unfinished jobs of a group; returns the counts that `Group.cancel` describes."""
    counts: dict[str, Any] = yield from call(server, "DELETE", f"/group/{path_part(name)}")
    return counts


# --- operations --------------------------------------------------------------------------------


def health(server: RemoteServer) -> Flow[dict[str, Any]]:
    """The state that `Client.health` describes."""
    view: dict[str, Any] = yield from get(server, "/health")
    _require_member(server, view, "status")
    return view


def list_all(server: RemoteServer, name: str) -> Flow[list[dict[str, Any]]]:
    """The list at `/{name}`; `name` is queues or workers."""
    listed = _require_member(server, (yield from get(server, f"/{name}")), name)
    return _convert(server, listed, list[dict[str, Any]])


def set_paused(server: RemoteServer, name: str, paused: bool) -> Flow[dict[str, Any]]:
    """Pauses a model, or resumes it; returns `model` and `paused`. Raises ModelNotFound."""
    verb = "pause" if paused else "resume"
    path = f"/models/{path_part(name)}/{verb}"
    answer: dict[str, Any] = yield from call(server, "POST", path)
    return answer


def retry_ids(server: RemoteServer, ids: list[str], tenant: str | None) -> Flow[dict[str, Any]]:
    """Retries jobs by their ids, at most 1,000 a request.

    Returns the lists `retried` (ids) and `refused` (dicts of `job_id`, `code` and `detail`).
    """
    total: dict[str, Any] = {"retried": [], "refused": []}
    for start in range(0, len(ids), _PAGE):
        body = msgspec.json.encode({"job_ids": ids[start : start + _PAGE]})
        headers = {"content-type": "application/json"}
        path = f"/jobs/retry{query_text({'tenant': tenant})}"
        request = Request(method="POST", path=path, headers=headers, body=body)
        page = _convert(server, (yield from fetch_json(server, request)), _Retried)
        total["retried"] += page.retried
        total["refused"] += page.refused
    return total


def purge_queue(server: RemoteServer, name: str) -> Flow[dict[str, Any]]:
    """Cancels the waiting jobs of a model, of all tenants; returns `model` and `cancelled`."""
    answer: dict[str, Any] = yield from call(server, "POST", f"/models/{path_part(name)}/purge")
    return answer


def retry_many(
    server: RemoteServer, ids: Sequence[str] | None, query: Mapping[str, Any]
) -> Flow[dict[str, Any]]:
    """Retries the jobs of `ids`, or all that match the query if `ids` is None.

    Returns the lists `retried` and `refused`. With `ids` only the query's `tenant` counts.
    """
    if ids is None:
        return (yield from call_until_done(server, "POST", "/jobs/retry", query))
    return (yield from retry_ids(server, list(ids), query.get("tenant")))
