"""Broken and hostile files are refused with a reason; one may kill only who tries it out."""

import re
from pathlib import Path

import pytest

from tests.zoo.hostile import BROKEN, SECRET, THIEVES, laughing_functions
from tests.zoo.loading import Loaded, load_each
from tests.zoo.making import place
from tests.zoo.mutating import place_mutants


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "models"
    folder.mkdir()
    for name, put in {**BROKEN, **THIEVES}.items():
        put(folder, name)
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> dict[str, Loaded]:
    """What became of each, all in one child."""
    return load_each(folder)


@pytest.mark.parametrize("name", [*BROKEN, *THIEVES])
def test_what_is_no_model_or_a_thief_is_refused_by_its_short_name(
    loaded: dict[str, Loaded], folder: Path, name: str
) -> None:
    became = loaded[name]

    assert not became.died
    assert re.match(rf"{name}/1/model\.onnx: \S+", became.reason)
    # What the file itself says may be said again; where it lies is nobody's business.
    assert str(folder / name) not in became.reason
    assert SECRET[:8].decode() not in became.reason
    assert "\n" not in became.reason


def test_functions_that_call_each_other_ten_times_over_are_cut_off(tmp_path: Path) -> None:
    place(tmp_path, "laughing", laughing_functions())
    place_mutants(tmp_path, 1)

    became = load_each(tmp_path, seconds_each=1)

    assert became["laughing"].died == "SIGPROF"
    assert not became["0000_mlp"].died


@pytest.mark.parametrize(
    "count",
    [60, pytest.param(1000, marks=pytest.mark.soak)],
)
def test_damaged_models_are_loaded_or_refused_and_nothing_else(tmp_path: Path, count: int) -> None:
    place_mutants(tmp_path, count)

    became = load_each(tmp_path)

    assert len(became) == count
    # ONNX Runtime may abort on one; that we raise what nobody expects is our own fault.
    ours = {name: one for name, one in became.items() if one.died.startswith("exit code")}
    assert not ours
    killers = [name for name, one in became.items() if one.died]
    assert len(killers) <= count / 200, killers
    for name, one in became.items():
        assert not one.reason or one.reason.startswith(f"{name}/1/model.onnx: ")
