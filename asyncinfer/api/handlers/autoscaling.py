"""The route that an autoscaler asks: how much work waits for a model, and for whom."""

from asyncinfer.api.http.messages import Reply, Request, json_reply
from asyncinfer.api.services import Services
from asyncinfer.repository.inspect.queue_load import Load, load
from asyncinfer.schemas.requests import NoQuery
from asyncinfer.schemas.responses import Scale


async def read_scale(services: Services, request: Request[NoQuery]) -> Reply:
    """How much work waits for a model, in seconds of slot time, and who works on it."""
    served = await services.catalog.find(request.path("model"))
    model = served.signature.model
    return json_reply(200, _view(model, await load(services.store, model, served.queue)))


def _view(model: str, found: Load) -> Scale:
    return Scale(
        model=model,
        waiting_jobs=found.waiting_jobs,
        running_jobs=found.gauge.running,
        paused=found.gauge.paused,
        oldest_age_seconds=found.gauge.oldest_age_seconds,
        seconds_per_job=found.seconds_per_job,
        backlog_seconds=found.backlog_seconds,
        workers=found.workers,
        slots=found.slots,
        starved=int(found.due_jobs > 0 and found.workers == 0),
    )
