"""The table of versions: what is loaded next, what is served, and what is said about the rest."""

from pathlib import Path

import pytest

from asyncinfer.errors import UnknownModel
from asyncinfer.models.config import ModelConfig
from asyncinfer.models.folder import OF_ALL_VERSIONS, ModelFile
from asyncinfer.models.signature import Signature
from asyncinfer.worker.models.source import ModelSource
from asyncinfer.worker.models.version_table import VersionTable
from asyncinfer.worker.models.versions import Version

_FOLDER = Path("/models")


def _version(
    number: int, *, model: str = "m", loaded: bool = True, default: int | None = None,
    problem: str = "", toml_problem: str = "",
) -> Version:  # fmt: skip
    """A version with a file of its own; without `loaded` it was not tried yet."""
    path = _FOLDER / model / str(number) / "model.onnx"
    config = ModelConfig(default_version=default)
    file = ModelFile(model, str(number), path, config, toml_problem=toml_problem)
    signature = Signature(model, str(number), f"sha-{model}-{number}", (), ())
    return Version(file, signature=signature if loaded else None, problem=problem, stamp=())


def _table(*known: Version, wanted: tuple[str, ...] = (), announced: bool = True) -> VersionTable:
    """A table with these versions, which were announced if they were loaded."""
    table = VersionTable(ModelSource(_FOLDER, wanted))
    for version in known:
        table.keep(version)
    if announced:
        table.mark_announced(table.by_label)
    table.update_served()
    return table


def _served(table: VersionTable) -> dict[str, str]:
    return {model: version.file.version for model, version in table.served.items()}


# --- what is served --------------------------------------------------------------------------


def test_the_highest_version_is_served_by_its_number() -> None:
    assert _served(_table(_version(2), _version(10), _version(9))) == {"m": "10"}


def test_the_default_version_of_the_model_is_served_instead() -> None:
    table = _table(*(_version(number, default=2) for number in (1, 2, 3)))

    assert _served(table) == {"m": "2"}
    assert table.default_versions() == {"m": "2"}


def test_a_version_is_served_once_it_was_announced() -> None:
    table = _table(_version(1))
    table.keep(_version(2))
    table.update_served()
    assert _served(table) == {"m": "1"}
    assert table.unannounced_labels == {("m", "2")}

    assert table.mark_announced([("m", "2"), ("m", "9")])

    assert table.update_served() == [("m", "1")]  # its engine is no longer needed
    assert _served(table) == {"m": "2"}
    assert not table.mark_announced([("m", "2")])


def test_the_best_version_is_the_one_to_serve_once_it_is_announced() -> None:
    table = _table(_version(1), _version(2), announced=False)

    assert [table.is_best(("m", number)) for number in "12"] == [False, True]


def test_a_version_that_another_worker_serves_from_another_file_is_not_served() -> None:
    table = _table(_version(1), _version(2))

    table.contested_problems = {("m", "2"): "another file"}
    table.update_served()

    assert _served(table) == {"m": "1"}
    assert table.problems() == {("m", "2"): "another file"}
    assert table.uncontested_signatures().keys() == {("m", "1")}
    with pytest.raises(UnknownModel, match="no version 2 of model 'm'; it has 1"):
        table.find_served("m", "2")


def test_a_removed_version_runs_jobs_that_wait_for_it_until_it_is_dropped() -> None:
    table = _table(_version(1), _version(2))

    assert table.remove(("m", "2"), now_seconds=100.0)
    assert table.update_served() == []  # its engine could not be loaded again

    assert _served(table) == {"m": "1"}
    assert table.find_served("m", "2") == _version(2)
    assert table.seconds_since_removal(103.5) == {("m", "2"): 3.5}
    table.drop_removed(("m", "2"))
    with pytest.raises(UnknownModel):
        table.find_served("m", "2")


def test_a_removed_model_is_served_until_its_last_version_is_dropped() -> None:
    table = _table(_version(1))

    table.remove(("m", "1"), now_seconds=0.0)
    table.update_served()
    assert _served(table) == {"m": "1"}
    assert table.names == []

    table.drop_removed(("m", "1"))
    table.update_served()
    assert _served(table) == {}


