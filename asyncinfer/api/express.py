"""The short way of a usual `POST /predict`: it is answered without a task of its own."""

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from msgspec import Struct

from asyncinfer.api.app import Api, check_scope
from asyncinfer.api.figures import RequestKey
from asyncinfer.api.handlers.predict import accepted_reply, predict
from asyncinfer.api.http.body import Body, is_plain_json
from asyncinfer.api.http.byte_budget import SMALL_BODY_BYTES
from asyncinfer.api.http.exchange import Exchange
from asyncinfer.api.http.header_fields import read_fields
from asyncinfer.api.http.messages import Request
from asyncinfer.api.inputs.new_job import (
    JobHead,
    explain_submit_error,
    job_head,
    job_of,
    refused_submit_error,
)
from asyncinfer.api.routes import ROUTES
from asyncinfer.errors import RequestError
from asyncinfer.monitoring.histogram import Histogram
from asyncinfer.repository.submissions import NewJob, SubmitReply
from asyncinfer.schemas.requests import RequestOptions, SubmitQuery

_ROUTE, _ROUTE_OF_MODEL = (route for route in ROUTES if route.handler is predict)
_PATH: Final = b"/predict"
_ACCEPTED: Final = 202
_NO_OPTIONS: Final = RequestOptions()
"""Those of the query, which a usual request has not."""
_UNUSUAL: Final = frozenset({b"prefer", b"idempotency-key", b"traceparent"})
"""Headers of requests that may have to wait for more than the submit, or are part of a trace."""


class _Path(Struct, frozen=True):
    """A path that takes submits, and the seconds of its requests whose job was accepted."""

    template: str
    accepted: Histogram


class Express:
    """Takes a usual request as far as its submit at once, by the functions of the ordinary way.
    What is unusual or wrong is left to that way, which then finds the same and says so."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._max_bytes = min(SMALL_BODY_BYTES, api.config.max_json_bytes)
        figures = api.request_figures
        # Nearly all are accepted, so theirs are not looked for at each request.
        self._default, self._named = (
            _Path(route.path, figures.of(_key(route.path, _ACCEPTED)))
            for route in (_ROUTE, _ROUTE_OF_MODEL)
        )

    def begin(self, exchange: Exchange) -> Callable[[], bool] | None:
        """Checks the head of a request, and returns what submits its job when its body is received,
        or returns False for a body that is left to the ordinary way. None leaves the request to
        it already now, so that a wrong head is answered before its body has come."""
        scope = exchange.scope
        raw_path: bytes = scope["raw_path"]
        before, _, model = raw_path.partition(_PATH + b"/")
        is_submit = raw_path == _PATH or (model and not before)
        if not is_submit or scope["method"] != "POST" or scope["query_string"]:
            return None
        started_at = self._api.clock()
        try:
            headers = read_fields(scope["headers"])
            # First, as an unusual request is checked again by the ordinary way.
            if not self._is_usual(headers):
                return None
            request: Request[SubmitQuery]
            request = self._api.admit(_ROUTE, scope, headers, exchange.receive)
            check_scope(_ROUTE, request)
            services = self._api.services
            served = services.catalog.find_known(model.decode() or None)
            if served is None:
                return None
            max_ttl_seconds, checks = self._api.config.max_ttl_seconds, services.webhook_checks
            head = job_head(request, _NO_OPTIONS, served, None, max_ttl_seconds, checks)
        except Exception:
            # Whatever it is, the ordinary way meets it too, and answers or logs it.
            return None
        path = self._named if model else self._default
        return partial(self._submit, exchange, request, head, path, started_at)

    def _is_usual(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether the headers announce a small body of JSON and ask for nothing else."""
        length = headers.get(b"content-length", b"0")
        return (
            _UNUSUAL.isdisjoint(headers)
            and is_plain_json(headers)
            and len(length) <= len(str(self._max_bytes))
            and 0 < int(length) <= self._max_bytes
        )

    def _submit(
        self,
        exchange: Exchange,
        request: Request[SubmitQuery],
        head: JobHead,
        path: _Path,
        started_at: float,
    ) -> bool:
        """Submits the job of a request whose body is received; returns whether that has begun."""
        body = exchange.take_body()
        try:
            # The key may have been revoked while the body was being received.
            request.admission.check()
            job = job_of(head, Body(body, None))
        except Exception:
            exchange.add_body(body)
            return False
        submitted = self._api.services.submissions.begin_submit(job)
        submitted.add_done_callback(partial(self._answer, exchange, job, path, started_at))
        return True

    def _answer(
        self,
        exchange: Exchange,
        job: NewJob,
        path: _Path,
        started_at: float,
        submitted: "asyncio.Future[SubmitReply]",
    ) -> None:
        """Answers a request whose submit has ended, and counts it."""
        try:
            if refusal := self._refusal(job, submitted):
                reply = self._api.error_reply(refusal, exchange.scope)
            else:
                reply = accepted_reply(self._api.services, job.job_id, "pending", job.record)
            exchange.reply(reply)
        except Exception as error:
            reply = self._api.error_reply(error, exchange.scope)
            exchange.reply(reply)
        seconds = self._api.clock() - started_at
        if reply.status == _ACCEPTED:
            path.accepted.observe(seconds)
        else:
            self._api.request_figures.answered(_key(path.template, reply.status), seconds)

    def _refusal(
        self, job: NewJob, submitted: "asyncio.Future[SubmitReply]"
    ) -> RequestError | None:
        """Why the job was not accepted; None if it was. It is not raised, since its traceback would
        keep the job in memory."""
        error = submitted.exception()
        if isinstance(error, RequestError):
            return explain_submit_error(error, job)
        services = self._api.services
        return refused_submit_error(
            submitted.result(),
            job,
            services.config.policy,
            services.wait_reasons,
            services.queue_looks,
        )


def _key(path: str, status: int) -> RequestKey:
    """That of a request which was answered here."""
    return (_ROUTE.method, path, status, False)
