"""The engine cache: one load for each version, and a bound on what stays loaded."""

import asyncio
import threading
import weakref
from functools import partial
from pathlib import Path

import pytest

from asyncinfer.engine import Engine
from asyncinfer.models.folder import ModelFile, read_stamp, single_file_model, total_bytes
from asyncinfer.worker.models.engine_cache import CacheBounds, EngineCache
from tests import zoo


@pytest.fixture
def files(tmp_path: Path) -> list[ModelFile]:
    content = zoo.mlp([4, 4]).SerializeToString()
    paths = [tmp_path / f"{name}.onnx" for name in "abc"]
    for path in paths:
        path.write_bytes(content)
    return [single_file_model(path) for path in paths]


load = partial(Engine.load, intra_op_threads=1)


async def test_jobs_that_come_while_a_version_is_loaded_wait_for_that_load(
    files: list[ModelFile],
) -> None:
    loads: list[str] = []
    go = threading.Event()

    def load_when_allowed(file: ModelFile) -> Engine:
        go.wait()
        loads.append(file.model)
        return load(file)

    cache = EngineCache(load_when_allowed, CacheBounds())
    fetches = [asyncio.create_task(cache.fetch(files[0], 1)) for _ in range(5)]
    await asyncio.sleep(0)
    go.set()
    engines = {id(await fetch) for fetch in fetches}
    assert (len(engines), loads) == (1, ["a"])
    assert cache.get(("a", "1")) is await cache.fetch(files[0], 1)
    cache.close()


async def test_the_least_used_engine_is_dropped_and_a_run_under_way_keeps_it(
    files: list[ModelFile],
) -> None:
    cache = EngineCache(load, CacheBounds(max_models=2))
    first, _ = [await cache.fetch(file, 1) for file in files[:2]]
    assert cache.get(("a", "1")) is first
    await cache.fetch(files[2], 1)
    assert cache.labels == [("a", "1"), ("c", "1")]
    gone = weakref.ref(first)
    cache.drop(("a", "1"))
    assert first.signature.model == "a"
    del first
    await cache.load(files[0])  # the thread frees dropped engines before it loads this one
    assert gone() is None
    cache.close()


async def test_loaded_engines_are_bounded_in_bytes_but_one_may_always_stay(
    files: list[ModelFile],
) -> None:
    size = total_bytes(read_stamp(files[0]))
    assert size == files[0].path.stat().st_size
    cache = EngineCache(load, CacheBounds(max_bytes=2 * size))
    for file in files:
        await cache.fetch(file, size)
    assert cache.labels == [("b", "1"), ("c", "1")]
    await cache.fetch(files[0], 100 * size)
    assert cache.labels == [("a", "1")]
    cache.close()