def test_a_removed_version_that_was_never_loaded_leaves_nothing() -> None:
    table = _table(_version(1, loaded=False))

    assert not table.remove(("m", "1"), now_seconds=0.0)

    assert table.seconds_since_removal(1.0) == {}


def test_a_job_for_no_model_is_told_which_there_are() -> None:
    table = _table(_version(1, model="a"), _version(1, model="b"))

    with pytest.raises(UnknownModel, match="no model 'c'; it has a, b"):
        table.find_served("c", None)


# --- what is loaded next ---------------------------------------------------------------------


def _loading_order(table: VersionTable) -> list[tuple[str, str]]:
    """Loads everything in turn; returns the order."""
    order = []
    while version := table.next_untried():
        order.append(version.label)
        table.keep(_version(int(version.file.version), model=version.file.model))
    return order


def test_each_model_gets_a_version_before_one_gets_its_second() -> None:
    known = [_version(n, model=model, loaded=False) for model in ("a", "b") for n in (1, 2)]

    order = _loading_order(_table(*known))

    assert order == [("a", "2"), ("b", "2"), ("a", "1"), ("b", "1")]


def test_what_jobs_wait_for_is_loaded_first_and_then_the_models_named_first() -> None:
    table = _table(*(_version(1, model=model, loaded=False) for model in ("a", "b", "c")))
    table.load_first(["b", "unknown"])
    assert table.will_load("c", None)

    assert [model for model, _ in _loading_order(table)] == ["c", "b", "a"]


def test_a_version_that_is_served_refused_or_absent_will_not_be_loaded() -> None:
    table = _table(_version(2), _version(1, loaded=False, problem="damaged"))

    assert not table.will_load("m", None)
    assert not table.will_load("m", "1")
    assert not table.will_load("m", "7")


def test_untried_versions_are_announced_as_loading() -> None:
    table = _table(_version(1), _version(2, loaded=False), _version(1, model="n", loaded=False))
    table.untried_files = {("o", "1")}

    assert table.loading == ["n", "o"]
    assert table.loading_versions == {"m": ["2"]}
    assert table.names == ["m", "n", "o"]


def test_new_and_changed_versions_are_tried_unless_an_earlier_load_serves() -> None:
    table = _table(_version(1), _version(2, loaded=False, problem="damaged"))
    seen = {
        version.label: Version(version.file, (("model.onnx", 1, 2),))
        for version in (_version(1), _version(2), _version(3))
    }

    assert table.differences(seen) == [("m", "1"), ("m", "2"), ("m", "3")]
    assert table.labels_to_try(seen) == {("m", "2"), ("m", "3")}
    assert table.differences({}) == [("m", "1"), ("m", "2")]


# --- problems --------------------------------------------------------------------------------


def test_a_problem_is_new_once_for_all_versions_of_a_model() -> None:
    table = _table()
    first, second = (_version(number, toml_problem="no such key") for number in (1, 2))

    assert table.keep(first) == ["no such key"]
    assert table.keep(second) == []
    assert table.keep(_version(1, problem="damaged", toml_problem="no such key")) == ["damaged"]


def test_models_that_are_named_and_absent_are_a_problem() -> None:
    table = _table(_version(1), wanted=("m", "absent"))

    ((label, problem),) = table.problems().items()
    assert label == ("absent", OF_ALL_VERSIONS)
    assert problem.startswith("MODELS names it, but /models has no such model.")


def test_a_problem_is_not_told_while_the_file_is_about_to_be_tried_again() -> None:
    table = _table(_version(1, loaded=False, problem="damaged"))
    assert table.problems() == {("m", "1"): "damaged"}

    table.untried_files = {("m", "1")}

    assert table.problems() == {}


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        ([], "There is no model in /models yet"),
        ([_version(1, loaded=False, problem="damaged.")], "The only model in /models cannot be"),
        (
            [_version(1, model=model, loaded=False, problem="damaged") for model in "ab"],
            "None of the 2 models in /models can be served: damaged.",
        ),
        ([_version(1, loaded=False)], ""),
        ([_version(1)], ""),
    ],
)
def test_it_says_why_nothing_is_served(known: list[Version], reason: str) -> None:
    found = _table(*known).why_nothing_is_served()

    assert found.startswith(reason)
    assert bool(found) == bool(reason)
