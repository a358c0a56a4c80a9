"""Datatypes of the Open Inference Protocol: their numpy dtypes, their ranges, and JSON decoding.

`np.asarray` accepts None, "1.5" and True as numbers and turns 1e39 into inf, so nothing relies
on it: the decoder checks the type and range of every element before numpy sees them.
"""

import functools
import itertools
import math
import operator
import re
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, TypeAlias

import ml_dtypes
import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from asyncinfer.tensors import missing_values
from asyncinfer.untrusted.expectations import problem_of

Array: TypeAlias = npt.NDArray[np.generic]
Feeds: TypeAlias = Mapping[str, Array]
"""The input arrays of a run, by input name."""

Dim: TypeAlias = int | str | None


class TensorSpec(Struct, frozen=True):
    """An input or output of a model, as its graph declares it."""

    name: str
    datatype: str
    """Open Inference name: FP32, INT64, BYTES (strings)..."""
    shape: tuple[Dim, ...] | None
    """Per dimension its size, its symbolic name, or None if the graph gives neither. None instead
    of a tuple if the graph does not give the number of dimensions."""
    optional: bool = False
    """Whether a request may leave this input out, because the graph has a default value for it."""


MAX_DIMENSIONS: Final = 32
"""The limit for every tensor, in requests and in stored payloads."""

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "BOOL": np.dtype(np.bool_),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "FP16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(object),
}
"""The numpy dtype of each datatype; strings are `str` objects, as ONNX Runtime requires."""

_DATATYPES: Final = {dtype: datatype for datatype, dtype in DTYPES.items()}

FLOATS: Final = frozenset({"FP16", "BF16", "FP32", "FP64"})

# The last number that rounds to a finite value is half a step above the largest finite value.
_FP16_END: Final = math.nextafter(65520.0, 0.0)
# bfloat16 is converted by way of float32, so it is rounded twice.
_BF16_END: Final = math.nextafter(2.0**128 - 2.0**119 - 2.0**103, 0.0)
_FP32_END: Final = math.nextafter(2.0**128 - 2.0**103, 0.0)

RANGES: Final[dict[str, tuple[float, float]]] = {
    "INT8": (-(2**7), 2**7 - 1),
    "INT16": (-(2**15), 2**15 - 1),
    "INT32": (-(2**31), 2**31 - 1),
    "INT64": (-(2**63), 2**63 - 1),
    "UINT8": (0, 2**8 - 1),
    "UINT16": (0, 2**16 - 1),
    "UINT32": (0, 2**32 - 1),
    "UINT64": (0, 2**64 - 1),
    "FP16": (-_FP16_END, _FP16_END),
    "BF16": (-_BF16_END, _BF16_END),
    "FP32": (-_FP32_END, _FP32_END),
    "FP64": (-sys.float_info.max, sys.float_info.max),
}
"""The smallest and largest number that fit each numeric datatype."""


def range_text(datatype: str) -> str:
    """The numbers that a numeric datatype has, as `-128 to 127`."""
    low, high = RANGES[datatype]
    if datatype in FLOATS:
        # What rounds to the largest number is a little beyond it.
        low, high = np.array([low, high]).astype(DTYPES[datatype]).astype(np.float64).tolist()
        return f"{low:g} to {high:g}"
    return f"{low} to {high}"


def number_beyond(array: Array, datatype: str) -> int | float | None:
    """The smallest or largest of an array's numbers, if it does not fit a numeric datatype.

    NaN and infinities fit every float.
    """
    # The dtype bfloat16 is of no kind that numpy compares.
    numbers: Any = array if array.dtype.kind in "iubf" else array.astype(np.float64)
    if array.dtype.kind not in "iub":
        numbers = numbers[np.isfinite(numbers)]
    if not numbers.size:
        return None
    low, high = RANGES[datatype]
    ends = (numbers.min().item(), numbers.max().item())
    return next((number for number in ends if not low <= number <= high), None)


_LONG_BYTES: Final = 1024
_PIECE_BYTES: Final = 64 << 10
"""How much of a long text is parsed per call: no other thread can run during a call."""

_BRACKETS_TO_SPACES: Final = bytes.maketrans(b"[]", b"  ")
_NUMBER_BYTES: Final = b"0123456789+-.eE \t\r\n"
_NO_NESTING: Final = re.compile(rb"[^\[\],]")
_BEGINNING: Final = re.compile(rb"[\s\[]*")
_IRREGULAR: Final = "its arrays are not of equal lengths and depths"


def decode(data: bytes | msgspec.Raw, spec: TensorSpec) -> Array:
    """The JSON text `data` as an array of `spec`'s datatype and number of dimensions.

    The sizes of its dimensions are not checked, and without a declared number of dimensions any up
    to 32 is taken. An element of a float datatype may be null, "NaN", "Infinity" or "-Infinity".
    Raises ValueError if any element does not fit the datatype, or the arrays are not regular.
    """
    data = bytes(data)
    try:
        return _decode_whole(data, spec)
    except msgspec.ValidationError as error:
        rank = nesting_of(data) if spec.shape is None else len(spec.shape)
        raise ValueError(_at_element(error, _list_type(spec.datatype, rank))) from error
    except OverflowError as error:
        raise ValueError(f"a number does not fit {spec.datatype}") from error


