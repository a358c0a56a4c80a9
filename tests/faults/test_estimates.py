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
from asyncinfer.repository import keys
from asyncinfer.repository.policy import Policy
from asyncinfer.worker.worker import WorkerConfig
from tests.api.harness import running_client

from .harness import eventually
from .processes import OpenWorkers

RUNS = 5
JOBS = 200
RUN_SECONDS = 0.1
WARM_JOBS = 20
KILLED_AFTER = 100
ASK_SECONDS = 0.25
MAX_ERROR = 0.25
"""Of the median."""

RUNNING = keys.running("predict_queue")
NDJSON = {"content-type": "application/x-ndjson"}

_log = logging.getLogger(__name__)


class Estimate(Struct, frozen=True):
    """What an API said of a waiting job, and when."""

    job_id: str
    asked_at: float
    """In Unix time."""
    eta_seconds: float | None


async def submit_all(api: httpx2.AsyncClient) -> None:
    line = b'{"data": [[0]], "options": {"group": "g"}}\n'
    reply = await api.post("/predict", content=line * JOBS, headers=NDJSON)
    assert reply.text.count('"pending"') == JOBS, reply.text


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
        if one.eta_seconds is None:
            continue  # the job of the lost worker, which was put back since the last look
        took = ended_at[one.job_id] - one.asked_at
        errors.append(abs(one.eta_seconds - took) / took)
    assert len(errors) > 0.9 * len(estimates)
    return errors


@pytest.mark.soak
async def test_estimates_are_right_within_a_quarter_though_a_worker_is_killed(
    open_workers: OpenWorkers, redis_url: str, server: redis.Redis
) -> None:
    errors: list[float] = []
    for run in range(RUNS):
        server.flushall()
        found = await errors_of_a_run(open_workers, redis_url, server)
        _log.info("Run %d: %d estimates, quartiles of the errors %s", run, len(found), shown(found))
        errors += found
    assert statistics.median(errors) < MAX_ERROR, shown(errors)


async def errors_of_a_run(
    open_workers: OpenWorkers, redis_url: str, server: redis.Redis
) -> list[float]:
    """The errors of the estimates of one run, from when 20 jobs have ended."""
    policy = Policy(job_ttl_seconds=600)
    config = ApiConfig(redis_url=redis_url, policy=policy)
    worker = WorkerConfig(concurrency=1, max_batch=1)
    with open_workers(policy=policy, worker=worker, run_seconds=RUN_SECONDS) as workers:
        killed, survivor = workers.start(), workers.start()
        for member in (killed, survivor):
            await eventually(lambda m=member: m.is_announced(server), "the worker is ready")  # type: ignore[misc]
        async with running_client(config) as api:
            await submit_all(api)

            def have_ended(count: int) -> bool:
                """Asked of Redis, which costs the workers' machine little."""
                return JOBS - server.llen("predict_queue") - server.hlen(RUNNING) >= count

            await eventually(lambda: have_ended(WARM_JOBS), "20 jobs ran", 300)
            async with asyncio.TaskGroup() as group:
                asking = group.create_task(ask_until_the_end(api))
                await eventually(lambda: have_ended(KILLED_AFTER), "half of the jobs ran", 300)
                killed.kill()
            await eventually(lambda: have_ended(JOBS), "all jobs ran", 300)
            return await errors_of(api, asking.result())


def shown(errors: list[float]) -> str:
    """The quartiles of errors."""
    return ", ".join(f"{quartile:.0%}" for quartile in statistics.quantiles(errors, n=4))
