"""The model folder changes while a worker serves it: no job fails, and no file takes it down."""

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
from asyncinfer.worker.models.engine_cache import Bounds
from tests import unprivileged, zoo
from tests.faults.load_client import answer
from tests.faults.model_folder import CONFIG, Folder, Shop, serving

from .harness import assert_at_rest, eventually
from .processes import OpenCrew

SLOW = zoo.loop_for_hours("batch").SerializeToString()
"""Takes seconds to load: as long as probing may take."""


def bomb() -> onnx.ModelProto:
    """Asks for 64 GiB as soon as it is loaded, or at the latest when it is run."""
    one = numpy_helper.from_array(np.ones(1, np.float32))
    nodes = [
        helper.make_node("ConstantOfShape", ["size"], ["filling"], value=one),
        helper.make_node("ReduceMax", ["filling"], ["most"], keepdims=0),
        helper.make_node("Add", ["x", "most"], ["y"]),
    ]
    weights = {"size": np.array([2**34])}
    inputs, outputs = [zoo.tensor("x", ["batch", 1])], [zoo.tensor("y", ["batch", 1])]
    return zoo.model(nodes, inputs, outputs, weights)


@pytest.mark.soak
async def test_a_new_version_takes_over_under_load_and_no_job_fails(
    crew: OpenCrew, folder: Folder, shop: Shop, server: redis.Redis
) -> None:
    job_ids: list[str] = []
    enough = asyncio.Event()

    async def load() -> None:
        while not enough.is_set():
            job_ids.extend([await shop.submit(10) for _ in range(20)])
            await shop.ended(job_ids[-1])

    async with serving(crew, folder, shop), asyncio.TaskGroup() as group:
        group.create_task(load())
        folder.publish(zoo.adds(2), 2)
        await shop.until_served("2")
        before = len(job_ids)
        await eventually(lambda: len(job_ids) > before + 40, "jobs run on the new version")
        enough.set()

    ended = [await shop.ended(job_id) for job_id in job_ids]
    assert {one.status for one in ended} == {"completed"}
    told = {(one.record and one.record.ran_version, answer(one)) for one in ended}
    assert told == {("1", 11.0), ("2", 12.0)}
    assert_at_rest(server, "predict_queue")


async def test_a_job_runs_on_the_version_it_asks_for(
    crew: OpenCrew, folder: Folder, shop: Shop
) -> None:
    folder.publish(zoo.adds(2), 2, toml="default_version = 1")
    async with serving(crew, folder, shop):
        await shop.until_announced("1", "2")
        assert [await shop.ask(1, version) for version in ("1", "2", None)] == [2, 3, 2]
        stored = await shop.ended(await shop.submit(1, "7"))
        assert b"unknown_model" in (stored.error or b"")
        (folder.path / "m" / "model.toml").write_text("default_version = 2")
        await shop.until_served("2")
        assert await shop.ask(1) == 3


@pytest.mark.soak
async def test_a_wrong_model_toml_leaves_the_old_one_in_force_and_is_named_once(
    crew: OpenCrew, folder: Folder, shop: Shop, store: Store
) -> None:
    folder.publish(zoo.adds(2), 2, toml="default_version = 1")
    async with serving(crew, folder, shop) as crewed:
        folder.publish(b"not a model", 3)
        await shop.until_refused("3", "it is no ONNX file")
        (folder.path / "m" / "model.toml").write_text('default_version = "x"')
        await shop.until_refused("", "m/model.toml: Expected `int | null`, got `str`")
        folder.publish(zoo.adds(4), 4)
        await shop.until_announced("1", "2", "4")

        async def only_third() -> bool:
            return (await shop.problems()).keys() == {"3"}

        catalog = Catalog(Inspection(store), store, "m")
        assert (await catalog.find("m")).signature.version == "1"
        assert await shop.ask(1) == 2
        problems = await shop.problems()
        assert problems.keys() == {"", "3"}
        assert "it is no ONNX file" in problems["3"]

        (folder.path / "m" / "model.toml").write_text("default_version = 1")
        await eventually(only_third, "model.toml is right again")
        logged = crewed.log
    assert logged.count("Expected `int | null`") == 1
    assert logged.count("it is no ONNX file") == 1


@pytest.mark.soak
@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"not a model", "it is no ONNX file, but text"),
        (zoo.adds(1).SerializeToString()[:-9], "it is no ONNX file, or damaged"),
        (bomb().SerializeToString(), "memory"),
    ],
    ids=["corrupt", "cut short", "bomb"],
)
async def test_a_bad_file_is_refused_and_the_old_version_serves_on(
    crew: OpenCrew, folder: Folder, shop: Shop, content: bytes, why: str
) -> None:
    async with serving(crew, folder, shop):
        folder.publish(content, 2)
        await shop.until_refused("2", why)
        assert await shop.ask(1) == 2
        folder.publish(zoo.adds(3), 3)
        await shop.until_announced("1", "3")
        assert await shop.ask(1) == 4


