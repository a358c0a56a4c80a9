"""For any model and any batch, each job's result is that of ONNX Runtime alone."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncinfer.engine import Engine
from asyncinfer.models.folder import scan
from tests.zoo.batch_run import run_jobs
from tests.zoo.catalogue import ENTRIES, soak_except_kinds
from tests.zoo.entry import Entry
from tests.zoo.reference import ReferenceSession, assert_equal


class Pair:
    """The engine of a model, and a reference session of the same file."""

    def __init__(self, entry: Entry, folder: Path) -> None:
        self.entry = entry
        path = entry.place(folder)
        (file,) = scan(folder)
        self.engine = Engine.load(file, intra_op_threads=1)
        self.reference = ReferenceSession(path)


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Pair]]:
    """Loads each model once for all tests of this file."""

    @cache
    def pair(name: str) -> Pair:
        return Pair(ENTRIES[name], tmp_path_factory.mktemp(name))

    yield pair
    pair.cache_clear()


@pytest.mark.soak
@pytest.mark.parametrize("name", soak_except_kinds(ENTRIES))
def test_a_model_is_batched_only_if_that_changes_no_result(
    pair_of: Callable[[str], Pair], name: str
) -> None:
    pair = pair_of(name)
    signature = pair.engine.signature

    if pair.entry.batched is not None:
        assert signature.batched == pair.entry.batched, signature.batching
    assert signature.batching


@pytest.mark.parametrize("name", soak_except_kinds(ENTRIES))
@given(seed=st.integers(0, 2**32 - 1), row_counts=st.lists(st.integers(1, 5), min_size=1))
@settings(max_examples=15, deadline=None)
def test_every_job_gets_the_result_of_onnx_runtime_alone(
    pair_of: Callable[[str], Pair], name: str, seed: int, row_counts: list[int]
) -> None:
    pair = pair_of(name)
    rng = np.random.default_rng(seed)
    jobs = [pair.entry.draw(rng, rows) for rows in row_counts]

    results = run_jobs(pair.engine, jobs)

    for feeds, result in zip(jobs, results, strict=True):
        expected = pair.reference.run(feeds)
        assert (result.outputs is None) == (expected is None)
        if result.outputs is not None and expected is not None:
            assert_equal(result.outputs, expected, exactly=result.jobs_in_run == 1)


@pytest.mark.parametrize(
    "name", soak_except_kinds(name for name, entry in ENTRIES.items() if entry.batched)
)
def test_jobs_of_one_shape_share_a_run_of_a_batched_model(
    pair_of: Callable[[str], Pair], name: str
) -> None:
    pair = pair_of(name)
    jobs = [pair.entry.draw(np.random.default_rng(7), 2) for _ in range(3)]

    assert {result.jobs_in_run for result in run_jobs(pair.engine, jobs)} == {3}
