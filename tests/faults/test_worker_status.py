"""The status that a real worker announces, and the statistics of its queue."""

import pytest
import redis

from asyncinfer.repository.inspect.statistics import Statistics
from asyncinfer.repository.store import Store
from asyncinfer.schemas.operations import JobsDone
from asyncinfer.worker.worker import WorkerConfig
from tests.faults.load_client import LoadClient

from .harness import assert_at_rest, eventually
from .processes import OpenWorkers


@pytest.mark.soak
async def test_a_busy_worker_is_shown_with_its_finished_and_its_running_jobs(
    open_workers: OpenWorkers, load_client: LoadClient, store: Store, server: redis.Redis
) -> None:
    observation = Statistics(store)
    with open_workers(
        worker=WorkerConfig(concurrency=2, prediction_timeout_seconds=600)
    ) as workers:
        member = workers.start()
        await load_client.submit([1.0] * 20)
        await load_client.assert_all_completed()
        (running,) = await load_client.submit([60_000.0])

        async def one_slot_is_busy() -> bool:
            return [worker.busy for worker in await observation.workers()] == [1]

        await eventually(one_slot_is_busy, "the worker announces that a slot is busy")
        (worker,) = await observation.workers()
        (queue,) = await observation.queues()
        (stored,) = await load_client.read([running])
        assert stored
        await load_client.operations.cancel(stored)
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
    assert_at_rest(server, load_client.queue)
