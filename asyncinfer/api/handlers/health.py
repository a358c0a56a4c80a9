"""The routes about the service itself: what it is, how it is, how to talk to it."""

from asyncinfer import __version__
from asyncinfer.api.http.messages import Reply, Request, json_reply
from asyncinfer.api.services import Services
from asyncinfer.errors import RedisUnavailable, RequestError, ServerRefused, WritesRefused
from asyncinfer.repository.inspect.queue_load import starved
from asyncinfer.schemas.requests import NoQuery
from asyncinfer.schemas.responses import About, Alive, Health

_LINKS = {
    "predict": "/predict",
    "jobs": "/jobs",
    "models": "/models",
    "health": "/health",
    "openapi": "/openapi.json",
}


async def about(services: Services, request: Request[NoQuery]) -> Reply:
    """What this is, and where things are."""
    return json_reply(200, About("asyncinfer", __version__, _LINKS))


async def openapi(services: Services, request: Request[NoQuery]) -> Reply:
    """This API in OpenAPI 3.1."""
    return Reply(200, services.openapi)


async def live(services: Services, request: Request[NoQuery]) -> Reply:
    """Whether the process answers."""
    return json_reply(200, Alive())


async def ready(services: Services, request: Request[NoQuery]) -> Reply:
    """Whether jobs can be taken: Redis answers, takes writes, and is one that keeps them."""
    try:
        await services.store.check_server()
    except ServerRefused as error:
        raise RedisUnavailable(error.detail) from error
    if refusal := services.store.writes_refused:
        # As the last sweep or submit found, some seconds ago at most.
        raise WritesRefused(refusal.detail, retry_after_seconds=1)
    return json_reply(200, Alive())


async def health(services: Services, request: Request[NoQuery]) -> Reply:
    """Redis, what waits in each queue, for which models nobody works, and how many workers there
    are. The status stays `ok` where a model is starved: that mends nobody who restarts an API."""
    if not request.admission.may("read"):
        return await _health_for_all(services)
    try:
        found = await services.inspection.health()
    except ServerRefused as error:
        raise RedisUnavailable(error.detail) from error
    waiting = [queue for queue, jobs in found.queues.items() if jobs]
    return json_reply(
        200,
        Health(
            redis=found.server,
            queues=found.queues,
            workers=found.workers,
            starved=await starved(services.store, waiting),
        ),
    )


async def _health_for_all(services: Services) -> Reply:
    """Without names: what Redis or redis-py says may hold some, so none of it is passed on."""
    try:
        await services.store.check_server()
    except RedisUnavailable:
        raise RedisUnavailable("Redis does not answer. Retry in a moment.") from None
    except (ServerRefused, RequestError):
        raise RedisUnavailable(
            "Redis answers, but cannot be used for jobs. Ask again with an API key that has the "
            "scope `read`, to be told why."
        ) from None
    return json_reply(200, Health())
