"""Workers that are asked to go."""

import signal
from functools import partial

import pytest
import redis

from asyncinfer.repository import keys
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from asyncinfer.worker.worker import EXIT_HUNG, WorkerConfig
from tests import zoo
from tests.faults.load_client import Customer, assert_one_end_each, transitions

from .harness import assert_at_rest, eventually
from .processes import DurableServer, OpenWorkers
from .proxy import proxied
from .test_redis_outage import opened


async def test_a_worker_that_waits_goes_at_once(
    open_workers: OpenWorkers, load_client: Customer, server: redis.Redis
) -> None:
    with open_workers(worker=WorkerConfig(concurrency=4, brpop_timeout_seconds=60)) as workers:
        worker = workers.start()
        await load_client.submit([1.0])
        await load_client.assert_all_completed()
        worker.signal(signal.SIGTERM)
        assert await worker.wait_for_exit(15) == 0
    assert not list(server.scan_iter(keys.worker("predict_queue", "*")))
    assert_at_rest(server, load_client.queue)


async def test_a_worker_that_runs_finishes_what_runs_and_takes_nothing_more(
    open_workers: OpenWorkers, load_client: Customer, server: redis.Redis
) -> None:
    with open_workers(worker=WorkerConfig(concurrency=1, max_batch=2)) as workers:
        ids = await load_client.submit([400.0, 401.0, 1.0])
        worker = workers.start()
        await eventually(lambda: server.hlen(keys.running(load_client.queue)) == 2, "two run")
        assert await worker.stop() == 0
        assert [server.get(keys.status(job_id)) for job_id in ids] == [
            b"completed",
            b"completed",
            b"pending",
        ]
        workers.start()
        await load_client.assert_all_completed()
        assert await workers.members[-1].stop() == 0
    assert_at_rest(server, load_client.queue)


@pytest.mark.soak
async def test_a_drain_that_takes_too_long_hands_its_jobs_back_uncounted(
    open_workers: OpenWorkers, load_client: Customer, server: redis.Redis
) -> None:
    slow_to_go = WorkerConfig(
        concurrency=1, prediction_timeout_seconds=600, drain_timeout_seconds=0.2
    )
    with open_workers(worker=slow_to_go) as workers:
        (job_id,) = await load_client.submit([zoo.FOREVER])
        running = keys.running(load_client.queue)
        for _ in range(2):
            worker = workers.start()
            await eventually(lambda: server.hlen(running) == 1, "it runs")
            assert await worker.stop() == 0
            assert server.get(keys.status(job_id)) == b"pending"
            assert not server.exists(keys.facts(load_client.queue))
        (stored,) = await load_client.read([job_id])
        assert stored
        assert await load_client.submissions.cancel(stored) == "cancelled"
    assert transitions(server, load_client.queue)[job_id]["processing"] == 2
    assert_at_rest(server, load_client.queue)


async def test_a_drain_does_not_wait_for_a_kernel_that_nothing_stops(
    open_workers: OpenWorkers, server: redis.Redis, store: Store
) -> None:
    load_client = Customer(store, "huge", "huge")
    slow_to_go = WorkerConfig(
        concurrency=1,
        prediction_timeout_seconds=600,
        drain_timeout_seconds=0.2,
        hang_grace_seconds=0.2,
    )
    with open_workers(models=("huge",), worker=slow_to_go) as workers:
        (job_id,) = await load_client.submit([20_000.0])
        worker = workers.start()
        await eventually(lambda: server.hlen(keys.running(load_client.queue)) == 1, "it runs")
        assert await worker.stop() == EXIT_HUNG
        assert server.get(keys.status(job_id)) == b"pending"
        (stored,) = await load_client.read([job_id])
        assert stored
        await load_client.submissions.cancel(stored)
    assert_at_rest(server, load_client.queue)


@pytest.mark.soak
async def test_a_second_signal_ends_a_worker_at_once_and_loses_nothing(
    open_workers: OpenWorkers, load_client: Customer, server: redis.Redis
) -> None:
    with open_workers() as workers:
        await load_client.submit([700.0])
        worker = workers.start()
        await eventually(lambda: server.hlen(keys.running(load_client.queue)) == 1, "it runs")
        worker.signal(signal.SIGTERM)
        await eventually(lambda: "Draining" in workers.log, "it drains")
        worker.signal(signal.SIGTERM)
        assert await worker.wait_for_exit(15) == 130
        workers.start()
        await load_client.assert_all_completed()
        assert await workers.members[-1].stop() == 0
    assert_one_end_each(server, load_client.queue)
    assert_at_rest(server, load_client.queue)


