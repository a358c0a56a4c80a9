"""The body of a request from an input: lists, arrays, frames, or a dict of arrays.

Lists are sent as JSON, unchanged. Arrays and frames are sent as bytes, in the datatype of the
model: an array of another float or whole-number dtype is converted if every number fits, since
`np.array([[5.1]])` is float64 whatever the model takes; floats are not converted to whole numbers.
Booleans become 0 and 1, and a missing value (None, pandas.NA, masked) becomes NaN for floats, as in
scikit-learn. Nothing else is converted.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct

from asyncinfer.client._errors import CannotSend
from asyncinfer.client._models import Model, TensorInfo
from asyncinfer.tensors.missing_values import NONFINITE_WORDS
from asyncinfer.untrusted.printable import printable_name

if TYPE_CHECKING:
    from asyncinfer.tensors.datatypes import Array

JSON: Final = "application/json"
BINARY: Final = "application/octet-stream"
JSON_LENGTH_HEADER: Final = "inference-header-content-length"
_FRAMES: Final = frozenset({"pandas", "polars"})
_LARGE_JSON_BYTES: Final = 1 << 20
"""Larger lists are sent as bytes; a server takes JSON up to MAX_JSON (2 MiB)."""


class RequestBody(Struct, frozen=True, kw_only=True):
    content: bytes
    headers: dict[str, str]
    """The headers that describe the body."""
    accept: str = JSON
    """The media type in which the result is wanted."""


def is_json_value(value: Any) -> bool:
    """Whether it is a list, string, number, boolean or None, to be sent as JSON.

    For that the model need not be known. Arrays and frames are none of these.
    """
    return isinstance(value, list | tuple | str | int | float | bool | None)


def json_body(data: Any, options: Mapping[str, Any]) -> RequestBody | None:
    """A list as JSON; None if it must be sent as bytes.

    That is so if it is larger than 1 MiB or has NaN or infinities, which JSON has not. Raises
    CannotSend for other values than numbers, strings and lists in it.
    """
    body = {"data": data, "options": options} if options else {"data": data}
    hook = _NanFinder()
    content = _encode(body, hook)
    # msgspec encodes NaN and infinities as null.
    if len(content) > _LARGE_JSON_BYTES or (
        b"null" in content and (hook.has_nan or _has_nan(data))
    ):
        return None
    return RequestBody(content=content, headers={"content-type": JSON}, accept=_accept(options))


def array_body(value: Any, model: Model, options: Mapping[str, Any]) -> RequestBody:
    """Any input as the bytes of tensors; raises CannotSend if it does not fit the model.

    Unless the options say otherwise, the result has labels if the model has them, else tensors.
    """
    options = {"answer": "json" if model.labels else "tensors", **options}
    tensors = named_arrays(value, model)
    described, parts = [], []
    for name, array in tensors.items():
        content, datatype = tensor_bytes(name, array)
        size = {"binary_data_size": len(content)}
        shape = array.shape
        described.append({"name": name, "shape": shape, "datatype": datatype, "parameters": size})
        parts.append(content)
    head = _encode({"inputs": described, "options": options}, to_plain)
    return RequestBody(
        content=b"".join([head, *parts]),
        headers={"content-type": BINARY, JSON_LENGTH_HEADER: str(len(head))},
        accept=_accept(options),
    )


def _accept(options: Mapping[str, Any]) -> str:
    """The media type in which the result is wanted, by the option `answer`."""
    return BINARY if options.get("answer") == "tensors" else JSON


def named_arrays(value: Any, model: Model) -> dict[str, "Array"]:
    """The array of each input by name, in the input's datatype if the numbers fit.

    `value` is a frame, a dict by input name, or what becomes one array. Names that the model does
    not have stay in it, for the server to refuse. Raises CannotSend for an input that is no array,
    mixes kinds, or has numbers that do not fit.
    """
    specs = {spec.name: spec for spec in model.inputs}
    if is_frame(value):
        named = frame_inputs(value, model)
    elif isinstance(value, Mapping):
        named = dict(value)
    else:
        named = {data_input(model).name: value}
    return {
        name: cast_to_spec(to_array(value, specs.get(name)), specs.get(name))
        for name, value in named.items()
    }


def data_input(model: Model) -> TensorInfo:
    """The input that a bare list or array is for: the only one, or the only required one.

    Raises CannotSend if there is no such input.
    """
    required = [spec for spec in model.inputs if not spec.optional]
    if len(required) == 1:
        return required[0]
    if not required and len(model.inputs) == 1:
        return model.inputs[0]
    if not model.inputs:
        raise CannotSend(f"{model.model} takes no input; give an empty dict, for a single run.")
    names = ", ".join(repr(spec.name) for spec in model.inputs)
    raise CannotSend(
        f"{model.model} takes several inputs; give a dict with an array for each of {names}."
    )


def is_frame(value: Any) -> bool:
    """Whether it is a frame of pandas or polars; neither is imported to find out."""
    kind = type(value)
    # A lazy frame of polars has no values yet.
    is_lazy = kind.__name__ == "LazyFrame"
    return kind.__module__.partition(".")[0] in _FRAMES and hasattr(kind, "columns") and not is_lazy


def to_array(value: Any, spec: TensorInfo | None) -> "Array":
    """An array of the value; strings are `str` objects, and missing floats are NaN.

    `spec` is None for an input that the model does not have. Raises CannotSend for rows of unequal
    lengths, mixed kinds, and missing values where the datatype has no NaN.
    """
    import numpy as np

    if isinstance(value, np.ma.MaskedArray):
        value = _unmasked(value, spec)
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise CannotSend(
            f"The input is not an array: {error}. Give rows of equal length."
        ) from error
    if array.dtype.kind in "UTS":
        # Numpy has converted numbers that stand beside strings to strings.
        array = np.asarray(value, dtype=object)
    if spec is not None and spec.datatype == "BYTES":
        return np.asarray(array.tolist(), dtype=object).reshape(array.shape)
    if array.dtype.kind == "O":
        return _from_objects(array, spec)
    return array


def _unmasked(array: Any, spec: TensorInfo | None) -> Any:
    """The array with NaN for masked values; raises CannotSend if the datatype has no NaN."""
    import numpy as np

    if spec is None or not np.ma.is_masked(array):
        return array.data
    if not _allows_missing(spec):
        raise _missing_value_error("is masked", spec)
    values = np.array(array.data, dtype=None if _is_float(array) else object)
    values[np.ma.getmaskarray(array)] = np.nan
    return values


def cast_to_spec(array: "Array", spec: TensorInfo | None) -> "Array":
    """The array in the datatype of `spec`; unchanged if it is of another kind, such as strings.

    Raises CannotSend if a number does not fit.
    """
    from asyncinfer.tensors.datatypes import DTYPES, FLOATS, RANGES, number_beyond, range_text

    if spec is None or spec.datatype not in RANGES or array.dtype == DTYPES[spec.datatype]:
        return array
    wanted = DTYPES[spec.datatype]
    if not (array.dtype.kind in "iub" or _is_float(array)):
        return array
    if _is_float(array) and spec.datatype not in FLOATS:
        if array.size and _has_nan_in(array):
            raise _missing_value_error("is NaN", spec)
        wanted_name = DTYPES[spec.datatype].name
        raise CannotSend(
            f"{spec.name} takes {spec.datatype}, whole numbers, and the array has {array.dtype}. "
            f"If its numbers are whole, convert it with astype({wanted_name!r})."
        )
    if (beyond := number_beyond(array, spec.datatype)) is not None:
        raise CannotSend(
            f"{spec.name} takes {spec.datatype}, numbers from {range_text(spec.datatype)}, and the "
            f"{array.dtype} array has {beyond}. Replace such numbers, as clip() does, or leave "
            "their rows out."
        )
    return array.astype(wanted)


def tensor_bytes(name: str, array: "Array") -> tuple[bytes, str]:
    """The elements, little-endian and row-major, and the name of the datatype.

    Strings come after their length in 4 bytes. `name` is that of the input, for the CannotSend that
    a dtype raises which no model takes.
    """
    import numpy as np

    from asyncinfer.tensors.datatypes import datatype_of

    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    try:
        datatype = datatype_of(native)
    except KeyError:
        raise CannotSend(
            f"{name} is an array of {array.dtype}, which no model takes; convert it with astype()."
        ) from None
    if datatype != "BYTES":
        if sys.byteorder == "big":
            native = native.byteswap()
        return np.ascontiguousarray(native).tobytes(), datatype
    return b"".join(_string_bytes(name, text) for text in native.ravel().tolist()), datatype


def _string_bytes(name: str, text: Any) -> bytes:
    """A string after its length in 4 bytes; raises CannotSend if it is none."""
    if not isinstance(text, str | bytes):
        raise CannotSend(
            f"{name} has {text!r} where a string is needed. Give strings alone; where one is "
            'missing, the one that stands for that in the model, such as "".'
        )
    content = text.encode() if isinstance(text, str) else text
    return len(content).to_bytes(4, "little") + content


def _from_objects(array: "Array", spec: TensorInfo | None) -> "Array":
    """An object array, as a frame of mixed columns gives, as numbers or strings.

    Raises CannotSend if it mixes them.
    """
    import numpy as np

    from asyncinfer.tensors.datatypes import RANGES

    values = array.ravel().tolist()
    kinds = {type(value) for value in values}
    if kinds and kinds <= {int, float}:
        return np.array(values).reshape(array.shape)
    if kinds == {bool}:
        return array.astype(np.bool_)
    if kinds and spec is not None and spec.datatype in RANGES:
        numbers = [_number(value, spec) for value in values]
        if None not in numbers:
            return np.array(numbers).reshape(array.shape)
    if kinds and kinds <= {str, bytes}:
        return array
    shown = ", ".join(sorted(kind.__name__ for kind in kinds))
    if array.ndim == 0:
        raise CannotSend(
            f"The input is of the type {shown}. Give lists or arrays of numbers or strings, a dict "
            "of them by input name, or a frame."
        )
    has = "has values of the type" if len(kinds) == 1 else "mixes"
    raise CannotSend(f"The input {has} {shown or 'nothing'}; give numbers, or strings, alone.")


def _number(value: Any, spec: TensorInfo) -> int | float | None:
    """The number that scikit-learn would read, NaN for a missing value; None if it reads none.

    Raises CannotSend for a missing value if the datatype has no NaN.
    """
    if isinstance(value, bool | int | float) or type(value).__module__ == "numpy":
        return _python_number(value)
    is_missing = value is None or type(value).__name__ == "NAType"
    if is_missing and not _allows_missing(spec):
        raise _missing_value_error(f"is {value}", spec)
    if is_missing:
        return math.nan
    if not _allows_missing(spec):
        return None
    if isinstance(value, Decimal) and not value.is_snan():
        return float(value)
    return NONFINITE_WORDS.get(value) if isinstance(value, str) else None


def _python_number(value: Any) -> int | float | None:
    """The value as int or float, a boolean as 0 or 1; None if it is no number."""
    plain = value.item() if hasattr(value, "item") else value
    if isinstance(plain, bool):
        return int(plain)
    return plain if isinstance(plain, int | float) else None


def _allows_missing(spec: TensorInfo) -> bool:
    """Whether the input's datatype has NaN."""
    from asyncinfer.tensors.datatypes import FLOATS

    return spec.datatype in FLOATS


