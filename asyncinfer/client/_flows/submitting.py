"""Submitting jobs, with the forms of their inputs."""

import math
import re
import time
import uuid
from collections.abc import Mapping
from typing import Any, Final, Literal, TypedDict

from msgspec import Struct

from asyncinfer.client._answers import ValidInput
from asyncinfer.client._decoding import decode_binary_result
from asyncinfer.client._encoding import BINARY, RequestBody, array_body, is_json_value, json_body
from asyncinfer.client._errors import error_of_response
from asyncinfer.client._flows import waiting
from asyncinfer.client._flows.jobs import MARGIN_SECONDS
from asyncinfer.client._flows.models import cached_model
from asyncinfer.client._flows.views import View, check_view, outcome
from asyncinfer.client._protocol import Flow, Request, Response
from asyncinfer.client._requests import (
    RemoteServer,
    convert,
    decode_json,
    fetch,
    fetch_json,
    path_part,
)
from asyncinfer.errors import InvalidInput
from asyncinfer.jobs import Priority

_KEY: Final = re.compile(r"[!-~]{1,255}")
_REQUEST_ID: Final = re.compile(r"[!-~]{1,128}")


class MapJobOptions(TypedDict, total=False):
    """The options of each job of a map, whose webhook is that of its group. One that is None is
    left out."""

    priority: Priority | None
    delay_seconds: float | None
    start_within_seconds: float | None
    finish_within_seconds: float | None
    ttl_seconds: int | None
    version: str | None
    group: str | None
    answer: Literal["json", "tensors"] | None


class JobOptions(MapJobOptions, total=False):
    """The options of one job; `Client` describes them. One that is None is left out."""

    webhook: str | Mapping[str, Any] | None


class NewJob(Struct, frozen=True, kw_only=True):
    """A job to submit."""

    value: Any
    model: str | None
    options: Mapping[str, Any]
    key: str
    """Its Idempotency-Key."""
    request_id: str | None = None
    """Its X-Request-ID; None leaves that to the server."""
    queue_full_seconds: float = 0.0
    """How long a full queue is awaited, beyond all retries."""


def new_job(
    value: Any, model: str | None, key: str | None, options: Any, request_id: str | None = None
) -> NewJob:
    """A job with the given idempotency key, or a random one; it is not sent.

    Options that are None are left out. Raises InvalidInput if the key or the request's id is
    malformed.
    """
    if request_id is not None and not _REQUEST_ID.fullmatch(request_id):
        raise InvalidInput("request_id takes 1 to 128 visible ASCII characters.")
    if key is not None and not _KEY.fullmatch(key):
        raise InvalidInput("idempotency_key takes 1 to 255 visible ASCII characters.")
    options = given_options(options)
    return NewJob(
        value=value,
        model=model,
        options=options,
        key=key or uuid.uuid4().hex,
        request_id=request_id,
    )


def given_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without those that are None; a webhook that is a URL as an object."""
    given = {name: option for name, option in options.items() if option is not None}
    if isinstance(given.get("webhook"), str):
        given["webhook"] = {"url": given["webhook"]}
    return given


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
    until = waiting.deadline(server, timeout)
    body = yield from body_of(server, job)
    response = yield from _post(server, job, body, until, wait=True)
    if response.headers.get("content-type", "").startswith(BINARY):
        return decode_binary_result(response)
    view = check_view(server, decode_json(server, response))
    if response.status == 200:
        return outcome(view)
    return (yield from waiting.result(server, view, until, cancel_on_timeout=cancel_on_timeout))


def submit(server: RemoteServer, job: NewJob) -> Flow[View]:
    """Submits a job, and returns its view as the server accepted it: with id, status and no result.

    Raises CannotSend, and the error with which the server refuses the job.
    """
    body = yield from body_of(server, job)
    until = time.monotonic() + server.timeout_seconds
    response = yield from _post(server, job, body, until, wait=False)
    return check_view(server, decode_json(server, response))


def body_of(server: RemoteServer, job: NewJob) -> Flow[RequestBody]:
    """A list as JSON; other inputs as the bytes of tensors, in the datatypes of the model.

    The model is read from the server for this, unless it was lately. Raises CannotSend.
    """
    if is_json_value(job.value) and (body := json_body(job.value, job.options)):
        return body
    model = yield from cached_model(server, job.model)
    return array_body(job.value, model, job.options)


def validate(server: RemoteServer, value: Any, name: str | None, options: Any) -> Flow[ValidInput]:
    """How the server would understand an input; raises the error with which it refuses it."""
    body = yield from body_of(server, new_job(value, name, None, options))
    if name is None:
        name = (yield from cached_model(server, None)).model
    path = f"/models/{path_part(name)}/validate"
    request = Request(method="POST", path=path, headers=body.headers, body=body.content)
    return convert(server, (yield from fetch_json(server, request)), ValidInput)


def _post(
    server: RemoteServer, job: NewJob, body: RequestBody, until: float, *, wait: bool
) -> Flow[Response]:
    """Submits a job, and returns the response, whose status is below 400; raises its error else.

    With `wait` the server holds the response back until the job has ended: at most 30 s, and not
    past `until`.
    """
    path = "/predict" if job.model is None else f"/predict/{path_part(job.model)}"
    headers = {**body.headers, "idempotency-key": job.key}
    if job.request_id is not None:
        headers["x-request-id"] = job.request_id
    seconds = (
        math.floor(min(waiting.MAX_WAIT_SECONDS, max(until - time.monotonic(), 0))) if wait else 0
    )
    if wait:
        headers |= {"prefer": f"wait={seconds}", "accept": body.accept}
    request = Request(
        method="POST",
        path=path,
        headers=headers,
        body=body.content,
        timeout_seconds=seconds + MARGIN_SECONDS,
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
