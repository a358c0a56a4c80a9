"""Broken and hostile files are refused with a reason; they may kill only the process of a trial."""

import re
from pathlib import Path

import pytest

from tests.zoo.hostile import BROKEN, OUTSIDE_WEIGHTS, SECRET, exponential_functions
from tests.zoo.isolated_load import LoadResult, load_each
from tests.zoo.model_builder import place
from tests.zoo.mutations import place_mutants


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "models"
    folder.mkdir()
    for name, put in {**BROKEN, **OUTSIDE_WEIGHTS}.items():
        put(folder, name)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, LoadResult]:
    """The outcome of each file, all loaded in one child process."""
    return load_each(folder)


@pytest.mark.parametrize("name", [*BROKEN, *OUTSIDE_WEIGHTS])
def test_a_broken_file_or_one_that_reads_outside_its_folder_is_refused_by_its_short_name(
    results: dict[str, LoadResult], folder: Path, name: str
) -> None:
    result = results[name]

    assert not result.killed_by
    assert re.match(rf"{name}/1/model\.onnx: \S+", result.reason)
    # The reason may quote the file, but must not show its absolute path.
    assert str(folder / name) not in result.reason
    assert SECRET[:8].decode() not in result.reason
    assert "\n" not in result.reason


@pytest.mark.soak
def test_a_load_of_functions_that_expand_exponentially_is_ended(tmp_path: Path) -> None:
    place(tmp_path, "exponential", exponential_functions())
    place_mutants(tmp_path, 1)

    results = load_each(tmp_path, seconds_each=1)

    assert results["exponential"].killed_by == "SIGPROF"
    assert not results["0000_mlp"].killed_by


@pytest.mark.soak
@pytest.mark.parametrize("count", [400])
def test_damaged_models_are_loaded_or_refused_and_nothing_else(tmp_path: Path, count: int) -> None:
    place_mutants(tmp_path, count)

    results = load_each(tmp_path)

    assert len(results) == count
    # ONNX Runtime may abort on a model; an unexpected exception would be a fault of our own.
    unexpected = {
        name: result for name, result in results.items() if result.killed_by.startswith("exit code")
    }
    assert not unexpected
    killers = [name for name, result in results.items() if result.killed_by]
    assert len(killers) <= count / 200, killers
    for name, result in results.items():
        assert not result.reason or result.reason.startswith(f"{name}/1/model.onnx: ")
