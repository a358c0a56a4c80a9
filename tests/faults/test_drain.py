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
from .processes import DurableServer, OpenCrew
from .proxy import proxied
from .test_redis_away import opened


async def test_a_worker_that_waits_goes_at_once(
    crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    with crew(worker=WorkerConfig(concurrency=4, brpop_timeout_seconds=60)) as workers:
        worker = workers.hire()
        await customer.submit([1.0])
        await customer.all_completed()
        worker.signal(signal.SIGTERM)
        assert await worker.left(15) == 0
    assert not list(server.scan_iter(keys.worker("predict_queue", "*")))
    assert_at_rest(server, customer.queue)


async def test_a_worker_that_runs_finishes_what_runs_and_takes_nothing_more(
    crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    with crew(worker=WorkerConfig(concurrency=1, max_batch=2)) as workers:
        ids = await customer.submit([400.0, 401.0, 1.0])
        worker = workers.hire()
        await eventually(lambda: server.hlen(keys.running(customer.queue)) == 2, "two run")
        assert await worker.stop() == 0
        assert [server.get(keys.status(job_id)) for job_id in ids] == [
            b"completed",
            b"completed",
            b"pending",
        ]
        workers.hire()
        await customer.all_completed()
        assert await workers.members[-1].stop() == 0
    assert_at_rest(server, customer.queue)


@pytest.mark.soak
async def test_a_drain_that_takes_too_long_hands_its_jobs_back_uncounted(
    crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    slow_to_go = WorkerConfig(
        concurrency=1, prediction_timeout_seconds=600, drain_timeout_seconds=0.2
    )
    with crew(worker=slow_to_go) as workers:
        (job_id,) = await customer.submit([zoo.FOREVER])
        running = keys.running(customer.queue)
        for _ in range(2):
            worker = workers.hire()
            await eventually(lambda: server.hlen(running) == 1, "it runs")
            assert await worker.stop() == 0
            assert server.get(keys.status(job_id)) == b"pending"
            assert not server.exists(keys.facts(customer.queue))
        (stored,) = await customer.read([job_id])
        assert stored
        assert await customer.operations.cancel(stored) == "cancelled"
    assert transitions(server, customer.queue)[job_id]["processing"] == 2
    assert_at_rest(server, customer.queue)


async def test_a_drain_does_not_wait_for_a_kernel_that_nothing_stops(
    crew: OpenCrew, server: redis.Redis, store: Store
) -> None:
    customer = Customer(store, "huge", "huge")
    slow_to_go = WorkerConfig(
        concurrency=1,
        prediction_timeout_seconds=600,
        drain_timeout_seconds=0.2,
        hang_grace_seconds=0.2,
    )
    with crew(models=("huge",), worker=slow_to_go) as workers:
        (job_id,) = await customer.submit([20_000.0])
        worker = workers.hire()
        await eventually(lambda: server.hlen(keys.running(customer.queue)) == 1, "it runs")
        assert await worker.stop() == EXIT_HUNG
        assert server.get(keys.status(job_id)) == b"pending"
        (stored,) = await customer.read([job_id])
        assert stored
        await customer.operations.cancel(stored)
    assert_at_rest(server, customer.queue)


@pytest.mark.soak
async def test_a_second_signal_ends_a_worker_at_once_and_loses_nothing(
    crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    with crew() as workers:
        await customer.submit([700.0])
        worker = workers.hire()
        await eventually(lambda: server.hlen(keys.running(customer.queue)) == 1, "it runs")
        worker.signal(signal.SIGTERM)
        await eventually(lambda: "Draining" in workers.log, "it drains")
        worker.signal(signal.SIGTERM)
        assert await worker.left(15) == 130
        workers.hire()
        await customer.all_completed()
        assert await workers.members[-1].stop() == 0
    assert_one_end_each(server, customer.queue)
    assert_at_rest(server, customer.queue)


async def test_after_a_drain_was_cut_nothing_more_of_a_claim_starts(
    crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    slow_to_go = WorkerConfig(
        concurrency=1, prediction_timeout_seconds=600, drain_timeout_seconds=0.2
    )
    with crew(worker=slow_to_go) as workers:
        ids = await customer.submit([zoo.FOREVER] * 3, rows=2500)  # too many for a shared run
        worker = workers.hire()
        await eventually(lambda: server.hlen(keys.running(customer.queue)) == 3, "one runs")
        assert await worker.stop() == 0
    assert {server.get(keys.status(one)) for one in ids} == {b"pending"}
    for stored in await customer.read():
        assert stored
        assert await customer.operations.cancel(stored) == "cancelled"
    assert_at_rest(server, customer.queue)


HASTY_TO_GO = WorkerConfig(concurrency=1, drain_timeout_seconds=0.2, hang_grace_seconds=0.2)


@pytest.mark.soak
async def test_what_a_cut_drain_could_not_store_is_recovered(
    crew: OpenCrew, customer: Customer, redis_url: str, server: redis.Redis
) -> None:
    async with proxied(redis_url) as proxy:
        proxy.swallow_requests_with(b'"data":[1.0]')
        with crew(redis_url=proxy.url, worker=HASTY_TO_GO) as workers:
            await customer.submit([1.0, 2.0, 3.0])
            worker = workers.hire()
            await eventually(lambda: proxy.swallowed > 0, "the finish is under way")
            assert await worker.stop() == EXIT_HUNG
    with crew() as workers:
        worker = workers.hire()
        await customer.all_completed()
        assert await worker.stop() == 0
    assert_one_end_each(server, customer.queue)
    assert_at_rest(server, customer.queue)


@pytest.mark.soak
async def test_a_worker_that_goes_while_redis_is_frozen_strands_nothing(
    crew: OpenCrew, durable: DurableServer
) -> None:
    policy = Policy(lease_seconds=0.5, reap_seconds=0.08, job_ttl_seconds=600)
    async with opened(durable.url, policy) as store:
        customer = Customer(store)
        client = redis.Redis.from_url(durable.url)
        with crew(redis_url=durable.url, worker=HASTY_TO_GO) as workers:
            await customer.submit([100.0, 101.0])
            worker = workers.hire()
            await eventually(lambda: client.hlen(keys.running(customer.queue)) == 2, "they run")
            durable.signal(signal.SIGSTOP)
            worker.signal(signal.SIGTERM)
            await worker.left(5)
            durable.signal(signal.SIGCONT)
            worker = workers.hire()
            await customer.all_completed()
            assert await worker.stop() == 0
        assert_one_end_each(client, customer.queue)
        assert_at_rest(client, customer.queue)
        client.close()


@pytest.mark.traceback("a step raises what nobody foresaw")
async def test_a_worker_that_fails_leaves_with_an_error_whatever_still_runs(
    crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    two_at_once = WorkerConfig(concurrency=2, max_batch=1, prediction_timeout_seconds=600)
    with crew(worker=two_at_once) as workers:
        await customer.submit([zoo.FOREVER, 1.0])
        assert await workers.hire(fail_at="finishing").left(5) == 1
        assert "a bug at 'finishing'" in workers.log


@pytest.mark.soak
async def test_a_worker_goes_every_time_it_is_asked(
    crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    """redis-py may swallow a cancellation; a role that lives on would keep the process."""
    with crew() as workers:
        for number in range(15):
            worker = workers.hire()
            await eventually(partial(worker.announced, server), "the worker is ready")
            await customer.submit([float(number % 3)] * 5)
            worker.signal(signal.SIGTERM)
            assert await worker.left(15) == 0
        workers.hire()
        await customer.all_completed()
    assert_one_end_each(server, customer.queue)
