"""Jobs that are called off: waiting, delayed, running, and at the very moment they end."""

import asyncio
import time

import pytest
import redis

from asyncinfer.jobs import TERMINAL, Options
from asyncinfer.repository import keys
from asyncinfer.repository.stored_jobs import Stored
from asyncinfer.worker.worker import WorkerConfig
from tests import zoo
from tests.faults.load_client import Customer, assert_one_end_each, transitions

from .harness import assert_at_rest, eventually
from .processes import OpenCrew


async def _read(customer: Customer, job_id: str) -> Stored:
    (stored,) = await customer.read([job_id])
    assert stored
    return stored


async def test_a_waiting_or_delayed_job_is_cancelled_at_once(
    customer: Customer, server: redis.Redis
) -> None:
    (waiting,) = await customer.submit([1.0])
    (delayed,) = await customer.submit([1.0], Options(delay_seconds=60))
    for job_id in (waiting, delayed):
        stored = await _read(customer, job_id)
        assert await customer.operations.cancel(stored) == "cancelled"
        # Again, as a call is whose reply was lost.
        assert await customer.operations.cancel(stored) == "cancelled"
    assert_at_rest(server, customer.queue)


async def test_a_running_job_is_stopped_and_its_neighbours_are_not(
    crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    with crew() as workers:
        ids = await customer.submit([500.0, 501.0, 502.0])
        worker = workers.hire()
        await eventually(lambda: server.hlen(keys.running(customer.queue)) == 3, "all three run")
        stored = await _read(customer, ids[1])
        assert await customer.operations.cancel(stored) == "stopping"
        assert await customer.operations.cancel(stored) in ("stopping", "cancelled")
        await eventually(lambda: server.get(keys.status(ids[1])) == b"cancelled", "one is out")
        assert server.hlen(keys.running(customer.queue)) == 2
        del customer.acknowledged[ids[1]]
        await customer.all_completed()
        assert await worker.stop() == 0
    assert_one_end_each(server, customer.queue)
    assert_at_rest(server, customer.queue)


async def test_a_run_that_nobody_wants_any_more_stops_at_its_next_kernel(
    crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    with crew(worker=WorkerConfig(concurrency=1, prediction_timeout_seconds=600)) as workers:
        worker = workers.hire()
        delays = [await _seconds_to_cancel(customer, server) for _ in range(5)]
        # The one slot is free again, or this would wait for years.
        customer.acknowledged.clear()
        await customer.submit([1.0])
        await customer.all_completed()
        assert min(delays) < 0.1, delays
        assert await worker.stop() == 0
    assert_at_rest(server, customer.queue)


async def _seconds_to_cancel(customer: Customer, server: redis.Redis) -> float:
    (job_id,) = await customer.submit([zoo.FOREVER])
    await eventually(lambda: server.hexists(keys.running(customer.queue), job_id), "it runs")
    asked_at = time.monotonic()
    await customer.operations.cancel(await _read(customer, job_id))
    await eventually(lambda: server.get(keys.status(job_id)) == b"cancelled", "it is out")
    return time.monotonic() - asked_at


async def test_an_unknown_or_ended_job_cannot_be_cancelled(
    crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    unknown = Stored("0" * 32, "pending", None, None, None)
    assert await customer.operations.cancel(unknown) == "absent"
    with crew() as workers:
        (job_id,) = await customer.submit([1.0])
        worker = workers.hire()
        await customer.all_completed()
        stored = await _read(customer, job_id)
        assert await customer.operations.cancel(stored) == "finished"
        assert (await _read(customer, job_id)).status == "completed"
        assert await worker.stop() == 0
    assert_at_rest(server, customer.queue)


@pytest.mark.soak
async def test_the_job_of_a_dead_worker_is_cancelled_all_the_same(
    crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    with crew() as workers:
        (job_id,) = await customer.submit([2000.0])
        doomed = workers.hire()
        await eventually(lambda: server.hlen(keys.running(customer.queue)) == 1, "it runs")
        doomed.kill()
        assert await customer.operations.cancel(await _read(customer, job_id)) == "stopping"
        survivor = workers.hire()
        await eventually(lambda: server.get(keys.status(job_id)) == b"cancelled", "it is out")
        await eventually(lambda: survivor.announced(server), "the survivor is ready")
        assert await survivor.stop() == 0
    assert_at_rest(server, customer.queue)


@pytest.mark.soak
async def test_cancel_racing_claim_and_finish_500_times_leaves_one_end_each(
    crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    with crew(worker=WorkerConfig(concurrency=2)) as workers:
        worker = workers.hire()
        await eventually(lambda: worker.announced(server), "the worker is ready")
        for number in range(50):
            ids = await customer.submit([float(number % 4)] * 10)
            async with asyncio.TaskGroup() as group:
                for place, job_id in enumerate(ids):
                    group.create_task(_cancel_at(customer, job_id, place))
        ended = {one.job_id: one.status for one in await customer.all_ended()}
        assert await worker.stop() == 0
    assert len(ended) == 500
    seen = transitions(server, customer.queue)
    for job_id, status in ended.items():
        assert [one for one in TERMINAL if seen[job_id][one]] == [status]
    assert set(ended.values()) == {"completed", "cancelled"}
    assert_one_end_each(server, customer.queue)
    assert_at_rest(server, customer.queue)


async def _cancel_at(customer: Customer, job_id: str, place: int) -> None:
    """Some round trips after the submit (places 0 to 3) or the start (4 to 8), or at the end."""
    before = ((), ("pending",), ("pending", "processing"))[(place + 1) // 5]
    deadline = time.monotonic() + 30
    while (stored := await _read(customer, job_id)).status in before:
        assert time.monotonic() < deadline, f"still {stored.status}"
    for _ in range((place + 1) % 5):
        stored = await _read(customer, job_id)
    await customer.operations.cancel(stored)
