"""No 5xx and no lost role, whatever Redis holds."""

import asyncio

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from asyncinfer.repository import keys
from asyncinfer.repository.policy import Policy
from asyncinfer.worker.worker import WorkerConfig
from tests.api.harness import hosted
from tests.api.sse import listening

from . import hostile
from .harness import eventually
from .hostile import HOSTILE, KINDS, Damage, Scene
from .processes import OpenCrew

BUSY = WorkerConfig(concurrency=1, brpop_timeout_seconds=0.1)


def damages() -> st.SearchStrategy[list[Damage]]:
    number = st.integers(0, 1 << 20)
    content = st.sampled_from(HOSTILE) | st.binary(max_size=40)
    damage = st.builds(Damage, st.sampled_from(KINDS), number, content, number)
    return st.lists(damage, min_size=1, max_size=4)


async def _try(scene: Scene, wanted: list[Damage]) -> None:
    scene.restore()
    for one in wanted:
        scene.damage(one)
    try:
        await scene.read_everything()
        await scene.change_everything()
    finally:
        scene.restore()
    await scene.works()


async def _emptied(scene: Scene) -> None:
    """All is announced again, jobs are run, and those who follow them are told."""
    scene.server.flushall()
    await eventually(lambda: scene.server.scard(keys.models(hostile.N)) == 2, "a worker announces")
    await eventually(hostile.has_models(scene.client), "both models are announced again", 20)
    async with listening(scene.client, "/events") as stream:
        await stream.event("snapshot")
        await scene.works()
        await stream.event("completed")
    scene.server.flushall()


def _hold(
    crew: OpenCrew, redis_url: str, policy: Policy, examples: int, *, emptied: bool = False
) -> None:
    """Damages a working service so many times; at the end both its processes live."""
    terms = {"models": hostile.MODELS, "default_model": hostile.MODELS[0], "worker": BUSY}
    with crew(**terms) as workers, asyncio.Runner() as runner:  # type: ignore[arg-type]
        worker = workers.hire()
        staged = hosted(hostile.staged(redis_url, policy))
        scene = runner.run(staged.__aenter__())

        @settings(
            max_examples=examples,
            derandomize=True,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(damages())
        def survives(wanted: list[Damage]) -> None:
            runner.run(_try(scene, wanted))
            assert not worker.died()

        survives()
        if emptied:
            runner.run(_emptied(scene))
        runner.run(staged.__aexit__(None, None, None))
        assert runner.run(worker.stop()) == 0


def test_whatever_redis_holds_no_answer_is_a_5xx_and_every_role_lives(
    crew: OpenCrew, redis_url: str, policy: Policy, server: object
) -> None:
    _hold(crew, redis_url, policy, examples=8)


@pytest.mark.soak
def test_the_same_for_a_long_time(
    crew: OpenCrew, redis_url: str, policy: Policy, server: object
) -> None:
    _hold(crew, redis_url, policy, examples=400, emptied=True)
