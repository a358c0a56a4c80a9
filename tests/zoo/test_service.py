"""Results through HTTP, Redis and a worker equal those of ONNX Runtime alone."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from functools import cache
from pathlib import Path
from typing import Final

import httpx2
import numpy as np
import pytest

from tests.zoo.catalogue import ENTRIES
from tests.zoo.client import Form, infer
from tests.zoo.reference import ReferenceSession, assert_equal
from tests.zoo.service import running_service

BINARY_ONLY: Final = frozenset({"fp16", "bf16", "half"})
"""The Open Inference Protocol has no JSON form for the 16-bit floats of these models."""

pytestmark = pytest.mark.soak

NAMES: Final = [name for name in ENTRIES if not name.startswith(("int", "uint"))] + ["int64"]
"""One integer datatype is enough here; the conversions have tests of their own."""


class Zoo:
    """All models of the catalogue, served."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.reference = cache(lambda name: ReferenceSession(folder / name / "1" / "model.onnx"))

    async def assert_equals_reference(
        self, http: httpx2.AsyncClient, name: str, form: Form, seed: int, rows: int
    ) -> None:
        feeds = ENTRIES[name].draw(np.random.default_rng(seed), rows)
        expected = self.reference(name).run(feeds)
        outputs = await infer(http, self.url, name, feeds, form)
        assert (outputs is None) == (expected is None)
        if outputs is not None and expected is not None:
            assert_equal(outputs, expected, exactly=False)


@pytest.fixture(scope="module")
def zoo(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zoo]:
    folder = tmp_path_factory.mktemp("zoo")
    for name in NAMES:
        ENTRIES[name].place(folder)
    with running_service(redis_url, folder, NAMES) as url:
        yield Zoo(url, folder)


@pytest.fixture
async def http() -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(timeout=30, verify=False) as client:
        yield client


@pytest.mark.parametrize("form", ["binary", "json"])
@pytest.mark.parametrize("name", NAMES)
async def test_a_job_of_each_model_has_the_result_of_onnx_runtime(
    zoo: Zoo, http: httpx2.AsyncClient, name: str, form: Form
) -> None:
    if form == "binary" or name not in BINARY_ONLY:
        await zoo.assert_equals_reference(http, name, form, seed=1, rows=2)


async def test_jobs_of_all_models_at_once_have_the_results_of_onnx_runtime(
    zoo: Zoo, http: httpx2.AsyncClient
) -> None:
    """Any job may share a run with any other, also with jobs that fail."""
    gate = asyncio.Semaphore(32)

    async def submit(number: int) -> None:
        name = NAMES[number % len(NAMES)]
        async with gate:
            await zoo.assert_equals_reference(
                http, name, "binary", seed=number, rows=1 + number % 4
            )

    async with asyncio.TaskGroup() as group:
        for number in range(4 * len(NAMES)):
            group.create_task(submit(number))


@pytest.mark.parametrize("name", ["lstm_step", "embedding", "several", "running_sum"])
async def test_many_jobs_of_a_model_have_the_results_of_onnx_runtime(
    zoo: Zoo, http: httpx2.AsyncClient, name: str
) -> None:
    async with asyncio.TaskGroup() as group:
        for seed in range(48):
            group.create_task(
                zoo.assert_equals_reference(http, name, "binary", seed, rows=1 + seed % 3)
            )
