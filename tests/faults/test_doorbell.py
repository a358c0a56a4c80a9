"""How soon idle workers claim new jobs, and in which order jobs of all priorities are run."""

import asyncio
import time
from pathlib import Path

import pytest
import redis

from asyncinfer.jobs import Options
from asyncinfer.repository import keys
from asyncinfer.repository.claims import ClaimRequest, JobOutcome, QueueConsumer
from asyncinfer.repository.doorbell import Doorbell
from asyncinfer.repository.store import Store
from asyncinfer.worker.worker import WorkerConfig
from tests import zoo
from tests.faults.load_client import LoadClient, claim_sizes, completed_in_order

from .harness import Halts, assert_at_rest, eventually
from .processes import OpenWorkers

_POLL_SECONDS = 10.0


async def test_a_bulk_of_1000_wakes_eight_idle_workers(store: Store, server: redis.Redis) -> None:
    """The doorbell wakes each worker, before it would have polled its queue."""
    assert await _seconds_to_wake(store, server, 8) < _POLL_SECONDS


async def _seconds_to_wake(store: Store, server: redis.Redis, workers: int) -> float:
    """The time from the submit of a bulk until the last of the idle workers has a claim."""
    load_client = LoadClient(store)
    doorbells = [Doorbell(store) for _ in range(workers)]
    claimed_at: list[float] = []

    async def work(doorbell: Doorbell, name: str) -> None:
        runs = QueueConsumer(store, name)
        while await doorbell.wait([load_client.queue], _POLL_SECONDS) is None:
            pass
        request = ClaimRequest((load_client.queue,), runs.new_token(), False, 32)
        claim = (await runs.claim(request)).claim
        assert claim
        claimed_at.append(time.monotonic())
        finished = [JobOutcome(job.job_id, "completed", b"{}", job.meta) for job in claim.jobs]
        await runs.finish(claim, finished, last=True)

    async with asyncio.TaskGroup() as group:
        for number, doorbell in enumerate(doorbells):
            group.create_task(work(doorbell, f"w{number}"))
        await eventually(
            lambda: server.info("clients")["blocked_clients"] == workers, "all of them wait"
        )
        started_at = time.monotonic()
        await load_client.submit([1.0] * 1000)
    for doorbell in doorbells:
        await doorbell.close()
    server.flushall()
    return max(claimed_at) - started_at


@pytest.mark.soak
async def test_a_lost_doorbell_token_delays_a_job_by_one_poll_at_most(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    """An external producer's LPUSH rings no doorbell: its token is lost every time."""
    with open_workers(worker=WorkerConfig(concurrency=1, brpop_timeout_seconds=0.5)) as workers:
        worker = workers.start()
        await eventually(lambda: worker.is_announced(server), "the worker is ready")
        waits_seconds = []
        for number in range(3):
            job_id = f"external-{number}"
            server.set(keys.data(job_id), "[[1.0]]")
            server.set(keys.status(job_id), "pending")
            server.lpush(load_client.queue, job_id)
            with Halts() as halts:
                waits_seconds.append(await _seconds_to_complete(server, job_id))
            if waits_seconds[-1] < 0.5 + 0.4 + halts.seconds:
                break  # a busy machine may delay a job or two
        assert waits_seconds[-1] < 0.5 + 0.4 + halts.seconds, waits_seconds
        assert await worker.stop() == 0
    assert_at_rest(server, load_client.queue)


async def _seconds_to_complete(server: redis.Redis, job_id: str) -> float:
    started_at = time.monotonic()
    await eventually(lambda: server.get(keys.status(job_id)) == b"completed", "it is completed")
    return time.monotonic() - started_at


@pytest.mark.soak
async def test_low_priority_jobs_run_while_high_priority_jobs_still_wait(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    low = await load_client.submit([1.0] * 4, Options(priority="low"))
    normal = await load_client.submit([1.0] * 4)
    high = await load_client.submit([1.0] * 140, Options(priority="high"))
    with open_workers(worker=WorkerConfig(concurrency=1, max_batch=1)) as workers:
        worker = workers.start()
        await load_client.assert_all_completed()
        assert await worker.stop() == 0
    order = completed_in_order(server, load_client.queue)
    while_high_waits = set(order[: order.index(high[-1])])
    assert while_high_waits >= {*low, *normal}
    assert_at_rest(server, load_client.queue)


@pytest.mark.soak
async def test_low_priority_jobs_run_in_each_of_two_queues_while_high_priority_jobs_still_wait(
    open_workers: OpenWorkers, server: redis.Redis, store: Store
) -> None:
    clients = [LoadClient(store, "slow"), LoadClient(store, "picky")]
    low: list[list[str]] = []
    high: list[list[str]] = []
    for load_client in clients:
        low.append(await load_client.submit([1.0] * 2, Options(priority="low")))
        high.append(await load_client.submit([1.0] * 80, Options(priority="high")))
    config = WorkerConfig(concurrency=1, max_batch=1)
    with open_workers(models=("slow", "picky"), default_model="slow", worker=config) as workers:
        worker = workers.start()
        for load_client in clients:
            await load_client.assert_all_completed()
        assert await worker.stop() == 0
    for load_client, its_low, its_high in zip(clients, low, high, strict=True):
        order = completed_in_order(server, load_client.queue)
        assert set(order[: order.index(its_high[-1])]) >= set(its_low)
    assert_at_rest(server, *(load_client.queue for load_client in clients))


@pytest.mark.soak
async def test_after_many_short_runs_a_job_does_not_wait_for_a_long_run_of_the_other_slot(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    """Beside short runs the other slot skips the doorbell: their next claim takes the new job."""
    config = WorkerConfig(concurrency=2, brpop_timeout_seconds=60, prediction_timeout_seconds=60)
    with open_workers(worker=config) as workers:
        worker = workers.start()
        for _ in range(20):
            await load_client.submit([0.0])
            await load_client.assert_all_completed()
        [long] = await load_client.submit([8000.0])
        await eventually(lambda: server.get(keys.status(long)) == b"processing", "it runs")
        [short] = await load_client.submit([0.0])
        await eventually(lambda: server.get(keys.status(short)) == b"completed", "it is completed")
        assert server.get(keys.status(long)) == b"processing"
        [stored] = await load_client.read([long])
        assert stored
        assert await load_client.operations.cancel(stored) == "stopping"
        await load_client.wait_until_all_ended()
        assert await worker.stop() == 0
    assert_at_rest(server, load_client.queue)


async def test_jobs_that_cannot_share_a_run_are_divided_among_the_slots(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis, tmp_path: Path
) -> None:
    zoo.place(tmp_path / "m", "slow", zoo.slow(), toml="[batching]\nenabled = false\n")
    with open_workers(
        model_dir=str(tmp_path / "m"), models=(), worker=WorkerConfig(concurrency=4)
    ) as workers:
        await load_client.submit([1.0] * 12)
        worker = workers.start()
        await load_client.assert_all_completed()
        assert await worker.stop() == 0
    assert claim_sizes(server, load_client.queue) == [1] * 12
    assert_at_rest(server, load_client.queue)