def _missing_value_error(is_missing: str, spec: TensorInfo) -> CannotSend:
    """Returns the error; `is_missing` completes `The input ... in places`."""
    return CannotSend(
        f"The input {is_missing} in places, and `{spec.name}` takes {spec.datatype}, which has no "
        "NaN. Put a value there, as fillna() or filled() do, or leave those rows out."
    )


def value_fault(value: Any, spec: TensorInfo) -> str:
    """Why a single value cannot be sent to an input; empty if it can."""
    shown = printable_name(repr(value.item() if hasattr(value, "item") else value))
    if spec.datatype == "BYTES":
        return "" if isinstance(value, str | bytes) else f"{shown} is no string"
    try:
        array = cast_to_spec(to_array([value], spec), spec)
    except CannotSend as error:
        return f"{shown} does not fit. {error}"
    is_number = array.dtype.kind not in "OUS" and array.ndim == 1
    return "" if is_number else f"{shown} is no number, and `{spec.name}` takes {spec.datatype}"


def frame_inputs(frame: Any, model: Model) -> dict[str, Any]:
    """An array for each input whose name is a column; else all columns as the only input.

    Columns of other names are left out if the model takes several inputs, or one value per row. A
    column of lists or arrays is an input by itself. Raises CannotSend if a required input has no
    column, the only input takes another number of columns, or lists of a column have unequal
    lengths.
    """
    names = [spec.name for spec in model.inputs]
    columns = [str(column) for column in frame.columns]
    if len(names) == 1 and not _is_column(frame, model.inputs[0]):
        return {names[0]: _table(frame, model.inputs[0], model.model)}
    missing = [spec.name for spec in model.inputs if not spec.optional and spec.name not in columns]
    if missing:
        raise CannotSend(
            f"{model.model} takes columns named {', '.join(map(repr, missing))} too; the frame has "
            f"{', '.join(map(repr, columns))}. Rename its columns."
        )
    ranks = {spec.name: spec.rank for spec in model.inputs}
    return {name: _column(_series(frame, name), ranks[name]) for name in names if name in columns}


