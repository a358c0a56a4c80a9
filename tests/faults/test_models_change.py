"""Changes of the model folder while a worker serves it: no job fails, no file ends the worker."""

import asyncio
import logging
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import redis
from onnx import helper, numpy_helper

from asyncinfer.api.catalog import Catalog
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.inspect.listing import Inspection
from asyncinfer.repository.store import Store
from asyncinfer.worker.models.engine_cache import CacheBounds
from tests import unprivileged, zoo
from tests.faults.load_client import result_value
from tests.faults.model_folder import CONFIG, ModelClient, ModelFolder, serving

from .harness import assert_at_rest, eventually
from .processes import OpenWorkers

SLOW = zoo.loop_for_hours("batch").SerializeToString()
"""A model that takes seconds to load: as long as probing may take."""


def bomb() -> onnx.ModelProto:
    """A model that allocates 64 GiB when it is loaded, or at the latest when it is run."""
    filling_value = numpy_helper.from_array(np.ones(1, np.float32))
    nodes = [
        helper.make_node("ConstantOfShape", ["size"], ["filling"], value=filling_value),
        helper.make_node("ReduceMax", ["filling"], ["most"], keepdims=0),
        helper.make_node("Add", ["x", "most"], ["y"]),
    ]
    weights = {"size": np.array([2**34])}
    inputs, outputs = [zoo.tensor("x", ["batch", 1])], [zoo.tensor("y", ["batch", 1])]
    return zoo.model(nodes, inputs, outputs, weights)


@pytest.mark.soak
async def test_a_new_version_takes_over_under_load_and_no_job_fails(
    open_workers: OpenWorkers, folder: ModelFolder, model_client: ModelClient, server: redis.Redis
) -> None:
    job_ids: list[str] = []
    has_enough_jobs = asyncio.Event()

    async def load() -> None:
        while not has_enough_jobs.is_set():
            job_ids.extend([await model_client.submit(10) for _ in range(20)])
            await model_client.wait_for_end(job_ids[-1])

    async with serving(open_workers, folder, model_client), asyncio.TaskGroup() as group:
        group.create_task(load())
        folder.publish(zoo.adds(2), 2)
        await model_client.wait_until_served("2")
        before = len(job_ids)
        await eventually(lambda: len(job_ids) > before + 40, "jobs run on the new version")
        has_enough_jobs.set()

    ended = [await model_client.wait_for_end(job_id) for job_id in job_ids]
    assert {job.status for job in ended} == {"completed"}
    results = {(job.record and job.record.ran_version, result_value(job)) for job in ended}
    assert results == {("1", 11.0), ("2", 12.0)}
    assert_at_rest(server, "predict_queue")


async def test_a_job_runs_on_the_version_that_it_requests(
    open_workers: OpenWorkers, folder: ModelFolder, model_client: ModelClient
) -> None:
    folder.publish(zoo.adds(2), 2, toml="default_version = 1")
    async with serving(open_workers, folder, model_client):
        await model_client.wait_until_announced("1", "2")
        assert [await model_client.predict(1, version) for version in ("1", "2", None)] == [2, 3, 2]
        stored = await model_client.wait_for_end(await model_client.submit(1, "7"))
        assert b"unknown_model" in (stored.error or b"")
        (folder.path / "m" / "model.toml").write_text("default_version = 2")
        await model_client.wait_until_served("2")
        assert await model_client.predict(1) == 3


@pytest.mark.soak
async def test_a_wrong_model_toml_leaves_the_old_one_in_force_and_is_logged_once(
    open_workers: OpenWorkers, folder: ModelFolder, model_client: ModelClient, store: Store
) -> None:
    folder.publish(zoo.adds(2), 2, toml="default_version = 1")
    async with serving(open_workers, folder, model_client) as workers:
        folder.publish(b"not a model", 3)
        await model_client.wait_until_refused("3", "it is no ONNX file")
        (folder.path / "m" / "model.toml").write_text('default_version = "x"')
        await model_client.wait_until_refused(
            "", "m/model.toml: key `default_version`: Expected a whole"
        )
        folder.publish(zoo.adds(4), 4)
        await model_client.wait_until_announced("1", "2", "4")

        async def only_third_is_refused() -> bool:
            return (await model_client.problems()).keys() == {"3"}

        catalog = Catalog(Inspection(store), store, "m")
        assert (await catalog.find("m")).signature.version == "1"
        assert await model_client.predict(1) == 2
        problems = await model_client.problems()
        assert problems.keys() == {"", "3"}
        assert "it is no ONNX file" in problems["3"]

        (folder.path / "m" / "model.toml").write_text("default_version = 1")
        await eventually(only_third_is_refused, "model.toml is right again")
        logged = workers.log
    assert logged.count("Expected a whole number") == 1
    assert logged.count("it is no ONNX file") == 1


