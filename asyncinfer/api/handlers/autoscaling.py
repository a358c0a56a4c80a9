"""The route for autoscalers: how much work waits for a model, and how many workers it has."""

from asyncinfer.api.http.messages import Reply, Request, json_reply
from asyncinfer.api.services import Services
from asyncinfer.repository.inspect.queue_load import QueueLoad, read_load
from asyncinfer.schemas.requests import NoQuery
from asyncinfer.schemas.responses import Scale


async def read_scale(services: Services, request: Request[NoQuery]) -> Reply:
    """How much work waits for a model, in seconds of slot time, and how many slots work on it.

    Raises ModelNotFound, NoModelAnnounced, ModelLoading or RedisUnavailable.
    """
    served = await services.catalog.find(request.path("model"))
    model = served.signature.model
    return json_reply(200, _view(model, await read_load(services.store, model, served.queue)))


def _view(model: str, queue_load: QueueLoad) -> Scale:
    return Scale(
        model=model,
        waiting_jobs=queue_load.waiting_jobs,
        running_jobs=queue_load.depth.running,
        paused=queue_load.depth.paused,
        oldest_age_seconds=queue_load.depth.oldest_age_seconds,
        seconds_per_job=queue_load.seconds_per_job,
        backlog_seconds=queue_load.backlog_seconds,
        workers=queue_load.workers,
        slots=queue_load.slots,
        starved=int(queue_load.due_jobs > 0 and queue_load.workers == 0),
    )
