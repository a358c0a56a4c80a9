"""What a real worker says of itself, and what its queue shows of the work it did."""

import pytest
import redis

from asyncinfer.repository.inspect.statistics import Observation
from asyncinfer.repository.store import Store
from asyncinfer.schemas.operations import JobsDone
from asyncinfer.worker.worker import WorkerConfig
from tests.faults.load_client import Customer

from .harness import assert_at_rest, eventually
from .processes import OpenCrew


@pytest.mark.soak
async def test_a_worker_at_work_is_seen_with_what_it_has_done_and_does(
    crew: OpenCrew, customer: Customer, store: Store, server: redis.Redis
) -> None:
    observation = Observation(store)
    with crew(worker=WorkerConfig(concurrency=2, prediction_timeout_seconds=600)) as workers:
        member = workers.hire()
        await customer.submit([1.0] * 20)
        await customer.all_completed()
        (running,) = await customer.submit([60_000.0])

        async def told() -> bool:
            found = await observation.workers()
            return [one.busy for one in found] == [1]

        await eventually(told, "the worker says that a slot is busy")
        (worker,) = await observation.workers()
        (queue,) = await observation.queues()
        (stored,) = await customer.read([running])
        assert stored
        await customer.operations.cancel(stored)
        assert await member.stop() == 0
    assert (worker.pid, worker.slots, worker.state) == (member.process.pid, 2, "ready")
    assert worker.jobs_done == JobsDone(completed=20)
    assert worker.models == ["slow"]
    assert worker.uptime_seconds is not None
    assert (queue.running, queue.workers, queue.slots) == (1, 1, 2)
    assert round(queue.completed_per_second * queue.window_seconds) == 20
    assert round(queue.submitted_per_second * queue.window_seconds) == 21
    assert queue.run_seconds
    assert queue.wait_seconds
    assert 0.001 <= queue.run_seconds.p50 <= queue.run_seconds.p99 < 10
    assert_at_rest(server, customer.queue)