@pytest.mark.soak
async def test_a_file_that_is_copied_slowly_is_waited_for(
    crew: OpenCrew, folder: Folder, shop: Shop
) -> None:
    content = zoo.adds(2).SerializeToString()
    async with serving(crew, folder, shop):
        path = folder.path / "m" / "2" / "model.onnx"
        path.parent.mkdir()
        with path.open("wb") as file:
            for byte in content:
                file.write(bytes([byte]))
                file.flush()
                await asyncio.sleep(0.3 / len(content))
        await shop.until_served("2")
        assert await shop.ask(1) == 3


@pytest.mark.soak
async def test_weights_in_a_file_of_their_own_are_part_of_their_version(
    crew: OpenCrew, folder: Folder, shop: Shop
) -> None:
    async with serving(crew, folder, shop):
        folder.publish_with_weights(zoo.adds(2), 2)
        await shop.until_served("2")
        (folder.path / "m" / "2").rename(folder.path / "m" / "5")
        await shop.until_announced("1", "5")
        assert await shop.ask(1) == 3

        kept = folder.path / "weights.bin.kept"
        weights = folder.publish_with_weights(zoo.adds(6), 6)
        weights.rename(kept)
        await shop.until_refused("6", "its weights lie in 'weights.bin', which is not there")
        assert await shop.ask(1) == 3
        kept.rename(weights)
        await shop.until_served("6")
        assert await shop.ask(1) == 7


@pytest.mark.soak
async def test_a_new_model_is_served_and_a_removed_one_runs_what_waits(
    crew: OpenCrew, folder: Folder, shop: Shop, server: redis.Redis
) -> None:
    async with serving(crew, folder, shop):
        folder.publish(zoo.adds(5), 1, name="other")
        await shop.until_announced("1", name="other")
        assert await shop.ask(1, name="other") == 6

        server.set(keys.paused("predict_queue:other"), "1")
        job_id = await shop.submit(2, name="other")
        folder.remove(1, name="other")
        await shop.until_announced(name="other")
        server.delete(keys.paused("predict_queue:other"))
        assert answer(await shop.ended(job_id)) == 7

        async def is_gone() -> bool:
            return all("other" not in says.models for says in await shop.says())

        await eventually(is_gone, "nobody serves it", 20)
        assert await shop.ask(1) == 2


@pytest.mark.soak
async def test_a_large_file_that_is_being_loaded_hides_nothing_else_that_changes(
    crew: OpenCrew, folder: Folder, shop: Shop
) -> None:
    folder.publish(zoo.adds(3), 1, name="old")
    async with serving(crew, folder, shop):
        await shop.until_announced("1", name="old")
        folder.publish(SLOW, 2)

        async def is_loading_version() -> bool:
            (says,) = await shop.says()
            return says.loading_versions == {"m": ("2",)}

        await eventually(is_loading_version, "version 2 is being loaded", 5)
        folder.publish(b"cut off", 1, name="new")
        folder.remove(1, name="old")

        async def is_seen() -> bool:
            (says,) = await shop.says()
            return says.loading == ("new",) and "old" not in says.versions

        await eventually(is_seen, "the folder is followed", 5)
        assert await is_loading_version()


@pytest.mark.soak
async def test_a_file_that_was_refused_is_loading_again_once_its_copy_goes_on(
    crew: OpenCrew, folder: Folder, shop: Shop
) -> None:
    async with serving(crew, folder, shop):
        path = folder.publish(SLOW[:-9], 1, name="new")
        await shop.until_refused("1", "9 bytes are missing", name="new")
        with path.open("ab") as file:
            file.write(SLOW[-9:])

        async def is_loading() -> bool:
            (says,) = await shop.says()
            return says.loading == ("new",) and "new" not in says.problems

        await eventually(is_loading, "it is tried again", 5)


@pytest.mark.soak
async def test_a_removed_version_gives_way_to_the_one_before(
    crew: OpenCrew, folder: Folder, shop: Shop
) -> None:
    async with serving(crew, folder, shop):
        folder.publish(zoo.adds(2), 2)
        await shop.until_announced("1", "2")
        folder.remove(2)
        await shop.until_announced("1")
        assert await shop.ask(1) == 2