async def test_after_a_drain_was_cut_nothing_more_of_a_claim_starts(
    open_workers: OpenWorkers, load_client: Customer, server: redis.Redis
) -> None:
    slow_to_go = WorkerConfig(
        concurrency=1, prediction_timeout_seconds=600, drain_timeout_seconds=0.2
    )
    with open_workers(worker=slow_to_go) as workers:
        ids = await load_client.submit([zoo.FOREVER] * 3, rows=2500)  # too many for a shared run
        worker = workers.start()
        await eventually(lambda: server.hlen(keys.running(load_client.queue)) == 3, "one runs")
        assert await worker.stop() == 0
    assert {server.get(keys.status(job_id)) for job_id in ids} == {b"pending"}
    for stored in await load_client.read():
        assert stored
        assert await load_client.submissions.cancel(stored) == "cancelled"
    assert_at_rest(server, load_client.queue)


HASTY_TO_GO = WorkerConfig(concurrency=1, drain_timeout_seconds=0.2, hang_grace_seconds=0.2)


@pytest.mark.soak
async def test_what_a_cut_drain_could_not_store_is_recovered(
    open_workers: OpenWorkers, load_client: Customer, redis_url: str, server: redis.Redis
) -> None:
    async with proxied(redis_url) as proxy:
        proxy.swallow_requests_with(b'"data":[1.0]')
        with open_workers(redis_url=proxy.url, worker=HASTY_TO_GO) as workers:
            await load_client.submit([1.0, 2.0, 3.0])
            worker = workers.start()
            await eventually(lambda: proxy.swallowed > 0, "the finish is under way")
            assert await worker.stop() == EXIT_HUNG
    with open_workers() as workers:
        worker = workers.start()
        await load_client.assert_all_completed()
        assert await worker.stop() == 0
    assert_one_end_each(server, load_client.queue)
    assert_at_rest(server, load_client.queue)


@pytest.mark.soak
async def test_a_worker_that_goes_while_redis_is_frozen_strands_nothing(
    open_workers: OpenWorkers, durable: DurableServer
) -> None:
    policy = Policy(lease_seconds=0.5, reap_seconds=0.08, job_ttl_seconds=600)
    async with opened(durable.url, policy) as store:
        load_client = Customer(store)
        client = redis.Redis.from_url(durable.url)
        with open_workers(redis_url=durable.url, worker=HASTY_TO_GO) as workers:
            await load_client.submit([100.0, 101.0])
            worker = workers.start()
            await eventually(lambda: client.hlen(keys.running(load_client.queue)) == 2, "they run")
            durable.signal(signal.SIGSTOP)
            worker.signal(signal.SIGTERM)
            await worker.wait_for_exit(5)
            durable.signal(signal.SIGCONT)
            worker = workers.start()
            await load_client.assert_all_completed()
            assert await worker.stop() == 0
        assert_one_end_each(client, load_client.queue)
        assert_at_rest(client, load_client.queue)
        client.close()


@pytest.mark.traceback("a step raises what nobody foresaw")
async def test_a_worker_that_fails_leaves_with_an_error_whatever_still_runs(
    open_workers: OpenWorkers, load_client: Customer, server: redis.Redis
) -> None:
    two_at_once = WorkerConfig(concurrency=2, max_batch=1, prediction_timeout_seconds=600)
    with open_workers(worker=two_at_once) as workers:
        await load_client.submit([zoo.FOREVER, 1.0])
        assert await workers.start(fail_at="finishing").wait_for_exit(5) == 1
        assert "a bug at 'finishing'" in workers.log


@pytest.mark.soak
async def test_a_worker_goes_every_time_it_is_asked(
    open_workers: OpenWorkers, load_client: Customer, server: redis.Redis
) -> None:
    """redis-py may swallow a cancellation; a role that lives on would keep the process."""
    with open_workers() as workers:
        for number in range(15):
            worker = workers.start()
            await eventually(partial(worker.announced, server), "the worker is ready")
            await load_client.submit([float(number % 3)] * 5)
            worker.signal(signal.SIGTERM)
            assert await worker.wait_for_exit(15) == 0
        workers.start()
        await load_client.assert_all_completed()
    assert_one_end_each(server, load_client.queue)
