"""What a person has in hand, as the body of a request.

Lists go as JSON, as they are. Arrays and frames go as their bytes, in the datatype of the model:
an array of another float or whole-number dtype is converted where every number fits, since
`np.array([[5.1]])` is float64 whatever the model takes; booleans are 0 and 1, and what is missing
(None, pandas.NA, masked) is NaN for floats, as for scikit-learn. Nothing else is converted.
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
from asyncinfer.tensors.missing_values import WORDS

if TYPE_CHECKING:
    from asyncinfer.tensors.datatypes import Array

JSON: Final = "application/json"
BINARY: Final = "application/octet-stream"
LENGTH: Final = "inference-header-content-length"
_FRAMES: Final = frozenset({"pandas", "polars"})
_LARGE_JSON_BYTES: Final = 1 << 20
"""Lists beyond it go as bytes; a server takes JSON up to MAX_JSON (2 MiB)."""


class Body(Struct, frozen=True, kw_only=True):
    """A request's body and what it says of itself."""

    content: bytes
    headers: dict[str, str]
    accept: str = JSON


def is_plain(value: Any) -> bool:
    """Whether it goes as JSON, and nothing need be known of its model."""
    return isinstance(value, list | tuple | str | int | float | bool | None)


def json_body(data: Any, options: Mapping[str, Any]) -> Body | None:
    """A list as JSON; None where that is not possible or not wise."""
    body = {"data": data, "options": options} if options else {"data": data}
    hook = _Plain()
    content = _encode(body, hook)
    # Of NaN and infinities alike msgspec makes null.
    if len(content) > _LARGE_JSON_BYTES or (
        b"null" in content and (hook.has_nan or _has_nan(data))
    ):
        return None
    return Body(content=content, headers={"content-type": JSON}, accept=_accept(options))


def array_body(value: Any, model: Model, options: Mapping[str, Any]) -> Body:
    """Anything as the bytes of tensors; where there are labels, to be answered with them."""
    options = {"answer": "json" if model.labels else "tensors", **options}
    tensors = named_arrays(value, model)
    described, parts = [], []
    for name, array in tensors.items():
        content, datatype = bytes_of(name, array)
        size = {"binary_data_size": len(content)}
        shape = array.shape
        described.append({"name": name, "shape": shape, "datatype": datatype, "parameters": size})
        parts.append(content)
    head = _encode({"inputs": described, "options": options}, plain)
    return Body(
        content=b"".join([head, *parts]),
        headers={"content-type": BINARY, LENGTH: str(len(head))},
        accept=_accept(options),
    )


def _accept(options: Mapping[str, Any]) -> str:
    return BINARY if options.get("answer") == "tensors" else JSON


def named_arrays(value: Any, model: Model) -> dict[str, "Array"]:
    """Each input's array, in its datatype where the numbers fit that."""
    specs = {spec.name: spec for spec in model.inputs}
    if is_frame(value):
        named = _of_frame(value, model)
    elif isinstance(value, Mapping):
        named = dict(value)
    else:
        named = {data_input(model).name: value}
    return {
        name: fitted(array_of(one, specs.get(name)), specs.get(name)) for name, one in named.items()
    }


def data_input(model: Model) -> TensorInfo:
    """The only input that is needed; raises CannotSend where there are several."""
    needed = [spec for spec in model.inputs if not spec.optional]
    if len(needed) == 1:
        return needed[0]
    if not needed and len(model.inputs) == 1:
        return model.inputs[0]
    names = ", ".join(repr(spec.name) for spec in model.inputs)
    raise CannotSend(
        f"{model.model} takes several inputs; give a dict with an array for each of {names}."
    )


def is_frame(value: Any) -> bool:
    """Of pandas or polars; they are not imported to find out."""
    return type(value).__module__.partition(".")[0] in _FRAMES and hasattr(value, "columns")


