"""A server whose JSON has wrong types: every command prints one line, and no traceback."""

import copy
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.cli.command_line import CommandResult, run_command
from tests.sampling import soak_except

from .hostile_server import HostileServer

Place = tuple[str | int, ...]

WRONG: Final[tuple[Any, ...]] = (None, 7, -1.5, True, "x", "\x1b[31m", [], [None], {}, {"x": None})
COMMANDS: Final[dict[str, tuple[tuple[str, ...], ...]]] = {
    "GET /jobs": (("jobs",), ("dead",), ("jobs", "--all-tenants"), ("jobs", "--json")),
    "GET /job": (
        ("job", "a"),
        ("job", "a", "--watch", "--timeout", "0"),
        ("job", "a", "--json"),
    ),
    "GET /webhook": (("job", "a"),),
    "GET /models": (("models",), ("models", "--json"), ("predict", "1", "2", "3", "4")),
    "GET /models/iris": (("models", "iris"), ("predict", "-m", "iris", "1", "2", "3", "4")),
    "GET /queues": (("top", "--once"), ("top", "--once", "--json")),
    "GET /audit": (("audit",), ("audit", "--json")),
    "GET /workers": (("top", "--once"),),
    "GET /group": (("predict", "-m", "iris", "1", "2", "3", "4"),),
    "POST /predict": (
        ("predict", "-m", "iris", "1", "2", "3", "4"),
        ("predict", "-m", "iris", "1", "2", "3", "4", "--to", "csv"),
    ),
    "DELETE /jobs": (
        ("cancel", "--model", "x"),
        ("purge", "--status", "ended", "--yes", "--json"),
    ),
    "DELETE /job": (("cancel", "a"), ("purge", "a")),
    "POST /jobs/retry": (("retry", "a"), ("retry", "--dead"), ("retry", "--dead", "--json")),
    "POST /models/iris/pause": (("pause", "iris"), ("pause", "iris", "--json")),
}


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    """The paths of a value and of all its parts; of a list the first two items."""
    yield at
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = list(enumerate(value))[:2]
    for key, item in items:
        yield from places(item, (*at, key))


def wrong_places(value: Any) -> Iterator[Place]:
    """All places but `more`, of which true is valid: the command would ask again for ever."""
    return (place for place in places(value) if place != ("more",))


def with_wrong(value: Any, place: Place, wrong: Any) -> Any:
    if not place:
        return wrong
    changed = copy.deepcopy(value)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = wrong
    return changed


def refuses_or_shows(argv: tuple[str, ...]) -> CommandResult:
    """A value may be one that is shown; any other ends with one line and exit code 3."""
    ran = run_command(*argv)
    assert "\x1b" not in ran.err
    if ran.code == 3:
        assert len(ran.err.splitlines()) == 1
        assert ran.err.startswith("asyncinfer: ")
    else:
        assert ran.code in (0, 1, 4)
    return ran


@pytest.mark.parametrize("request_line", COMMANDS)
def test_the_answers_that_the_hostile_server_changes_are_good_ones(
    hostile: HostileServer, request_line: str
) -> None:
    for argv in COMMANDS[request_line]:
        assert run_command(*argv).code in (0, 1)


@pytest.mark.parametrize("request_line", soak_except(COMMANDS, 2))
def test_no_wrong_type_in_an_answer_ends_in_a_traceback(
    hostile: HostileServer, request_line: str
) -> None:
    good = hostile.answers[request_line]
    for number, place in enumerate(wrong_places(good)):
        hostile.answers[request_line] = with_wrong(good, place, WRONG[number % len(WRONG)])
        for argv in COMMANDS[request_line]:
            refuses_or_shows(argv)


def test_an_axis_that_a_model_has_not_is_refused(hostile: HostileServer) -> None:
    model = hostile.answers["GET /models/iris"]
    for axis in (-1, 7):
        hostile.answers["GET /models/iris"] = {**model, "input_axes": [axis]}
        assert refuses_or_shows(("predict", "-m", "iris", "1", "2", "3", "4")).code == 3


def test_an_output_that_declares_fewer_dimensions_than_it_has_hides_no_model(
    hostile: HostileServer,
) -> None:
    """Workers of an earlier release announce a model so if its converter declared it wrongly."""
    model = hostile.answers["GET /models/iris"]
    outputs = [{**output, "shape": []} for output in model["outputs"]]
    misdeclared = {**model, "outputs": outputs, "output_axes": [0] * len(outputs)}
    hostile.answers["GET /models/iris"] = misdeclared
    hostile.answers["GET /models"] = {**hostile.answers["GET /models"], "models": [misdeclared]}

    shown = run_command("models")
    assert shown.code == 0
    assert "iris" in shown.out
    assert run_command("predict", "-m", "iris", "1", "2", "3", "4").code in (0, 1)


@pytest.mark.soak
@pytest.mark.parametrize("wrong", WRONG[::2], ids=repr)
@pytest.mark.parametrize("request_line", COMMANDS)
def test_no_wrong_type_anywhere_ends_in_a_traceback(
    hostile: HostileServer, request_line: str, wrong: Any
) -> None:
    good = hostile.answers[request_line]
    for place in wrong_places(good):
        hostile.answers[request_line] = with_wrong(good, place, wrong)
        for argv in COMMANDS[request_line]:
            refuses_or_shows(argv)


PROBLEM: Final = {
    "type": "about:blank",
    "title": "It is wrong",
    "status": 422,
    "detail": "Wrong.",
    "code": "invalid_input",
    "job_id": "a",
    "error": {"code": "a", "message": "b"},
    "errors": [{"pointer": "/data/0", "detail": "has no row"}],
}


@pytest.mark.parametrize("wrong", soak_except(WRONG, 3), ids=repr)
@pytest.mark.parametrize(
    "code", soak_except(["invalid_input", "job_failed", "model_not_found", "x"], 2)
)
def test_no_wrong_type_in_an_error_ends_in_a_traceback(
    hostile: HostileServer, code: str, wrong: Any
) -> None:
    hostile.status = 422
    good = {**PROBLEM, "code": code}
    for place in places(good):
        hostile.answers = {"GET ": None, "GET": None}
        changed = with_wrong(good, place, wrong)
        hostile.answers = dict.fromkeys(COMMANDS, changed)
        for argv in (("jobs",), ("predict", "-m", "iris", "1", "2"), ("cancel", "a")):
            assert run_command(*argv).code in (1, 2, 3)
