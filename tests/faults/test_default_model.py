"""Changes of a queue's default model while workers serve it."""

import pytest
import redis

from asyncinfer.repository import keys
from asyncinfer.repository.store import Store
from tests.faults.load_client import LoadClient
from tests.queue_driver import Q

from .harness import eventually
from .processes import OpenWorkers


@pytest.mark.soak
async def test_a_worker_adopts_the_default_model_that_redis_names(
    open_workers: OpenWorkers, store: Store, server: redis.Redis
) -> None:
    with open_workers(models=("slow", "picky"), default_model="slow") as workers:
        worker = workers.start()
        before = LoadClient(store, "slow", "slow")
        await before.submit([1.0])
        await before.assert_all_completed()
        server.set(keys.default_model(Q), "picky")
        await eventually(lambda: "Redis names 'picky'" in workers.log, "the worker logs it")
        for load_client in (
            *(LoadClient(store, model, "picky") for model in ("slow", "picky")),
            # The client of an API that does not know of the change yet.
            before,
        ):
            await load_client.submit([2.0])
            await load_client.assert_all_completed()
        assert await worker.stop() == 0
        assert workers.log.count("Redis names 'picky'") == 1


async def test_a_job_from_an_api_with_another_default_model_is_never_run_by_a_wrong_model(
    open_workers: OpenWorkers, store: Store
) -> None:
    """An API notices within 2 s that the default has changed; until then it adds jobs of the old
    default model to the queue of the new one."""
    await store.claim_default_model("slow")
    late = LoadClient(store, "slow", "slow")
    with open_workers(models=("picky",), default_model="picky") as workers:
        worker = workers.start()
        await eventually(lambda: "Serves picky" in workers.log, "it serves", 10)
        await late.submit([1.0])
        (ended,) = await late.wait_until_all_ended(5)
        assert ended.status == "failed"
        assert b"no model 'slow'" in (ended.error or b"")
        assert await worker.stop() == 0


async def test_a_starting_worker_logs_that_no_worker_has_the_default_model(
    open_workers: OpenWorkers, store: Store
) -> None:
    await store.claim_default_model("gone")
    with open_workers(models=("slow",), default_model="gone") as workers:
        worker = workers.start()
        warning = "No worker that is alive has the default model 'gone'"
        await eventually(lambda: warning in workers.log, "the worker logs it", 10)
        assert await worker.stop() == 0


@pytest.mark.soak
async def test_a_worker_accepts_that_there_is_no_default_model(
    open_workers: OpenWorkers, store: Store
) -> None:
    with open_workers(models=("slow", "picky"), default_model="slow") as workers:
        worker = workers.start()
        load_client = LoadClient(store, "slow", "slow")
        await load_client.submit([1.0])
        await load_client.assert_all_completed()
        assert await store.replace_default_model("slow", "") is None
        await eventually(lambda: "Redis names none" in workers.log, "the worker logs it", 10)
        after = LoadClient(store, "slow", "")
        await after.submit([2.0])
        await after.assert_all_completed(5)
        assert await store.default_model() is None
        assert await worker.stop() == 0