def array_of(value: Any, spec: TensorInfo | None) -> "Array":
    """As numpy sees it; strings are `str` objects, and for floats what is missing is NaN."""
    import numpy as np

    if isinstance(value, np.ma.MaskedArray):
        value = _unmasked(value, spec)
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise CannotSend(f"The input is no array: {error}. Give rows of equal length.") from error
    if array.dtype.kind in "UTS":
        # Numpy has made text of the numbers beside text.
        array = np.asarray(value, dtype=object)
    if spec is not None and spec.datatype == "BYTES":
        return np.asarray(array.tolist(), dtype=object).reshape(array.shape)
    if array.dtype.kind == "O":
        return _of_objects(array, spec)
    return array


def _unmasked(array: Any, spec: TensorInfo | None) -> Any:
    """What is masked is NaN for floats; nothing else can say so."""
    import numpy as np

    if spec is None or not np.ma.is_masked(array):
        return array.data
    if not _takes_gaps(spec):
        raise _no_gaps("is masked", spec)
    values = np.array(array.data, dtype=None if _is_float(array) else object)
    values[np.ma.getmaskarray(array)] = np.nan
    return values


def fitted(array: "Array", spec: TensorInfo | None) -> "Array":
    """In the datatype of `spec` where the numbers fit; another kind of array as it is."""
    from asyncinfer.tensors.datatypes import DTYPES, FLOATS, RANGES

    if spec is None or spec.datatype not in RANGES or array.dtype == DTYPES[spec.datatype]:
        return array
    wanted = DTYPES[spec.datatype]
    if not (array.dtype.kind in "iub" or _is_float(array)):
        return array
    if _is_float(array) and spec.datatype not in FLOATS:
        if array.size and _has_nan_in(array):
            raise _no_gaps("is NaN", spec)
        return array
    low, high = RANGES[spec.datatype]
    if array.size and not _within(array, low, high):
        raise CannotSend(
            f"{spec.name} takes {spec.datatype}, numbers from {low:g} to {high:g}, and the "
            f"{array.dtype} array has others."
        )
    return array.astype(wanted)


def bytes_of(name: str, array: "Array") -> tuple[bytes, str]:
    """Little-endian, row-major, and the name of the datatype."""
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
    return b"".join(_text_bytes(name, one) for one in native.ravel().tolist()), datatype


def _text_bytes(name: str, text: Any) -> bytes:
    if not isinstance(text, str | bytes):
        raise CannotSend(
            f"{name} has {text!r} where a string is needed. Give strings alone; where one is "
            'missing, the one that stands for that in the model, such as "".'
        )
    content = text.encode() if isinstance(text, str) else text
    return len(content).to_bytes(4, "little") + content


def _of_objects(array: "Array", spec: TensorInfo | None) -> "Array":
    """An object array (a frame of mixed columns gives one) as numbers or strings, if it is that."""
    import numpy as np

    from asyncinfer.tensors.datatypes import RANGES

    values = array.ravel().tolist()
    kinds = {type(one) for one in values}
    if kinds and kinds <= {int, float}:
        return np.array(values).reshape(array.shape)
    if kinds == {bool}:
        return array.astype(np.bool_)
    if kinds and spec is not None and spec.datatype in RANGES:
        numbers = [_number(one, spec) for one in values]
        if None not in numbers:
            return np.array(numbers).reshape(array.shape)
    if kinds and kinds <= {str, bytes}:
        return array
    shown = ", ".join(sorted(one.__name__ for one in kinds))
    raise CannotSend(f"The input mixes {shown or 'nothing'}; give numbers, or strings, alone.")


def _number(value: Any, spec: TensorInfo) -> int | float | None:
    """What scikit-learn would take it for; None where that is no number."""
    if isinstance(value, bool | int | float) or type(value).__module__ == "numpy":
        return _of_scalar(value)
    is_missing = value is None or type(value).__name__ == "NAType"
    if is_missing and not _takes_gaps(spec):
        raise _no_gaps(f"is {value}", spec)
    if is_missing:
        return math.nan
    if not _takes_gaps(spec):
        return None
    if isinstance(value, Decimal) and not value.is_snan():
        return float(value)
    return WORDS.get(value) if isinstance(value, str) else None