@pytest.mark.soak
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"not a model", "it is no ONNX file, but text"),
        (zoo.adds(1).SerializeToString()[:-9], "it is no ONNX file, or damaged"),
        (bomb().SerializeToString(), "memory"),
    ],
    ids=["corrupt", "cut short", "bomb"],
)
async def test_a_bad_file_is_refused_and_the_old_version_is_still_served(
    open_workers: OpenWorkers,
    folder: ModelFolder,
    model_client: ModelClient,
    content: bytes,
    reason: str,
) -> None:
    async with serving(open_workers, folder, model_client):
        folder.publish(content, 2)
        await model_client.wait_until_refused("2", reason)
        assert await model_client.predict(1) == 2
        folder.publish(zoo.adds(3), 3)
        await model_client.wait_until_announced("1", "3")
        await model_client.wait_until_served("3")
        assert await model_client.predict(1) == 4


@pytest.mark.soak
async def test_a_file_that_is_copied_slowly_is_served_once_it_is_complete(
    open_workers: OpenWorkers, folder: ModelFolder, model_client: ModelClient
) -> None:
    content = zoo.adds(2).SerializeToString()
    async with serving(open_workers, folder, model_client):
        path = folder.path / "m" / "2" / "model.onnx"
        path.parent.mkdir()
        with path.open("wb") as file:
            for byte in content:
                file.write(bytes([byte]))
                file.flush()
                await asyncio.sleep(0.3 / len(content))
        await model_client.wait_until_served("2")
        assert await model_client.predict(1) == 3


@pytest.mark.soak
async def test_weights_in_a_separate_file_are_part_of_their_version(
    open_workers: OpenWorkers, folder: ModelFolder, model_client: ModelClient
) -> None:
    async with serving(open_workers, folder, model_client):
        folder.publish_with_weights(zoo.adds(2), 2)
        await model_client.wait_until_served("2")
        (folder.path / "m" / "2").rename(folder.path / "m" / "5")
        await model_client.wait_until_announced("1", "5")
        await model_client.wait_until_served("5")
        assert await model_client.predict(1) == 3

        aside = folder.path / "weights.bin.aside"
        weights = folder.publish_with_weights(zoo.adds(6), 6)
        weights.rename(aside)
        await model_client.wait_until_refused(
            "6", "its weights lie in 'weights.bin', which is not there"
        )
        assert await model_client.predict(1) == 3
        aside.rename(weights)
        await model_client.wait_until_served("6")
        assert await model_client.predict(1) == 7


@pytest.mark.soak
async def test_a_new_model_is_served_and_a_removed_model_runs_its_waiting_jobs(
    open_workers: OpenWorkers, folder: ModelFolder, model_client: ModelClient, server: redis.Redis
) -> None:
    async with serving(open_workers, folder, model_client):
        folder.publish(zoo.adds(5), 1, name="other")
        await model_client.wait_until_announced("1", name="other")
        assert await model_client.predict(1, name="other") == 6

        server.set(keys.paused("predict_queue:other"), "1")
        job_id = await model_client.submit(2, name="other")
        folder.remove(1, name="other")
        await model_client.wait_until_announced(name="other")
        server.delete(keys.paused("predict_queue:other"))
        assert result_value(await model_client.wait_for_end(job_id)) == 7

        async def is_gone() -> bool:
            workers = await model_client.announcements()
            return all("other" not in worker.models for worker in workers)

        await eventually(is_gone, "no worker serves it", 20)
        assert await model_client.predict(1) == 2


