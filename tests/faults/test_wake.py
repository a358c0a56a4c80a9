"""How soon idle workers hear of work, and who comes first."""

import asyncio
import time
from pathlib import Path

import pytest
import redis

from asyncinfer.jobs import Options
from asyncinfer.repository import keys
from asyncinfer.repository.claims import ClaimRequest, Finished, Runs
from asyncinfer.repository.doorbell import Doorbell
from asyncinfer.repository.store import Store
from asyncinfer.worker.worker import WorkerConfig
from tests import zoo
from tests.faults.load_client import Customer, claim_sizes, completed_in_order

from .harness import assert_at_rest, eventually
from .processes import OpenCrew

_LOOK_SECONDS = 10.0


async def test_a_bulk_of_1000_wakes_eight_idle_workers(store: Store, server: redis.Redis) -> None:
    """By the bell: none of them waits until it would have looked anyway."""
    assert await _seconds_to_wake(store, server, 8) < _LOOK_SECONDS


async def _seconds_to_wake(store: Store, server: redis.Redis, workers: int) -> float:
    """From a bulk's submit to the moment the last of the idle workers holds a claim."""
    customer = Customer(store)
    bells = [Doorbell(store) for _ in range(workers)]
    awake: list[float] = []

    async def work(bell: Doorbell, name: str) -> None:
        runs = Runs(store, name)
        while await bell.wait([customer.queue], _LOOK_SECONDS) is None:
            pass
        request = ClaimRequest((customer.queue,), runs.new_token(), False, 32)
        claim = (await runs.claim(request)).claim
        assert claim
        awake.append(time.monotonic())
        done = [Finished(job.job_id, "completed", b"{}", job.meta) for job in claim.jobs]
        await runs.finish(claim, done, last=True)

    async with asyncio.TaskGroup() as group:
        for number, bell in enumerate(bells):
            group.create_task(work(bell, f"w{number}"))
        await eventually(
            lambda: server.info("clients")["blocked_clients"] == workers, "all of them wait"
        )
        started_at = time.monotonic()
        await customer.submit([1.0] * 1000)
    for bell in bells:
        await bell.close()
    server.flushall()
    return max(awake) - started_at


async def test_a_lost_token_delays_a_job_by_one_look_at_most(
    crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    """A stranger's LPUSH rings no bell at all, which is a token lost every time."""
    with crew(worker=WorkerConfig(concurrency=1, brpop_timeout_seconds=0.5)) as workers:
        worker = workers.hire()
        await eventually(lambda: worker.announced(server), "the worker is ready")
        waits = []
        for number in range(3):
            job_id = f"stranger-{number}"
            server.set(keys.data(job_id), "[[1.0]]")
            server.set(keys.status(job_id), "pending")
            server.lpush(customer.queue, job_id)
            waits.append(await _seconds_to_complete(server, job_id))
            if waits[-1] < 0.5 + 0.4:
                break  # a busy machine may delay one or two
        assert waits[-1] < 0.5 + 0.4, waits
        assert await worker.stop() == 0
    assert_at_rest(server, customer.queue)


async def _seconds_to_complete(server: redis.Redis, job_id: str) -> float:
    started_at = time.monotonic()
    await eventually(lambda: server.get(keys.status(job_id)) == b"completed", "it is done")
    return time.monotonic() - started_at


async def test_low_priority_moves_while_high_never_runs_dry(
    crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    low = await customer.submit([1.0] * 4, Options(priority="low"))
    normal = await customer.submit([1.0] * 4)
    high = await customer.submit([1.0] * 140, Options(priority="high"))
    with crew(worker=WorkerConfig(concurrency=1, max_batch=1)) as workers:
        worker = workers.hire()
        await customer.all_completed()
        assert await worker.stop() == 0
    order = completed_in_order(server, customer.queue)
    while_high_waits = set(order[: order.index(high[-1])])
    assert while_high_waits >= {*low, *normal}
    assert_at_rest(server, customer.queue)


@pytest.mark.soak
async def test_low_priority_moves_in_each_of_two_queues_while_high_runs_dry_in_neither(
    crew: OpenCrew, server: redis.Redis, store: Store
) -> None:
    customers = [Customer(store, "slow"), Customer(store, "picky")]
    low: list[list[str]] = []
    high: list[list[str]] = []
    for customer in customers:
        low.append(await customer.submit([1.0] * 2, Options(priority="low")))
        high.append(await customer.submit([1.0] * 80, Options(priority="high")))
    one_by_one = WorkerConfig(concurrency=1, max_batch=1)
    with crew(models=("slow", "picky"), default_model="slow", worker=one_by_one) as workers:
        worker = workers.hire()
        for customer in customers:
            await customer.all_completed()
        assert await worker.stop() == 0
    for customer, its_low, its_high in zip(customers, low, high, strict=True):
        order = completed_in_order(server, customer.queue)
        assert set(order[: order.index(its_high[-1])]) >= set(its_low)
    assert_at_rest(server, *(customer.queue for customer in customers))


async def test_a_job_waits_for_no_run_that_is_long_after_many_brief_ones(
    crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    """Beside brief runs the other slot does not listen for a bell, as their next claim takes it."""
    config = WorkerConfig(concurrency=2, brpop_timeout_seconds=60.0)
    with crew(worker=config) as workers:
        worker = workers.hire()
        for _ in range(20):
            await customer.submit([0.0])
            await customer.all_completed()
        [long] = await customer.submit([8000.0])
        await eventually(lambda: server.get(keys.status(long)) == b"processing", "it runs")
        [brief] = await customer.submit([0.0])
        await eventually(lambda: server.get(keys.status(brief)) == b"completed", "it is done")
        assert server.get(keys.status(long)) == b"processing"
        [stored] = await customer.read([long])
        assert stored
        assert await customer.operations.cancel(stored) == "stopping"
        await customer.all_ended()
        assert await worker.stop() == 0
    assert_at_rest(server, customer.queue)


async def test_jobs_that_cannot_share_a_run_are_shared_among_the_slots(
    crew: OpenCrew, customer: Customer, server: redis.Redis, tmp_path: Path
) -> None:
    zoo.place(tmp_path / "m", "slow", zoo.slow(), toml="[batching]\nenabled = false\n")
    with crew(
        model_dir=str(tmp_path / "m"), models=(), worker=WorkerConfig(concurrency=4)
    ) as workers:
        await customer.submit([1.0] * 12)
        worker = workers.hire()
        await customer.all_completed()
        assert await worker.stop() == 0
    assert claim_sizes(server, customer.queue) == [1] * 12
    assert_at_rest(server, customer.queue)
