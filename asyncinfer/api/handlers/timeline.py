"""GET /job/{id}/timeline: what has happened to a job, and when."""

from asyncinfer.api.audit import audited
from asyncinfer.api.http.messages import Reply, Request, json_reply
from asyncinfer.api.job_lookup import find_job, job_absent_error
from asyncinfer.api.services import Services
from asyncinfer.api.timelines import timeline_view
from asyncinfer.repository.inspect.history import read_history
from asyncinfer.schemas.requests import JobQuery


async def read_timeline(services: Services, request: Request[JobQuery]) -> Reply:
    """What has happened to a job in its present round, with times.

    It holds no data of the tenant, so an operator is shown the same. Raises JobNotFound, JobExpired
    or RedisUnavailable.
    """
    async with audited(services, request, "read", {"job_id": request.path("id")}) as audit:
        stored = await find_job(services, request)
        history = await read_history(services.store, stored)
        if history is None:
            raise job_absent_error(services, stored.job_id)
        audit.count = 1
    return json_reply(200, timeline_view(history))
