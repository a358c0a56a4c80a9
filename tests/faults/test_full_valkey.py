"""An embedded Valkey that has more than its limit: it refuses new jobs, and runs those it has."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest
import redis

from asyncinfer.api.config import ApiConfig
from asyncinfer.client import Client
from asyncinfer.errors import StorageFull
from asyncinfer.processes import valkey
from asyncinfer.repository import keys
from asyncinfer.repository.leases import Leases, Renewal
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from tests.api.harness import ROW, announce, running_client
from tests.cli.command_line import run_command
from tests.faults.harness import assert_at_rest, eventually, eventually_sync
from tests.faults.processes import OpenWorkers
from tests.queue_driver import Q, QueueDriver, new_job
from tests.serving import running_serve

MIB: Final = 1 << 20
LIMIT: Final = 16 * MIB
POLICY: Final = Policy(lease_seconds=0.5, reap_seconds=0.08, job_ttl_seconds=600)
IRIS: Final = [[5.1, 3.5, 1.4, 0.2]]


@pytest.fixture
def memory_full(server: redis.Redis) -> Iterator[Callable[[], object]]:
    """A function that leaves the server no memory."""
    yield lambda: server.config_set("maxmemory", "1mb")
    server.config_set("maxmemory", "0")


@asynccontextmanager
async def driver_of(url: str) -> AsyncIterator[QueueDriver]:
    async with Store.open(url, queue_name=Q, policy=POLICY, name="test") as store:
        client = redis.Redis.from_url(url)
        yield QueueDriver(store, client)
        client.close()


async def test_stored_jobs_are_claimed_renewed_and_finished_above_the_limit(tmp_path: Path) -> None:
    """They are also recovered, cancelled and retried; only a submit is refused."""
    async with valkey.embedded(tmp_path) as server, driver_of(server.url) as hands:
        ids = [await hands.submit_one(data=b" " * MIB) for _ in range(20)]

    async with valkey.embedded(tmp_path, LIMIT) as server, driver_of(server.url) as hands:
        with pytest.raises(StorageFull, match="EMBEDDED_MAXMEMORY"):
            await hands.submit(new_job())
        claim = await hands.claim_jobs(2)
        leases = Leases(hands.store)
        assert leases.renew({Q: [claim.token]}) == Renewal((), (), ())
        leases.close()
        assert hands.statuses(ids[:2]) == {"processing"}

        async def is_recovered() -> bool:
            await hands.maintenance.sweep()
            return hands.statuses(ids) == {"pending"}

        await eventually(is_recovered, "the jobs of the lost claim wait again")
        assert await hands.cancel(ids[0]) == "cancelled"
        assert await hands.retry(ids[0]) == "ok"
        assert sorted(await hands.run_all()) == sorted(ids)
        assert hands.statuses(ids) == {"completed"}
        # The inputs of completed jobs are deleted, so there is room again.
        assert await hands.submit(new_job()) == ["ok"]
        await hands.run_all()
        assert_at_rest(hands.redis, Q)


@pytest.mark.soak
def test_a_serve_that_starts_above_its_limit_runs_what_it_has_and_says_what_to_do(
    tmp_path: Path, shipped_models: Path
) -> None:
    argv = ("--data-dir", str(tmp_path), "--model-dir", str(shipped_models))
    with running_serve(*argv) as serve, Client(serve.banner["URL"]) as client:
        client.pause("iris")
        ids = [client.submit(IRIS).id for _ in range(3)]
        connect(tmp_path).setrange("other", 20 * MIB, "x")
        serve.process.process.terminate()
        assert serve.process.process.wait(15) == 0

    with running_serve(*argv, "--embedded-maxmemory", str(LIMIT)) as serve:
        url = serve.banner["URL"]
        with Client(url, retries=0) as client:
            with pytest.raises(StorageFull, match=r"raise maxmemory .* EMBEDDED_MAXMEMORY"):
                client.submit(IRIS)
            client.resume("iris")
            wait_until_completed(client, ids)
            eventually_sync(lambda: client.health().workers == 1, "its worker is announced")
            told = run_command("doctor", "--url", url, *argv).out
            assert "MiB of 16 MiB, its maxmemory: full memory refuses submits" in told
            assert "-> raise EMBEDDED_MAXMEMORY" in told
            connect(tmp_path).delete("other")
            wait_until_completed(client, [client.submit(IRIS).id])
        serve.process.kill()
        assert "may have 16 MiB (EMBEDDED_MAXMEMORY)" in serve.process.read_stderr()


async def test_an_api_that_starts_without_memory_answers_who_waits_as_soon_as_the_job_ends(
    store: Store, server: redis.Redis, redis_url: str, memory_full: Callable[[], object]
) -> None:
    """Its inbox tells it: the check of all jobs that are waited for comes only every 4 to 6 s."""
    hands = QueueDriver(store, server)
    await announce(store, "iris", default="iris")
    job_id = await hands.submit_one()
    memory_full()
    async with running_client(ApiConfig(redis_url=redis_url, policy=POLICY)) as client:
        await eventually(lambda: bool(server.keys(keys.inbox(Q, "*"))), "it has an inbox", 2)
        waiting = asyncio.create_task(client.get(f"/job/{job_id}?wait=20"))
        await eventually(lambda: server.hexists(keys.facts(Q), job_id), "it waits for the job")
        await hands.run_all()
        async with asyncio.timeout(2):
            assert (await waiting).json()["status"] == "completed"
        refused = await client.post("/predict", json={"data": ROW})
        assert refused.json()["code"] == "storage_full"

        server.config_set("maxmemory", "0")
        post = client.post("/predict", json={"data": ROW}, headers={"prefer": "wait=20"})
        waiting = asyncio.create_task(post)
        await eventually(lambda: server.llen(Q) == 1, "the job is stored")
        await hands.run_all()
        async with asyncio.timeout(2):
            assert (await waiting).status_code == 200
    assert_at_rest(server, Q)


async def test_what_only_reads_is_answered_while_memory_is_full(
    store: Store, server: redis.Redis, redis_url: str, memory_full: Callable[[], object]
) -> None:
    """Also what is read in one transaction, of which Redis then refuses each command."""
    hands = QueueDriver(store, server)
    await announce(store, "iris", default="iris")
    async with running_client(ApiConfig(redis_url=redis_url, policy=POLICY)) as client:
        job_id = await hands.submit_one()
        memory_full()
        assert (await client.get(f"/job/{job_id}/timeline")).status_code == 200
        assert await store.queues_with_jobs([Q]) == {Q}
        await hands.run_all()


@pytest.mark.soak
async def test_a_worker_stays_announced_while_memory_is_full(
    server: redis.Redis, open_workers: OpenWorkers, memory_full: Callable[[], object]
) -> None:
    """So that nobody who is called starts workers that are there, and no autoscaler counts none."""
    with open_workers(default_model="slow") as workers:
        worker = workers.start()
        await eventually(lambda: worker.is_announced(server), "it is announced")
        memory_full()
        for name in list(server.scan_iter(keys.worker(Q, "*"))):
            server.delete(name)
        await eventually(lambda: worker.is_announced(server), "it is announced again")
        assert await worker.stop() == 0


def wait_until_completed(client: Client, ids: list[str]) -> None:
    for job_id in ids:
        client.job(job_id).result(timeout=20)


def connect(data_dir: Path) -> redis.Redis:
    return redis.Redis.from_url(valkey.running_url(data_dir) or "")
