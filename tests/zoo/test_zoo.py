"""Whatever model and whatever is batched with whatever: a job's answer is bare ONNX Runtime's."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncinfer.engine import Engine
from asyncinfer.models.folder import scan
from tests.zoo.bare import Bare, assert_equal
from tests.zoo.catalogue import ENTRIES
from tests.zoo.entry import Entry
from tests.zoo.running import serve


class Pair:
    """A model as we serve it and as ONNX Runtime runs it."""

    def __init__(self, entry: Entry, folder: Path) -> None:
        self.entry = entry
        path = entry.place(folder)
        (file,) = scan(folder)
        self.engine = Engine.load(file, intra_op_threads=1)
        self.bare = Bare(path)


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Pair]]:
    """Each model is loaded once for all tests here."""

    @cache
    def pair(name: str) -> Pair:
        return Pair(ENTRIES[name], tmp_path_factory.mktemp(name))

    yield pair
    pair.cache_clear()


@pytest.mark.parametrize("name", ENTRIES)
def test_jobs_share_a_run_only_where_that_changes_no_answer(
    pair_of: Callable[[str], Pair], name: str
) -> None:
    pair = pair_of(name)
    signature = pair.engine.signature

    if pair.entry.batched is not None:
        assert signature.batched == pair.entry.batched, signature.batching
    assert signature.batching


@pytest.mark.parametrize("name", ENTRIES)
@given(seed=st.integers(0, 2**32 - 1), row_counts=st.lists(st.integers(1, 5), min_size=1))
@settings(max_examples=15, deadline=None)
def test_every_job_gets_the_answer_of_bare_onnx_runtime(
    pair_of: Callable[[str], Pair], name: str, seed: int, row_counts: list[int]
) -> None:
    pair = pair_of(name)
    rng = np.random.default_rng(seed)
    jobs = [pair.entry.draw(rng, rows) for rows in row_counts]

    served = serve(pair.engine, jobs)

    for feeds, one in zip(jobs, served, strict=True):
        expected = pair.bare.run(feeds)
        assert (one.answers is None) == (expected is None)
        if one.answers is not None and expected is not None:
            assert_equal(one.answers, expected, exactly=one.beside == 1)


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.batched])
def test_jobs_of_one_shape_do_share_a_run(pair_of: Callable[[str], Pair], name: str) -> None:
    pair = pair_of(name)
    drawn = [pair.entry.draw(np.random.default_rng(7), 2) for _ in range(3)]

    assert {one.beside for one in serve(pair.engine, drawn)} == {3}