def _series(frame: Any, name: str) -> Any:
    """The column whose name is written so; in pandas it may be a number."""
    return frame[frame.columns[[str(column) for column in frame.columns].index(name)]]


def _is_column(frame: Any, spec: TensorInfo) -> bool:
    """Whether the column of the input's name is all of the input, not one of its columns."""
    columns = [str(column) for column in frame.columns]
    if columns.count(spec.name) != 1:
        return False
    takes_one_value = spec.shape is not None and spec.shape[1:] in ((), (1,))
    is_alone = len(columns) == 1
    return is_alone or takes_one_value or _column(_series(frame, spec.name), None).ndim > 1


def _table(frame: Any, spec: TensorInfo, model: str) -> Any:
    """The columns side by side, `(rows, columns)`; a single column of lists as `(rows, *dims)`."""
    count = len(frame.columns)
    if count == 1:
        (column,) = frame.columns
        if (array := _column(frame[column], None)).ndim > 1:
            return array
    width = spec.shape[1] if spec.shape is not None and spec.rank == 2 else None
    if isinstance(width, int) and count != width:
        raise CannotSend(
            f"{model} takes {width} columns, and the frame has {count}. Give it the columns of the "
            "model's input alone; map_frame has columns= for that."
        )
    return _values(frame, [frame[column] for column in frame.columns])


