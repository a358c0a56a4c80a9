"""Workers that are killed, frozen or poisoned."""

import asyncio
import random
import signal
from pathlib import Path

import pytest
import redis

from asyncinfer.repository import keys
from asyncinfer.repository.claims import ClaimRequest, Runs
from asyncinfer.repository.maintenance import Maintenance
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from asyncinfer.worker.held_claim import Step
from asyncinfer.worker.worker import WorkerConfig
from tests import zoo
from tests.faults.load_client import Customer, assert_one_end_each, transitions

from .harness import assert_at_rest, eventually
from .processes import Crew, OpenCrew, WorkerChild
from .test_redis_away import renewed

STEPS: tuple[Step, ...] = ("woken", "claimed", "running", "finishing", "finished")
PATIENT = Policy(lease_seconds=0.5, reap_seconds=0.08, job_ttl_seconds=600, max_deliveries=1000)


def _waits_at_the_bell(client: redis.Redis) -> int:
    listed: list[dict[str, str]] = client.client_list()
    return sum(one["cmd"] == "brpop" for one in listed)


async def _killed_at(
    step: Step, times: int, workers: Crew, customer: Customer, server: redis.Redis
) -> None:
    for number in range(times):
        doomed = workers.hire(die_at=step)
        await _ready_or_dead(doomed, server)
        await customer.submit([float(number)])
        await eventually(doomed.died, "the worker dies")
        assert doomed.process.returncode == -signal.SIGKILL
    last = workers.hire()
    await _announced(last, server)
    await customer.all_completed()
    assert await last.stop() == 0


async def _announced(worker: WorkerChild, client: redis.Redis) -> None:
    await eventually(lambda: worker.announced(client), "the worker has loaded its models")


async def _ready_or_dead(worker: WorkerChild, client: redis.Redis) -> None:
    """It waits at the bell, or met an older job and died of its step."""
    await eventually(
        lambda: _waits_at_the_bell(client) > 0 or worker.died(), "the worker waits, or is dead"
    )