@pytest.mark.soak
async def test_other_changes_are_seen_while_a_large_file_is_being_loaded(
    open_workers: OpenWorkers, folder: ModelFolder, model_client: ModelClient
) -> None:
    folder.publish(zoo.adds(3), 1, name="old")
    async with serving(open_workers, folder, model_client):
        await model_client.wait_until_announced("1", name="old")
        folder.publish(SLOW, 2)

        async def is_loading_version() -> bool:
            (worker,) = await model_client.announcements()
            return worker.loading_versions == {"m": ("2",)}

        await eventually(is_loading_version, "version 2 is being loaded", 5)
        folder.publish(b"cut off", 1, name="new")
        folder.remove(1, name="old")

        async def is_seen() -> bool:
            (worker,) = await model_client.announcements()
            return worker.loading == ("new",) and "old" not in worker.versions

        await eventually(is_seen, "both changes are seen", 5)
        assert await is_loading_version()


@pytest.mark.soak
async def test_a_refused_file_is_loaded_again_once_its_copy_goes_on(
    open_workers: OpenWorkers, folder: ModelFolder, model_client: ModelClient
) -> None:
    async with serving(open_workers, folder, model_client):
        path = folder.publish(SLOW[:-9], 1, name="new")
        await model_client.wait_until_refused("1", "9 bytes are missing", name="new")
        with path.open("ab") as file:
            file.write(SLOW[-9:])

        async def is_loading() -> bool:
            (worker,) = await model_client.announcements()
            return worker.loading == ("new",) and "new" not in worker.problems

        await eventually(is_loading, "it is loaded again", 5)


@pytest.mark.soak
async def test_a_removed_version_is_replaced_by_the_one_before(
    open_workers: OpenWorkers, folder: ModelFolder, model_client: ModelClient
) -> None:
    async with serving(open_workers, folder, model_client):
        folder.publish(zoo.adds(2), 2)
        await model_client.wait_until_announced("1", "2")
        folder.remove(2)
        await model_client.wait_until_announced("1")
        assert await model_client.predict(1) == 2


@pytest.mark.soak
async def test_a_removed_version_that_an_older_dump_announces_is_removed_again(
    open_workers: OpenWorkers, folder: ModelFolder, model_client: ModelClient, store: Store
) -> None:
    async with serving(open_workers, folder, model_client):
        folder.publish(zoo.adds(2), 2)
        await model_client.wait_until_announced("1", "2")
        dumped = await Announcements(store).read_versions("m")
        folder.remove(2)
        await model_client.wait_until_announced("1")
        await Announcements(store).announce_models({"m": dumped})
        await model_client.wait_until_announced("1", "2")
        await model_client.wait_until_announced("1")


@pytest.mark.soak
async def test_a_file_changed_in_place_is_refused_until_it_has_its_old_content(
    open_workers: OpenWorkers, folder: ModelFolder, model_client: ModelClient
) -> None:
    path = folder.path / "m" / "1" / "model.onnx"
    before = path.read_bytes()
    async with serving(open_workers, folder, model_client):
        path.write_bytes(zoo.adds(9).SerializeToString())
        await model_client.wait_until_refused("1", "changed in place")
        assert await model_client.predict(1) == 2

        async def only_file_is_refused() -> bool:
            return (await model_client.problems()).keys() == {"1"}

        toml = folder.path / "m" / "model.toml"
        toml.write_text("oops")
        await model_client.wait_until_refused("", "m/model.toml")
        toml.write_text('description = "another"')
        await eventually(only_file_is_refused, "model.toml is right")
        assert "changed in place" in (await model_client.problems())["1"]
        assert await model_client.predict(1) == 2
        path.write_bytes(before)

        async def has_no_problem() -> bool:
            return not await model_client.problems()

        await eventually(has_no_problem, "the problem is gone", 20)


