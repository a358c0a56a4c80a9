"""Cancelled jobs: waiting, delayed, running, and at the moment when they end."""

import asyncio
import time

import pytest
import redis

from asyncinfer.jobs import TERMINAL, Options
from asyncinfer.repository import keys
from asyncinfer.repository.stored_jobs import StoredJob
from asyncinfer.worker.worker import WorkerConfig
from tests import zoo
from tests.faults.load_client import LoadClient, assert_one_end_each, transitions

from .harness import assert_at_rest, eventually
from .processes import OpenWorkers


async def _read(load_client: LoadClient, job_id: str) -> StoredJob:
    (stored,) = await load_client.read([job_id])
    assert stored
    return stored


async def test_a_waiting_or_delayed_job_is_cancelled_at_once(
    load_client: LoadClient, server: redis.Redis
) -> None:
    (waiting,) = await load_client.submit([1.0])
    (delayed,) = await load_client.submit([1.0], Options(delay_seconds=60))
    for job_id in (waiting, delayed):
        stored = await _read(load_client, job_id)
        assert await load_client.operations.cancel(stored) == "cancelled"
        # A caller whose reply was lost calls again.
        assert await load_client.operations.cancel(stored) == "cancelled"
    assert_at_rest(server, load_client.queue)


async def test_a_running_job_is_stopped_and_its_neighbours_are_not(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    with open_workers() as workers:
        ids = await load_client.submit([500.0, 501.0, 502.0])
        worker = workers.start()
        await eventually(lambda: server.hlen(keys.running(load_client.queue)) == 3, "all three run")
        stored = await _read(load_client, ids[1])
        assert await load_client.operations.cancel(stored) == "stopping"
        assert await load_client.operations.cancel(stored) in ("stopping", "cancelled")
        await eventually(lambda: server.get(keys.status(ids[1])) == b"cancelled", "it is cancelled")
        assert server.hlen(keys.running(load_client.queue)) == 2
        del load_client.acknowledged[ids[1]]
        await load_client.assert_all_completed()
        assert await worker.stop() == 0
    assert_one_end_each(server, load_client.queue)
    assert_at_rest(server, load_client.queue)


@pytest.mark.soak
async def test_a_run_whose_jobs_are_all_cancelled_stops_at_its_next_kernel(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    with open_workers(
        worker=WorkerConfig(concurrency=1, prediction_timeout_seconds=600)
    ) as workers:
        worker = workers.start()
        delays = [await _seconds_to_cancel(load_client, server) for _ in range(5)]
        # The only slot is free again; else this job would wait for years.
        load_client.acknowledged.clear()
        await load_client.submit([1.0])
        await load_client.assert_all_completed()
        assert min(delays) < 0.1, delays
        assert await worker.stop() == 0
    assert_at_rest(server, load_client.queue)


async def _seconds_to_cancel(load_client: LoadClient, server: redis.Redis) -> float:
    (job_id,) = await load_client.submit([zoo.FOREVER])
    await eventually(lambda: server.hexists(keys.running(load_client.queue), job_id), "it runs")
    cancelled_at = time.monotonic()
    await load_client.operations.cancel(await _read(load_client, job_id))
    await eventually(lambda: server.get(keys.status(job_id)) == b"cancelled", "it is cancelled")
    return time.monotonic() - cancelled_at


@pytest.mark.soak
async def test_an_unknown_or_ended_job_cannot_be_cancelled(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    unknown = StoredJob("0" * 32, "pending", None, None, None)
    assert await load_client.operations.cancel(unknown) == "absent"
    with open_workers() as workers:
        (job_id,) = await load_client.submit([1.0])
        worker = workers.start()
        await load_client.assert_all_completed()
        stored = await _read(load_client, job_id)
        assert await load_client.operations.cancel(stored) == "finished"
        assert (await _read(load_client, job_id)).status == "completed"
        assert await worker.stop() == 0
    assert_at_rest(server, load_client.queue)


@pytest.mark.soak
async def test_a_job_of_a_dead_worker_can_be_cancelled(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    with open_workers() as workers:
        (job_id,) = await load_client.submit([2000.0])
        doomed = workers.start()
        await eventually(lambda: server.hlen(keys.running(load_client.queue)) == 1, "it runs")
        doomed.kill()
        assert await load_client.operations.cancel(await _read(load_client, job_id)) == "stopping"
        survivor = workers.start()
        await eventually(lambda: server.get(keys.status(job_id)) == b"cancelled", "it is cancelled")
        await eventually(lambda: survivor.is_announced(server), "the survivor is ready")
        assert await survivor.stop() == 0
    assert_at_rest(server, load_client.queue)


@pytest.mark.soak
async def test_each_of_500_jobs_cancelled_around_its_claim_or_finish_ends_once(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    with open_workers(worker=WorkerConfig(concurrency=2)) as workers:
        worker = workers.start()
        await eventually(lambda: worker.is_announced(server), "the worker is ready")
        for number in range(50):
            ids = await load_client.submit([float(number % 4)] * 10)
            async with asyncio.TaskGroup() as group:
                for number_in_batch, job_id in enumerate(ids):
                    group.create_task(_cancel_at(load_client, job_id, number_in_batch))
        ended = {job.job_id: job.status for job in await load_client.wait_until_all_ended()}
        assert await worker.stop() == 0
    assert len(ended) == 500
    logged = transitions(server, load_client.queue)
    for job_id, status in ended.items():
        assert [status for status in TERMINAL if logged[job_id][status]] == [status]
    assert set(ended.values()) == {"completed", "cancelled"}
    assert_one_end_each(server, load_client.queue)
    assert_at_rest(server, load_client.queue)


async def _cancel_at(load_client: LoadClient, job_id: str, number: int) -> None:
    """Cancels some round trips after the submit (0 to 3) or the start (4 to 8), or at the end."""
    earlier_statuses = ((), ("pending",), ("pending", "processing"))[(number + 1) // 5]
    deadline = time.monotonic() + 30
    while (stored := await _read(load_client, job_id)).status in earlier_statuses:
        assert time.monotonic() < deadline, f"still {stored.status}"
    for _ in range((number + 1) % 5):
        stored = await _read(load_client, job_id)
    await load_client.operations.cancel(stored)
