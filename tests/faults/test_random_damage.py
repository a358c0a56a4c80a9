"""Random damage of Redis keys: no unexpected 5xx, and no role of a process ends."""

import asyncio

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from asyncinfer.repository import keys
from asyncinfer.repository.policy import Policy
from asyncinfer.worker.worker import WorkerConfig
from tests.api.harness import hosted
from tests.api.sse import open_event_stream

from . import damaged_redis
from .damaged_redis import HOSTILE_VALUES, KINDS, Damage, DamagedService
from .harness import eventually
from .processes import OpenWorkers

BUSY = WorkerConfig(concurrency=1, brpop_timeout_seconds=0.1)


def damages() -> st.SearchStrategy[list[Damage]]:
    number = st.integers(0, 1 << 20)
    content = st.sampled_from(HOSTILE_VALUES) | st.binary(max_size=40)
    damage = st.builds(Damage, st.sampled_from(KINDS), number, content, number)
    return st.lists(damage, min_size=1, max_size=4)


async def _assert_survived(service: DamagedService, all_damage: list[Damage]) -> None:
    """Damages the service; asserts that it replies without error, and works once restored."""
    service.restore()
    for damage in all_damage:
        service.damage(damage)
    try:
        await service.read_everything()
        await service.change_everything()
    finally:
        service.restore()
    await service.assert_works()


async def _assert_works_after_flush(service: DamagedService) -> None:
    """Asserts that models are announced again, jobs run, and event streams get their events."""
    service.server.flushall()
    await eventually(
        lambda: service.server.scard(keys.models(damaged_redis.N)) == 2, "models are announced"
    )
    await eventually(
        damaged_redis.has_models(service.client), "both models are announced again", 20
    )
    async with open_event_stream(service.client, "/events") as stream:
        await stream.wait_for_event("snapshot")
        await service.assert_works()
        await stream.wait_for_event("completed")
    service.server.flushall()


def _damage_repeatedly(
    open_workers: OpenWorkers,
    redis_url: str,
    policy: Policy,
    examples: int,
    *,
    flush: bool = False,
) -> None:
    """Damages a working service `examples` times; asserts that API and worker still run."""
    options = {
        "models": damaged_redis.MODELS,
        "default_model": damaged_redis.MODELS[0],
        "worker": BUSY,
    }
    with open_workers(**options) as workers, asyncio.Runner() as runner:  # type: ignore[arg-type]
        worker = workers.start()
        context = hosted(damaged_redis.running_service(redis_url, policy))
        service = runner.run(context.__aenter__())

        @settings(
            max_examples=examples,
            derandomize=True,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(damages())
        def survives(all_damage: list[Damage]) -> None:
            runner.run(_assert_survived(service, all_damage))
            assert not worker.has_ended()

        survives()
        if flush:
            runner.run(_assert_works_after_flush(service))
        runner.run(context.__aexit__(None, None, None))
        assert runner.run(worker.stop()) == 0


@pytest.mark.soak
def test_after_random_damage_no_reply_is_an_unexpected_5xx_and_no_process_ends(
    open_workers: OpenWorkers, redis_url: str, policy: Policy, server: object
) -> None:
    _damage_repeatedly(open_workers, redis_url, policy, examples=3)


@pytest.mark.soak
def test_after_much_random_damage_and_a_flush_no_reply_is_a_5xx_and_no_process_ends(
    open_workers: OpenWorkers, redis_url: str, policy: Policy, server: object
) -> None:
    _damage_repeatedly(open_workers, redis_url, policy, examples=80, flush=True)