def _decode_whole(data: bytes, spec: TensorSpec) -> Array:
    """`decode`, which also raises msgspec.ValidationError or OverflowError."""
    try:
        return _decode_plain(data, spec)
    except (ValueError, OverflowError):
        # Most texts have no missing value, so they are searched for one only after an error.
        plain = _replace_missing(data, spec)
        if plain is data:
            raise
    array = _decode_plain(plain, spec)
    _restore_missing(array, data)
    return array


def _replace_missing(data: bytes, spec: TensorSpec) -> bytes:
    """The text with zeros for missing values; the same object if it has none, or no floats."""
    return missing_values.replace_with_zeros(data) if spec.datatype in FLOATS else data


def _restore_missing(array: Array, text: bytes) -> None:
    """Writes NaN and infinities into `array`, where `_replace_missing` wrote zeros for them.

    `text` is the text before that, and has nothing but numbers and missing values: the index of an
    element is the number of commas before it, and one letter identifies each kind of missing value.
    Raises ValueError if the text has another number of elements.
    """
    codes = np.frombuffer(text, np.uint8)
    commas = np.flatnonzero(codes == ord(","))
    if array.size != len(commas) + 1:
        raise ValueError(_IRREGULAR)
    elements: npt.NDArray[Any] = array.reshape(-1)
    for letter in b"au":  # in NaN and null
        elements[np.searchsorted(commas, np.flatnonzero(codes == letter))] = math.nan
    infinite = np.flatnonzero(codes == ord("I"))
    is_negative = codes[infinite - 1] == ord("-")
    elements[np.searchsorted(commas, infinite)] = np.where(is_negative, -math.inf, math.inf)


def _decode_plain(data: bytes, spec: TensorSpec) -> Array:
    """`decode` for a text without missing values."""
    rank = nesting_of(data) if spec.shape is None else len(spec.shape)
    if len(data) > _LONG_BYTES and rank and spec.datatype in RANGES:
        nesting = data.translate(None, _NUMBER_BYTES)
        if len(nesting) > _LONG_BYTES or b"[]" not in nesting:
            return _decode_numbers(data, _shape_of(nesting, rank), spec.datatype)
    values: Any = _decoder(spec.datatype, rank)(data)
    return np.array(values, dtype=DTYPES[spec.datatype])


def nesting_of(data: bytes) -> int:
    """The number of dimensions of the JSON text, counted from its leading brackets.

    Raises ValueError if there are more than MAX_DIMENSIONS.
    """
    brackets = _BEGINNING.match(data)
    depth = brackets[0].count(b"[") if brackets else 0
    if depth > MAX_DIMENSIONS:
        raise ValueError(f"it is nested deeper than {MAX_DIMENSIONS} arrays")
    return depth


def _decode_numbers(data: bytes, shape: tuple[int, ...], datatype: str) -> Array:
    """Decodes the numbers of a long text in pieces, ignoring its nesting.

    One flat list takes half the time of nested lists, or a tenth if rows are short, because there
    is no list per row; and other threads can run between two pieces.
    """
    decode_piece = _decoder(datatype, 1)
    pieces: list[Array] = []
    position = 0
    for piece in _pieces(data.translate(_BRACKETS_TO_SPACES)):
        try:
            values: Any = decode_piece(b"[%b]" % piece)
            pieces.append(_flat_array(values, datatype))
        except msgspec.ValidationError as error:
            expected = _list_type(datatype, 1)
            raise ValueError(_at_element(error, expected, position)) from error
        position += len(values)
    return np.concatenate(pieces).reshape(shape)


def _shape_of(nesting: bytes, rank: int) -> tuple[int, ...]:
    """The shape of an array, read from its brackets and commas.

    `nesting` is the text without all bytes of numbers. Raises ValueError unless it forms a regular
    array of this rank.
    """
    if other := _NO_NESTING.search(nesting):
        raise ValueError(f"element {nesting.count(b',', 0, other.start())} is not a number")
    inner = nesting[rank : nesting.find(b"]")]
    sizes = [len(inner) + 1]
    whole = b"[%b]" % inner
    for depth in range(rank - 2, -1, -1):
        # If the nesting is regular, the first array at this depth ends there.
        end = nesting.find(b"]" * (rank - depth)) + rank - depth - 1
        size, rest = divmod(end - depth, len(whole) + 1)
        if rest or size < 1:
            raise ValueError(_IRREGULAR)
        sizes.append(size)
        whole = b"[%b]" % ((whole + b",") * size)[:-1]
    if inner.strip(b",") or whole != nesting:
        raise ValueError(_IRREGULAR)
    return tuple(reversed(sizes))


