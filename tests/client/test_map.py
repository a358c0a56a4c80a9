"""Maps: every row has its result, in order, and nothing runs twice."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import polars as pl
import pytest
import redis

from asyncinfer.client import (
    AsyncClient,
    AsyncinferError,
    CannotSend,
    Client,
    IdempotencyConflict,
    InvalidInput,
    JobFailed,
    ModelNotFound,
    SlowMapWarning,
)
from asyncinfer.testing import service
from tests.zoo.catalogue import ENTRIES

SETOSA: Final = [5.1, 3.5, 1.4, 0.2]


def iris_rows(count: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.random.default_rng(seed).uniform(0.1, 7.0, (count, 4))


def started(client: Client, group: str) -> dict[str, Any]:
    """When each completed job of a group was started, by id; another time shows another run."""
    return {
        job.id: job.times["started"]
        for job in client.jobs(group=group, limit=5000)
        if job.status == "completed"
    }


def test_rows_of_any_form_give_the_same_results_in_order(client: Client) -> None:
    rows = iris_rows(1500)
    expected = client.predict(rows, "iris")

    forms: list[Any] = [
        rows,
        rows.tolist(),
        (row for row in rows),
        (tuple(row) for row in rows.tolist()),
        {"input": rows},
        ({"input": row} for row in rows),
    ]
    for form in forms:
        assert list(client.map(form, "iris", progress=False)) == expected
    assert list(client.map(rows[:300], batch=7, in_flight=3, progress=False)) == expected[:300]


async def test_rows_may_come_from_an_async_generator(aclient: AsyncClient) -> None:
    rows = iris_rows(1500).tolist()
    expected = await aclient.predict(rows)

    async def coming() -> AsyncIterator[Any]:
        for row in rows:
            yield row

    for form in (coming(), rows, np.array(rows)):
        assert [result async for result in aclient.map(form, progress=False)] == expected


async def test_no_rows_give_no_results(client: Client, aclient: AsyncClient) -> None:
    empties: list[Any] = [[], (), np.empty((0, 4)), {"input": np.empty((0, 4))}]
    for empty in empties:
        assert list(client.map(empty, progress=False)) == []
        assert [result async for result in aclient.map(empty, progress=False)] == []


def test_an_endless_generator_is_read_only_as_far_as_it_is_used(client: Client) -> None:
    pulled = 0

    def endless() -> Iterator[list[float]]:
        nonlocal pulled
        while True:
            pulled += 1
            yield SETOSA

    results = client.map(endless(), batch=10, in_flight=4, progress=False)
    assert len(list(itertools.islice(results, 500))) == 500
    results.close()

    assert 500 <= pulled <= 500 + 2 * 4 * 10 + 10
    assert client.group(results.group).counts.pending == 0


def test_rows_of_a_model_that_cannot_batch_are_jobs_of_their_own(client: Client) -> None:
    rows = [[float(number), 1.0] for number in range(150)]
    with pytest.warns(SlowMapWarning):
        alone = list(client.map(rows, "mean", progress=False))
    with pytest.warns(SlowMapWarning):
        packed = list(client.map(np.array(rows, np.float32), "mean", progress=False, group="alone"))

    assert [result.tolist() for result in alone] == [[0.0, 0.0]] * 150
    assert [result.tolist() for result in packed] == [[0.0, 0.0]] * 150
    assert client.group("alone").jobs == 150


def test_several_inputs_are_a_dict_a_row_or_a_dict_of_arrays(client: Client) -> None:
    feeds = ENTRIES["several"].draw(np.random.default_rng(0), 20)
    expected = client.predict(feeds, "several")

    by_row = [{name: values[at] for name, values in feeds.items()} for at in range(20)]
    for form in (feeds, by_row):
        results = list(client.map(form, "several", progress=False))
        for name, values in expected.items():
            np.testing.assert_array_equal(np.stack([row[name] for row in results]), values)


def test_rows_lie_along_the_axis_that_the_model_counts(client: Client) -> None:
    feeds = ENTRIES["lstm_step"].draw(np.random.default_rng(0), 3)
    expected = client.predict(feeds, "lstm_step")

    rows = [
        {"input": feeds["input"][at], "state": feeds["state"][:, at], "sr": feeds["sr"]}
        for at in range(3)
    ]
    for at, row in enumerate(client.map(rows, "lstm_step", progress=False)):
        np.testing.assert_allclose(row["output"], expected["output"][at], atol=1e-5)
        np.testing.assert_allclose(row["stateN"], expected["stateN"][:, at], atol=1e-5)


def test_rows_of_different_lengths_go_in_jobs_apart(client: Client) -> None:
    texts = [[1, 2, 3], [1, 2], [3, 4], [5]]
    shapes = [result.shape for result in client.map(texts, "embedding", progress=False)]
    assert shapes == [(3, 4), (2, 4), (2, 4), (1, 4)]


def test_a_row_may_be_a_whole_input(client: Client) -> None:
    whole = [[[1, 2]], [[3, 4], [5, 6]]]
    results = [result.tolist() for result in client.map(whole, "int64", progress=False)]
    assert results == [client.predict(row, "int64").tolist() for row in whole]


# --- rows that are wrong -----------------------------------------------------------------------


def test_one_bad_row_in_10000_is_an_error_of_its_own(client: Client) -> None:
    rows: list[Any] = iris_rows(10_000).tolist()
    rows[7777] = [5.1, "x", 1.4, 0.2]

    results = list(client.map(rows, progress=False, on_error="return"))

    bad = {row: error for row, error in enumerate(results) if isinstance(error, AsyncinferError)}
    assert list(bad) == [7777]
    assert isinstance(bad[7777], InvalidInput)
    assert bad[7777].row == 7777
    assert str(bad[7777]).startswith("Row 7777: value at 1: a string, expected")
    assert len(results) == 10_000


def test_a_row_that_fails_the_run_of_its_job_is_found(client: Client) -> None:
    rows = [[float(number % 3)] for number in range(600)]
    rows[123] = rows[456] = [9.0]

    results = list(client.map(rows, "picky", progress=False, on_error="return"))

    bad = [row for row, result in enumerate(results) if isinstance(result, JobFailed)]
    assert bad == [123, 456]
    assert [result.item() for result in results[:123]] == [number % 3 for number in range(123)]


def test_rows_of_another_shape_and_numbers_that_do_not_fit_have_their_errors(
    client: Client,
) -> None:
    rows: list[Any] = [SETOSA, SETOSA[:3], [*SETOSA[:3], 1e39], SETOSA]
    results = list(client.map(rows, progress=False, on_error="return"))
    assert [type(result) for result in results] == [dict, InvalidInput, InvalidInput, dict]

    arrays = np.array([SETOSA, [1e39] * 4, SETOSA])
    results = list(client.map(arrays, progress=False, on_error="return"))
    assert [type(result) for result in results] == [dict, CannotSend, dict]


@pytest.mark.parametrize("model", ["mixing", "infinite"])
@pytest.mark.filterwarnings("ignore::asyncinfer.client.SlowMapWarning")
def test_a_row_has_one_shape_whether_or_not_its_model_batches(client: Client, model: str) -> None:
    """Also if the dimensions have no names that say which of them counts rows."""
    rows = np.array([[1.0, np.inf, 3.0], [4.0, 5.0, 6.0]], np.float32)
    assert not client.model(model).batched
    assert [row.shape for row in client.map(rows, model, progress=False)] == [(3,), (3,)]
    frame = client.map_frame(pd.DataFrame(rows), model=model, progress=False)
    assert list(frame.columns)[3:] == ["y_0", "y_1", "y_2"]


def test_rows_share_jobs_although_an_optional_input_has_no_rows(client: Client) -> None:
    rows: list[Any] = [[float(number), 1.0] for number in range(300)]
    expected = [[2 * first, 3.0] for first, _ in rows]
    results = client.map(rows, "overridable", group="shared", progress=False)
    assert [row.tolist() for row in results] == expected
    assert client.group("shared").jobs == 2

    scales = [[10.0, 1.0], [20.0, 1.0], [30.0, 1.0]]
    with_scales = [{"x": [1.0, 1.0], "scale": scale} for scale in scales]
    results = client.map([rows[0], *with_scales], "overridable", progress=False)
    assert [row.tolist() for row in results] == [expected[0], *scales]


@pytest.mark.parametrize("batch", [1, 2, 256])
def test_the_error_of_a_row_has_one_number_that_is_counted_from_0(
    client: Client, batch: int
) -> None:
    rows: list[Any] = [SETOSA] * 8
    rows[5:7] = [SETOSA[:2], [5.1, 3.5, None, "x"]]
    results = client.map(rows, "iris", batch=batch, progress=False, on_error="return")

    short, bad = list(results)[5:7]
    assert str(short) == "Row 5: has 2 numbers, iris takes 4"
    assert str(bad).startswith("Row 6: value at 3: a string, expected a number")
    assert [fault.pointer for fault in short.faults + bad.faults] == ["", "/3"]


def test_the_first_bad_row_is_raised_when_it_is_its_turn(client: Client) -> None:
    rows: list[Any] = [SETOSA] * 40
    rows[25] = ["?"] * 4
    results = client.map(rows, batch=10, progress=False)

    given = list(itertools.islice(results, 25))
    with pytest.raises(InvalidInput, match="Row 25: ") as refused:
        next(results)

    assert len(given) == 25
    assert refused.value.row == 25


def test_an_error_of_the_whole_map_is_raised_at_the_first_row(client: Client) -> None:
    results = client.map([SETOSA], "rose", progress=False)
    with pytest.raises(ModelNotFound, match="Known: "):
        next(results)


async def test_no_client_sends_anything_before_the_first_result_is_taken(
    client: Client, aclient: AsyncClient
) -> None:
    """A wrong argument is an error of the call itself."""
    pulled: list[int] = []

    def rows() -> Iterator[list[float]]:
        pulled.append(1)
        yield SETOSA

    for kind in (client, aclient):
        results = kind.map(rows(), "rose", progress=False)
        closed = results.close()
        if closed is not None:
            await closed
        with pytest.raises(CannotSend, match="batch="):
            kind.map([SETOSA], batch=0, progress=False)
    assert pulled == []


# --- resumed -----------------------------------------------------------------------------------


def test_the_same_rows_and_group_run_nothing_again(client: Client) -> None:
    rows = iris_rows(2000).tolist()
    first = list(client.map(rows, group="again", progress=False))
    ran = started(client, "again")

    assert list(client.map(rows, group="again", progress=False)) == first
    assert started(client, "again") == ran
    assert len(ran) == 8


def names(results: Sequence[Any]) -> list[str]:
    """The classes: probabilities differ in the last digit with the rows beside them."""
    return [result["class_name"] for result in results]


@pytest.mark.soak
def test_a_map_goes_through_a_server_that_keeps_jobs_for_less_than_a_day(
    shipped_models: Path,
) -> None:
    rows = iris_rows(600).tolist()
    limited = service(shipped_models / "iris", max_ttl=3600, failed_ttl=3600)
    with limited as running, Client(running.url) as client:
        assert client.model().max_ttl_seconds == 3600
        first = list(client.map(rows, group="short", progress=False))
        one_by_one = list(client.map(rows[:20], batch=1, progress=False))
        ran = started(client, "short")

        assert names(first[:20]) == names(one_by_one)
        assert list(client.map(rows, group="short", progress=False)) == first
        assert started(client, "short") == ran
        with pytest.raises(InvalidInput, match=r"3601 s is longer .* 3600 s at most.*MAX_TTL"):
            next(client.map(rows, ttl_seconds=3601, progress=False))


@pytest.mark.soak
def test_the_jobs_of_a_map_that_cannot_be_resumed_are_kept_for_an_hour(
    shipped_models: Path, redis_url: str, server: redis.Redis
) -> None:
    rows = iris_rows(20).tolist()
    with (
        service(shipped_models / "iris", redis_url=redis_url) as running,
        Client(running.url) as client,
    ):
        list(client.map(rows, progress=False))
        kept = [server.ttl(key) for key in server.scan_iter("job:*:result")]
        list(client.map(rows, group="named", progress=False))
        (named,) = client.jobs(group="named")

    assert kept == [pytest.approx(3600, abs=60)]
    assert server.ttl(f"job:{named.id}:result") == pytest.approx(24 * 3600, abs=60)


def test_a_map_left_early_cancels_what_waits_and_is_resumed(client: Client) -> None:
    rows = [[float(number % 3)] for number in range(100)]
    client.pause("picky")
    left = client.map(rows, "picky", group="left", batch=10, progress=False)
    client.resume("picky")
    next(left)
    client.pause("picky")
    left.close()
    counts = client.group("left").counts
    assert counts.pending == counts.processing == 0
    ran = started(client, "left")
    client.resume("picky")

    results = list(client.map(rows, "picky", group="left", batch=10, progress=False))

    assert [result.item() for result in results] == [number % 3 for number in range(100)]
    after = started(client, "left")
    assert len(after) == 10
    assert all(after[job_id] == at for job_id, at in ran.items())


def test_other_rows_in_a_used_group_are_refused(client: Client) -> None:
    list(client.map([SETOSA] * 3, group="used", progress=False))
    with pytest.raises(IdempotencyConflict, match="Rows 0 to 2 of group 'used'"):
        list(client.map([SETOSA[::-1]] * 3, group="used", progress=False))


async def test_a_cancelled_task_cancels_its_map(aclient: AsyncClient) -> None:
    rows = np.full((64, 1), 50.0)
    results = aclient.map(rows, "slow", batch=1, in_flight=4, progress=False)
    begun = asyncio.Event()

    async def use() -> None:
        async for _ in results:
            begun.set()

    async with asyncio.TaskGroup() as group:
        task = group.create_task(use())
        await begun.wait()
        task.cancel()

    counts = (await aclient.group(results.group)).counts
    assert 0 < counts.completed < 64
    assert counts.pending == 0


# --- frames ------------------------------------------------------------------------------------


def test_a_frame_comes_back_with_predictions_beside_its_columns(client: Client) -> None:
    rows = iris_rows(50)
    expected = client.predict(rows)
    pandas_frame = pd.DataFrame(rows, columns=list("abcd"), index=range(100, 150))
    pandas_frame["name"] = "x"
    polars_frame = pl.DataFrame(rows, schema=list("abcd")).with_columns(name=pl.lit("x"))

    for frame in (pandas_frame, polars_frame):
        found: Any = client.map_frame(frame, ["a", "b", "c", "d"], progress=False)
        assert type(found) is type(frame)
        new = ["prediction", "class_name", "probability"]
        assert list(found.columns) == [*"abcd", "name", *new]
        assert list(found["class_name"]) == [row["class_name"] for row in expected]
        assert list(found["probability"]) == [max(row["probabilities"]) for row in expected]
    assert list(client.map_frame(pandas_frame, list("abcd"), progress=False).index) == list(
        pandas_frame.index
    )


def test_a_frame_without_labels_gets_a_column_for_each_number(client: Client) -> None:
    frame = pl.DataFrame({"a": [1, 2], "b": [3, 4]})
    found = client.map_frame(frame, model="int64", progress=False)
    assert found.columns == ["a", "b", "y_0", "y_1"]
    assert found["y_0"].dtype == pl.Int64


def frames_of(rows: Any) -> list[Any]:
    """A frame of pandas and one of polars, both with the columns a, b, and so on."""
    names = list("abcdefgh"[: len(rows[0])])
    return [pd.DataFrame(rows, columns=names), pl.DataFrame(rows, schema=names, orient="row")]


COLUMN_CASES: Final[list[tuple[dict[str, Any], Any, Any]]] = [
    ({"model": "iris"}, SETOSA, [1e39] * 4),
    ({"model": "iris", "answer": "tensors"}, SETOSA, [1e39] * 4),
    ({"model": "picky"}, [1.0], [9.0]),
    ({"model": "doubled"}, [1.0, 2.0, 3.0], [1e39] * 3),
    ({"model": "int64"}, [1, 2], None),
]


@pytest.mark.parametrize(("options", "good", "bad"), COLUMN_CASES, ids=str)
async def test_a_frame_has_the_same_columns_without_any_result(
    client: Client, aclient: AsyncClient, options: dict[str, Any], good: Any, bad: Any
) -> None:
    """Of the same types too, so that the frames of several files fit together."""
    for frame in frames_of([good] * 2):
        found: Any = client.map_frame(frame, progress=False, on_error="return", **options)
        empties = [
            client.map_frame(frame[:0], progress=False, on_error="return", **options),
            await aclient.map_frame(frame[:0], progress=False, on_error="return", **options),
        ]
        for empty in empties:
            assert list(empty.columns) == list(found.columns)
            assert list(empty.dtypes) == list(found.dtypes)
    for frame in frames_of([bad] * 2) if bad else []:
        failed: Any = client.map_frame(frame, progress=False, on_error="return", **options)
        assert list(failed.columns) == list(found.columns)
        new = list(failed.columns)[len(good) : -1]
        assert failed[new[0]].to_list() in ([None, None], pytest.approx([np.nan] * 2, nan_ok=True))


@pytest.mark.parametrize("bad", ["x", [1], {"a": 1}, 1e39], ids=str)
async def test_a_value_that_cannot_be_sent_is_an_error_of_its_row_and_column(
    client: Client, aclient: AsyncClient, bad: Any
) -> None:
    frame = pd.DataFrame(iris_rows(300), columns=list("abcd")).astype(object)
    expected = client.map_frame(frame, progress=False)["class_name"].to_list()
    frame.iat[280, 2] = bad
    for found in (
        client.map_frame(frame, progress=False, on_error="return"),
        await aclient.map_frame(frame, progress=False, on_error="return"),
    ):
        assert found["error"].notna().sum() == found["class_name"].isna().sum() == 1
        good = found["class_name"].drop(280).to_list()
        assert good == expected[:280] + expected[281:]
        assert found["error"][280].startswith(f"Row 280: column 'c': {bad!r} ")
    with pytest.raises(AsyncinferError, match="Row 280: column 'c': ") as raised:
        client.map_frame(frame, progress=False)
    assert raised.value.row == 280


def test_a_missing_whole_number_is_an_error_of_its_row_and_column(client: Client) -> None:
    for frame in frames_of([(1, 2), (3, None), (5, 6)]):
        typed = frame.astype("Int64") if isinstance(frame, pd.DataFrame) else frame
        found: Any = client.map_frame(typed, model="int64", progress=False, on_error="return")
        first, second, third = found["error"].to_list()
        assert "Row 1: column 'b': " in second
        assert {str(first), str(third)} <= {"None", "nan"}


async def test_columns_find_the_inputs_of_their_names(aclient: AsyncClient) -> None:
    frame = pd.DataFrame({"b": [1, 2], "c": ["one", "two words"]})
    with pytest.raises(CannotSend, match="'a' too"):
        await aclient.map_frame(frame, model="several", progress=False)


async def test_errors_of_bad_rows_of_a_frame_are_in_a_column(aclient: AsyncClient) -> None:
    frame = pd.DataFrame({"x": [0.0, 9.0, 2.0]})
    found = await aclient.map_frame(frame, model="picky", on_error="return", progress=False)
    assert found["error"].isna().tolist() == [True, False, True]
    assert "model_failed" in found["error"][1]


def test_a_number_of_a_frame_that_does_not_fit_is_named_with_its_column(client: Client) -> None:
    frame = pd.DataFrame([SETOSA, [1e300, *SETOSA[1:]]], columns=list("abcd"))
    found = client.map_frame(frame, on_error="return", progress=False)
    assert found["error"][1].startswith("Row 1: column 'a': 1e+300 does not fit. input takes FP32")


def test_a_column_of_lists_or_arrays_is_the_input(client: Client) -> None:
    rows = iris_rows(3)
    expected = client.map_frame(pd.DataFrame(rows), progress=False)["class_name"].to_list()
    array_type = pl.Array(pl.Float64, 4)
    frames: list[Any] = [
        pd.DataFrame({"vector": list(rows)}),
        pd.DataFrame({"vector": rows.tolist()}),
        pd.DataFrame({"id": [7, 8, 9], "input": rows.tolist()}),
        pl.DataFrame({"vector": rows.tolist()}),
        pl.DataFrame(
            {"id": [7, 8, 9], "input": rows.tolist()}, schema_overrides={"input": array_type}
        ),
    ]
    for frame in frames:
        found = client.map_frame(frame, progress=False)
        assert found["class_name"].to_list() == expected
        assert [row["class_name"] for row in client.predict(frame)] == expected

    nested = pd.DataFrame({"x": [np.array([np.array([1.0, 2.0]), np.array([3.0])], object)] * 2})
    for ragged in (pd.DataFrame({"v": [[1.0, 2.0], [3.0]]}), nested):
        with pytest.raises(CannotSend, match="unequal lengths"):
            client.map_frame(ragged, progress=False)


def test_dates_of_a_frame_are_not_taken_for_numbers(client: Client) -> None:
    """Polars makes floats of dates that stand beside floats."""
    moment = datetime(2026, 11, 30, tzinfo=UTC)
    for value in (moment, moment.date(), moment.time(), timedelta(days=1)):
        for frame in frames_of([(5.1, 3.5, 1.4, value), (5.1, 3.5, 1.4, value)]):
            with pytest.raises(CannotSend, match=r"Row 0: column '[d3]': .*does not fit"):
                client.map_frame(frame, progress=False)


def test_columns_of_a_frame_are_chosen_by_name_also_if_the_name_is_a_number(
    client: Client,
) -> None:
    frame = pd.DataFrame(iris_rows(2))
    expected = client.map_frame(frame, progress=False)["class_name"].to_list()
    wider = frame.assign(more="text")
    found = client.map_frame(wider, ["0", "1", "2", "3"], progress=False)
    assert found["class_name"].to_list() == expected
    for wrong in (wider, frame[[0, 1]]):
        with pytest.raises(
            CannotSend, match=f"takes 4 columns, and the frame has {wrong.shape[1]}"
        ):
            client.map_frame(wrong, progress=False)


def test_a_column_of_the_inputs_name_is_taken_from_among_others(client: Client) -> None:
    frame = pd.DataFrame({"id": [7, 8], "x": [0.0, 2.0]})
    alone = client.map_frame(frame[["x"]], model="picky", progress=False)
    found = client.map_frame(frame, model="picky", progress=False)
    assert found.drop(columns="id").equals(alone)


def test_floats_are_not_made_whole_numbers(client: Client) -> None:
    with pytest.raises(
        CannotSend, match=r"takes INT64, whole numbers.*convert it with astype\('int64'"
    ):
        client.predict(np.array([[1.0, 2.0]]), "int64")


def test_a_lazy_frame_is_to_be_collected(client: Client) -> None:
    with pytest.raises(CannotSend, match=r"not LazyFrame; collect\(\) it first"):
        client.map_frame(pl.DataFrame({"x": [1.0]}).lazy(), progress=False)


def test_a_frame_that_does_not_fit_is_refused(client: Client) -> None:
    frame = pd.DataFrame(iris_rows(2), columns=["prediction", *"bcd"])
    with pytest.raises(CannotSend, match="prefix="):
        client.map_frame(frame, progress=False)
    assert "iris_prediction" in client.map_frame(frame, prefix="iris_", progress=False).columns
    with pytest.raises(CannotSend, match="no column 'z'"):
        client.map_frame(frame, ["z"], progress=False)
    with pytest.raises(CannotSend, match=r"try map\(\)"):
        client.map_frame([SETOSA], progress=False)


def test_progress_counts_rows_and_errors(
    client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[Any] = [SETOSA] * 30
    rows[3] = ["x"] * 4
    list(client.map(rows, group="shown", batch=10, on_error="return"))

    shown = capsys.readouterr().err
    assert "shown: 100%" in shown
    assert "30.0/30.0" in shown
    assert "row/s" in shown
    assert "errors=1" in shown
