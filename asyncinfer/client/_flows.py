"""Each conversation with a server, once: what is asked, for how long, what the answer means."""

import math
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypedDict

import msgspec
from msgspec import Struct

from asyncinfer import jobs
from asyncinfer.client._decoding import result_of, result_of_bytes
from asyncinfer.client._encoding import BINARY, Body, array_body, is_plain, json_body
from asyncinfer.client._errors import (
    NotAsyncinfer,
    WaitTimeout,
    error_of,
    job_failed,
    reason_of,
    strange_refused,
    stranger,
)
from asyncinfer.client._models import Model
from asyncinfer.client._protocol import Flow, Lost, Request, Response, T, exchange
from asyncinfer.client._requests import (
    AGAIN,
    FIRST_WORKER_RETRIES,
    Server,
    ask,
    ask_json,
    backoff_seconds,
    call,
    decoded,
    get,
    path_part,
    query_text,
    wait_before_retry,
    with_own_headers,
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
"""One waiting request; proxies cut silent connections, often after 60 s."""
_MARGIN_SECONDS: Final = 15.0
_KNOWN_SECONDS: Final = 30.0
_NEWEST: Final = 32
"""Jobs that a look for a reason reads: more than those that a map has under way in most cases."""
_LOOK_SECONDS: Final = 2.0
"""A look for the reason of a wait must not hold up the answer that is waited for."""
_PAGE: Final = 1000


class _Error(Struct, frozen=True):
    code: str
    message: str


class _View(Struct, frozen=True, kw_only=True):
    """What a client reads of a job; a newer server may show more."""

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
    """What can be asked of one job."""

    priority: Priority
    delay_seconds: float
    start_within_seconds: float
    finish_within_seconds: float
    ttl_seconds: int
    version: str
    group: str
    answer: Literal["json", "tensors"]


class Submission(Struct, frozen=True, kw_only=True):
    """A job to be made."""

    value: Any
    model: str | None
    options: Mapping[str, Any]
    key: str
    patience_seconds: float = 0.0
    """How long a full queue is waited for, beyond all retries."""


# --- asking ------------------------------------------------------------------------------------


# --- models ------------------------------------------------------------------------------------


def models(server: Server) -> Flow[list[Model]]:
    return (yield from _models(server)).models


class _Models(Struct, frozen=True):
    models: list[Model]
    loading: list[str] = []
    problems: list[dict[str, Any]] = []


def _models(server: Server) -> Flow[_Models]:
    listed = yield from get(server, "/models")
    _member(server, listed, "models")
    found = _converted(server, listed, _Models)
    for one in found.models:
        _remember(server, one)
    return found


def model(server: Server, name: str | None) -> Flow[Model]:
    """The model called `name`, or the default one."""
    if name is None:
        return (yield from _default(server))
    answer = yield from get(server, f"/models/{path_part(name)}")
    _member(server, answer, "model")
    found = _converted(server, answer, Model)
    _remember(server, found)
    return found


def known_model(server: Server, name: str | None) -> Flow[Model]:
    """As it was a moment ago, which spares a request."""
    at, found = server.models.get(name, (-math.inf, None))
    if found is not None and time.monotonic() - at < _KNOWN_SECONDS:
        return found
    return (yield from model(server, name))


def _remember(server: Server, found: Model) -> None:
    now = time.monotonic()
    server.models[found.model] = (now, found)
    if found.default:
        server.models[None] = (now, found)


def _default(server: Server) -> Flow[Model]:
    """The default model, which may have yet to be loaded."""
    attempt = 0
    while True:
        found = yield from _models(server)
        is_only = len(found.models) == 1 and not found.loading
        for one in found.models:
            if one.default or is_only:
                server.models[None] = (time.monotonic(), one)
                return one
        error, is_passing = _no_default(found)
        attempt += 1
        most = server.retries if found.loading else FIRST_WORKER_RETRIES
        is_awaited = bool(found.loading) and server.waits_for_models
        if not is_passing or (attempt > most and not is_awaited):
            raise error
        yield from wait_before_retry(
            server, backoff_seconds(attempt), WaitingFor(error.code, error.detail)
        )


def _no_default(found: _Models) -> tuple[ModelLoading | ModelNotFound | NoModelAnnounced, bool]:
    """Why there is no default model, and whether that may pass by itself."""
    if found.loading:
        names = ", ".join(found.loading[:3])
        told = f"No model is the default yet; a worker is loading {names}. Retry in a moment."
        return ModelLoading(told), True
    if found.models:
        names = ", ".join(one.model for one in found.models)
        return ModelNotFound(f"No model is the default; give model= one of: {names}."), False
    if found.problems:
        told = f"No worker serves any model. {found.problems[0].get('reason')}"
        return NoModelAnnounced(told), False
    told = (
        "No worker serves any model. Start one with `asyncinfer work`, or look at the log of those "
        "that run."
    )
    return NoModelAnnounced(told), True


def _converted(server: Server, value: Any, kind: type[T]) -> T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise NotAsyncinfer(
            f"{server.url} does not answer as this release of asyncinfer does ({error}). Give the "
            "address that `asyncinfer serve` shows as its URL, or install the server's release."
        ) from error


def is_view(answer: Any) -> bool:
    try:
        msgspec.convert(answer, _View)
    except msgspec.ValidationError:
        return False
    return True


def _check_view(server: Server, answer: Any) -> None:
    _member(server, answer, "job_id")
    _converted(server, answer, _View)


def _member(server: Server, answer: Any, name: str) -> Any:
    """Whoever answers JSON without it is another program."""
    if not isinstance(answer, dict) or name not in answer:
        raise stranger(Response(200, {"content-type": "other JSON"}, b""), server.url)
    return answer[name]


# --- submitting and waiting --------------------------------------------------------------------


def submission(value: Any, model: str | None, key: str | None, options: Any) -> Submission:
    if key is not None and not _KEY.fullmatch(key):
        raise InvalidInput("idempotency_key takes 1 to 255 visible ASCII characters.")
    given = {name: one for name, one in options.items() if one is not None}
    return Submission(value=value, model=model, options=given, key=key or uuid.uuid4().hex)


def predict(
    server: Server,
    asked: Submission,
    timeout: float | None = None,
    *,
    cancel_on_timeout: bool = False,
) -> Flow[Any]:
    """The result of a new job."""
    until = over_at(server, timeout)
    body = yield from body_of(server, asked)
    response = yield from _post(server, asked, body, until, wait=True)
    if response.headers.get("content-type", "").startswith(BINARY):
        return result_of_bytes(response)
    view = decoded(server, response)
    _check_view(server, view)
    if response.status == 200:
        return outcome(view)
    return (yield from result(server, view, until, cancel_on_timeout=cancel_on_timeout))


def submit(server: Server, asked: Submission) -> Flow[View]:
    """A new job, accepted."""
    body = yield from body_of(server, asked)
    until = time.monotonic() + server.timeout_seconds
    response = yield from _post(server, asked, body, until, wait=False)
    view: View = decoded(server, response)
    _check_view(server, view)
    return view


def body_of(server: Server, asked: Submission) -> Flow[Body]:
    """In JSON what is a list, else the bytes of tensors as the model takes them."""
    if is_plain(asked.value) and (body := json_body(asked.value, asked.options)):
        return body
    found = yield from known_model(server, asked.model)
    return array_body(asked.value, found, asked.options)


def validate(server: Server, value: Any, name: str | None, options: Any) -> Flow[dict[str, Any]]:
    asked = submission(value, name, None, options)
    body = yield from body_of(server, asked)
    if name is None:
        name = (yield from known_model(server, None)).model
    path = f"/models/{path_part(name)}/validate"
    request = Request(method="POST", path=path, headers=body.headers, body=body.content)
    found: dict[str, Any] = yield from ask_json(server, request)
    return found


def _post(
    server: Server, asked: Submission, body: Body, until: float, *, wait: bool
) -> Flow[Response]:
    path = "/predict" if asked.model is None else f"/predict/{path_part(asked.model)}"
    headers = {**body.headers, "idempotency-key": asked.key}
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
    response = yield from ask(server, request, until=until, patience_seconds=asked.patience_seconds)
    if response.status == 422:
        # Perhaps the model is no longer the one that this client knew.
        server.models.pop(asked.model, None)
    if response.status >= 400:
        raise error_of(response, server.url)
    return response


def read(
    server: Server, job_id: str, wait_seconds: float = 0, tenant: str | None = None
) -> Flow[View]:
    """The job as it is after at most `wait_seconds`; `tenant` is another's, for operators."""
    wait = f"{wait_seconds:g}" if wait_seconds else None
    request = Request(
        method="GET",
        path=_job(job_id) + query_text({"wait": wait, "tenant": tenant}),
        timeout_seconds=wait_seconds + _MARGIN_SECONDS,
    )
    view: View = yield from ask_json(server, request)
    _check_view(server, view)
    return view


def wait(
    server: Server, view: View, until: float, *, cancel_on_timeout: bool = False
) -> Flow[View]:
    """The job once it has ended; raises WaitTimeout, and cancels it then if asked to."""
    until = min(until, server.until)
    left = until - time.monotonic()
    while not is_whole(view):
        seconds = round(min(_WAIT_SECONDS, max(left, 0)), 3)
        view = yield from read(server, view["job_id"], seconds, view.get("tenant"))
        left = until - time.monotonic()
        if left <= 0 and view["status"] not in jobs.TERMINAL:
            return (yield from _give_up(server, view, cancel=cancel_on_timeout))
    return view


def doubted(view: View) -> View:
    """As a view that may be old: only what completed stays so, the rest may have been retried."""
    is_final = view["status"] == "completed"
    kept: View = {name: view[name] for name in ("job_id", "tenant") if name in view}
    return view if is_final else {**kept, "status": "pending"}


def is_whole(view: View) -> bool:
    """Whether it shows how the job ended; lists leave the result out, operators never see it."""
    return view["status"] in ("failed", "cancelled") or (
        view["status"] == "completed" and ("result" in view or "tenant" in view)
    )


def result(
    server: Server, view: View, until: float, *, cancel_on_timeout: bool = False
) -> Flow[Any]:
    return outcome((yield from wait(server, view, until, cancel_on_timeout=cancel_on_timeout)))


def outcome(view: View) -> Any:
    """The result of a job that has ended; raises where it has none."""
    if view["status"] == "failed":
        raise job_failed(view.get("error") or {}, view["job_id"])
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
    return result_of(view.get("result"))


def over_at(server: Server, timeout: float | None) -> float:
    """When a wait is over; None stands for the client's own timeout."""
    seconds = server.timeout_seconds if timeout is None else timeout
    return min(time.monotonic() + seconds, server.until)


def _give_up(server: Server, view: View, *, cancel: bool) -> Flow[View]:
    job_id, told = view["job_id"], "it goes on: client.job(id) finds it again"
    if cancel:
        try:
            view = yield from cancel_job(server, job_id, view.get("tenant"))
        except JobFinished:
            return (yield from read(server, job_id, tenant=view.get("tenant")))
        told = "it was cancelled"
    reason = waiting_for(view)
    why = f": {reason.message.rstrip('.')}" if reason else ""
    look = "" if reason else ", or look whether workers are there: client.health()"
    raise WaitTimeout(
        f"Job {job_id} has not ended in time ({view['status']}{why}); {told}. Give a longer "
        f"timeout={look}.",
        job_id=job_id,
        waiting_for=reason,
    )


def waiting_for(view: View) -> WaitingFor | None:
    """Why a job is not run now, as a view that was checked says it."""
    found = view.get("waiting_for")
    return msgspec.convert(found, WaitingFor) if found else None


def why_waiting(server: Server, group: str) -> Flow[WaitingFor | None]:
    """Why jobs of a group make no progress, as its newest ones that have not ended say.

    Asked once. A server that does not answer, or not now, is a reason too.
    """
    newest = yield from _listed_once(server, group=group, limit=_NEWEST)
    if isinstance(newest, list) and not any(map(_is_unfinished, newest)):
        # Those of a map that was taken up again may be older; to look for them costs more.
        newest = yield from _listed_once(server, group=group, status="pending", limit=1)
    if not isinstance(newest, list):
        return newest
    reasons = [one.waiting_for for one in newest if _is_unfinished(one)]
    return next(filter(None, reasons), None)


def _is_unfinished(view: _View) -> bool:
    return view.status not in jobs.TERMINAL


def _listed_once(server: Server, **query: Any) -> Flow[list[_View] | WaitingFor | None]:
    """Jobs, or why there is no answer; None where the key may not list them."""
    left = server.until - time.monotonic()
    request = Request(
        method="GET",
        path=f"/jobs{query_text(query)}",
        timeout_seconds=max(1.0, min(_LOOK_SECONDS, left)),
    )
    told = yield from exchange(with_own_headers(server, request))
    if isinstance(told, Lost) or told.status in AGAIN:
        return reason_of(told, server.url)
    if told.status >= 400:
        # The wait itself says what is wrong, if anything is.
        return None
    return _converted(server, _member(server, decoded(server, told), "jobs"), list[_View])


# --- jobs --------------------------------------------------------------------------------------


def cancel_job(server: Server, job_id: str, tenant: str | None = None) -> Flow[View]:
    """The job, cancelled or told to stop. A cancel whose first answer was lost knows its work."""
    try:
        view: View = yield from call(server, "DELETE", _job(job_id), tenant=tenant)
        _check_view(server, view)
    except JobFinished as error:
        view = yield from read(server, job_id, tenant=tenant)
        if view["status"] != "cancelled":
            raise error from None
    return view


def retry_job(server: Server, job_id: str, tenant: str | None = None) -> Flow[View]:
    try:
        view: View = yield from call(server, "POST", f"{_job(job_id)}/retry", tenant=tenant)
        _check_view(server, view)
    except JobNotRetryable as error:
        view = yield from read(server, job_id, tenant=tenant)
        if view["status"] in jobs.TERMINAL or view.get("round", 1) == 1:
            raise error from None
    return {**view, "tenant": tenant} if tenant else view


def list_jobs(server: Server, limit: int, query: Mapping[str, Any]) -> Flow[list[View]]:
    """Newest first, at most `limit`."""
    found: list[View] = []
    cursor: str | None = None
    while len(found) < limit:
        page = yield from get(
            server, "/jobs", **query, limit=min(_PAGE, limit - len(found)), cursor=cursor
        )
        views = _converted(server, _member(server, page, "jobs"), list[View])
        for view in views:
            _check_view(server, view)
        found += views
        cursor = page.get("cursor")
        if not cursor:
            break
    return found


def many(server: Server, method: str, path: str, query: Mapping[str, Any]) -> Flow[dict[str, Any]]:
    """Asks again while there is more, and adds up what was done."""
    total: dict[str, Any] = {}
    while True:
        answer = yield from call(server, method, path, **query)
        done = _converted(server, answer, dict[str, Any])
        more = done.pop("more", False)
        with strange_refused("An answer"):
            for name, value in done.items():
                total[name] = total[name] + value if name in total else value
        if not more or not any(done.values()):
            return total


def _job(job_id: str) -> str:
    return f"/job/{path_part(job_id)}"


def purge_job(server: Server, job_id: str, tenant: str | None = None) -> Flow[None]:
    yield from call(server, "DELETE", _job(job_id), purge=True, tenant=tenant)


# --- groups ------------------------------------------------------------------------------------


def group(server: Server, name: str) -> Flow[dict[str, Any]]:
    view: dict[str, Any] = yield from get(server, f"/group/{path_part(name)}")
    _member(server, view, "group")
    return view


def cancel_group(server: Server, name: str) -> Flow[dict[str, Any]]:
    done: dict[str, Any] = yield from call(server, "DELETE", f"/group/{path_part(name)}")
    return done


# --- the operator's ----------------------------------------------------------------------------


def health(server: Server) -> Flow[dict[str, Any]]:
    view: dict[str, Any] = yield from get(server, "/health")
    _member(server, view, "status")
    return view


def listed(server: Server, name: str) -> Flow[list[dict[str, Any]]]:
    """Of queues or workers."""
    found = _member(server, (yield from get(server, f"/{name}")), name)
    return _converted(server, found, list[dict[str, Any]])


def set_paused(server: Server, name: str, paused: bool) -> Flow[dict[str, Any]]:
    verb = "pause" if paused else "resume"
    path = f"/models/{path_part(name)}/{verb}"
    done: dict[str, Any] = yield from call(server, "POST", path)
    return done


def retry_ids(server: Server, ids: list[str], tenant: str | None) -> Flow[dict[str, Any]]:
    """At most 1,000 a request."""
    total: dict[str, Any] = {"retried": [], "refused": []}
    for start in range(0, len(ids), _PAGE):
        body = msgspec.json.encode({"job_ids": ids[start : start + _PAGE]})
        headers = {"content-type": "application/json"}
        path = f"/jobs/retry{query_text({'tenant': tenant})}"
        request = Request(method="POST", path=path, headers=headers, body=body)
        done = _converted(server, (yield from ask_json(server, request)), _Retried)
        total["retried"] += done.retried
        total["refused"] += done.refused
    return total


def purge_queue(server: Server, name: str) -> Flow[dict[str, Any]]:
    done: dict[str, Any] = yield from call(server, "POST", f"/models/{path_part(name)}/purge")
    return done


def retry_many(
    server: Server, ids: Sequence[str] | None, query: Mapping[str, Any]
) -> Flow[dict[str, Any]]:
    if ids is None:
        return (yield from many(server, "POST", "/jobs/retry", query))
    return (yield from retry_ids(server, list(ids), query.get("tenant")))
