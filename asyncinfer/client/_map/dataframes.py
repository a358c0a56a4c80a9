"""Frames of pandas and polars: rows out of them, predictions beside them."""

import math
from collections.abc import Sequence
from typing import Any, Final

from asyncinfer.client._encoding import is_frame, named_arrays
from asyncinfer.client._errors import CannotSend
from asyncinfer.client._models import Model
from asyncinfer.errors import AsyncinferError

_MOST_COLUMNS: Final = 64
"""An output of more numbers a row is one column of arrays."""


def rows_of(frame: Any, columns: Sequence[str] | None, model: Model) -> Any:
    """An array, or one for each input, as the model takes them."""
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
    """A frame of the same kind, with columns of the results behind its own."""
    columns = columns_of(results, model)
    if errors:
        columns["error"] = [
            str(one) if isinstance(one, AsyncinferError) else None for one in results
        ]
    named = {f"{prefix}{name}": values for name, values in columns.items()}
    if taken := sorted(set(named) & set(map(str, frame.columns))):
        shown = ", ".join(map(repr, taken))
        raise CannotSend(f"The frame has {shown} already; give prefix= for the new columns.")
    if type(frame).__module__.startswith("polars"):
        import polars

        return frame.with_columns(**{name: polars.Series(one) for name, one in named.items()})
    return frame.assign(**named)


def columns_of(results: Sequence[Any], model: Model) -> dict[str, list[Any]]:
    """Of labelled rows prediction, class_name and probability; else a column for each number."""
    good = next((one for one in results if not isinstance(one, AsyncinferError)), None)
    if isinstance(good, dict) and "prediction" in good:
        return {
            "prediction": [_member(one, "prediction") for one in results],
            "class_name": [_member(one, "class_name") for one in results],
            "probability": list(map(_probability, results)),
        }
    if isinstance(good, dict):
        named = {name: [_member(one, name) for one in results] for name in good}
    else:
        failed = [isinstance(one, AsyncinferError) for one in results]
        values = [None if bad else one for one, bad in zip(results, failed, strict=True)]
        named = {model.outputs[0].name: values}
    return {name: one for output, values in named.items() for name, one in _flat(output, values)}


def _flat(output: str, values: list[Any]) -> list[tuple[str, list[Any]]]:
    """A column, or one for each place of a short vector."""
    sizes = {getattr(one, "shape", ()) for one in values if one is not None}
    size: tuple[int, ...] = next(iter(sizes), ())
    if len(sizes) > 1 or len(size) > 1 or math.prod(size) > _MOST_COLUMNS:
        return [(output, values)]
    if size in ((), (1,)):
        return [(output, [None if one is None else _scalar(one) for one in values])]
    return [
        (f"{output}_{place}", [None if one is None else one[place].item() for one in values])
        for place in range(size[0])
    ]


def _scalar(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _member(row: Any, name: str) -> Any:
    return row[name] if isinstance(row, dict) else None


def _probability(row: Any) -> float | None:
    """Of the class that was predicted; None where there is no class, or not among the scores."""
    if not isinstance(row, dict):
        return None
    place, shares = row["prediction"], row["probabilities"]
    if place is None or not 0 <= place < len(shares):
        return None
    return float(shares[place])
