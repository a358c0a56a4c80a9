"""A worker's start: each model is served once it is loaded, though others cannot be loaded."""

import shutil
import time

import pytest
import redis

from asyncinfer.repository import keys
from asyncinfer.repository.announcements import WorkerAnnouncement
from asyncinfer.worker.worker import WorkerConfig
from tests import zoo
from tests.faults.model_folder import CONFIG, ModelClient, ModelFolder
from tests.queue_driver import Q

from .harness import eventually
from .processes import OpenWorkers

SLOW = zoo.loop_for_hours("batch").SerializeToString()
"""A model that takes 7 s to load: as long as probing may take."""


async def wait_until_announced(
    model_client: ModelClient, description: str, **fields: object
) -> None:
    """Waits until a worker announces these fields."""
    workers: list[WorkerAnnouncement] = []

    async def is_announced() -> bool:
        workers[:] = await model_client.announcements()
        return any(
            all(getattr(worker, name) == value for name, value in fields.items())
            for worker in workers
        )

    await eventually(is_announced, f"{description}: {workers}", 20)


async def test_each_model_is_served_as_soon_as_it_is_loaded(
    open_workers: OpenWorkers, folder: ModelFolder, model_client: ModelClient
) -> None:
    folder.publish(zoo.adds(2), 1, name="a")
    folder.publish(SLOW, 1, name="b")
    with open_workers(model_dir=str(folder.path), models=(), default_model="m") as workers:
        worker = workers.start()

        assert [await model_client.predict(1), await model_client.predict(1, name="a")] == [2, 3]

        (announced,) = await model_client.announcements()
        assert (announced.state, announced.loading) == ("ready", ("b",))
        assert announced.model_dir == str(folder.path)
        assert not worker.has_ended()


async def test_jobs_of_the_model_that_is_loaded_last_are_claimed_at_once(
    open_workers: OpenWorkers, folder: ModelFolder, model_client: ModelClient
) -> None:
    folder.publish(zoo.adds(2), 1, name="a")
    config = WorkerConfig(concurrency=1, brpop_timeout_seconds=60)
    with open_workers(
        model_dir=str(folder.path), models=(), default_model="m", worker=config
    ) as workers:
        workers.start()

        assert await model_client.predict(1, name="a") == 3


async def test_a_worker_announces_that_it_is_starting_before_its_first_model_is_loaded(
    open_workers: OpenWorkers, folder: ModelFolder, model_client: ModelClient
) -> None:
    folder.publish(SLOW, 1, name="b")
    with open_workers(model_dir=str(folder.path), models=(), default_model="b") as workers:
        worker = workers.start()

        await wait_until_announced(
            model_client, "it starts", state="starting", loading=("b", "m"), models=()
        )

        assert not worker.has_ended()


@pytest.mark.soak
async def test_known_models_are_loaded_first(
    open_workers: OpenWorkers, folder: ModelFolder, model_client: ModelClient
) -> None:
    folder.publish(zoo.adds(2), 1, name="z")
    with open_workers(model_dir=str(folder.path), models=(), default_model="m") as workers:
        worker = workers.start()
        await model_client.wait_until_announced("1", name="z")
        assert await worker.stop() == 0
        folder.publish(SLOW, 1, name="new")

        workers.start()

        assert await model_client.predict(1, name="z") == 3
        (announced,) = await model_client.announcements()
        assert announced.loading == ("new",)


async def test_a_drain_while_models_load_ends_at_once(
    open_workers: OpenWorkers, folder: ModelFolder, model_client: ModelClient
) -> None:
    folder.publish(SLOW, 1, name="b")
    with open_workers(model_dir=str(folder.path), models=(), default_model="m") as workers:
        worker = workers.start()
        assert await model_client.predict(1) == 2
        (announced,) = await model_client.announcements()
        assert announced.loading == ("b",)

        stopped_at = time.monotonic()
        assert await worker.stop() == 0

        assert time.monotonic() - stopped_at < 3


@pytest.mark.soak
async def test_a_job_for_a_version_that_is_not_loaded_yet_runs_once_it_is(
    open_workers: OpenWorkers, folder: ModelFolder, model_client: ModelClient
) -> None:
    folder.publish(zoo.adds(2), 2)
    folder.publish(SLOW, 1, name="b")
    with open_workers(model_dir=str(folder.path), models=(), default_model="m") as workers:
        workers.start()
        assert await model_client.predict(1) == 3
        (announced,) = await model_client.announcements()
        assert (announced.loading, set(announced.versions["m"])) == (("b",), {"2"})

        assert await model_client.predict(1, "1") == 2


@pytest.mark.soak
@pytest.mark.parametrize(
    ("names", "warning"),
    [
        ((), "There is no model in"),
        pytest.param(("first", "second"), "None of the 2 models in", marks=pytest.mark.soak),
    ],
)
async def test_a_folder_without_a_model_to_serve_is_reported_and_watched(
    open_workers: OpenWorkers,
    folder: ModelFolder,
    model_client: ModelClient,
    names: tuple[str, ...],
    warning: str,
) -> None:
    shutil.rmtree(folder.path / "m")
    for name in names:
        folder.publish(b"no model", 1, name=name)
    with open_workers(model_dir=str(folder.path), models=(), worker=CONFIG) as workers:
        worker = workers.start()
        await wait_until_announced(
            model_client, "it has nothing to load", state="ready", loading=()
        )
        for name in names:
            await model_client.wait_until_refused("1", "it is no ONNX file", name=name)

        folder.publish(zoo.adds(1), 1)

        await wait_until_announced(
            model_client, "it is being loaded", state="starting", loading=("m",)
        )
        assert await model_client.predict(1) == 2
        assert not worker.has_ended()
        assert workers.log.count(warning) == 1


@pytest.mark.soak
async def test_a_name_in_MODELS_that_is_missing_in_the_folder_stops_no_other_model(
    open_workers: OpenWorkers, folder: ModelFolder, model_client: ModelClient
) -> None:
    options = {"model_dir": str(folder.path), "default_model": "m", "worker": CONFIG}
    with open_workers(**options, models=("m", "nope")) as workers:  # type: ignore[arg-type]
        workers.start()
        assert await model_client.predict(1) == 2
        await model_client.wait_until_refused("", "MODELS names it", name="nope")

        folder.publish(zoo.adds(2), 1, name="nope")

        assert await model_client.predict(1, name="nope") == 3
        await wait_until_announced(model_client, "nothing is missing", problems={})
        assert workers.log.count("MODELS names it") == 1


async def test_a_model_that_cannot_be_loaded_is_not_the_default_model(
    open_workers: OpenWorkers, folder: ModelFolder, server: redis.Redis
) -> None:
    folder.publish(b"no model", 1, name="a")
    with open_workers(model_dir=str(folder.path), models=()) as workers:
        workers.start()

        await eventually(lambda: server.get(keys.default_model(Q)) == b"m", "it is the default")
