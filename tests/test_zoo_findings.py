"""What a model may not do: fail a load unexpectedly, kill a start, mix one job with another."""

import contextlib
from pathlib import Path
from typing import Final

import httpx2
import numpy as np
import pytest

from asyncinfer import models
from asyncinfer.engine import Engine
from asyncinfer.errors import ModelRefused
from tests import zoo
from tests.zoo.catalogue import ENTRIES
from tests.zoo.client import infer
from tests.zoo.flowing import by_largest
from tests.zoo.hostile import aborting_split
from tests.zoo.mutating import BASES, mutated
from tests.zoo.running import serve
from tests.zoo.serving import served

UNEXPECTED: Final = (117, 205, 4061, 4636)
"""Seeds of damaged models that ONNX Runtime loads: huge fixed dimensions, names not UTF-8."""


@pytest.mark.parametrize("seed", UNEXPECTED)
def test_a_model_of_impossible_shapes_or_names_is_refused_or_loaded(
    tmp_path: Path, seed: int
) -> None:
    base = BASES[seed % len(BASES)]
    content = mutated(ENTRIES[base].build().SerializeToString(), seed)
    zoo.place_bytes(tmp_path, "m", content)
    (file,) = models.scan(tmp_path)

    with contextlib.suppress(ModelRefused):
        assert Engine.load(file, intra_op_threads=1).signature.inputs


@pytest.mark.parametrize(
    ("threshold", "toml"), [(0.5, ""), (5, ""), (50, ""), (1000, "example = [[2000.0, 0.0]]")]
)
def test_one_jobs_large_number_changes_no_other_jobs_answer(
    tmp_path: Path, threshold: float, toml: str
) -> None:
    """Probe jobs of like size all lie on one side of the threshold, and prove nothing. Numbers as
    large as the example are tried too; larger ones are not, which may cost any time and memory."""
    zoo.place(tmp_path, "m", by_largest(threshold), toml=toml)
    (file,) = models.scan(tmp_path)
    jobs = [{"x": np.full((1, 2), value, np.float32)} for value in (0.25, 2 * threshold)]

    small, large = serve(Engine.load(file, intra_op_threads=1), jobs)

    assert small.answers is not None
    assert large.answers is not None
    assert small.answers["y"].tolist() == [[-0.25, -0.25]]
    assert large.answers["y"].tolist() == [[4 * threshold, 4 * threshold]]


async def test_a_worker_starts_beside_a_model_that_kills_who_loads_it(
    redis_url: str, tmp_path: Path
) -> None:
    """Else one that its trial refused while the worker ran takes the next start down."""
    ENTRIES["added"].place(tmp_path)
    zoo.place(tmp_path, "bomb", aborting_split())
    feeds = ENTRIES["added"].draw(np.random.default_rng(0), 2)

    with served(redis_url, tmp_path, ["added"]) as url:
        async with httpx2.AsyncClient(timeout=30, verify=False) as http:
            answers = await infer(http, url, "added", feeds, "binary")

    assert answers is not None
    np.testing.assert_array_equal(answers["y"], np.add(feeds["a"], feeds["b"]))
