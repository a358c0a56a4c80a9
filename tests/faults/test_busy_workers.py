"""Jobs that wait although their workers live, since these run other jobs."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx2
import pytest
import redis

from asyncinfer.api.config import ApiConfig
from asyncinfer.repository import keys
from asyncinfer.repository.policy import Policy
from asyncinfer.worker.worker import WorkerConfig
from tests import zoo
from tests.api.harness import hosted, running_client

from .harness import eventually
from .processes import OpenWorkers, Workers

pytestmark = pytest.mark.soak


@pytest.fixture
def workers(open_workers: OpenWorkers, tmp_path: Path) -> Iterator[Workers]:
    """Workers of two slots that serve `slow` and `quick`; none runs yet."""
    folder = tmp_path / "models"
    zoo.place(folder, "slow", zoo.slow())
    zoo.place(folder, "quick", zoo.adds(1))
    config = WorkerConfig(concurrency=2, max_batch=1, prediction_timeout_seconds=60)
    with open_workers(model_dir=str(folder), models=(), worker=config) as opened:
        yield opened


@pytest.fixture
async def client(
    redis_url: str, policy: Policy, server: redis.Redis
) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of an API that starts on an empty Redis: of another one it would remember the
    default model."""
    config = ApiConfig(redis_url=redis_url, policy=policy)
    async with hosted(running_client(config)) as client:
        yield client


async def test_a_job_behind_one_that_runs_alone_says_so(
    client: httpx2.AsyncClient, workers: Workers, server: redis.Redis
) -> None:
    first = workers.start()
    await eventually(lambda: first.is_announced(server), "it is ready")
    slow = await _submit(client, "slow", zoo.FOREVER)
    await eventually(lambda: _is_running(server, slow), "it runs")
    first.kill()
    second = workers.start()
    await eventually(lambda: second.is_announced(server), "it is ready")
    await eventually(lambda: _runs_again(client, slow), "it runs again")

    quick = await _submit(client, "quick", 1.0)

    await eventually(
        lambda: _says(client, quick, "may run only one job at a time"), "it says why it waits"
    )
    assert (await client.get(f"/job/{quick}")).json()["eta_seconds"] is None
    listed = (await client.get("/workers")).json()["workers"]
    assert any(worker["isolating"] for worker in listed)
    await client.delete(f"/job/{slow}")
    await eventually(lambda: server.get(keys.status(quick)) == b"completed", "it has run")


async def test_a_job_whose_workers_are_busy_with_other_models_says_so(
    client: httpx2.AsyncClient, workers: Workers, server: redis.Redis
) -> None:
    worker = workers.start()
    await eventually(lambda: worker.is_announced(server), "it is ready")
    slow = [await _submit(client, "slow", zoo.FOREVER) for _ in range(2)]
    await eventually(lambda: all(_is_running(server, job_id) for job_id in slow), "both run")

    quick = await _submit(client, "quick", 1.0)

    await eventually(lambda: _says(client, quick, "run jobs of other models"), "it says why")
    for job_id in slow:
        await client.delete(f"/job/{job_id}")
    await eventually(lambda: server.get(keys.status(quick)) == b"completed", "it has run")


async def _submit(client: httpx2.AsyncClient, model: str, value: float) -> str:
    answer = await client.post(f"/predict/{model}", json={"data": [[value]]})
    assert answer.status_code == 202, answer.text
    job_id: str = answer.json()["job_id"]
    return job_id


def _is_running(server: redis.Redis, job_id: str) -> bool:
    return server.get(keys.status(job_id)) == b"processing"


async def _runs_again(client: httpx2.AsyncClient, job_id: str) -> bool:
    """Whether a job that was lost with its worker is run by another."""
    timeline = (await client.get(f"/job/{job_id}/timeline")).json()
    names = [event["event"] for event in timeline["events"]]
    return timeline["status"] == "processing" and "worker_lost" in names


async def _says(client: httpx2.AsyncClient, job_id: str, words: str) -> bool:
    reason = (await client.get(f"/job/{job_id}")).json()["waiting_for"]
    return bool(reason) and reason["code"] == "no_free_slot" and words in reason["message"]
