"""Runs that take too long, fail, or want too much memory, alone and among others."""

from pathlib import Path

import msgspec
import pytest
import redis
from msgspec.structs import replace

from asyncinfer.jobs import TERMINAL, JobError
from asyncinfer.repository import keys
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import Stored
from asyncinfer.worker.worker import EXIT_HUNG, WorkerConfig
from tests import zoo
from tests.faults.load_client import Customer, answer, assert_one_end_each, transitions

from .harness import assert_at_rest, eventually
from .processes import Crew, OpenCrew

HASTY = WorkerConfig(
    concurrency=2, prediction_timeout_seconds=0.5, hang_grace_seconds=0.2, max_batch=8
)
TOO_BIG = 20_000.0
"""A matrix that one kernel multiplies for minutes."""


def _why(stored: Stored) -> str:
    assert stored.error is not None
    return msgspec.json.decode(stored.error, type=JobError).code


async def _by_value(customer: Customer) -> dict[float, Stored]:
    return {customer.acknowledged[one.job_id]: one for one in await customer.all_ended()}


async def test_an_endless_run_is_stopped_and_fails_as_timeout(
    crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    with crew(worker=HASTY) as workers:
        await customer.submit([zoo.FOREVER])
        worker = workers.hire()
        (ended,) = await customer.all_ended()
        assert (ended.status, _why(ended)) == ("failed", "timeout")
        await customer.submit([1.0])
        await customer.all_ended()
        assert await worker.stop() == 0
    assert_at_rest(server, customer.queue)


async def test_an_endless_run_fails_alone_among_the_jobs_that_shared_it(
    crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    with crew(worker=HASTY) as workers:
        await customer.submit([1.0, 2.0, zoo.FOREVER, 3.0])
        worker = workers.hire()
        ended = await _by_value(customer)
        assert _why(ended.pop(zoo.FOREVER)) == "timeout"
        assert {value: answer(one) for value, one in ended.items()} == {
            1.0: 1.0,
            2.0: 2.0,
            3.0: 3.0,
        }
        assert await worker.stop() == 0
    assert_one_end_each(server, customer.queue)
    assert_at_rest(server, customer.queue)


async def _supervised(workers: Crew, customer: Customer) -> set[int]:
    """Keeps a worker running, as a supervisor would, until all jobs have ended; returns the exit
    codes of those that left by themselves."""
    exits: set[int] = set()
    worker = workers.hire()

    async def done() -> bool:
        nonlocal worker
        if worker.died():
            exits.add(worker.process.returncode)
            worker = workers.hire()
        return all(one and one.status in TERMINAL for one in await customer.read())

    await eventually(done, "every job has ended", 40)
    worker.kill()
    return exits


async def test_a_kernel_that_nothing_stops_costs_its_job_and_its_process_alone(
    crew: OpenCrew, server: redis.Redis, store: Store
) -> None:
    hung, other = Customer(store, "huge"), Customer(store)
    with crew(models=("slow", "huge"), worker=HASTY, default_model="slow") as workers:
        await other.submit([10.0])
        await hung.submit([TOO_BIG])
        worker = workers.hire()
        (ended,) = await hung.all_ended()
        assert (ended.status, _why(ended)) == ("failed", "timeout")
        await other.all_completed()
        await eventually(worker.died, "the worker leaves, for its supervisor to start another")
        assert worker.process.returncode == EXIT_HUNG
    assert_at_rest(server, hung.queue, other.queue)


@pytest.mark.soak
async def test_a_kernel_that_nothing_stops_fails_alone_among_the_jobs_that_shared_it(
    crew: OpenCrew, server: redis.Redis, store: Store
) -> None:
    customer = Customer(store, "huge")
    with crew(models=("slow", "huge"), worker=HASTY, default_model="slow") as workers:
        await customer.submit([1.0, TOO_BIG, 2.0])
        assert EXIT_HUNG in (exits := await _supervised(workers, customer))
        assert exits <= {EXIT_HUNG, 0}
        ended = await _by_value(customer)
        assert _why(ended.pop(TOO_BIG)) == "timeout"
        assert {value: answer(one) for value, one in ended.items()} == {1.0: 1.0, 2.0: 2.0}
    assert_one_end_each(server, customer.queue)
    assert_at_rest(server, customer.queue)


async def test_a_worker_with_a_hung_run_takes_nothing_more(
    crew: OpenCrew, server: redis.Redis, store: Store
) -> None:
    customer = Customer(store, "huge", "huge")
    patient = replace(HASTY, concurrency=1, max_batch=1, drain_timeout_seconds=20)
    with crew(models=("huge",), worker=patient) as workers:
        hung, *others = await customer.submit([TOO_BIG, 1.0, 2.0, 3.0])
        assert await workers.hire().left(15) == EXIT_HUNG
    assert server.get(keys.status(hung)) == b"failed"
    assert {server.get(keys.status(one)) for one in others} == {b"pending"}
    seen = transitions(server, customer.queue)
    assert not any(seen[one]["processing"] for one in others)


async def test_a_result_too_large_fails_alone_among_the_jobs_that_shared_its_run(
    crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    with crew(worker=WorkerConfig(concurrency=1, max_result_bytes=300)) as workers:
        small = await customer.submit([1.0, 2.0])
        (large,) = await customer.submit([0.0], rows=100)
        small += await customer.submit([3.0])
        worker = workers.hire()
        ended = {one.job_id: one for one in await customer.all_ended()}
        assert await worker.stop() == 0
    assert (ended[large].status, _why(ended[large])) == ("failed", "result_too_large")
    assert [answer(ended[job_id]) for job_id in small] == [1.0, 2.0, 3.0]
    assert_at_rest(server, customer.queue)


async def test_an_input_that_the_model_refuses_fails_alone_in_its_batch(
    crew: OpenCrew, server: redis.Redis, store: Store
) -> None:
    customer = Customer(store, "picky", "picky")
    with crew(models=("picky",)) as workers:
        await customer.submit([0.0, 1.0, 7.0, 2.0, 0.0, 9.0, 1.0])
        worker = workers.hire()
        for one in await customer.all_ended():
            value = customer.acknowledged[one.job_id]
            if value > 2:
                assert (one.status, _why(one)) == ("failed", "model_failed")
            else:
                assert answer(one) == value
        assert await worker.stop() == 0
    assert_at_rest(server, customer.queue)


@pytest.mark.soak
async def test_a_run_without_memory_is_tried_again_and_then_a_dead_letter(
    crew: OpenCrew, server: redis.Redis, store: Store
) -> None:
    customer = Customer(store, "hungry", "hungry")
    policy = Policy(lease_seconds=0.5, reap_seconds=0.08, job_ttl_seconds=600, max_errors=2)
    with crew(models=("hungry",), policy=policy) as workers:
        await customer.submit([1.0, zoo.ENDLESS_MIB, 2.0])
        worker = workers.hire()
        ended = await _by_value(customer)
        greedy = ended.pop(zoo.ENDLESS_MIB)
        assert (greedy.status, _why(greedy)) == ("failed", "out_of_memory")
        assert greedy.record
        assert greedy.record.errors == 1
        assert {value: answer(one) for value, one in ended.items()} == {1.0: 1.0, 2.0: 2.0}
        assert server.zrange(keys.dead(customer.queue), 0, -1) == [greedy.job_id.encode()]
        assert await worker.stop() == 0
    assert_at_rest(server, customer.queue)


async def test_a_models_own_time_limit_comes_before_the_general_one(
    crew: OpenCrew, customer: Customer, server: redis.Redis, tmp_path: Path
) -> None:
    zoo.place(tmp_path / "m", "slow", zoo.slow(), toml="[limits]\ntimeout_seconds = 0.3\n")
    unhurried = WorkerConfig(concurrency=1, prediction_timeout_seconds=600)
    with crew(model_dir=str(tmp_path / "m"), models=(), worker=unhurried) as workers:
        await customer.submit([zoo.FOREVER])
        worker = workers.hire()
        (ended,) = await customer.all_ended()
        assert _why(ended) == "timeout"
        assert await worker.stop() == 0
    assert_at_rest(server, customer.queue)
