"""Workers that are killed or frozen, or that a job kills: their jobs survive."""

import asyncio
import random
import re
import signal
from pathlib import Path

import pytest
import redis

from asyncinfer.repository import keys
from asyncinfer.repository.claims import ClaimRequest, QueueConsumer
from asyncinfer.repository.maintenance import Maintenance
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from asyncinfer.worker.held_claim import Step
from asyncinfer.worker.worker import WorkerConfig
from tests import zoo
from tests.faults.load_client import LoadClient, assert_one_end_each, transitions
from tests.sampling import soak_except

from .harness import assert_at_rest, eventually, is_renewed, waiting_workers
from .processes import OpenWorkers, WorkerChild, Workers

STEPS: tuple[Step, ...] = ("woken", "claimed", "running", "finishing", "finished")
MANY_DELIVERIES = Policy(
    lease_seconds=0.5, reap_seconds=0.08, job_ttl_seconds=600, max_deliveries=1000
)


async def _kill_at(
    step: Step, times: int, workers: Workers, load_client: LoadClient, server: redis.Redis
) -> None:
    """Kills `times` workers at this step of a job; asserts that another completes all jobs."""
    for number in range(times):
        doomed = workers.start(die_at=step)
        await _wait_until_ready_or_dead(doomed, server)
        await load_client.submit([float(number)])
        await eventually(doomed.has_ended, "the worker dies")
        assert doomed.process.returncode == -signal.SIGKILL
    last = workers.start()
    await _wait_until_announced(last, server)
    await load_client.assert_all_completed()
    assert await last.stop() == 0


async def _wait_until_announced(worker: WorkerChild, client: redis.Redis) -> None:
    await eventually(lambda: worker.is_announced(client), "the worker has loaded its models")


async def _wait_until_ready_or_dead(worker: WorkerChild, client: redis.Redis) -> None:
    """Waits until the worker waits on the doorbell, or has died at its step of an older job."""
    await eventually(
        lambda: waiting_workers(client) > 0 or worker.has_ended(), "the worker waits, or is dead"
    )