@pytest.mark.soak
async def test_a_removed_version_that_an_older_dump_brings_back_is_removed_again(
    crew: OpenCrew, folder: Folder, shop: Shop, store: Store
) -> None:
    async with serving(crew, folder, shop):
        folder.publish(zoo.adds(2), 2)
        await shop.until_announced("1", "2")
        dumped = await Announcements(store).announced_versions("m")
        folder.remove(2)
        await shop.until_announced("1")
        await Announcements(store).announce_models({"m": dumped})
        await shop.until_announced("1", "2")
        await shop.until_announced("1")


@pytest.mark.soak
async def test_a_file_changed_in_place_is_refused_until_it_is_as_it_was(
    crew: OpenCrew, folder: Folder, shop: Shop
) -> None:
    path = folder.path / "m" / "1" / "model.onnx"
    before = path.read_bytes()
    async with serving(crew, folder, shop):
        path.write_bytes(zoo.adds(9).SerializeToString())
        await shop.until_refused("1", "changed in place")
        assert await shop.ask(1) == 2

        async def refused() -> bool:
            return (await shop.problems()).keys() == {"1"}

        toml = folder.path / "m" / "model.toml"
        toml.write_text("oops")
        await shop.until_refused("", "m/model.toml")
        toml.write_text('description = "another"')
        await eventually(refused, "model.toml is right")
        assert "changed in place" in (await shop.problems())["1"]
        assert await shop.ask(1) == 2
        path.write_bytes(before)

        async def none() -> bool:
            return not await shop.problems()

        await eventually(none, "the problem is gone", 20)


async def test_a_bare_file_that_gets_a_folder_is_the_same_version_with_its_model_toml(
    crew: OpenCrew, folder: Folder, shop: Shop, tmp_path: Path
) -> None:
    bare, home = folder.path / "bare.onnx", folder.path / "bare"
    bare.write_bytes(zoo.adds(4).SerializeToString())
    (tmp_path / "bare" / "1").mkdir(parents=True)
    (tmp_path / "bare" / "model.toml").write_text('description = "it moved"')
    async with serving(crew, folder, shop) as crewed:
        await shop.until_announced("1", name="bare")
        (tmp_path / "bare").rename(home)
        bare.rename(home / "1" / "model.onnx")

        async def is_described() -> bool:
            versions = await shop.versions("bare")
            return "1" in versions and versions["1"].description == "it moved"

        await eventually(is_described, "its model.toml is in force", 20)
        assert await shop.ask(1, name="bare") == 5

        # What a file manager leaves beside a model is no change of it.
        (home / "1" / ".DS_Store").write_bytes(b"x")
        (home / "model.toml").write_text('description = "once more"')
        await eventually(
            lambda: crewed.log.count("bare/1/model.onnx is ready") == 2, "it is taken up", 20
        )
        assert not await shop.problems("bare")
        assert await shop.ask(1, name="bare") == 5
        assert "in place" not in crewed.log
        assert "is gone" not in crewed.log


@pytest.mark.soak
async def test_what_is_served_is_served_on_while_its_file_may_not_be_read(
    crew: OpenCrew, folder: Folder, shop: Shop
) -> None:
    unprivileged.skip_unless_possible()
    async with serving(crew, folder, shop, unprivileged=True) as crewed:
        for path in (folder.path / "m", folder.path / "m" / "1" / "model.onnx"):
            mode = path.stat().st_mode
            path.chmod(0)

            async def is_told() -> bool:
                return "Permission denied" in str(await shop.problems())

            async def is_well() -> bool:
                return not await shop.problems()

            await eventually(is_told, "it is told", 20)
            assert await shop.ask(1) == 2
            path.chmod(mode)
            await eventually(is_well, "it is well again", 20)
            assert await shop.ask(1) == 2
        log = crewed.log
    assert log.count("m: cannot be read: Permission denied") == 1
    assert log.count("m/1/model.onnx: cannot be read: Permission denied") == 1
    assert "is gone" not in log
    assert "in place" not in log


@pytest.mark.soak
async def test_a_model_folder_that_is_gone_for_a_while_changes_nothing_and_is_told_once(
    crew: OpenCrew, folder: Folder, shop: Shop, tmp_path: Path
) -> None:
    async with serving(crew, folder, shop) as crewed:
        folder.path.rename(tmp_path / "away")
        await eventually(lambda: "The models stay as they are" in crewed.log, "it is told", 20)
        assert await shop.ask(1) == 2
        folder.path.write_bytes(b"a file")
        await eventually(lambda: "It is a file" in crewed.log, "it is told", 20)
        folder.path.unlink()
        (tmp_path / "away").rename(folder.path)
        folder.publish(zoo.adds(2), 2)
        await shop.until_served("2")
        log = crewed.log
    assert log.count("cannot be read: No such file") == 1
    assert "is gone" not in log


