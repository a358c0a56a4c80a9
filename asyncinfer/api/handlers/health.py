"""The routes about the service itself: health, version and OpenAPI document."""

from collections.abc import Sequence
from typing import Any, Final

from msgspec import UNSET, UnsetType

from asyncinfer import __version__
from asyncinfer.api.http.messages import Reply, Request, json_reply
from asyncinfer.api.services import Services
from asyncinfer.errors import (
    PermissionDenied,
    RedisRefused,
    RedisUnavailable,
    RequestError,
    ServerRefused,
    ServerStopping,
    StorageFull,
    WritesRefused,
)
from asyncinfer.repository.inspect.queue_load import read_starved_models
from asyncinfer.repository.intake import why_no_jobs
from asyncinfer.schemas.requests import NoQuery, ReadyQuery
from asyncinfer.schemas.responses import Health, Liveness, NotAccepting, Readiness, ServiceInfo

_NO_ANSWER: Final = "Redis does not answer. Retry in a moment."
_SEE_WHY: Final = (
    "Redis answers, but cannot be used for jobs. Retry with an API key that has the scope "
    "`read` to see why."
)

_LINKS = {
    "predict": "/predict",
    "jobs": "/jobs",
    "models": "/models",
    "health": "/health",
    "openapi": "/openapi.json",
}


async def about(services: Services, request: Request[NoQuery]) -> Reply:
    """The name and version of this service, and its main routes."""
    return json_reply(200, ServiceInfo("asyncinfer", __version__, _LINKS))


async def openapi(services: Services, request: Request[NoQuery]) -> Reply:
    """The OpenAPI 3.1 document of this API."""
    return Reply(200, services.openapi)


async def live(services: Services, request: Request[NoQuery]) -> Reply:
    """Whether the process answers."""
    return json_reply(200, Liveness())


async def ready(services: Services, request: Request[ReadyQuery]) -> Reply:
    """Whether this API can serve anything; with `for=submit` whether it can accept jobs too.

    Reads, cancels and deletions work while Redis takes no new jobs: an API that is taken out of
    service then could not even be used to make room. Raises ServerStopping, and the reason if Redis
    has not answered for a while, or does not take jobs and the query asks for that.
    """
    if services.inbox.closing.is_set():
        raise ServerStopping("The server is stopping; use another one.", retry_after_seconds=1)
    refusal = await _why_not_accepting(services, request)
    if refusal is None:
        return json_reply(200, Readiness())
    if request.query.purpose == "submit" or _is_redis_away(services):
        raise refusal
    return json_reply(200, Readiness(accepting=False, reason=_view(refusal)))


async def health(services: Services, request: Request[NoQuery]) -> Reply:
    """The state of Redis, the queues, the workers, and the models without workers.

    The status stays `ok` if a model has no worker or no jobs are accepted, since restarting an API
    does not help. Raises RedisUnavailable if Redis does not answer or cannot keep jobs safely. A
    caller without the scope `read` gets the status alone, and whether jobs are accepted.
    """
    if not request.admission.has_scope("read"):
        return await _health_for_all(services, request)
    try:
        health_now = await services.inspection.health()
    except ServerRefused as error:
        raise RedisUnavailable(error.detail) from error
    waiting = [queue for queue, jobs in health_now.queues.items() if jobs]
    refusal = await _why_not_accepting(services, request)
    return json_reply(
        200,
        Health(
            accepting=refusal is None,
            reason=UNSET if refusal is None else _view(refusal),
            redis=health_now.server,
            queues=health_now.queues,
            workers=health_now.workers,
            starved=await _starved(services, waiting),
        ),
    )


async def _starved(services: Services, waiting: Sequence[str]) -> list[str] | UnsetType:
    """Models that no living worker has, whose queues have jobs; UNSET if Redis denies to find
    out."""
    try:
        return await read_starved_models(services.store, waiting)
    except PermissionDenied:
        return UNSET


async def _health_for_all(services: Services, request: Request[Any]) -> Reply:
    """The answer without the scope `read`; raises RedisUnavailable. Messages of Redis or redis-py
    may hold names, so none is passed on."""
    try:
        await services.store.check_server()
    except PermissionDenied:
        raise PermissionDenied(_SEE_WHY) from None
    except RedisUnavailable:
        raise RedisUnavailable(_NO_ANSWER) from None
    except (ServerRefused, RequestError):
        raise RedisUnavailable(_SEE_WHY) from None
    refusal = await _why_not_accepting(services, request)
    if refusal is None:
        return json_reply(200, Health())
    return json_reply(200, Health(accepting=False, reason=_view(refusal)))


def _is_redis_away(services: Services) -> bool:
    """Whether Redis has not answered for so long that it is no short outage."""
    report = services.store.report
    limit = services.config.unready_after_seconds
    return report is not None and report.outage.silent_seconds > limit


async def _why_not_accepting(services: Services, request: Request[Any]) -> RequestError | None:
    """Why a submit would be refused now, None if it would not. Raises nothing. Messages of Redis or
    redis-py may hold names, so a caller without the scope `read` gets another one."""
    shows_names = request.admission.has_scope("read")
    try:
        await services.store.check_server()
        refusal: RequestError | None = await why_no_jobs(services.store)
    except ServerRefused as error:
        services.store.warn_of_unsafe_server(error)
        return RedisUnavailable(error.detail if shows_names else _SEE_WHY, retry_after_seconds=1)
    except RequestError as error:
        refusal = error
    if refusal is None or shows_names or isinstance(refusal, StorageFull | WritesRefused):
        return refusal
    message = _SEE_WHY if isinstance(refusal, RedisRefused) else _NO_ANSWER
    return type(refusal)(message, retry_after_seconds=1)


def _view(refusal: RequestError) -> NotAccepting:
    return NotAccepting(refusal.code, refusal.detail)
