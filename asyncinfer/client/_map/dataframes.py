"""Frames of pandas and polars: their rows as inputs, and predictions as new columns."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal, NamedTuple

from asyncinfer.client._encoding import frame_inputs, is_frame, value_fault
from asyncinfer.client._errors import CannotSend
from asyncinfer.client._map.jobs import described_row_shape
from asyncinfer.client._models import Model, TensorInfo
from asyncinfer.errors import AsyncinferError, InvalidInput

_MAX_COLUMNS: Final = 64
"""An output of more numbers per row becomes a single column of arrays."""


class FrameRows:
    """The rows of a frame, as `map` takes them, with the names of their columns."""

    def __init__(self, frame: Any, columns: Sequence[str] | None, model: Model) -> None:
        """`columns` are the columns to send, in this order; None for all.

        Raises CannotSend if it is no frame, or lacks a column.
        """
        if not is_frame(frame):
            kind = type(frame).__name__
            remedy = "collect() it first" if kind == "LazyFrame" else "try map()"
            raise CannotSend(f"map_frame takes a frame of pandas or polars, not {kind}; {remedy}.")
        if columns is not None:
            known = list(map(str, frame.columns))
            if unknown := [name for name in columns if name not in known]:
                raise CannotSend(
                    f"The frame has no column {', '.join(map(repr, unknown))}; it has "
                    f"{', '.join(map(repr, known))}."
                )
            frame = frame[[frame.columns[known.index(name)] for name in columns]]
        self._columns = list(map(str, frame.columns))
        self._specs = {spec.name: spec for spec in model.inputs}
        self._arrays = frame_inputs(frame, model)

    @property
    def arrays(self) -> Any:
        """An array `(rows, *dims)`, or a dict of one for each input by name, as they are: what does
        not fit is found as the rows are sent, and is the error of its row."""
        arrays = self._arrays
        return next(iter(arrays.values())) if len(arrays) == 1 else arrays

    @contextmanager
    def named_errors(self) -> Iterator[None]:
        """Names the columns in an error of a row that its block raises."""
        try:
            yield
        except AsyncinferError as error:
            self.name_columns(error)
            raise

    def name_columns(self, result: Any) -> Any:
        """The same result; an error of a row says which columns cannot be sent."""
        if isinstance(result, CannotSend | InvalidInput) and result.row is not None:
            faults = [
                f"column {column!r}: {fault}"
                for column, value, spec in self._cells(result.row)
                if (fault := value_fault(value, spec))
            ]
            if faults:
                result.detail = "; ".join(faults)
                result.args = (f"Row {result.row}: {result.detail}",)
        return result

    def _cells(self, row: int) -> Iterator[tuple[str, Any, TensorInfo]]:
        """The column, the value and the input of each single value in a row."""
        for name, array in self._arrays.items():
            if len(self._arrays) == 1 and array.ndim == 2 and array.shape[1] == len(self._columns):
                for column, value in zip(self._columns, array[row], strict=True):
                    yield column, value, self._specs[name]
            elif not getattr(array[row], "ndim", 0):
                yield name, array[row], self._specs[name]
            elif array[row].size == 1:
                yield name, array[row].item(), self._specs[name]


def with_results(
    frame: Any,
    results: Sequence[Any],
    model: Model,
    answer: str | None,
    prefix: str,
    *,
    errors: bool,
) -> Any:
    """A new frame of the same kind, with columns of the results behind its own.

    `results` has the result or error of each row of the frame, and `answer` is the option of the
    map; `errors` adds the column `error` with their messages. The names of the new columns begin
    with `prefix`. Raises CannotSend if a column exists already.
    """
    columns = result_columns(results, model, answer)
    if errors:
        texts = [str(result) if isinstance(result, AsyncinferError) else None for result in results]
        columns["error"] = Column(texts, "string")
    named = {f"{prefix}{name}": column for name, column in columns.items()}
    if existing := sorted(set(named) & set(map(str, frame.columns))):
        names = ", ".join(map(repr, existing))
        raise CannotSend(f"The frame has {names} already; give prefix= for the new columns.")
    if type(frame).__module__.startswith("polars"):
        return frame.with_columns(**{name: _polars(column) for name, column in named.items()})
    return frame.assign(**{name: _pandas(column, frame.index) for name, column in named.items()})


class Column(NamedTuple):
    """The values of a new column, None in rows with an error, and their kind where it is known."""

    values: list[Any]
    kind: Literal["float", "integer", "boolean", "string", ""] = ""

    @property
    def is_blank(self) -> bool:
        """Whether no row has a value, so that only the kind tells the type of the column."""
        return bool(self.kind) and all(value is None for value in self.values)


def _polars(column: Column) -> Any:
    """A column of a polars frame."""
    import polars

    if not column.is_blank:
        return polars.Series(column.values)
    types = {"float": "Float64", "integer": "Int64", "boolean": "Boolean", "string": "String"}
    return polars.Series(column.values, dtype=getattr(polars, types[column.kind]))


def _pandas(column: Column, index: Any) -> Any:
    """A column of a pandas frame; whole numbers become floats where one is missing, as ever."""
    if not column.is_blank:
        return column.values
    import pandas

    samples = {"float": 0.0, "integer": 0.0 if column.values else 0, "boolean": None, "string": ""}
    dtype = pandas.Series([samples[column.kind]]).dtype
    return pandas.Series(column.values, index=index, dtype=dtype)


def result_columns(results: Sequence[Any], model: Model, answer: str | None) -> dict[str, Column]:
    """Columns by name, each with a value per result.

    For labelled rows these are prediction, class_name and probability, else a column for each
    number of an output. A row with an error has None in each; without any other row, the model's
    description tells the columns.
    """
    good = next((result for result in results if not isinstance(result, AsyncinferError)), None)
    if good is None:
        is_labelled = bool(model.labels) and answer != "tensors"
    else:
        is_labelled = isinstance(good, dict) and "prediction" in good
    if is_labelled:
        return {
            "prediction": Column([_member(row, "prediction") for row in results], "integer"),
            "class_name": Column([_member(row, "class_name") for row in results], "string"),
            "probability": Column(list(map(_probability, results)), "float"),
        }
    if good is None:
        blank = [None] * len(results)
        return {
            name: Column(blank, _kind(spec))
            for spec in model.outputs
            for name in _names(spec.name, described_row_shape(model, spec))
        }
    if isinstance(good, dict):
        outputs = {name: [_member(row, name) for row in results] for name in good}
    else:
        values = [None if isinstance(row, AsyncinferError) else row for row in results]
        outputs = {model.outputs[0].name: values}
    return {
        name: column
        for output, values in outputs.items()
        for name, column in _columns_of(output, values).items()
    }


def _kind(spec: TensorInfo) -> Literal["float", "integer", "boolean", "string"]:
    """The kind of the values of an output."""
    if spec.datatype in ("BYTES", "BOOL"):
        return "string" if spec.datatype == "BYTES" else "boolean"
    return "integer" if "INT" in spec.datatype else "float"


def _columns_of(output: str, values: list[Any]) -> dict[str, Column]:
    """The column of an output, or one for each place of a short vector, by name."""
    shapes = {getattr(value, "shape", ()) for value in values if value is not None}
    shape = shapes.pop() if len(shapes) == 1 else None
    names = _names(output, shape)
    if shape in ((), (1,)):
        return {output: Column([None if value is None else _scalar(value) for value in values])}
    if names == [output]:
        return {output: Column(values)}
    return {
        name: Column([None if value is None else value[place].item() for value in values])
        for place, name in enumerate(names)
    }


def _names(output: str, shape: tuple[int, ...] | None) -> list[str]:
    """The names of the columns of an output with rows of this shape, None if it is not known."""
    if shape in (None, (), (1,)) or len(shape) > 1 or shape[0] > _MAX_COLUMNS:
        return [output]
    return [f"{output}_{place}" for place in range(shape[0])]


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
