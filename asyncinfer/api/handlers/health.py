"""The routes about the service itself: health, version and OpenAPI document."""

from asyncinfer import __version__
from asyncinfer.api.http.messages import Reply, Request, json_reply
from asyncinfer.api.services import Services
from asyncinfer.errors import RedisUnavailable, RequestError, ServerRefused, WritesRefused
from asyncinfer.repository.inspect.queue_load import read_starved_models
from asyncinfer.schemas.requests import NoQuery
from asyncinfer.schemas.responses import Health, Liveness, ServiceInfo

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


async def ready(services: Services, request: Request[NoQuery]) -> Reply:
    """Whether jobs can be accepted: Redis answers, runs scripts, takes writes and keeps jobs safe.

    Raises RedisUnavailable or WritesRefused if not, which are answered with 503.
    """
    if not request.admission.has_scope("read"):
        await _check_server_for_all(services)
    else:
        try:
            await services.store.check_server()
        except ServerRefused as error:
            raise RedisUnavailable(error.detail) from error
    if refusal := services.store.writes_refused:
        # Found by the last sweep or submit, at most some seconds ago.
        raise WritesRefused(refusal.detail, retry_after_seconds=1)
    return json_reply(200, Liveness())


async def health(services: Services, request: Request[NoQuery]) -> Reply:
    """The state of Redis, the queues, the workers, and the models without workers.

    The status stays `ok` if a model has no worker, since restarting an API does not help. Raises
    RedisUnavailable if Redis does not answer or cannot keep jobs safely. A caller without the scope
    `read` gets the status alone.
    """
    if not request.admission.has_scope("read"):
        await _check_server_for_all(services)
        return json_reply(200, Health())
    try:
        health_now = await services.inspection.health()
    except ServerRefused as error:
        raise RedisUnavailable(error.detail) from error
    waiting = [queue for queue, jobs in health_now.queues.items() if jobs]
    return json_reply(
        200,
        Health(
            redis=health_now.server,
            queues=health_now.queues,
            workers=health_now.workers,
            starved=await read_starved_models(services.store, waiting),
        ),
    )


async def _check_server_for_all(services: Services) -> None:
    """For callers without the scope `read`; raises RedisUnavailable. Messages of Redis or redis-py
    may hold names, and others the server's address, so none is passed on."""
    try:
        await services.store.check_server()
    except RedisUnavailable:
        raise RedisUnavailable("Redis does not answer. Retry in a moment.") from None
    except (ServerRefused, RequestError):
        raise RedisUnavailable(
            "Redis answers, but cannot be used for jobs. Retry with an API key that has the scope "
            "`read` to see why."
        ) from None
