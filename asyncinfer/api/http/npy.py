"""Arrays in numpy's `.npy` format, read without pickle and written from stored bytes."""

import io
import tokenize
import warnings
from math import prod
from typing import Any, Final

import numpy as np
from numpy.lib import format as npy_format

from asyncinfer.errors import InputError, InvalidInput
from asyncinfer.tensors.datatypes import DTYPES, Array

_MAX_HEADER_BYTES: Final = 10_000
_UNREADABLE: Final = (
    ValueError,
    SyntaxError,
    TypeError,
    RecursionError,
    MemoryError,
    tokenize.TokenError,
)
_MAX_RANK: Final = 32
_MAX_ELEMENTS: Final = 1 << 40
_SHOWN_CHARACTERS: Final = 64

UNSUPPORTED_DATATYPES: Final = frozenset({"BF16", "BYTES"})
"""Datatypes that `.npy` cannot hold."""


def read(content: bytes) -> Array:
    """The array, a view of `content`, of any plain dtype. Raises InvalidInput if the content is
    not an array, or has objects, an impossible shape or another size than its header says."""
    head = io.BytesIO(content[: _MAX_HEADER_BYTES + 16])
    try:
        shape, fortran_order, dtype = _read_header(head)
    except _UNREADABLE as error:
        # numpy's own message may hold an address of this process's memory.
        raise _input_error(
            "The body is not an array that numpy saved: its header cannot be read. Make it with "
            "`numpy.save(file, array)`; formats 1.0 and 2.0 are taken."
        ) from error
    # A dtype may have a shape of its own, in addition to the array's.
    is_plain = not (dtype.hasobject or dtype.subdtype) and dtype.itemsize > 0
    if len(shape) > _MAX_RANK:
        raise _input_error(f"The array has {len(shape)} dimensions; a model takes {_MAX_RANK}.")
    if not is_plain:
        shown = str(dtype)[:_SHOWN_CHARACTERS]
        raise _input_error(
            f"The array's elements are not plain numbers: its dtype is {shown}. "
            "Convert it with `array.astype()` and save it again; strings are sent as `inputs`."
        )
    if any(type(size) is not int for size in shape):
        raise _input_error(f"The array's header says shape {list(shape)}, which is not valid.")
    data_bytes = len(content) - head.tell()
    if min(shape, default=0) < 0 or prod(shape) * dtype.itemsize != data_bytes:
        raise _input_error(
            f"The array's header says shape {list(shape)}, {data_bytes} bytes follow it."
        )
    if prod(max(size, 1) for size in shape) > _MAX_ELEMENTS:
        raise _input_error(f"The array's shape {list(shape)} is larger than any request.")
    start = head.tell() if data_bytes else 0
    flat = np.frombuffer(content, dtype, prod(shape), start)
    return flat.reshape(shape[::-1]).T if fortran_order else flat.reshape(shape)


def header_of(datatype: str, shape: tuple[int, ...]) -> bytes | None:
    """The `.npy` header, to be followed by a tensor's bytes as they are stored, or None if `.npy`
    cannot hold the datatype."""
    if datatype in UNSUPPORTED_DATATYPES:
        return None
    head = io.BytesIO()
    header = {
        "descr": npy_format.dtype_to_descr(DTYPES[datatype]),
        "fortran_order": False,
        "shape": shape,
    }
    npy_format.write_array_header_1_0(head, header)
    return head.getvalue()


def numpy_name_of(datatype: str) -> str:
    """numpy's name of the datatype, with its byte order: `<f4`."""
    return DTYPES[datatype].str


def _read_header(head: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """The shape, whether the order is Fortran's, and the dtype; `head` is then at the first byte of
    the elements. Raises one of `_UNREADABLE`."""
    version = npy_format.read_magic(head)
    with warnings.catch_warnings():
        # numpy warns of headers that Python 2 wrote, and reads them all the same.
        warnings.simplefilter("ignore")
        if version == (1, 0):
            return npy_format.read_array_header_1_0(head, max_header_size=_MAX_HEADER_BYTES)
        if version == (2, 0):
            return npy_format.read_array_header_2_0(head, max_header_size=_MAX_HEADER_BYTES)
    raise ValueError(f"format {version[0]}.{version[1]}; 1.0 and 2.0 are taken")


def _input_error(detail: str) -> InvalidInput:
    """Makes the error of a whole body."""
    return InvalidInput(detail, faults=[InputError("", detail)])