def _pieces(text: bytes) -> Iterator[bytes]:
    """Yields a flat text in pieces of about 64 KiB, cut at commas, which are left out."""
    start = 0
    while len(text) - start > _PIECE_BYTES and (end := text.find(b",", start + _PIECE_BYTES)) > 0:
        yield text[start:end]
        start = end + 1
    yield text[start:]


def _at_element(error: msgspec.ValidationError, expected: object, position: int = 0) -> str:
    """What is wrong in a text that is not of the type `expected`, and the index of the element.

    `position` is the number of elements before the piece that the error is of.
    """
    problem = problem_of(error, expected)
    place = ", ".join(str(position + int(index)) for index in problem.steps)
    return f"element {place}: {problem.detail}" if place else problem.detail


def _flat_array(values: list[Any], datatype: str) -> Array:
    """A one-dimensional array of numbers; raises OverflowError if one does not fit."""
    if datatype not in FLOATS:
        return np.array(values, dtype=DTYPES[datatype])
    # The same as np.array(values), in half the time.
    packed = np.frombuffer(struct.pack(f"{len(values)}d", *values))
    return packed.astype(DTYPES[datatype])


def decode_rows(data: Sequence[bytes], spec: TensorSpec) -> tuple[Array, list[int]]:
    """Decodes several JSON texts of shape `(rows, *dims)` into one array.

    Returns the array of shape `(total rows, *dims)`, in the order of `data`, and the number of rows
    of each text. Shapes are not checked; raises as `decode` does, without saying which text. `spec`
    must declare its number of dimensions.
    """
    try:
        return _decode_plain_rows(data, spec)
    except (ValueError, OverflowError):
        plain = [_replace_missing(text, spec) for text in data]
        if all(map(operator.is_, plain, data)):
            raise
    rows, counts = _decode_plain_rows(plain, spec)
    _restore_missing(rows, b",".join(data))
    return rows, counts


def _decode_plain_rows(data: Sequence[bytes], spec: TensorSpec) -> tuple[Array, list[int]]:
    """`decode_rows` for texts without missing values."""
    decoder = _decoder(spec.datatype, len(dims(spec)))
    values: list[Any] = [decoder(text) for text in data]
    rows = list(itertools.chain.from_iterable(values))
    return np.array(rows, dtype=DTYPES[spec.datatype]), [len(text_rows) for text_rows in values]


def datatype_of(array: Array) -> str:
    """The Open Inference datatype of an array; raises KeyError if its dtype has none."""
    return _DATATYPES[array.dtype]


def shape_fits(shape: tuple[int, ...], spec: TensorSpec) -> bool:
    """Whether an array of `shape` fits `spec`.

    Sizes of one symbol must be equal, and no size 0. Without a declared number of dimensions up to
    32 fit.
    """
    if spec.shape is None:
        return len(shape) <= MAX_DIMENSIONS and 0 not in shape
    if len(shape) != len(spec.shape) or 0 in shape:
        return False
    symbols: dict[str, int] = {}
    for size, dim in zip(shape, spec.shape, strict=True):
        if isinstance(dim, int):
            if size != dim:
                return False
        elif dim is not None and symbols.setdefault(dim, size) != size:
            return False
    return True


def has_dynamic_first_dim(spec: TensorSpec) -> bool:
    """Whether there is a first dimension, and it has no fixed size."""
    return bool(spec.shape) and not isinstance(dims(spec)[0], int)


def dims(spec: TensorSpec) -> tuple[Dim, ...]:
    """The dimensions that `spec` declares; empty if it does not give their number."""
    return spec.shape or ()


def shape_text(spec: TensorSpec) -> str:
    """The shape as text for people, as `[batch, 3, ?]`."""
    if spec.shape is None:
        return f"[...] of up to {MAX_DIMENSIONS} dimensions"
    return f"[{', '.join('?' if dim is None else str(dim) for dim in spec.shape)}]"


@functools.cache
def _decoder(datatype: str, rank: int) -> Callable[[bytes | msgspec.Raw], object]:
    """A function that decodes lists nested `rank` deep, and checks the range of each element.

    It raises msgspec.ValidationError.
    """
    return msgspec.json.Decoder(_list_type(datatype, rank)).decode


@functools.cache
def _list_type(datatype: str, rank: int) -> object:
    """The type for msgspec of lists that are nested `rank` deep."""
    nested: Any = _element_type(datatype)
    for _ in range(rank):
        nested = list[nested]
    return nested


def _element_type(datatype: str) -> object:
    """The type for msgspec of an element, with its range."""
    if datatype == "BOOL":
        return bool
    if datatype == "BYTES":
        return str
    low, high = RANGES[datatype]
    if datatype == "UINT64":  # msgspec has no bound beyond int64; numpy rejects larger numbers
        return Annotated[int, Meta(ge=0)]
    return Annotated[float if datatype in FLOATS else int, Meta(ge=low, le=high)]