def _of_scalar(value: Any) -> int | float | None:
    plain = value.item() if hasattr(value, "item") else value
    if isinstance(plain, bool):
        return int(plain)
    return plain if isinstance(plain, int | float) else None


def _takes_gaps(spec: TensorInfo) -> bool:
    from asyncinfer.tensors.datatypes import FLOATS

    return spec.datatype in FLOATS


def _no_gaps(is_gap: str, spec: TensorInfo) -> CannotSend:
    return CannotSend(
        f"The input {is_gap} in places, and `{spec.name}` takes {spec.datatype}, which has no NaN. "
        "Put a value there, as fillna() or filled() do, or leave those rows out."
    )


def _of_frame(frame: Any, model: Model) -> dict[str, Any]:
    """Columns that are inputs by name, else all columns as the columns of the one input."""
    names = [spec.name for spec in model.inputs]
    columns = [str(one) for one in frame.columns]
    if len(names) == 1 and columns != names:
        return {names[0]: frame.to_numpy()}
    missing = [one.name for one in model.inputs if not one.optional and one.name not in columns]
    if missing:
        raise CannotSend(
            f"{model.model} takes columns named {', '.join(map(repr, missing))} too; the frame has "
            f"{', '.join(map(repr, columns))}. Rename its columns."
        )
    ranks = {spec.name: spec.rank for spec in model.inputs}
    return {name: _column(frame[name], ranks[name]) for name in names if name in columns}


def _column(series: Any, rank: int | None) -> Any:
    """A column has a value a row; inputs as scikit-learn exports them are a matrix of one."""
    array = series.to_numpy()
    return array.reshape(-1, 1) if rank == 2 and array.ndim == 1 else array


def _is_float(array: "Array") -> bool:
    from asyncinfer.tensors.datatypes import DTYPES

    return array.dtype.kind == "f" or array.dtype == DTYPES["BF16"]


def _within(array: "Array", low: float, high: float) -> bool:
    """What is not finite fits every float."""
    import numpy as np

    if array.dtype.kind in "iub":
        return bool(int(array.min()) >= low and int(array.max()) <= high)
    wide = array.astype(np.float64, copy=False)
    wide = wide[np.isfinite(wide)]
    return not wide.size or bool(wide.min() >= low and wide.max() <= high)


def _has_nan_in(array: "Array") -> bool:
    import numpy as np

    return bool(np.isnan(array.astype(np.float64, copy=False)).any())


def _has_nan(value: Any) -> bool:
    if isinstance(value, list | tuple):
        with contextlib.suppress(TypeError, OverflowError):
            return not all(map(math.isfinite, value))  # of numbers alone, five times as fast
        return any(map(_has_nan, value))
    return isinstance(value, float) and not math.isfinite(value)


class _Plain:
    """`plain` that remembers whether a number was among them that JSON does not have."""

    def __init__(self) -> None:
        self.has_nan = False

    def __call__(self, value: Any) -> Any:
        made = plain(value)
        self.has_nan = self.has_nan or _has_nan(made)
        return made


def _encode(value: Any, hook: Callable[[Any], Any]) -> bytes:
    try:
        return msgspec.json.encode(value, enc_hook=hook)
    except (TypeError, ValueError, RecursionError) as error:
        raise CannotSend(
            f"The input cannot be sent: {error}. Give lists, arrays, a dict of arrays, or a frame."
        ) from error


def plain(value: Any) -> Any:
    """Arrays and numbers of numpy inside lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Iterable) and not isinstance(value, bytes):
        return list(value)
    raise TypeError(f"{type(value).__name__} is no number, string or list")
