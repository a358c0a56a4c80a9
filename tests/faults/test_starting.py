"""A worker's start: each model is served once it is loaded, and what cannot be stops no other."""

import shutil
import time

import pytest
import redis

from asyncinfer.repository import keys
from asyncinfer.repository.announcements import WorkerSays
from asyncinfer.worker.worker import WorkerConfig
from tests import zoo
from tests.faults.model_folder import CONFIG, Folder, Shop
from tests.queue_driver import Q

from .harness import eventually
from .processes import OpenCrew

SLOW = zoo.loop_for_hours("batch").SerializeToString()
"""Takes 7 s to load: as long as probing may take."""


async def until(shop: Shop, what: str, **said: object) -> None:
    """Until the one worker says so."""
    seen: list[WorkerSays] = []

    async def is_so() -> bool:
        seen[:] = await shop.says()
        return any(all(getattr(one, key) == said[key] for key in said) for one in seen)

    await eventually(is_so, f"{what}: {seen}", 20)


async def test_each_model_is_served_as_soon_as_it_is_loaded(
    crew: OpenCrew, folder: Folder, shop: Shop
) -> None:
    folder.publish(zoo.adds(2), 1, name="a")
    folder.publish(SLOW, 1, name="b")
    with crew(model_dir=str(folder.path), models=(), default_model="m") as crewed:
        worker = crewed.hire()

        assert [await shop.ask(1), await shop.ask(1, name="a")] == [2, 3]

        (says,) = await shop.says()
        assert (says.state, says.loading) == ("ready", ("b",))
        assert says.model_dir == str(folder.path)
        assert not worker.died()


async def test_jobs_of_the_model_that_is_loaded_last_are_heard_of_at_once(
    crew: OpenCrew, folder: Folder, shop: Shop
) -> None:
    folder.publish(zoo.adds(2), 1, name="a")
    config = WorkerConfig(concurrency=1, brpop_timeout_seconds=60)
    with crew(model_dir=str(folder.path), models=(), default_model="m", worker=config) as crewed:
        crewed.hire()

        assert await shop.ask(1, name="a") == 3


async def test_a_worker_says_that_it_starts_before_its_first_model_is_loaded(
    crew: OpenCrew, folder: Folder, shop: Shop
) -> None:
    folder.publish(SLOW, 1, name="b")
    with crew(model_dir=str(folder.path), models=(), default_model="b") as crewed:
        worker = crewed.hire()

        await until(shop, "it starts", state="starting", loading=("b", "m"), models=())

        assert not worker.died()


async def test_known_models_are_loaded_first(crew: OpenCrew, folder: Folder, shop: Shop) -> None:
    folder.publish(zoo.adds(2), 1, name="z")
    with crew(model_dir=str(folder.path), models=(), default_model="m") as crewed:
        worker = crewed.hire()
        await shop.until_announced("1", name="z")
        assert await worker.stop() == 0
        folder.publish(SLOW, 1, name="new")

        crewed.hire()

        assert await shop.ask(1, name="z") == 3
        (says,) = await shop.says()
        assert says.loading == ("new",)


async def test_a_drain_while_models_load_ends_at_once(
    crew: OpenCrew, folder: Folder, shop: Shop
) -> None:
    folder.publish(SLOW, 1, name="b")
    with crew(model_dir=str(folder.path), models=(), default_model="m") as crewed:
        worker = crewed.hire()
        assert await shop.ask(1) == 2
        (says,) = await shop.says()
        assert says.loading == ("b",)

        since = time.monotonic()
        assert await worker.stop() == 0

        assert time.monotonic() - since < 3


@pytest.mark.soak
async def test_a_job_for_a_version_that_is_not_loaded_yet_runs_once_it_is(
    crew: OpenCrew, folder: Folder, shop: Shop
) -> None:
    folder.publish(zoo.adds(2), 2)
    folder.publish(SLOW, 1, name="b")
    with crew(model_dir=str(folder.path), models=(), default_model="m") as crewed:
        crewed.hire()
        assert await shop.ask(1) == 3
        (says,) = await shop.says()
        assert (says.loading, set(says.versions["m"])) == (("b",), {"2"})

        assert await shop.ask(1, "1") == 2


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ((), "There is no model in"),
        (("one", "other"), "None of the 2 models in"),
    ],
)
async def test_a_folder_without_a_model_to_serve_is_told_and_followed(
    crew: OpenCrew, folder: Folder, shop: Shop, found: tuple[str, ...], said: str
) -> None:
    shutil.rmtree(folder.path / "m")
    for name in found:
        folder.publish(b"no model", 1, name=name)
    with crew(model_dir=str(folder.path), models=(), worker=CONFIG) as crewed:
        worker = crewed.hire()
        await until(shop, "it has nothing to load", state="ready", loading=())
        for name in found:
            await shop.until_refused("1", "it is no ONNX file", name=name)

        folder.publish(zoo.adds(1), 1)

        await until(shop, "it is being loaded", state="starting", loading=("m",))
        assert await shop.ask(1) == 2
        assert not worker.died()
        assert crewed.log.count(said) == 1


async def test_a_missing_name_of_models_stops_nothing(
    crew: OpenCrew, folder: Folder, shop: Shop
) -> None:
    terms = {"model_dir": str(folder.path), "default_model": "m", "worker": CONFIG}
    with crew(**terms, models=("m", "nope")) as crewed:  # type: ignore[arg-type]
        crewed.hire()
        assert await shop.ask(1) == 2
        await shop.until_refused("", "MODELS names it", name="nope")

        folder.publish(zoo.adds(2), 1, name="nope")

        assert await shop.ask(1, name="nope") == 3
        await until(shop, "nothing is missing", problems={})
        assert crewed.log.count("MODELS names it") == 1


async def test_what_cannot_be_loaded_is_not_the_default_model(
    crew: OpenCrew, folder: Folder, server: redis.Redis
) -> None:
    folder.publish(b"no model", 1, name="a")
    with crew(model_dir=str(folder.path), models=()) as crewed:
        crewed.hire()

        await eventually(lambda: server.get(keys.default_model(Q)) == b"m", "it is the default")
