"""Workers that die, stop, freeze or lose their link while they wait at the doorbell: the jobs that
come then are taken by others, at once or with their next look."""

import signal
import time
from functools import partial

import pytest
import redis

from asyncinfer.repository import keys
from asyncinfer.repository.policy import Policy
from asyncinfer.worker.worker import WorkerConfig
from tests.faults.load_client import LoadClient, assert_one_end_each, transitions

from .harness import assert_at_rest, eventually, waiting_workers
from .processes import OpenWorkers, WorkerChild
from .proxy import proxied

_LOOK_SECONDS = 0.5
_SLACK_SECONDS = 5.0

_PATIENT = WorkerConfig(concurrency=1, brpop_timeout_seconds=60)
"""Waits for the doorbell alone, as far as a test can tell."""
_LOOKING = WorkerConfig(concurrency=1, brpop_timeout_seconds=_LOOK_SECONDS)
_LONG_LEASE = Policy(lease_seconds=60, reap_seconds=0.08, job_ttl_seconds=600)
"""A job that was leased to a worker which cannot run it stays there for longer than any test."""


async def _wait_until_both_wait(
    first: WorkerChild, second: WorkerChild, load_client: LoadClient, server: redis.Redis
) -> None:
    """Waits until both workers wait at the doorbell, the first one longer, so that it gets the next
    token: the second one has run the last job."""
    for worker in (first, second):
        await eventually(partial(worker.is_announced, server), "a worker has loaded its models")
    while not await _is_next_job_run_by(second, load_client):
        pass
    await eventually(lambda: waiting_workers(server) == 2, "both wait")


async def _is_next_job_run_by(worker: WorkerChild, load_client: LoadClient) -> bool:
    (job_id,) = await load_client.submit([0.0])
    await load_client.assert_all_completed()
    (stored,) = await load_client.read([job_id])
    assert stored
    assert stored.record
    return f"-{worker.process.pid}-" in (stored.record.worker or "")


async def _seconds_of_one_job(load_client: LoadClient, server: redis.Redis) -> float:
    """How long a new job takes to complete; asserts that one worker alone ever had it."""
    began_at = time.monotonic()
    (job_id,) = await load_client.submit([1.0])
    await load_client.assert_all_completed()
    seconds = time.monotonic() - began_at
    assert transitions(server, load_client.queue)[job_id]["processing"] == 1
    assert not server.exists(keys.facts(load_client.queue)), "no delivery was counted"
    return seconds


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.soak)]
)
async def test_a_worker_that_ended_while_it_waited_delays_no_job(
    number: signal.Signals, open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    with open_workers(worker=_PATIENT, policy=_LONG_LEASE) as workers:
        ended, other = workers.start(), workers.start()
        await _wait_until_both_wait(ended, other, load_client, server)

        ended.signal(number)
        await ended.wait_for_exit()

        assert await _seconds_of_one_job(load_client, server) < _SLACK_SECONDS
        assert await other.stop() == 0
    assert_at_rest(server, load_client.queue)


async def test_a_worker_frozen_while_it_waited_delays_a_job_by_one_look_of_another(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    with (
        open_workers(worker=_PATIENT, policy=_LONG_LEASE) as patient,
        open_workers(worker=_LOOKING, policy=_LONG_LEASE) as looking,
    ):
        frozen, other = patient.start(), looking.start()
        await _wait_until_both_wait(frozen, other, load_client, server)

        frozen.signal(signal.SIGSTOP)

        assert await _seconds_of_one_job(load_client, server) < _LOOK_SECONDS + _SLACK_SECONDS
        assert await other.stop() == 0
        frozen.signal(signal.SIGCONT)
        assert await _seconds_of_one_job(load_client, server) < _SLACK_SECONDS
        assert await frozen.stop() == 0
    assert_one_end_each(server, load_client.queue)
    assert_at_rest(server, load_client.queue)


@pytest.mark.soak
async def test_a_worker_cut_off_while_it_waited_delays_a_job_by_one_look_of_another(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis, redis_url: str
) -> None:
    async with proxied(redis_url) as proxy:
        with (
            open_workers(worker=_PATIENT, policy=_LONG_LEASE, redis_url=proxy.url) as patient,
            open_workers(worker=_LOOKING, policy=_LONG_LEASE) as looking,
        ):
            cut_off, other = patient.start(), looking.start()
            await _wait_until_both_wait(cut_off, other, load_client, server)

            proxy.black_hole()

            assert await _seconds_of_one_job(load_client, server) < _LOOK_SECONDS + _SLACK_SECONDS
            assert await other.stop() == 0
            proxy.restore()
            assert await _seconds_of_one_job(load_client, server) < _SLACK_SECONDS
            assert await cut_off.stop() == 0
    assert_one_end_each(server, load_client.queue)
    assert_at_rest(server, load_client.queue)