@pytest.mark.soak
async def test_of_very_many_problems_as_many_are_told_as_a_person_reads(
    crew: OpenCrew, folder: Folder, shop: Shop
) -> None:
    for number in range(250):
        (folder.path / f"not a model {number}.onnx").touch()
    (folder.path / "bad.onnx").write_bytes(b"x" * 100)
    async with serving(crew, folder, shop):

        async def told() -> bool:
            (says,) = await shop.says()
            return "51 more problems are not listed" in says.problems.get("…", {}).get("", "")

        await eventually(told, "the rest is counted", 20)
        (says,) = await shop.says()
        assert len(says.problems) == 201
        assert "bad" in says.problems


async def test_of_two_workers_with_different_files_the_first_is_believed(
    crew: OpenCrew, folder: Folder, shop: Shop, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    other = Folder(tmp_path / "elsewhere")
    other.publish(zoo.adds(100), 1)
    async with serving(crew, folder, shop):
        with crew(model_dir=str(other.path), models=(), default_model="m", worker=CONFIG) as second:
            second.hire()
            await shop.until_refused("1", "another worker serves another file")
            answers = {await shop.ask(1) for _ in range(30)}
            assert answers == {2.0}


@pytest.mark.soak
async def test_a_job_for_a_version_that_one_worker_has_yet_is_run_by_that_one(
    crew: OpenCrew, folder: Folder, shop: Shop, tmp_path: Path, server: redis.Redis
) -> None:
    (tmp_path / "elsewhere").mkdir()
    newer = Folder(tmp_path / "elsewhere")
    newer.publish(zoo.adds(1), 1)
    newer.publish(zoo.adds(2), 2)
    async with serving(crew, folder, shop):
        with crew(model_dir=str(newer.path), models=(), default_model="m", worker=CONFIG) as second:
            second.hire()
            await shop.until_announced("1", "2")
            assert set(await asyncio.gather(*(shop.ask(1, "2") for _ in range(20)))) == {3.0}
            server.flushall()  # Nobody has said again what it has.
            assert set(await asyncio.gather(*(shop.ask(1, "2") for _ in range(20)))) == {3.0}


@pytest.mark.soak
async def test_forty_models_are_served_with_four_of_them_in_memory(
    crew: OpenCrew, folder: Folder, shop: Shop
) -> None:
    for number in range(40):
        toml = "pinned = true" if number == 0 else ""
        folder.publish(zoo.adds(number), 1, name=f"n{number}", toml=toml)
    async with serving(crew, folder, shop, Bounds(max_models=4)):
        await shop.until_announced("1", name="n39")

        async def all_known() -> bool:
            return all(len(says.models) == 41 for says in await shop.says())

        await eventually(all_known, "all are described")
        answers = [await shop.ask(1, name=f"n{number}") for number in range(40)]
        assert answers == [1 + number for number in range(40)]
        await shop.until_served("1")

        async def few_loaded() -> bool:
            (says,) = await shop.says()
            return len(says.loaded) <= 4 and {"n0/1", "n39/1"} <= set(says.loaded)

        await eventually(few_loaded, "four are loaded, the pinned one among them")


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
async def test_memory_does_not_grow_with_the_number_of_models(
    crew: OpenCrew, folder: Folder, shop: Shop
) -> None:
    for number in range(200):
        folder.publish(zoo.adds(number), 1, name=f"n{number}")
    started_at = time.monotonic()
    async with serving(crew, folder, shop, Bounds(max_models=8)) as crewed:

        async def all_known() -> bool:
            return all(len(says.models) == 201 for says in await shop.says())

        await eventually(all_known, "all are described", 60)
        logging.info("200 models were described in %.1f s.", time.monotonic() - started_at)
        after: list[int] = []
        for number in range(200):
            assert await shop.ask(1, name=f"n{number}") == 1 + number
            if number in (49, 199):
                after.append(_rss_kib(crewed.members[0].process.pid))
        logging.info("RSS after 50 of them and after all: %s KiB.", after)
        assert after[1] <= 1.2 * after[0], after
        assert all(len(says.loaded) <= 8 for says in await shop.says())


def _rss_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
async def test_memory_does_not_grow_with_reloads(
    crew: OpenCrew, folder: Folder, shop: Shop
) -> None:
    wide = zoo.mlp([1, 1500, 1500, 1])
    async with serving(crew, folder, shop) as crewed:
        after: list[int] = []
        for version in range(2, 22):
            folder.publish(wide, version)
            await shop.until_served(str(version))
            await shop.ask(1)
            after.append(_rss_kib(crewed.members[0].process.pid))
    assert after[-1] <= 1.2 * after[1], after
