"""The default model of a queue, while workers serve it."""

import redis

from asyncinfer.repository import keys
from asyncinfer.repository.store import Store
from tests.faults.load_client import Customer
from tests.queue_driver import Q

from .harness import eventually
from .processes import OpenCrew


async def test_a_worker_adopts_the_default_model_that_redis_names(
    crew: OpenCrew, store: Store, server: redis.Redis
) -> None:
    with crew(models=("slow", "picky"), default_model="slow") as workers:
        worker = workers.hire()
        before = Customer(store, "slow", "slow")
        await before.submit([1.0])
        await before.all_completed()
        server.set(keys.default_model(Q), "picky")
        await eventually(lambda: "Redis names 'picky'" in workers.log, "it says so", 5)
        for customer in (
            *(Customer(store, model, "picky") for model in ("slow", "picky")),
            # Of an API that has not heard of it.
            before,
        ):
            await customer.submit([2.0])
            await customer.all_completed(5)
        assert await worker.stop() == 0
        assert workers.log.count("Redis names 'picky'") == 1


async def test_a_job_of_an_api_with_another_default_model_is_never_run_by_a_wrong_model(
    crew: OpenCrew, store: Store
) -> None:
    """An API hears within 2 s that the default has changed; until then it puts jobs of the old
    default where those of the new one are."""
    await store.claim_default_model("slow")
    late = Customer(store, "slow", "slow")
    with crew(models=("picky",), default_model="picky") as workers:
        worker = workers.hire()
        await eventually(lambda: "Serves picky" in workers.log, "it serves", 10)
        await late.submit([1.0])
        (ended,) = await late.all_ended(5)
        assert ended.status == "failed"
        assert b"no model 'slow'" in (ended.error or b"")
        assert await worker.stop() == 0


async def test_a_worker_says_at_its_start_that_nobody_has_the_default_model(
    crew: OpenCrew, store: Store
) -> None:
    await store.claim_default_model("gone")
    with crew(models=("slow",), default_model="gone") as workers:
        worker = workers.hire()
        told = "No worker that is alive has the default model 'gone'"
        await eventually(lambda: told in workers.log, "it says so", 10)
        assert await worker.stop() == 0


async def test_a_worker_goes_by_the_decision_that_there_is_no_default_model(
    crew: OpenCrew, store: Store
) -> None:
    with crew(models=("slow", "picky"), default_model="slow") as workers:
        worker = workers.hire()
        customer = Customer(store, "slow", "slow")
        await customer.submit([1.0])
        await customer.all_completed()
        assert await store.replace_default_model("slow", "") is None
        await eventually(lambda: "Redis names none" in workers.log, "it says so", 10)
        after = Customer(store, "slow", "")
        await after.submit([2.0])
        await after.all_completed(5)
        assert await store.default_model() is None
        assert await worker.stop() == 0