@pytest.mark.soak
async def test_a_single_file_moved_into_a_model_folder_keeps_its_version_and_gets_a_model_toml(
    open_workers: OpenWorkers, folder: ModelFolder, model_client: ModelClient, tmp_path: Path
) -> None:
    bare, home = folder.path / "bare.onnx", folder.path / "bare"
    bare.write_bytes(zoo.adds(4).SerializeToString())
    (tmp_path / "bare" / "1").mkdir(parents=True)
    (tmp_path / "bare" / "model.toml").write_text('description = "it moved"')
    async with serving(open_workers, folder, model_client) as workers:
        await model_client.wait_until_announced("1", name="bare")
        (tmp_path / "bare").rename(home)
        bare.rename(home / "1" / "model.onnx")

        async def is_described() -> bool:
            versions = await model_client.announced_versions("bare")
            return "1" in versions and versions["1"].description == "it moved"

        await eventually(is_described, "its model.toml is in force", 20)
        assert await model_client.predict(1, name="bare") == 5

        # A file that a file manager adds beside a model is no change of the model.
        (home / "1" / ".DS_Store").write_bytes(b"x")
        (home / "model.toml").write_text('description = "once more"')
        await eventually(
            lambda: workers.log.count("bare/1/model.onnx is ready") == 2, "it is loaded again", 20
        )
        assert not await model_client.problems("bare")
        assert await model_client.predict(1, name="bare") == 5
        assert "in place" not in workers.log
        assert "is gone" not in workers.log


@pytest.mark.soak
async def test_a_model_is_still_served_while_its_file_cannot_be_read(
    open_workers: OpenWorkers, folder: ModelFolder, model_client: ModelClient
) -> None:
    unprivileged.skip_unless_possible()
    async with serving(open_workers, folder, model_client, unprivileged=True) as workers:
        for path in (folder.path / "m", folder.path / "m" / "1" / "model.onnx"):
            mode = path.stat().st_mode
            path.chmod(0)

            async def is_reported() -> bool:
                return "Permission denied" in str(await model_client.problems())

            async def has_no_problem() -> bool:
                return not await model_client.problems()

            await eventually(is_reported, "the problem is reported", 20)
            assert await model_client.predict(1) == 2
            path.chmod(mode)
            await eventually(has_no_problem, "the problem is gone", 20)
            assert await model_client.predict(1) == 2
        log = workers.log
    assert log.count("m: cannot be read: Permission denied") == 1
    assert log.count("m/1/model.onnx: cannot be read: Permission denied") == 1
    assert "is gone" not in log
    assert "in place" not in log


@pytest.mark.soak
async def test_a_missing_model_folder_changes_nothing_and_is_logged_once(
    open_workers: OpenWorkers, folder: ModelFolder, model_client: ModelClient, tmp_path: Path
) -> None:
    async with serving(open_workers, folder, model_client) as workers:
        folder.path.rename(tmp_path / "away")
        await eventually(lambda: "The models stay as they are" in workers.log, "it is logged", 20)
        assert await model_client.predict(1) == 2
        folder.path.write_bytes(b"a file")
        await eventually(lambda: "It is a file" in workers.log, "it is logged", 20)
        folder.path.unlink()
        (tmp_path / "away").rename(folder.path)
        folder.publish(zoo.adds(2), 2)
        await model_client.wait_until_served("2")
        log = workers.log
    assert log.count("cannot be read: No such file") == 1
    assert "is gone" not in log


@pytest.mark.soak
async def test_of_very_many_problems_200_are_listed_and_the_rest_is_counted(
    open_workers: OpenWorkers, folder: ModelFolder, model_client: ModelClient
) -> None:
    for number in range(250):
        (folder.path / f"not a model {number}.onnx").touch()
    (folder.path / "bad.onnx").write_bytes(b"x" * 100)
    async with serving(open_workers, folder, model_client):

        async def rest_is_counted() -> bool:
            (worker,) = await model_client.announcements()
            return "51 more problems are not listed" in worker.problems.get("…", {}).get("", "")

        await eventually(rest_is_counted, "the rest is counted", 20)
        (worker,) = await model_client.announcements()
        assert len(worker.problems) == 201
        assert "bad" in worker.problems