@pytest.mark.parametrize("step", soak_except(STEPS, 2))
async def test_a_job_survives_its_worker(
    step: Step, open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    with open_workers(policy=MANY_DELIVERIES) as workers:
        await _kill_at(step, 1, workers, load_client, server)
    assert_one_end_each(server, load_client.queue)
    assert_at_rest(server, load_client.queue)


@pytest.mark.soak
@pytest.mark.parametrize("step", STEPS)
async def test_a_job_survives_six_workers_each_killed_at_one_step(
    step: Step, open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    with open_workers(policy=MANY_DELIVERIES) as workers:
        await _kill_at(step, 6, workers, load_client, server)
    assert_one_end_each(server, load_client.queue)
    assert_at_rest(server, load_client.queue)


@pytest.mark.soak
async def test_a_worker_that_was_frozen_cannot_overwrite_the_result_of_the_next_worker(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    with open_workers(policy=MANY_DELIVERIES) as workers:
        frozen = workers.start()
        (job_id,) = await load_client.submit([500.0])
        await eventually(lambda: server.hexists(keys.running(load_client.queue), job_id), "it runs")
        # A renewal shows that the worker has the claim's reply, and runs the job.
        await eventually(is_renewed(server, load_client.queue), "its lease is renewed")
        frozen.signal(signal.SIGSTOP)
        workers.start()
        await load_client.assert_all_completed()
        frozen.signal(signal.SIGCONT)
        await eventually(lambda: "came too late" in workers.log, "the late result is refused")
        for worker in workers.members:
            assert await worker.stop() == 0
    assert_one_end_each(server, load_client.queue)
    assert_at_rest(server, load_client.queue)


@pytest.mark.soak
async def test_2000_jobs_survive_workers_killed_and_frozen_at_random(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    chance = random.Random(7)
    with open_workers(
        policy=MANY_DELIVERIES, worker=WorkerConfig(concurrency=2, max_batch=16)
    ) as workers:
        running = [workers.start() for _ in range(3)]
        async with asyncio.TaskGroup() as group:
            group.create_task(_submit_slowly(load_client, 2000, chance))
            await _kill_and_freeze(workers, running, load_client, chance)
        await load_client.assert_all_completed(120)
        await eventually(lambda: "came too late" in workers.log, "a stale result was refused", 60)
        for worker in running:
            worker.signal(signal.SIGCONT)
            await worker.stop()
    assert len(load_client.acknowledged) == 2000
    assert_one_end_each(server, load_client.queue)
    assert_at_rest(server, load_client.queue)


async def _submit_slowly(load_client: LoadClient, total: int, chance: random.Random) -> None:
    for start in range(0, total, 20):
        await load_client.submit([float(chance.randint(0, 60)) for _ in range(start, start + 20)])
        await asyncio.sleep(0.15)


async def _kill_and_freeze(
    workers: Workers, running: list[WorkerChild], load_client: LoadClient, chance: random.Random
) -> None:
    """Kills or freezes a worker about every half second; replaces a killed worker."""
    for _ in range(40):
        await asyncio.sleep(chance.uniform(0.2, 0.8))
        index = chance.randrange(len(running))
        if chance.random() < 0.5:
            running[index].kill()
            running[index] = workers.start()
        else:
            running[index].signal(signal.SIGSTOP)
            await asyncio.sleep(chance.uniform(0.5, 1.5))
            running[index].signal(signal.SIGCONT)


async def test_a_job_that_kills_its_workers_fails_alone_after_three_deliveries(
    open_workers: OpenWorkers, server: redis.Redis, store: Store, tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    poison = zoo.place_poison(folder, "poison", toml="[batching]\nenabled = true\n")
    zoo.place(folder, "slow", zoo.slow())
    poisoned, unaffected = LoadClient(store, "poison"), LoadClient(store, "slow")
    await store.command("SET", keys.paused(poisoned.queue), "1")
    await store.command("SADD", keys.queues(store.queue_name), poisoned.queue, unaffected.queue)
    with open_workers(
        model_dir=str(folder),
        models=(),
        default_model="slow",
        policy=Policy(lease_seconds=0.5, reap_seconds=0.08, job_ttl_seconds=600),
        worker=WorkerConfig(concurrency=4, max_batch=4),
    ) as workers:
        harmless = await poisoned.submit([0.0] * 7)
        (culprit,) = await poisoned.submit([5.0])
        await unaffected.submit([float(20 + number % 5) for number in range(24)])
        for _ in range(3):
            poison.disarm()
            await store.command("SET", keys.paused(poisoned.queue), "1")
            worker = workers.start()
            await _wait_until_announced(worker, server)
            poison.arm()
            await store.command("DEL", keys.paused(poisoned.queue))
            await store.command("LPUSH", keys.wake(poisoned.queue), "1")
            await eventually(worker.has_ended, "the poison kills", 20)
            assert worker.process.returncode < 0
        poison.disarm()
        workers.start()
        ended = {job.job_id: job for job in await poisoned.wait_until_all_ended()}
        await unaffected.assert_all_completed()
        assert await workers.members[-1].stop() == 0
    assert ended[culprit].status == "failed"
    assert b"worker_lost" in (ended[culprit].error or b"")
    logged = re.findall(rf"Job {culprit} failed: (.*)", workers.log)
    assert logged == [f"worker_lost (model poison, request -, worker {worker.name(server)})."]
    assert {ended[job_id].status for job_id in harmless} == {"completed"}
    assert server.zrange(keys.dead(poisoned.queue), 0, -1) == [culprit.encode()]
    assert not server.exists(keys.dead(unaffected.queue))
    assert_at_rest(server, poisoned.queue, unaffected.queue)


@pytest.mark.soak
async def test_the_unfinished_jobs_of_a_dead_workers_claim_are_run_again(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    """The claim's first job ends early (it is cancelled); the worker dies with the others open."""
    with open_workers(policy=MANY_DELIVERIES) as workers:
        ids = await load_client.submit([300.0, 301.0, 302.0])
        doomed = workers.start()
        await eventually(lambda: server.hlen(keys.running(load_client.queue)) == 3, "all three run")
        stored = (await load_client.read(ids[:1]))[0]
        assert stored
        await load_client.operations.cancel(stored)
        await eventually(lambda: server.get(keys.status(ids[0])) == b"cancelled", "it is cancelled")
        doomed.kill()
        workers.start()
        del load_client.acknowledged[ids[0]]
        await load_client.assert_all_completed()
        assert await workers.members[-1].stop() == 0
    assert transitions(server, load_client.queue)[ids[0]]["cancelled"] == 1
    assert_one_end_each(server, load_client.queue)
    assert_at_rest(server, load_client.queue)


async def test_a_frozen_workers_jobs_come_back_within_the_promised_time(
    load_client: LoadClient, server: redis.Redis, store: Store
) -> None:
    """A job's next run waits for its lease, the outage guard and two sweeps, and nothing else."""
    await load_client.submit([1.0])
    maintenance = Maintenance(store)
    await maintenance.sweep()
    runs = QueueConsumer(store, "frozen")
    await runs.claim(ClaimRequest((load_client.queue,), runs.new_token(), False, 10))
    policy = store.policy

    async def waits_again() -> bool:
        await maintenance.sweep()
        return server.llen(load_client.queue) == 1

    await eventually(waits_again, "it waits again", 3 * policy.lease_seconds + 1)
