"""Jobs of a model with `max_wait_ms` wait for others to run with, and for nothing else."""

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
from tests.faults.load_client import Customer, assert_one_end_each, claim_sizes, completed_in_order

from .harness import assert_at_rest, eventually
from .processes import Crew, OpenCrew, WorkerChild

FOR_LONG = 60_000


@pytest.fixture
def patient(store: Store) -> Customer:
    return Customer(store, "patient")


class Patience:
    """Workers of `slow`, and of `patient`, which is as slow but waits for company."""

    def __init__(self, crew: OpenCrew, folder: Path) -> None:
        self._crew = crew
        self._folder = folder

    @contextmanager
    def __call__(self, wait_ms: float, max_jobs: int = 100, max_batch: int = 128) -> Iterator[Crew]:
        batching = f"enabled = true\nmax_wait_ms = {wait_ms}\nmax_jobs = {max_jobs}\n"
        zoo.place(self._folder, "patient", zoo.slow(), toml=f"[batching]\n{batching}")
        zoo.place(self._folder, "slow", zoo.slow())
        config = WorkerConfig(concurrency=1, max_batch=max_batch, brpop_timeout_seconds=0.3)
        folder = str(self._folder)
        with self._crew(model_dir=folder, models=(), default_model="slow", worker=config) as crew:
            yield crew


@pytest.fixture
def patience(crew: OpenCrew, tmp_path: Path) -> Patience:
    return Patience(crew, tmp_path / "m")


async def hired(crew: Crew, server: redis.Redis) -> WorkerChild:
    worker = crew.hire()
    await eventually(lambda: worker.announced(server), "the worker is ready")
    return worker


async def test_jobs_that_trickle_in_within_the_wait_share_one_run(
    patience: Patience, patient: Customer, server: redis.Redis
) -> None:
    with patience(500) as crew:
        worker = await hired(crew, server)
        for number in range(20):
            await patient.submit([number % 3])
        await patient.all_completed()
        assert await worker.stop() == 0
    assert claim_sizes(server, patient.queue) == [20]
    assert_at_rest(server, patient.queue, "predict_queue")


async def test_a_job_alone_is_answered_after_the_wait_and_not_much_later(
    patience: Patience, patient: Customer, server: redis.Redis
) -> None:
    with patience(300) as crew:
        worker = await hired(crew, server)
        took: list[float] = []
        for _ in range(5):
            submitted_at = time.monotonic()
            await patient.submit([1.0])
            await patient.all_completed()
            took.append(time.monotonic() - submitted_at)
            if took[-1] < 0.4:
                break  # a busy machine may delay one or two
        assert min(took) >= 0.295
        assert took[-1] < 0.4, took
        assert await worker.stop() == 0


async def test_a_full_batch_does_not_wait_and_what_is_left_over_does(
    patience: Patience, patient: Customer, server: redis.Redis
) -> None:
    with patience(FOR_LONG, max_jobs=100, max_batch=4) as crew:
        worker = await hired(crew, server)
        await patient.submit([1.0] * 3)
        await patient.submit([1.0] * 2)
        await eventually(lambda: claim_sizes(server, patient.queue) == [4], "four are claimed", 10)
        await eventually(lambda: server.llen(patient.queue) == 1, "one waits on")
        await patient.submit([1.0] * 7)
        await patient.all_completed(10)
        assert claim_sizes(server, patient.queue) == [4, 4, 4]
        assert await worker.stop() == 0


async def test_meanwhile_the_only_slot_runs_other_models_and_a_drain_leaves_what_waits(
    patience: Patience, patient: Customer, customer: Customer, server: redis.Redis
) -> None:
    with patience(FOR_LONG) as crew:
        worker = await hired(crew, server)
        await patient.submit([1.0])
        for _ in range(5):
            await customer.submit([1.0])
            await customer.all_completed(5)
        asked_at = time.monotonic()
        assert await worker.stop() == 0
        assert time.monotonic() - asked_at < 2
    assert server.llen(patient.queue) == 1
    assert not claim_sizes(server, patient.queue)
    server.flushall()


@pytest.mark.soak
async def test_a_slot_that_others_keep_busy_still_comes_to_who_has_waited(
    patience: Patience, patient: Customer, customer: Customer, server: redis.Redis
) -> None:
    with patience(50, max_batch=2) as crew:
        (job_id,) = await patient.submit([1.0])
        others = await customer.submit([20.0] * 60)
        worker = await hired(crew, server)
        await patient.all_completed()
        assert len(completed_in_order(server, customer.queue)) < len(others)
        await customer.all_completed()
        assert await worker.stop() == 0
    assert completed_in_order(server, patient.queue) == [job_id]


async def test_a_job_that_rang_no_bell_waits_one_look_longer(
    patience: Patience, patient: Customer, server: redis.Redis
) -> None:
    with patience(50) as crew:
        worker = await hired(crew, server)
        server.set(keys.data("stranger"), "[[1.0]]")
        server.set(keys.status("stranger"), "pending")
        server.lpush("predict_queue:patient", "stranger")
        await eventually(
            lambda: server.get(keys.status("stranger")) in (b"completed", b"failed"), "it ran", 5
        )
        assert await worker.stop() == 0


@pytest.mark.soak
async def test_a_worker_busy_with_what_it_waited_for_leaves_the_bell_of_others_to_others(
    patience: Patience, patient: Customer, customer: Customer, server: redis.Redis
) -> None:
    with patience(50) as crew:
        workers = [await hired(crew, server) for _ in range(2)]
        took: list[float] = []
        for _ in range(3):
            await patient.submit([300.0])
            await eventually(lambda: server.hlen(keys.running(patient.queue)) == 1, "it runs")
            submitted_at = time.monotonic()
            await customer.submit([1.0])
            await customer.all_completed()
            took.append(time.monotonic() - submitted_at)
            await patient.all_completed()
        assert sorted(took)[1] < 0.2, took  # a busy machine may delay one
        assert [await worker.stop() for worker in workers] == [0, 0]
    assert_at_rest(server, patient.queue, customer.queue)


@pytest.mark.soak
async def test_whatever_waits_and_whoever_dies_all_jobs_end_once(
    patience: Patience, patient: Customer, customer: Customer, server: redis.Redis
) -> None:
    with patience(30, max_batch=8) as crew:
        workers = [await hired(crew, server) for _ in range(3)]
        for number in range(60):
            await patient.submit([1.0] * (1 + number % 4))
            await customer.submit([1.0] * (1 + number % 3))
            if number == 20:
                workers.pop().kill()
            if number == 40:
                assert await workers.pop().stop() == 0
        await patient.all_completed()
        await customer.all_completed()
        assert await workers.pop().stop() == 0
    assert_one_end_each(server, patient.queue)
    assert max(claim_sizes(server, patient.queue)) > 1
    assert_at_rest(server, patient.queue, customer.queue)
