"""Frames of pandas and polars: their rows as inputs, and predictions as new columns."""

import math
from collections.abc import Sequence
from typing import Any, Final

from asyncinfer.client._encoding import is_frame, named_arrays
from asyncinfer.client._errors import CannotSend
from asyncinfer.client._models import Model
from asyncinfer.errors import AsyncinferError

_MAX_COLUMNS: Final = 64
"""An output of more numbers per row becomes a single column of arrays."""


def input_rows(frame: Any, columns: Sequence[str] | None, model: Model) -> Any:
    """An array `(rows, *dims)`, or a dict of one for each input by name, as the model takes them.

    `columns` are the columns to send, in this order; None for all. Raises CannotSend if it is no
    frame, lacks a column, or has values that do not fit.
    """
    if not is_frame(frame):
        kind = type(frame).__name__
        raise CannotSend(f"map_frame takes a frame of pandas or polars, not {kind}; try map().")
    if columns is not None:
        known = list(map(str, frame.columns))
        if unknown := [name for name in columns if name not in known]:
            raise CannotSend(
                f"The frame has no column {', '.join(map(repr, unknown))}; it has "
                f"{', '.join(map(repr, known))}."
            )
        frame = frame[list(columns)]
    arrays = named_arrays(frame, model)
    return next(iter(arrays.values())) if len(arrays) == 1 else arrays


def with_results(
    frame: Any, results: Sequence[Any], model: Model, prefix: str, *, errors: bool
) -> Any:
    """A new frame of the same kind, with columns of the results behind its own.

    `results` has the result or error of each row of the frame; `errors` adds the column `error`
    with their messages. The names of the new columns begin with `prefix`. Raises CannotSend if a
    column exists already.
    """
    columns = result_columns(results, model)
    if errors:
        columns["error"] = [
            str(result) if isinstance(result, AsyncinferError) else None for result in results
        ]
    named = {f"{prefix}{name}": values for name, values in columns.items()}
    if existing := sorted(set(named) & set(map(str, frame.columns))):
        names = ", ".join(map(repr, existing))
        raise CannotSend(f"The frame has {names} already; give prefix= for the new columns.")
    if type(frame).__module__.startswith("polars"):
        import polars

        return frame.with_columns(**{name: polars.Series(values) for name, values in named.items()})
    return frame.assign(**named)


def result_columns(results: Sequence[Any], model: Model) -> dict[str, list[Any]]:
    """Columns by name, each with a value per result.

    For labelled rows these are prediction, class_name and probability, else a column for each
    number of an output. A row with an error has None in each.
    """
    good = next((result for result in results if not isinstance(result, AsyncinferError)), None)
    if isinstance(good, dict) and "prediction" in good:
        return {
            "prediction": [_member(row, "prediction") for row in results],
            "class_name": [_member(row, "class_name") for row in results],
            "probability": list(map(_probability, results)),
        }
    if isinstance(good, dict):
        outputs = {name: [_member(row, name) for row in results] for name in good}
    else:
        values = [None if isinstance(row, AsyncinferError) else row for row in results]
        outputs = {model.outputs[0].name: values}
    return {
        name: column
        for output, values in outputs.items()
        for name, column in _columns_of(output, values)
    }


def _columns_of(output: str, values: list[Any]) -> list[tuple[str, list[Any]]]:
    """Name and values of the column of an output, or of one for each place of a short vector."""
    shapes = {getattr(value, "shape", ()) for value in values if value is not None}
    shape: tuple[int, ...] = next(iter(shapes), ())
    if len(shapes) > 1 or len(shape) > 1 or math.prod(shape) > _MAX_COLUMNS:
        return [(output, values)]
    if shape in ((), (1,)):
        return [(output, [None if value is None else _scalar(value) for value in values])]
    return [
        (
            f"{output}_{place}",
            [None if value is None else value[place].item() for value in values],
        )
        for place in range(shape[0])
    ]


def _scalar(value: Any) -> Any:
    """A number of numpy as Python's; other values unchanged."""
    return value.item() if hasattr(value, "item") else value


def _member(row: Any, name: str) -> Any:
    """A member of a row's result; None if the row has an error."""
    return row[name] if isinstance(row, dict) else None


def _probability(row: Any) -> float | None:
    """The probability of the predicted class; None if there is no class, or no score for it."""
    if not isinstance(row, dict):
        return None
    place, shares = row["prediction"], row["probabilities"]
    if place is None or not 0 <= place < len(shares):
        return None
    return float(shares[place])
