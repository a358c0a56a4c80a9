"""The timeline of a job that lost workers, as its user reads it."""

import asyncio
import signal
from typing import Any

import msgspec
import pytest
import redis

from asyncinfer.api.config import ApiConfig
from asyncinfer.client import AsyncClient, AsyncJob, TimelineEvent
from asyncinfer.repository.policy import Policy
from tests.api.harness import client_of, running
from tests.cli.command_line import CommandResult, run_in_shell
from tests.process import REPOSITORY

from .harness import eventually
from .processes import OpenWorkers, Workers

POLICY = Policy(lease_seconds=0.5, reap_seconds=0.08, job_ttl_seconds=600)


async def submit_and_lose_workers(
    client: AsyncClient, workers: Workers, server: redis.Redis, count: int
) -> AsyncJob:
    """Submits a job to workers that, one after another, die in its run."""
    doomed = workers.start(die_at="running")
    await eventually(lambda: doomed.is_announced(server), "the worker has its model")
    job = await client.submit([[1.0]], "slow")
    for number in range(count):
        await eventually(doomed.has_ended, "the worker dies")
        assert doomed.process.returncode == -signal.SIGKILL
        if number < count - 1:
            doomed = workers.start(die_at="running")
    return job


async def show(job: AsyncJob, url: str) -> CommandResult:
    """The output of `asyncinfer job ID --timeline`."""
    command = f"python -m asyncinfer job {job.id} --timeline --url {url}"
    return await asyncio.to_thread(run_in_shell, command, REPOSITORY)


async def read_timeline(port: int, job_id: str) -> dict[str, Any]:
    async with client_of(port) as http:
        reply = await http.get(f"/job/{job_id}/timeline")
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


@pytest.mark.soak
async def test_a_job_that_lost_two_workers_and_then_completed_shows_when_and_where(
    open_workers: OpenWorkers, redis_url: str, server: redis.Redis
) -> None:
    with open_workers(policy=POLICY) as workers:
        config = ApiConfig(redis_url=redis_url, policy=POLICY)
        async with running(config) as port:
            url = f"http://127.0.0.1:{port}"
            async with AsyncClient(url) as client:
                job = await submit_and_lose_workers(client, workers, server, 2)
                workers.start()
                await job.wait()
                timeline = await job.timeline()
            body = await read_timeline(port, job.id)
            command = await show(job, url)
        assert await workers.members[-1].stop() == 0

    lost = ["claimed", "worker_lost", "redelivered"]
    assert [event.event for event in timeline] == [
        *("submitted", *lost, *lost, "claimed", "running", "finished")
    ]
    claims = [event for event in timeline if event.event == "claimed"]
    assert [claim.delivery for claim in claims] == [1, 2, 3]
    assert len({claim.worker for claim in claims}) == 3
    assert [claim.at is not None for claim in claims] == [False, False, True]
    losses = [event for event in timeline if event.event == "worker_lost"]
    assert [loss.worker for loss in losses] == [claim.worker for claim in claims[:2]]
    # A lease that is not renewed ends after 0.5 s.
    assert all(loss.seconds is not None and loss.seconds >= 0.4 for loss in losses)
    known_ms = [event.at_ms for event in timeline if event.at_ms is not None]
    assert known_ms == sorted(known_ms)
    run = timeline.events[-2]
    assert (run.jobs, run.rows, run.version, run.provider) == (1, 1, "1", "CPU")
    assert run.sha256 == job.as_dict()["sha256"]
    assert timeline.events[-1].status == "completed"
    assert timeline.seconds is not None
    assert abs(timeline.seconds - (known_ms[-1] - known_ms[0]) / 1000) < 0.001
    assert list(timeline) == msgspec.convert(body["events"], list[TimelineEvent])
    assert command.out.count("worker_lost") == 2
    assert f"delivery 2, {claims[1].worker}" in command.out


@pytest.mark.soak
async def test_a_dead_letter_shows_each_of_the_workers_that_it_lost(
    open_workers: OpenWorkers, redis_url: str, server: redis.Redis
) -> None:
    policy = msgspec.structs.replace(POLICY, max_deliveries=2)
    with open_workers(policy=policy) as workers:
        config = ApiConfig(redis_url=redis_url, policy=policy)
        async with running(config) as port:
            url = f"http://127.0.0.1:{port}"
            async with AsyncClient(url) as client:
                job = await submit_and_lose_workers(client, workers, server, 2)
                await job.wait()
                timeline = await job.timeline()
            body = await read_timeline(port, job.id)
            command = await show(job, url)

    assert job.error is not None
    assert set(msgspec.to_builtins(job.error)) == {"code", "message"}
    assert [event.event for event in timeline] == [
        *("submitted", "claimed", "worker_lost", "redelivered"),
        *("claimed", "worker_lost", "finished"),
    ]
    *_, last_loss, end = timeline
    assert (end.status, end.code, end.seconds) == ("failed", "worker_lost", 0.0)
    assert (last_loss.delivery, last_loss.at_ms) == (2, end.at_ms)
    assert timeline.seconds is not None
    assert timeline.seconds >= 0.8
    assert list(timeline) == msgspec.convert(body["events"], list[TimelineEvent])
    assert command.code == 1
    assert "failed, worker_lost" in command.out
