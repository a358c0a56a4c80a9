"""Batching with `max_wait_ms`: jobs wait for others to share a run with, and for nothing else."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from asyncinfer.repository import keys
from asyncinfer.repository.store import Store
from asyncinfer.worker.worker import WorkerConfig
from tests import zoo
from tests.faults.load_client import (
    LoadClient,
    assert_one_end_each,
    claim_sizes,
    completed_in_order,
)

from .harness import Halts, assert_at_rest, eventually
from .processes import OpenWorkers, WorkerChild, Workers

A_MINUTE_MS = 60_000


@pytest.fixture
def waiting_client(store: Store) -> LoadClient:
    """A client that submits to `waiting`."""
    return LoadClient(store, "waiting")


class StartWaitingWorkers:
    """Opens a context of workers that serve `slow`, and `waiting`: the same with `max_wait_ms`."""

    def __init__(self, open_workers: OpenWorkers, folder: Path) -> None:
        self._open_workers = open_workers
        self._folder = folder

    @contextmanager
    def __call__(
        self,
        wait_ms: float,
        max_jobs: int = 100,
        max_batch: int = 128,
        brpop_timeout_seconds: float = 0.3,
    ) -> Iterator[Workers]:
        batching = f"enabled = true\nmax_wait_ms = {wait_ms}\nmax_jobs = {max_jobs}\n"
        zoo.place(self._folder, "waiting", zoo.slow(), toml=f"[batching]\n{batching}")
        zoo.place(self._folder, "slow", zoo.slow())
        config = WorkerConfig(
            concurrency=1,
            max_batch=max_batch,
            brpop_timeout_seconds=brpop_timeout_seconds,
            prediction_timeout_seconds=60,
        )
        folder = str(self._folder)
        with self._open_workers(
            model_dir=folder, models=(), default_model="slow", worker=config
        ) as workers:
            yield workers


@pytest.fixture
def waiting_workers(open_workers: OpenWorkers, tmp_path: Path) -> StartWaitingWorkers:
    return StartWaitingWorkers(open_workers, tmp_path / "m")


async def start_worker(workers: Workers, server: redis.Redis) -> WorkerChild:
    """Starts a worker and waits until it has loaded its models."""
    worker = workers.start()
    await eventually(lambda: worker.is_announced(server), "the worker is ready")
    return worker


@pytest.mark.soak
async def test_jobs_that_trickle_in_within_the_wait_share_one_run(
    waiting_workers: StartWaitingWorkers, waiting_client: LoadClient, server: redis.Redis
) -> None:
    with waiting_workers(500) as workers:
        worker = await start_worker(workers, server)
        for number in range(20):
            await waiting_client.submit([number % 3])
        await waiting_client.assert_all_completed()
        assert await worker.stop() == 0
    assert claim_sizes(server, waiting_client.queue) == [20]
    assert_at_rest(server, waiting_client.queue, "predict_queue")


@pytest.mark.soak
async def test_a_single_job_is_run_after_the_wait_and_not_much_later(
    waiting_workers: StartWaitingWorkers, waiting_client: LoadClient, server: redis.Redis
) -> None:
    with waiting_workers(300) as workers:
        worker = await start_worker(workers, server)
        waits_seconds: list[float] = []
        for _ in range(5):
            submitted_at = time.monotonic()
            with Halts() as halts:
                await waiting_client.submit([1.0])
                await waiting_client.assert_all_completed()
            waits_seconds.append(time.monotonic() - submitted_at)
            if waits_seconds[-1] < 0.4 + halts.seconds:
                break  # a busy machine may delay a job or two
        assert min(waits_seconds) >= 0.295
        assert waits_seconds[-1] < 0.4 + halts.seconds, waits_seconds
        assert await worker.stop() == 0


@pytest.mark.soak
async def test_a_full_batch_does_not_wait_and_the_remaining_jobs_do(
    waiting_workers: StartWaitingWorkers, waiting_client: LoadClient, server: redis.Redis
) -> None:
    with waiting_workers(A_MINUTE_MS, max_jobs=100, max_batch=4) as workers:
        worker = await start_worker(workers, server)
        await waiting_client.submit([1.0] * 3)
        await waiting_client.submit([1.0] * 2)
        await eventually(
            lambda: claim_sizes(server, waiting_client.queue) == [4], "four are claimed", 10
        )
        await eventually(lambda: server.llen(waiting_client.queue) == 1, "one still waits")
        await waiting_client.submit([1.0] * 7)
        await waiting_client.assert_all_completed(10)
        assert claim_sizes(server, waiting_client.queue) == [4, 4, 4]
        assert await worker.stop() == 0


@pytest.mark.soak
async def test_during_the_wait_the_only_slot_runs_other_models_and_a_drain_leaves_the_waiting_job(
    waiting_workers: StartWaitingWorkers,
    waiting_client: LoadClient,
    load_client: LoadClient,
    server: redis.Redis,
) -> None:
    with waiting_workers(A_MINUTE_MS) as workers:
        worker = await start_worker(workers, server)
        await waiting_client.submit([1.0])
        for _ in range(5):
            await load_client.submit([1.0])
            await load_client.assert_all_completed(5)
        stopped_at = time.monotonic()
        assert await worker.stop() == 0
        assert time.monotonic() - stopped_at < 2
    assert server.llen(waiting_client.queue) == 1
    assert not claim_sizes(server, waiting_client.queue)
    server.flushall()


@pytest.mark.soak
async def test_a_slot_that_other_models_keep_busy_still_runs_the_job_that_has_waited(
    waiting_workers: StartWaitingWorkers,
    waiting_client: LoadClient,
    load_client: LoadClient,
    server: redis.Redis,
) -> None:
    with waiting_workers(50, max_batch=2) as workers:
        (job_id,) = await waiting_client.submit([1.0])
        others = await load_client.submit([20.0] * 60)
        worker = await start_worker(workers, server)
        await waiting_client.assert_all_completed()
        assert len(completed_in_order(server, load_client.queue)) < len(others)
        await load_client.assert_all_completed()
        assert await worker.stop() == 0
    assert completed_in_order(server, waiting_client.queue) == [job_id]


@pytest.mark.soak
async def test_a_job_without_a_doorbell_token_waits_for_the_next_look_at_its_queue(
    waiting_workers: StartWaitingWorkers, waiting_client: LoadClient, server: redis.Redis
) -> None:
    with waiting_workers(50) as workers:
        worker = await start_worker(workers, server)
        server.set(keys.data("external"), "[[1.0]]")
        server.set(keys.status("external"), "pending")
        server.lpush("predict_queue:waiting", "external")
        await eventually(
            lambda: server.get(keys.status("external")) in (b"completed", b"failed"), "it ran", 5
        )
        assert await worker.stop() == 0


@pytest.mark.soak
async def test_a_worker_busy_with_a_batch_that_waited_leaves_doorbell_tokens_to_other_workers(
    waiting_workers: StartWaitingWorkers,
    waiting_client: LoadClient,
    load_client: LoadClient,
    server: redis.Redis,
) -> None:
    def is_running() -> bool:
        return server.hlen(keys.running(waiting_client.queue)) == 1

    with waiting_workers(50, brpop_timeout_seconds=60) as workers:
        started = [await start_worker(workers, server) for _ in range(2)]
        for _ in range(3):
            await waiting_client.submit([1000.0])
            await eventually(is_running, "it runs")
            await load_client.submit([1.0])
            await load_client.assert_all_completed()
            assert is_running()
            await waiting_client.assert_all_completed()
        assert [await worker.stop() for worker in started] == [0, 0]
    assert_at_rest(server, waiting_client.queue, load_client.queue)


@pytest.mark.soak
async def test_all_jobs_of_waiting_and_other_models_end_once_though_workers_die_and_stop(
    waiting_workers: StartWaitingWorkers,
    waiting_client: LoadClient,
    load_client: LoadClient,
    server: redis.Redis,
) -> None:
    with waiting_workers(30, max_batch=8) as workers:
        started = [await start_worker(workers, server) for _ in range(3)]
        for number in range(60):
            await waiting_client.submit([1.0] * (1 + number % 4))
            await load_client.submit([1.0] * (1 + number % 3))
            if number == 20:
                started.pop().kill()
            if number == 40:
                assert await started.pop().stop() == 0
        await waiting_client.assert_all_completed()
        await load_client.assert_all_completed()
        assert await started.pop().stop() == 0
    assert_one_end_each(server, waiting_client.queue)
    assert max(claim_sizes(server, waiting_client.queue)) > 1
    assert_at_rest(server, waiting_client.queue, load_client.queue)
