"""Runs that take too long, fail, or need too much memory, alone and in a batch."""

from pathlib import Path

import msgspec
import pytest
import redis
from msgspec.structs import replace

from asyncinfer.jobs import TERMINAL, JobError
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import StoredJob
from asyncinfer.worker.worker import EXIT_HUNG, WorkerConfig
from tests import zoo
from tests.faults.load_client import LoadClient, assert_one_end_each, result_value, transitions

from .harness import assert_at_rest, eventually
from .processes import OpenWorkers, Workers

SHORT_TIME_OUTS = WorkerConfig(
    concurrency=2, prediction_timeout_seconds=0.5, hang_grace_seconds=0.2, max_batch=8
)


def _error_code(stored: StoredJob) -> str:
    assert stored.error is not None
    return msgspec.json.decode(stored.error, type=JobError).code


async def _by_value(load_client: LoadClient) -> dict[float, StoredJob]:
    return {
        load_client.acknowledged[job.job_id]: job
        for job in await load_client.wait_until_all_ended()
    }


@pytest.mark.soak
async def test_an_endless_run_is_stopped_and_its_job_fails_with_timeout(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    with open_workers(worker=SHORT_TIME_OUTS) as workers:
        await load_client.submit([zoo.FOREVER])
        worker = workers.start()
        (ended,) = await load_client.wait_until_all_ended()
        assert (ended.status, _error_code(ended)) == ("failed", "timeout")
        await load_client.submit([1.0])
        await load_client.wait_until_all_ended()
        assert await worker.stop() == 0
    assert_at_rest(server, load_client.queue)


async def test_a_job_with_an_endless_run_fails_alone_among_those_that_shared_its_run(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    with open_workers(worker=SHORT_TIME_OUTS) as workers:
        await load_client.submit([1.0, 2.0, zoo.FOREVER, 3.0])
        worker = workers.start()
        ended = await _by_value(load_client)
        assert _error_code(ended.pop(zoo.FOREVER)) == "timeout"
        assert {value: result_value(job) for value, job in ended.items()} == {
            1.0: 1.0,
            2.0: 2.0,
            3.0: 3.0,
        }
        assert await worker.stop() == 0
    assert_one_end_each(server, load_client.queue)
    assert_at_rest(server, load_client.queue)


async def _restart_until_all_ended(workers: Workers, load_client: LoadClient) -> set[int]:
    """Keeps a worker running, as a supervisor would, until all jobs have ended.

    Returns the exit codes of the workers that ended by themselves.
    """
    exits: set[int] = set()
    worker = workers.start()

    async def all_have_ended() -> bool:
        nonlocal worker
        if worker.has_ended():
            exits.add(worker.process.returncode)
            worker = workers.start()
        return all(job and job.status in TERMINAL for job in await load_client.read())

    await eventually(all_have_ended, "every job has ended", 40)
    worker.kill()
    return exits


@pytest.mark.soak
async def test_a_kernel_that_cannot_be_stopped_costs_only_its_job_and_its_process(
    open_workers: OpenWorkers, server: redis.Redis, store: Store
) -> None:
    hung, other = LoadClient(store, "huge"), LoadClient(store)
    with open_workers(
        models=("slow", "huge"), worker=SHORT_TIME_OUTS, default_model="slow"
    ) as workers:
        await other.submit([10.0])
        await hung.submit([zoo.TOO_BIG])
        worker = workers.start()
        (ended,) = await hung.wait_until_all_ended()
        assert (ended.status, _error_code(ended)) == ("failed", "timeout")
        await other.assert_all_completed()
        await eventually(worker.has_ended, "the worker ends; its supervisor would start another")
        assert worker.process.returncode == EXIT_HUNG
    assert_at_rest(server, hung.queue, other.queue)


@pytest.mark.soak
async def test_a_job_whose_kernel_cannot_be_stopped_fails_alone_among_those_of_its_run(
    open_workers: OpenWorkers, server: redis.Redis, store: Store
) -> None:
    load_client = LoadClient(store, "huge")
    with open_workers(
        models=("slow", "huge"), worker=SHORT_TIME_OUTS, default_model="slow"
    ) as workers:
        await load_client.submit([1.0, zoo.TOO_BIG, 2.0])
        assert EXIT_HUNG in (exits := await _restart_until_all_ended(workers, load_client))
        assert exits <= {EXIT_HUNG, 0}
        ended = await _by_value(load_client)
        assert _error_code(ended.pop(zoo.TOO_BIG)) == "timeout"
        assert {value: result_value(job) for value, job in ended.items()} == {1.0: 1.0, 2.0: 2.0}
    assert_one_end_each(server, load_client.queue)
    assert_at_rest(server, load_client.queue)


@pytest.mark.soak
async def test_a_worker_with_a_hung_run_claims_no_more_jobs(
    open_workers: OpenWorkers, server: redis.Redis, store: Store
) -> None:
    load_client = LoadClient(store, "huge", "huge")
    config = replace(SHORT_TIME_OUTS, concurrency=1, max_batch=1, drain_timeout_seconds=20)
    with open_workers(models=("huge",), worker=config) as workers:
        hung, *others = await load_client.submit([zoo.TOO_BIG, 1.0, 2.0, 3.0])
        assert await workers.start().wait_for_exit(15) == EXIT_HUNG
    assert server.get(keys.status(hung)) == b"failed"
    assert {server.get(keys.status(job_id)) for job_id in others} == {b"pending"}
    logged = transitions(server, load_client.queue)
    assert not any(logged[job_id]["processing"] for job_id in others)
    assert "A run of huge would not stop" in workers.log
    # It ended at once, but its state is shown for as long as a scrape may take to come.
    (announced,) = (await Announcements(store).read_workers()).values()
    assert announced.state == "hung"


@pytest.mark.soak
async def test_a_job_with_too_large_a_result_fails_alone_among_those_of_its_run(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    with open_workers(worker=WorkerConfig(concurrency=1, max_result_bytes=300)) as workers:
        small = await load_client.submit([1.0, 2.0])
        (large,) = await load_client.submit([0.0], rows=100)
        small += await load_client.submit([3.0])
        worker = workers.start()
        ended = {job.job_id: job for job in await load_client.wait_until_all_ended()}
        assert await worker.stop() == 0
    assert (ended[large].status, _error_code(ended[large])) == ("failed", "result_too_large")
    assert [result_value(ended[job_id]) for job_id in small] == [1.0, 2.0, 3.0]
    assert_at_rest(server, load_client.queue)


async def test_a_job_whose_input_the_model_refuses_fails_alone_in_its_batch(
    open_workers: OpenWorkers, server: redis.Redis, store: Store
) -> None:
    load_client = LoadClient(store, "picky", "picky")
    with open_workers(models=("picky",)) as workers:
        await load_client.submit([0.0, 1.0, 7.0, 2.0, 0.0, 9.0, 1.0])
        worker = workers.start()
        for job in await load_client.wait_until_all_ended():
            value = load_client.acknowledged[job.job_id]
            if value > 2:
                assert (job.status, _error_code(job)) == ("failed", "model_failed")
            else:
                assert result_value(job) == value
        assert await worker.stop() == 0
    assert_at_rest(server, load_client.queue)


@pytest.mark.soak
async def test_a_job_whose_run_gets_no_memory_is_retried_and_then_a_dead_letter(
    open_workers: OpenWorkers, server: redis.Redis, store: Store
) -> None:
    load_client = LoadClient(store, "hungry", "hungry")
    policy = Policy(lease_seconds=0.5, reap_seconds=0.08, job_ttl_seconds=600, max_errors=2)
    with open_workers(models=("hungry",), policy=policy) as workers:
        await load_client.submit([1.0, zoo.ENDLESS_MIB, 2.0])
        worker = workers.start()
        ended = await _by_value(load_client)
        too_large = ended.pop(zoo.ENDLESS_MIB)
        assert (too_large.status, _error_code(too_large)) == ("failed", "out_of_memory")
        assert too_large.record
        assert too_large.record.errors == 1
        assert {value: result_value(job) for value, job in ended.items()} == {1.0: 1.0, 2.0: 2.0}
        assert server.zrange(keys.dead(load_client.queue), 0, -1) == [too_large.job_id.encode()]
        assert await worker.stop() == 0
    assert_at_rest(server, load_client.queue)


@pytest.mark.soak
async def test_a_models_own_time_limit_takes_precedence_over_the_general_limit(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis, tmp_path: Path
) -> None:
    zoo.place(tmp_path / "m", "slow", zoo.slow(), toml="[limits]\ntimeout_seconds = 0.3\n")
    config = WorkerConfig(concurrency=1, prediction_timeout_seconds=600)
    with open_workers(model_dir=str(tmp_path / "m"), models=(), worker=config) as workers:
        await load_client.submit([zoo.FOREVER])
        worker = workers.start()
        (ended,) = await load_client.wait_until_all_ended()
        assert _error_code(ended) == "timeout"
        assert await worker.stop() == 0
    assert_at_rest(server, load_client.queue)
