"""Through HTTP, Redis and a worker: the answers are those of bare ONNX Runtime."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from functools import cache
from pathlib import Path
from typing import Final

import httpx2
import numpy as np
import pytest

from tests.zoo.bare import Bare, assert_equal
from tests.zoo.catalogue import ENTRIES
from tests.zoo.client import Form, infer
from tests.zoo.serving import served

BINARY_ONLY: Final = frozenset({"fp16", "bf16", "half"})
"""JSON has no numbers of theirs, says the Open Inference Protocol."""

NAMES: Final = [name for name in ENTRIES if not name.startswith(("int", "uint"))] + ["int64"]
"""Of the whole numbers one is enough here; the conversions are tested where they are."""


class Zoo:
    """All of them, served."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.bare = cache(lambda name: Bare(folder / name / "1" / "model.onnx"))

    async def assert_same(
        self, http: httpx2.AsyncClient, name: str, form: Form, seed: int, rows: int
    ) -> None:
        feeds = ENTRIES[name].draw(np.random.default_rng(seed), rows)
        expected = self.bare(name).run(feeds)
        answers = await infer(http, self.url, name, feeds, form)
        assert (answers is None) == (expected is None)
        if answers is not None and expected is not None:
            assert_equal(answers, expected, exactly=False)


@pytest.fixture(scope="module")
def zoo(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zoo]:
    folder = tmp_path_factory.mktemp("zoo")
    for name in NAMES:
        ENTRIES[name].place(folder)
    with served(redis_url, folder, NAMES) as url:
        yield Zoo(url, folder)


@pytest.fixture
async def http() -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(timeout=30, verify=False) as it:
        yield it


@pytest.mark.parametrize("form", ["binary", "json"])
@pytest.mark.parametrize("name", NAMES)
async def test_one_job_of_each_model(
    zoo: Zoo, http: httpx2.AsyncClient, name: str, form: Form
) -> None:
    if form == "binary" or name not in BINARY_ONLY:
        await zoo.assert_same(http, name, form, seed=1, rows=2)


@pytest.mark.soak
async def test_many_clients_of_all_models_at_once(zoo: Zoo, http: httpx2.AsyncClient) -> None:
    """Whatever is batched with whatever: neighbours that fail included."""
    gate = asyncio.Semaphore(32)

    async def one(number: int) -> None:
        name = NAMES[number % len(NAMES)]
        async with gate:
            await zoo.assert_same(http, name, "binary", seed=number, rows=1 + number % 4)

    async with asyncio.TaskGroup() as group:
        for number in range(4 * len(NAMES)):
            group.create_task(one(number))


@pytest.mark.parametrize("name", ["lstm_step", "embedding", "several", "running_sum"])
async def test_many_clients_of_one_model(zoo: Zoo, http: httpx2.AsyncClient, name: str) -> None:
    async with asyncio.TaskGroup() as group:
        for seed in range(48):
            group.create_task(zoo.assert_same(http, name, "binary", seed, rows=1 + seed % 3))