@pytest.mark.soak
async def test_of_two_workers_with_different_files_of_a_version_the_first_serves_it(
    open_workers: OpenWorkers, folder: ModelFolder, model_client: ModelClient, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    other = ModelFolder(tmp_path / "elsewhere")
    other.publish(zoo.adds(100), 1)
    async with serving(open_workers, folder, model_client):
        with open_workers(
            model_dir=str(other.path), models=(), default_model="m", worker=CONFIG
        ) as second:
            second.start()
            await model_client.wait_until_refused("1", "another worker serves another file")
            results = {await model_client.predict(1) for _ in range(30)}
            assert results == {2.0}


@pytest.mark.soak
async def test_a_job_for_a_version_that_only_one_worker_has_is_run_by_that_worker(
    open_workers: OpenWorkers,
    folder: ModelFolder,
    model_client: ModelClient,
    tmp_path: Path,
    server: redis.Redis,
) -> None:
    (tmp_path / "elsewhere").mkdir()
    newer = ModelFolder(tmp_path / "elsewhere")
    newer.publish(zoo.adds(1), 1)
    newer.publish(zoo.adds(2), 2)
    async with serving(open_workers, folder, model_client):
        with open_workers(
            model_dir=str(newer.path), models=(), default_model="m", worker=CONFIG
        ) as second:
            second.start()
            await model_client.wait_until_announced("1", "2")
            assert set(
                await asyncio.gather(*(model_client.predict(1, "2") for _ in range(20)))
            ) == {3.0}
            server.flushall()  # No worker has announced its models again yet.
            assert set(
                await asyncio.gather(*(model_client.predict(1, "2") for _ in range(20)))
            ) == {3.0}


@pytest.mark.soak
async def test_forty_models_are_served_with_four_of_them_in_memory(
    open_workers: OpenWorkers, folder: ModelFolder, model_client: ModelClient
) -> None:
    for number in range(40):
        toml = "pinned = true" if number == 0 else ""
        folder.publish(zoo.adds(number), 1, name=f"n{number}", toml=toml)
    async with serving(open_workers, folder, model_client, CacheBounds(max_models=4)):
        await model_client.wait_until_announced("1", name="n39")

        async def all_are_announced() -> bool:
            workers = await model_client.announcements()
            return all(len(worker.models) == 41 for worker in workers)

        await eventually(all_are_announced, "all models are announced")
        results = [await model_client.predict(1, name=f"n{number}") for number in range(40)]
        assert results == [1 + number for number in range(40)]
        await model_client.wait_until_served("1")

        async def few_are_loaded() -> bool:
            (worker,) = await model_client.announcements()
            return len(worker.loaded) <= 4 and {"n0/1", "n39/1"} <= set(worker.loaded)

        await eventually(few_are_loaded, "four models are loaded, among them the pinned one")


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
async def test_memory_does_not_grow_with_the_number_of_models(
    open_workers: OpenWorkers, folder: ModelFolder, model_client: ModelClient
) -> None:
    for number in range(100):
        folder.publish(zoo.adds(number), 1, name=f"n{number}")
    started_at = time.monotonic()
    async with serving(open_workers, folder, model_client, CacheBounds(max_models=8)) as workers:

        async def all_are_announced() -> bool:
            announcements = await model_client.announcements()
            return all(len(worker.models) == 101 for worker in announcements)

        await eventually(all_are_announced, "all models are announced", 60)
        logging.info("100 models were announced in %.1f s.", time.monotonic() - started_at)
        rss_kib: list[int] = []
        for number in range(100):
            assert await model_client.predict(1, name=f"n{number}") == 1 + number
            if number in (29, 99):
                rss_kib.append(_rss_kib(workers.members[0].process.pid))
        logging.info("RSS after 30 models and after all: %s KiB.", rss_kib)
        assert rss_kib[1] <= 1.2 * rss_kib[0], rss_kib
        assert all(len(worker.loaded) <= 8 for worker in await model_client.announcements())


def _rss_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
async def test_memory_does_not_grow_with_reloads(
    open_workers: OpenWorkers, folder: ModelFolder, model_client: ModelClient
) -> None:
    wide = zoo.mlp([1, 1500, 1500, 1])
    async with serving(open_workers, folder, model_client) as workers:
        rss_kib: list[int] = []
        for version in range(2, 22):
            folder.publish(wide, version)
            await model_client.wait_until_served(str(version))
            await model_client.predict(1)
            rss_kib.append(_rss_kib(workers.members[0].process.pid))
    assert rss_kib[-1] <= 1.2 * rss_kib[1], rss_kib