def _column(series: Any, rank: int | None) -> Any:
    """The values of a column, `(rows,)`, or `(rows, *dims)` if they are lists or arrays.

    For an input of rank 2 single values are `(rows, 1)`: scikit-learn exports its inputs so.
    """
    array = _stacked(_values(series, [series]), str(series.name))
    return array.reshape(-1, 1) if rank == 2 and array.ndim == 1 else array


def _stacked(array: Any, column: str) -> Any:
    """Lists or arrays in the cells of a column as one array; other cells unchanged."""
    import numpy as np

    cells = array.tolist() if array.dtype.kind == "O" and array.ndim == 1 else []
    if not cells or not all(isinstance(cell, list | tuple | np.ndarray) for cell in cells):
        return array
    nested = _nested_lists(cells)
    try:
        stacked = np.array(nested)
    except ValueError as error:
        raise CannotSend(
            f"The lists of the column {column!r} have unequal lengths. Send rows of equal lengths "
            "together, or each row with map()."
        ) from error
    # Numpy has converted numbers that stand beside strings to strings.
    return np.array(nested, dtype=object) if stacked.dtype.kind in "US" else stacked


def _nested_lists(value: Any) -> Any:
    """The value with lists for arrays of objects, as those that Parquet's nested lists become."""
    is_of_objects = hasattr(value, "dtype") and value.dtype.kind == "O"
    plain = value.tolist() if is_of_objects else value
    is_nested = isinstance(plain, list | tuple) and len(plain) and hasattr(plain[0], "__len__")
    return list(map(_nested_lists, plain)) if is_nested else plain


def _values(values: Any, series: list[Any]) -> Any:
    """The values of a frame or a column, which has these series.

    They are objects where whole numbers of polars are missing, or it has dates: `to_numpy` makes
    floats of all.
    """
    import numpy as np

    if type(values).__module__.startswith("polars") and any(
        each.dtype.is_temporal() or (each.dtype.is_integer() and each.null_count())
        for each in series
    ):
        rows = values.rows() if hasattr(values, "rows") else values.to_list()
        return np.array(rows, dtype=object)
    return values.to_numpy()


def _is_float(array: "Array") -> bool:
    """Whether the dtype is one of floats, bfloat16 among them."""
    from asyncinfer.tensors.datatypes import DTYPES

    return array.dtype.kind == "f" or array.dtype == DTYPES["BF16"]


def _has_nan_in(array: "Array") -> bool:
    """Whether an array of floats has NaN."""
    import numpy as np

    return bool(np.isnan(array.astype(np.float64, copy=False)).any())


def _has_nan(value: Any) -> bool:
    """Whether nested lists have NaN or an infinity."""
    if isinstance(value, list | tuple):
        with contextlib.suppress(TypeError, OverflowError):
            # Of numbers alone, five times as fast.
            return not all(map(math.isfinite, value))
        return any(map(_has_nan, value))
    return isinstance(value, float) and not math.isfinite(value)


class _NanFinder:
    """`to_plain`, which also notes whether it met NaN or an infinity."""

    def __init__(self) -> None:
        self.has_nan = False

    def __call__(self, value: Any) -> Any:
        converted = to_plain(value)
        self.has_nan = self.has_nan or _has_nan(converted)
        return converted


def _encode(value: Any, hook: Callable[[Any], Any]) -> bytes:
    """The JSON of a value; `hook` converts what msgspec cannot. Raises CannotSend."""
    try:
        return msgspec.json.Encoder(enc_hook=hook, decimal_format="number").encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise CannotSend(
            f"The input cannot be sent: {error}. Give lists, arrays, a dict of arrays, or a frame."
        ) from error


def to_plain(value: Any) -> Any:
    """An array, a number of numpy or an iterable as plain Python, for `enc_hook` of msgspec.

    Raises TypeError for anything else.
    """
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Iterable) and not isinstance(value, bytes):
        return list(value)
    raise TypeError(f"{type(value).__name__} is not a number, a string or a list")
