"""The default model of a queue, while workers serve it."""

import redis

from asyncinfer import keys
from asyncinfer.repository.store import Store
from tests.hands import Q

from .customer import Customer
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
