"""The estimate of when a waiting job will have ended, against when it has."""

import asyncio
import logging
import random
import statistics
import time
from datetime import datetime

import httpx2
import pytest
import redis
from msgspec import Struct

from asyncinfer.api.config import ApiConfig
from asyncinfer.repository.policy import Policy
from asyncinfer.worker.worker import WorkerConfig
from tests.api.harness import running_client

from .harness import eventually
from .processes import OpenWorkers

JOBS = 200
JOB_MS = 100
WARM_JOBS = 20
KILLED_AFTER = 100
ASK_SECONDS = 0.25
MAX_ERROR = 0.25
"""Of the median. A machine whose other load comes and goes has no rate that could be foreseen."""

NDJSON = {"content-type": "application/x-ndjson"}

_log = logging.getLogger(__name__)


class Estimate(Struct, frozen=True):
    """What an API said of a waiting job, and when."""

    job_id: str
    asked_at: float
    """In Unix time."""
    eta_seconds: float | None


async def submit_all(api: httpx2.AsyncClient) -> None:
    line = b'{"data": [[%d]], "options": {"group": "g"}}\n' % JOB_MS
    reply = await api.post("/predict", content=line * JOBS, headers=NDJSON)
    assert reply.text.count('"pending"') == JOBS, reply.text


async def ended_count(api: httpx2.AsyncClient) -> int:
    group = (await api.get("/group/g")).json()
    return int(group["counts"]["completed"])


async def ask_until_the_end(api: httpx2.AsyncClient) -> list[Estimate]:
    """Asks for the end of a random waiting job, again and again, until none waits."""
    estimates = []
    while waiting := (await api.get("/jobs?status=pending&limit=200")).json()["jobs"]:
        job_id = random.choice(waiting)["job_id"]
        asked_at = time.time()
        job = (await api.get(f"/job/{job_id}")).json()
        if job["status"] == "pending":
            estimates.append(Estimate(job_id, asked_at, job["eta_seconds"]))
        await asyncio.sleep(ASK_SECONDS)
    return estimates


async def errors_of(api: httpx2.AsyncClient, estimates: list[Estimate]) -> list[float]:
    """The relative error of each estimate."""
    jobs = (await api.get(f"/jobs?limit={JOBS}")).json()["jobs"]
    ended_at = {
        job["job_id"]: datetime.fromisoformat(job["finished_at"]).timestamp() for job in jobs
    }
    errors = []
    for one in estimates:
        assert one.eta_seconds is not None
        took = ended_at[one.job_id] - one.asked_at
        errors.append(abs(one.eta_seconds - took) / took)
    return errors


@pytest.mark.soak
@pytest.mark.parametrize("run", range(5))
async def test_estimates_are_right_within_a_quarter_though_a_worker_is_killed(
    run: int, open_workers: OpenWorkers, redis_url: str, server: redis.Redis
) -> None:
    policy = Policy(job_ttl_seconds=600)
    config = ApiConfig(redis_url=redis_url, policy=policy)
    worker = WorkerConfig(concurrency=1, max_batch=1)
    with open_workers(policy=policy, worker=worker) as workers:
        killed, survivor = workers.start(), workers.start()
        for member in (killed, survivor):
            await eventually(lambda m=member: m.is_announced(server), "the worker is ready")  # type: ignore[misc]
        async with running_client(config) as api:
            await submit_all(api)

            async def have_ended(count: int) -> bool:
                return await ended_count(api) >= count

            await eventually(lambda: have_ended(WARM_JOBS), "20 jobs ran", 300)
            async with asyncio.TaskGroup() as group:
                asking = group.create_task(ask_until_the_end(api))
                await eventually(lambda: have_ended(KILLED_AFTER), "half of the jobs ran", 300)
                killed.kill()
            await eventually(lambda: have_ended(JOBS), "all jobs ran", 300)
            errors = await errors_of(api, asking.result())
    quartiles = statistics.quantiles(errors, n=4)
    shown = ", ".join(f"{quartile:.0%}" for quartile in quartiles)
    _log.info("Run %d: %d estimates, quartiles of the errors %s", run, len(errors), shown)
    assert quartiles[1] < MAX_ERROR, shown
