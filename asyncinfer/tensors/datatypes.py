"""Open Inference tensors <-> numpy: the datatypes, what fits them, and JSON read as one.

`np.asarray` takes None, "1.5" and True for numbers and turns 1e39 into inf, so nothing relies
on it: the decoder knows the type and range of every element before numpy sees them.
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

Array: TypeAlias = npt.NDArray[np.generic]
Feeds: TypeAlias = Mapping[str, Array]
"""What a run is given, by the name of the input."""

Dim: TypeAlias = int | str | None


class TensorSpec(Struct, frozen=True):
    """A tensor that a model takes or gives, as its graph declares it."""

    name: str
    datatype: str
    """Open Inference name: FP32, INT64, BYTES (strings)..."""
    shape: tuple[Dim, ...] | None
    """Per dimension its size, its symbolic name, or None where the graph says neither; None as a
    whole where the graph leaves open how many dimensions there are."""
    optional: bool = False
    """Whether a request may leave this input out; the graph has a value of its own for it."""


MOST_DIMENSIONS: Final = 32
"""Of any tensor, given or stored."""

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
"""The numpy dtype of each datatype; strings are `str` objects, as ONNX Runtime wants them."""

_DATATYPES: Final = {dtype: datatype for datatype, dtype in DTYPES.items()}

FLOATS: Final = frozenset({"FP16", "BF16", "FP32", "FP64"})

# The last number that still rounds to a finite one lies half a step above the largest of them.
_FP16_END: Final = math.nextafter(65520.0, 0.0)
# bfloat16 is made by way of float32, so it is rounded twice.
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
"""The numbers that fit each numeric datatype, ends included."""

_LONG_BYTES: Final = 1024
_PIECE_BYTES: Final = 64 << 10
"""Of a long text, what is parsed in one call: no thread can run during such a call."""

_BRACKETS_TO_SPACES: Final = bytes.maketrans(b"[]", b"  ")
_NUMBER_BYTES: Final = b"0123456789+-.eE \t\r\n"
_NO_NESTING: Final = re.compile(rb"[^\[\],]")
_BEGINNING: Final = re.compile(rb"[\s\[]*")
_IRREGULAR: Final = "its arrays are not of equal lengths and depths"
_PLACE: Final = re.compile(r" - at `\$\[(\d+)\]`")


def decode(data: bytes | msgspec.Raw, spec: TensorSpec) -> Array:
    """The JSON text `data` as an array of `spec`'s datatype; its shape is still to be checked.

    An element of a float may be null, or "NaN", "Infinity" or "-Infinity". Raises ValueError or
    OverflowError when anything in it is not an element of that datatype.
    """
    data = bytes(data)
    try:
        return _decode_plain(data, spec)
    except (ValueError, OverflowError):
        # Most texts have no such element, so they are not searched for one before.
        plain = _without_gaps(data, spec)
        if plain is data:
            raise
    array = _decode_plain(plain, spec)
    _put_back(array, data)
    return array


def _without_gaps(data: bytes, spec: TensorSpec) -> bytes:
    return missing_values.with_zeros(data) if spec.datatype in FLOATS else data


def _put_back(array: Array, text: bytes) -> None:
    """Gives the elements that `_without_gaps` replaced in `text` their values.

    `array` was read from what that made, so the text is numbers and gaps alone: the number of an
    element is how many commas come before it, and one letter tells each kind of gap from all else.
    """
    codes = np.frombuffer(text, np.uint8)
    commas = np.flatnonzero(codes == ord(","))
    if array.size != len(commas) + 1:
        raise ValueError(_IRREGULAR)
    elements: npt.NDArray[Any] = array.reshape(-1)
    for letter in b"au":  # of NaN and null
        elements[np.searchsorted(commas, np.flatnonzero(codes == letter))] = math.nan
    infinite = np.flatnonzero(codes == ord("I"))
    is_negative = codes[infinite - 1] == ord("-")
    elements[np.searchsorted(commas, infinite)] = np.where(is_negative, -math.inf, math.inf)


def _decode_plain(data: bytes, spec: TensorSpec) -> Array:
    rank = nesting_of(data) if spec.shape is None else len(spec.shape)
    if len(data) > _LONG_BYTES and rank and spec.datatype in RANGES:
        nesting = data.translate(None, _NUMBER_BYTES)
        if len(nesting) > _LONG_BYTES or b"[]" not in nesting:
            return _decode_numbers(data, _shape_of(nesting, rank), spec.datatype)
    values: Any = _decoder(spec.datatype, rank)(data)
    return np.array(values, dtype=DTYPES[spec.datatype])


def nesting_of(data: bytes) -> int:
    """How many dimensions the JSON text has, by the brackets that it begins with.

    Raises ValueError where there are more than a tensor may have.
    """
    brackets = _BEGINNING.match(data)
    depth = brackets[0].count(b"[") if brackets else 0
    if depth > MOST_DIMENSIONS:
        raise ValueError(f"it is nested deeper than {MOST_DIMENSIONS} arrays")
    return depth


def _decode_numbers(data: bytes, shape: tuple[int, ...], datatype: str) -> Array:
    """Reads the numbers of a long text piece by piece, without its nesting.

    One list of numbers makes no list per row, so it takes half the time of nested lists, or a
    tenth where rows are short; and other threads run between two pieces.
    """
    decode_piece = _decoder(datatype, 1)
    pieces: list[Array] = []
    position = 0
    for piece in _pieces(data.translate(_BRACKETS_TO_SPACES)):
        try:
            values: Any = decode_piece(b"[%b]" % piece)
            pieces.append(_packed(values, datatype))
        except msgspec.ValidationError as error:
            raise ValueError(_at_element(error, position)) from error
        position += len(values)
    return np.concatenate(pieces).reshape(shape)


def _shape_of(nesting: bytes, rank: int) -> tuple[int, ...]:
    """The shape of an array from its brackets and commas alone.

    Raises ValueError unless they are what a regular array of this rank has.
    """
    if other := _NO_NESTING.search(nesting):
        raise ValueError(f"element {nesting.count(b',', 0, other.start())} is no number")
    inner = nesting[rank : nesting.find(b"]")]
    sizes = [len(inner) + 1]
    whole = b"[%b]" % inner
    for depth in range(rank - 2, -1, -1):
        size, rest = divmod(_end_of(nesting, depth, rank) - depth, len(whole) + 1)
        if rest or size < 1:
            raise ValueError(_IRREGULAR)
        sizes.append(size)
        whole = b"[%b]" % ((whole + b",") * size)[:-1]
    if inner.strip(b",") or whole != nesting:
        raise ValueError(_IRREGULAR)
    return tuple(reversed(sizes))


def _end_of(nesting: bytes, depth: int, rank: int) -> int:
    """Where the first array at this depth ends, if the nesting is regular."""
    return nesting.find(b"]" * (rank - depth)) + rank - depth - 1


def _pieces(text: bytes) -> Iterator[bytes]:
    start = 0
    while len(text) - start > _PIECE_BYTES and (end := text.find(b",", start + _PIECE_BYTES)) > 0:
        yield text[start:end]
        start = end + 1
    yield text[start:]


def _at_element(error: msgspec.ValidationError, position: int) -> str:
    """The message of an error in a piece whose first element has this number, from 0."""
    message = str(error)
    place = _PLACE.search(message)
    return f"element {position + int(place[1])}: {message[: place.start()]}" if place else message


def _packed(values: list[Any], datatype: str) -> Array:
    if datatype not in FLOATS:
        return np.array(values, dtype=DTYPES[datatype])
    # What np.array makes of the list, in half of its time.
    packed = np.frombuffer(struct.pack(f"{len(values)}d", *values))
    return packed.astype(DTYPES[datatype])


def decode_rows(data: Sequence[bytes], spec: TensorSpec) -> tuple[Array, list[int]]:
    """The rows of several JSON texts in one array, and how many each has; raises as `decode`."""
    try:
        return _decode_plain_rows(data, spec)
    except (ValueError, OverflowError):
        plain = [_without_gaps(one, spec) for one in data]
        if all(map(operator.is_, plain, data)):
            raise
    rows, counts = _decode_plain_rows(plain, spec)
    _put_back(rows, b",".join(data))
    return rows, counts


def _decode_plain_rows(data: Sequence[bytes], spec: TensorSpec) -> tuple[Array, list[int]]:
    decoder = _decoder(spec.datatype, len(dims(spec)))
    values: list[Any] = [decoder(one) for one in data]
    rows = list(itertools.chain.from_iterable(values))
    return np.array(rows, dtype=DTYPES[spec.datatype]), [len(one) for one in values]


def datatype_of(array: Array) -> str:
    """The Open Inference datatype of an array; KeyError where it has none."""
    return _DATATYPES[array.dtype]


def fits(shape: tuple[int, ...], spec: TensorSpec) -> bool:
    """Whether `shape` is one that `spec` declares; an empty array never is."""
    if spec.shape is None:
        return len(shape) <= MOST_DIMENSIONS and 0 not in shape
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


def is_open(spec: TensorSpec) -> bool:
    """Whether the size of the first dimension is the caller's choice."""
    return bool(spec.shape) and not isinstance(dims(spec)[0], int)


def dims(spec: TensorSpec) -> tuple[Dim, ...]:
    """The dimensions that `spec` declares; none where it leaves open how many there are."""
    return spec.shape or ()


def shape_words(spec: TensorSpec) -> str:
    """`spec`'s shape as people read it: `[batch, 3, ?]`."""
    if spec.shape is None:
        return f"[...] of up to {MOST_DIMENSIONS} dimensions"
    return f"[{', '.join('?' if dim is None else str(dim) for dim in spec.shape)}]"


@functools.cache
def _decoder(datatype: str, rank: int) -> Callable[[bytes | msgspec.Raw], object]:
    nested: Any = _element_type(datatype)
    for _ in range(rank):
        nested = list[nested]
    return msgspec.json.Decoder(nested).decode


def _element_type(datatype: str) -> object:
    if datatype == "BOOL":
        return bool
    if datatype == "BYTES":
        return str
    low, high = RANGES[datatype]
    if datatype == "UINT64":  # msgspec has no bound beyond int64; numpy refuses the rest
        return Annotated[int, Meta(ge=0)]
    return Annotated[float if datatype in FLOATS else int, Meta(ge=low, le=high)]