@pytest.mark.parametrize("step", STEPS)
async def test_a_job_survives_its_worker(
    step: Step, crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    with crew(policy=PATIENT) as workers:
        await _killed_at(step, 1, workers, customer, server)
    assert_one_end_each(server, customer.queue)
    assert_at_rest(server, customer.queue)


@pytest.mark.soak
@pytest.mark.parametrize("step", STEPS)
async def test_a_job_survives_twenty_workers_each_killed_at_one_step(
    step: Step, crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    with crew(policy=PATIENT) as workers:
        await _killed_at(step, 20, workers, customer, server)
    assert_one_end_each(server, customer.queue)
    assert_at_rest(server, customer.queue)


async def test_a_worker_that_froze_cannot_write_over_the_one_that_took_its_job(
    crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    with crew(policy=PATIENT) as workers:
        frozen = workers.hire()
        (job_id,) = await customer.submit([500.0])
        await eventually(lambda: server.hexists(keys.running(customer.queue), job_id), "it runs")
        # Renewed, so the worker has the claim's reply, and runs it.
        await eventually(renewed(server, customer.queue), "its lease is renewed")
        frozen.signal(signal.SIGSTOP)
        workers.hire()
        await customer.all_completed()
        frozen.signal(signal.SIGCONT)
        await eventually(lambda: "came too late" in workers.log, "the late result is refused")
        for one in workers.members:
            assert await one.stop() == 0
    assert_one_end_each(server, customer.queue)
    assert_at_rest(server, customer.queue)


@pytest.mark.soak
async def test_2000_jobs_survive_workers_killed_and_frozen_at_random(
    crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    chance = random.Random(7)
    with crew(policy=PATIENT, worker=WorkerConfig(concurrency=2, max_batch=16)) as workers:
        shift = [workers.hire() for _ in range(3)]
        async with asyncio.TaskGroup() as group:
            group.create_task(_arrivals(customer, 2000, chance))
            await _chaos(workers, shift, customer, chance)
        await customer.all_completed(120)
        await eventually(lambda: "came too late" in workers.log, "a stale result was refused", 60)
        for one in shift:
            one.signal(signal.SIGCONT)
            await one.stop()
    assert len(customer.acknowledged) == 2000
    assert_one_end_each(server, customer.queue)
    assert_at_rest(server, customer.queue)


async def _arrivals(customer: Customer, total: int, chance: random.Random) -> None:
    for start in range(0, total, 20):
        await customer.submit([float(chance.randint(0, 60)) for _ in range(start, start + 20)])
        await asyncio.sleep(0.15)


async def _chaos(
    workers: Crew, shift: list[WorkerChild], customer: Customer, chance: random.Random
) -> None:
    """Kills or freezes a worker about every half second; a killed one is replaced."""
    for _ in range(40):
        await asyncio.sleep(chance.uniform(0.2, 0.8))
        at = chance.randrange(len(shift))
        if chance.random() < 0.5:
            shift[at].kill()
            shift[at] = workers.hire()
        else:
            shift[at].signal(signal.SIGSTOP)
            await asyncio.sleep(chance.uniform(0.5, 1.5))
            shift[at].signal(signal.SIGCONT)


async def test_a_poison_job_dies_alone_after_three_deliveries(
    crew: OpenCrew, server: redis.Redis, store: Store, tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    poison = zoo.place_poison(folder, "poison", toml="[batching]\nenabled = true\n")
    zoo.place(folder, "slow", zoo.slow())
    poisoned, innocent = Customer(store, "poison"), Customer(store, "slow")
    await store.command("SET", keys.paused(poisoned.queue), "1")
    await store.command("SADD", keys.queues(store.n), poisoned.queue, innocent.queue)
    with crew(
        model_dir=str(folder),
        models=(),
        default_model="slow",
        policy=Policy(lease_seconds=0.5, reap_seconds=0.08, job_ttl_seconds=600),
        worker=WorkerConfig(concurrency=4, max_batch=4),
    ) as workers:
        harmless = await poisoned.submit([0.0] * 7)
        (culprit,) = await poisoned.submit([5.0])
        await innocent.submit([float(20 + number % 5) for number in range(64)])
        for _ in range(3):
            poison.disarm()
            await store.command("SET", keys.paused(poisoned.queue), "1")
            worker = workers.hire()
            await _announced(worker, server)
            poison.arm()
            await store.command("DEL", keys.paused(poisoned.queue))
            await store.command("LPUSH", keys.wake(poisoned.queue), "1")
            await eventually(worker.died, "the poison kills", 20)
            assert worker.process.returncode < 0
        poison.disarm()
        workers.hire()
        ended = {one.job_id: one for one in await poisoned.all_ended()}
        await innocent.all_completed()
        assert await workers.members[-1].stop() == 0
    assert ended[culprit].status == "failed"
    assert b"worker_lost" in (ended[culprit].error or b"")
    assert {ended[job_id].status for job_id in harmless} == {"completed"}
    assert server.zrange(keys.dead(poisoned.queue), 0, -1) == [culprit.encode()]
    assert not server.exists(keys.dead(innocent.queue))
    assert_at_rest(server, poisoned.queue, innocent.queue)


@pytest.mark.soak
async def test_what_a_dead_worker_left_unfinished_of_a_claim_is_run_again(
    crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    """Its claim's first job is ended early (cancelled); the worker dies with the others open."""
    with crew(policy=PATIENT) as workers:
        ids = await customer.submit([300.0, 301.0, 302.0])
        doomed = workers.hire()
        await eventually(lambda: server.hlen(keys.running(customer.queue)) == 3, "all three run")
        stored = (await customer.read(ids[:1]))[0]
        assert stored
        await customer.operations.cancel(stored)
        await eventually(lambda: server.get(keys.status(ids[0])) == b"cancelled", "it is cancelled")
        doomed.kill()
        workers.hire()
        del customer.acknowledged[ids[0]]
        await customer.all_completed()
        assert await workers.members[-1].stop() == 0
    assert transitions(server, customer.queue)[ids[0]]["cancelled"] == 1
    assert_one_end_each(server, customer.queue)
    assert_at_rest(server, customer.queue)


async def test_a_frozen_workers_jobs_come_back_within_the_promised_time(
    customer: Customer, server: redis.Redis, store: Store
) -> None:
    """Lease, outage guard and two ticks: nothing else stands between a job and its next run."""
    await customer.submit([1.0])
    maintenance = Maintenance(store)
    await maintenance.sweep()
    runs = Runs(store, "frozen")
    await runs.claim(ClaimRequest((customer.queue,), runs.new_token(), False, 10))
    policy = store.policy

    async def back() -> bool:
        await maintenance.sweep()
        return server.llen(customer.queue) == 1

    await eventually(back, "it waits again", 3 * policy.lease_seconds + 1)
