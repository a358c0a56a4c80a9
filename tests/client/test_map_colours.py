"""Maps of `Client` and `AsyncClient`: each case runs with both, and they do the same."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Final

import numpy as np
import pandas as pd
import pytest
from msgspec import Struct

from asyncinfer.client import AsyncClient, AsyncinferError, Client
from asyncinfer.testing import Running
from tests.faults.harness import eventually_sync
from tests.ports import free_port

SETOSA: Final = [5.1, 3.5, 1.4, 0.2]
AWAY: Final = "http://127.0.0.1:{port}"


class Outcome(Struct, frozen=True):
    """What a map did: the place where it raised, with the error, and its results before that."""

    raised: str = ""
    """`call` or `loop`; empty if it came to its end."""
    error: str = ""
    """The class and the message of what it raised."""
    notes: tuple[str, ...] = ()
    results: tuple[str, ...] = ()
    is_over: bool = True
    """Whether there are no more results after that."""


class Case(Struct, frozen=True, kw_only=True):
    rows: Callable[[], Any]
    options: dict[str, Any] = {}
    is_away: bool = False
    """Nothing listens at the URL."""
    closes_client: str = ""
    """When the client is closed: `first`, or after the `call`."""
    take: int = 1_000
    """After so many results the map is closed."""


def shown(result: Any) -> str:
    """A result in short: a class, numbers, or an error with its row."""
    if isinstance(result, AsyncinferError):
        return f"{type(result).__name__} {result.row}"
    return str(result["class_name"] if isinstance(result, dict) else result.tolist())


def raised(where: str, error: Exception, group: str, results: list[str], over: bool) -> Outcome:
    notes = tuple(note.replace(group, "GROUP") for note in getattr(error, "__notes__", ()))
    return Outcome(where, f"{type(error).__name__}: {error}", notes, tuple(results), over)


def run_plain(case: Case, url: str) -> Outcome:
    results: list[str] = []
    with Client(url, retries=0) as client:
        if case.closes_client == "first":
            client.close()
        try:
            mapped = client.map(case.rows(), progress=False, **case.options)
        except Exception as error:
            return raised("call", error, "-", results, True)
        if case.closes_client == "call":
            client.close()
        try:
            for result in mapped:
                results.append(shown(result))
                if len(results) == case.take:
                    mapped.close()
        except Exception as error:
            is_over = next(mapped, None) is None
            return raised("loop", error, mapped.group, results, is_over)
        return Outcome(results=tuple(results), is_over=next(mapped, None) is None)


async def run_async(case: Case, url: str) -> Outcome:
    results: list[str] = []
    async with AsyncClient(url, retries=0) as client:
        if case.closes_client == "first":
            await client.close()
        try:
            mapped = client.map(case.rows(), progress=False, **case.options)
        except Exception as error:
            return raised("call", error, "-", results, True)
        if case.closes_client == "call":
            await client.close()
        try:
            async for result in mapped:
                results.append(shown(result))
                if len(results) == case.take:
                    await mapped.close()
        except Exception as error:
            is_over = await anext(mapped, None) is None
            return raised("loop", error, mapped.group, results, is_over)
        return Outcome(results=tuple(results), is_over=await anext(mapped, None) is None)


def run_both(case: Case, running: Running) -> Outcome:
    """What both did; fails if they differ."""
    url = f"http://127.0.0.1:{free_port()}" if case.is_away else running.url
    plain, asynchronous = run_plain(case, url), asyncio.run(run_async(case, url))
    assert plain == asynchronous
    return plain


def broken_at(place: int, error: Exception, count: int = 20) -> Callable[[], Iterator[list[float]]]:
    """Rows that raise an error in the place of one of them."""

    def rows() -> Iterator[list[float]]:
        for number in range(count):
            if number == place:
                raise type(error)(*error.args)
            yield SETOSA

    return rows


def good_rows() -> list[list[float]]:
    return [SETOSA] * 3


WRONG_ROW: Final = [SETOSA, SETOSA, [5.1, "x", 1.4, 0.2], SETOSA]
NEXT: Final = "Map the same rows with group='GROUP' to go on"


# --- when it starts ----------------------------------------------------------------------------


class Watched:
    """Rows of either kind that count how many were taken."""

    def __init__(self) -> None:
        self.taken = 0

    def __iter__(self) -> Iterator[list[float]]:
        for row in good_rows():
            self.taken += 1
            yield row


def test_nothing_is_taken_or_sent_before_the_first_result_is_wanted() -> None:
    """A server that is away is not noticed by the call, nor by `with`."""
    rows = Watched()
    with Client(AWAY.format(port=free_port())) as client:
        with client.map(rows, progress=False) as results:
            assert iter(results) is results
        results.close()
        assert list(results) == []
    assert rows.taken == 0


async def test_nothing_is_taken_or_sent_before_the_first_result_is_awaited() -> None:
    rows = Watched()
    async with AsyncClient(AWAY.format(port=free_port())) as client:
        async with client.map(rows, progress=False) as results:
            assert aiter(results) is results
        await results.close()
        assert [result async for result in results] == []
    assert rows.taken == 0


def test_no_rows_are_no_requests(running: Running) -> None:
    empty = np.empty((0, 4))
    for rows in (list, lambda: empty, lambda: {"input": empty}, dict):
        assert run_both(Case(rows=rows, is_away=True), running) == Outcome()


SLOW: Final[dict[str, Any]] = {
    "model": "slow_alone",
    "batch": 1,
    "in_flight": 32,
    "progress": False,
}
ONE_SHORT_ROW: Final = np.array([[100.0], *[[60_000.0]] * 63])
"""The milliseconds that each row takes: only the first ends by itself, once others were sent."""


def leave_plain(url: str) -> str:
    with Client(url) as client, client.map(ONE_SHORT_ROW, **SLOW) as results:
        next(results)
        raise LeftError(results.group)


async def leave_async(url: str) -> None:
    async with AsyncClient(url) as client, client.map(ONE_SHORT_ROW, **SLOW) as results:
        await anext(results)
        raise LeftError(results.group)


class LeftError(Exception):
    """Raised in the body of a `with`."""


@pytest.mark.parametrize("leave", [leave_plain, lambda url: asyncio.run(leave_async(url))])
def test_a_with_has_cancelled_its_jobs_when_its_body_has_raised(
    client: Client, leave: Callable[[str], None]
) -> None:
    with pytest.raises(LeftError) as left:
        leave(client.url)

    group = client.group(str(left.value))
    assert group.counts.pending == 0
    assert group.counts.cancelled > 0
    # Sooner than by the time limit of a run.
    eventually_sync(
        lambda: client.group(group.name).counts.processing == 0, "the running jobs stop", seconds=8
    )


# --- where it raises ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 0},
        {"batch": "many"},
        {"batch": None},
        {"in_flight": 0},
        {"in_flight": "all"},
        {"on_error": "ignore"},
    ],
    ids=str,
)
def test_a_wrong_argument_raises_at_the_call(running: Running, options: dict[str, Any]) -> None:
    outcome = run_both(Case(rows=good_rows, options=options, is_away=True), running)

    (name,) = options
    assert (outcome.raised, outcome.error.split(":")[0]) == ("call", "CannotSend")
    assert f"{name}={options[name]!r}" in outcome.error


@pytest.mark.parametrize(
    ("rows", "words"),
    [(7, "int"), (None, "NoneType"), (np.array(1.0), "ndarray"), (pd.DataFrame([SETOSA]), "frame")],
    ids=["int", "None", "0-d", "frame"],
)
def test_what_has_no_rows_raises_at_the_call(running: Running, rows: Any, words: str) -> None:
    outcome = run_both(Case(rows=lambda: rows, is_away=True), running)

    assert (outcome.raised, outcome.error.split(":")[0]) == ("call", "CannotSend")
    assert words in outcome.error


def test_an_asynchronous_iterator_is_only_for_the_asynchronous_client() -> None:
    async def rows() -> AsyncIterator[list[float]]:
        yield SETOSA

    with Client(AWAY.format(port=free_port())) as client:
        outcome = run_plain(Case(rows=rows), client.url)
    assert outcome.raised == "call"
    assert "AsyncClient" in outcome.error


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": "nothing"}, "ModelNotFound"),
        ({"version": "99"}, "VersionNotFound"),
        ({"priority": "urgent"}, "InvalidInput"),
        ({"no_such_option": 1}, "InvalidInput"),
    ],
    ids=str,
)
@pytest.mark.parametrize("on_error", ["raise", "return"])
def test_what_the_server_refuses_raises_at_the_first_result(
    running: Running, options: dict[str, Any], error: str, on_error: str
) -> None:
    case = Case(rows=good_rows, options={**options, "on_error": on_error})
    outcome = run_both(case, running)

    if error == "InvalidInput" and on_error == "return":
        assert outcome.results == tuple(f"InvalidInput {row}" for row in range(3))
    else:
        assert (outcome.raised, outcome.error.split(":")[0]) == ("loop", error)
        assert outcome.results == ()
        assert outcome.is_over


@pytest.mark.parametrize("batch", [1, 3, "auto"])
@pytest.mark.parametrize("form", [list, iter])
def test_a_bad_row_raises_in_its_place(running: Running, batch: Any, form: Any) -> None:
    outcome = run_both(Case(rows=lambda: form(WRONG_ROW), options={"batch": batch}), running)

    assert (outcome.raised, outcome.results) == ("loop", ("setosa", "setosa"))
    assert outcome.error.startswith("InvalidInput: Row 2: ")
    assert "a string, expected a number" in outcome.error
    assert NEXT in outcome.notes[0]
    assert outcome.is_over


@pytest.mark.parametrize("batch", [1, 3, "auto"])
def test_a_bad_row_may_be_returned_in_its_place(running: Running, batch: Any) -> None:
    case = Case(rows=lambda: WRONG_ROW, options={"batch": batch, "on_error": "return"})

    assert run_both(case, running) == Outcome(
        results=("setosa", "setosa", "InvalidInput 2", "setosa")
    )


def test_a_row_that_cannot_be_sent_raises_in_its_place(running: Running) -> None:
    outcome = run_both(Case(rows=lambda: [SETOSA, {1, 2}, SETOSA]), running)

    assert (outcome.raised, outcome.results) == ("loop", ("setosa",))
    assert outcome.error.startswith("InvalidInput: Row 1: ")


@pytest.mark.parametrize("on_error", ["raise", "return"])
def test_a_server_that_is_away_raises_at_the_first_result(running: Running, on_error: str) -> None:
    outcome = run_both(Case(rows=good_rows, options={"on_error": on_error}, is_away=True), running)

    assert (outcome.raised, outcome.error.split(":")[0]) == ("loop", "ConnectionFailed")
    assert outcome.is_over


@pytest.mark.parametrize("when", ["first", "call"])
def test_a_closed_client_raises_at_the_first_result(running: Running, when: str) -> None:
    outcome = run_both(Case(rows=good_rows, closes_client=when), running)

    assert outcome.raised == "loop"
    assert outcome.error == "ClientClosed: This client was closed; make a new one."
    assert outcome.is_over


@pytest.mark.parametrize("on_error", ["raise", "return"])
@pytest.mark.parametrize("error", [ValueError("broken"), IndexError("broken"), KeyError("broken")])
def test_rows_that_raise_at_once_raise_at_the_first_result(
    running: Running, error: Exception, on_error: str
) -> None:
    case = Case(rows=broken_at(0, error), options={"on_error": on_error}, is_away=True)
    outcome = run_both(case, running)

    assert (outcome.raised, outcome.results) == ("loop", ())
    assert outcome.error == f"{type(error).__name__}: {error}"
    assert outcome.is_over


@pytest.mark.parametrize("batch", [1, 4, "auto"])
def test_rows_that_raise_later_raise_after_the_results_before(running: Running, batch: Any) -> None:
    case = Case(rows=broken_at(9, IndexError("broken")), options={"batch": batch})
    outcome = run_both(case, running)

    assert (outcome.raised, outcome.error) == ("loop", "IndexError: broken")
    assert outcome.results == ("setosa",) * 9
    assert NEXT in outcome.notes[0]
    assert outcome.is_over


def test_a_map_that_was_closed_is_over(running: Running) -> None:
    case = Case(rows=lambda: [SETOSA] * 64, options={"batch": 1}, take=3)
    assert run_both(case, running) == Outcome(results=("setosa",) * 3)
