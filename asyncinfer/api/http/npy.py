"""Arrays as numpy saves them (`.npy`): read without pickle, written from stored bytes."""

import io
import tokenize
import warnings
from math import prod
from typing import Any, Final

import numpy as np
from numpy.lib import format as npy_format

from asyncinfer.errors import Fault, InvalidInput
from asyncinfer.tensors.datatypes import DTYPES, Array

_MOST_HEADER_BYTES: Final = 10_000
_UNREADABLE: Final = (
    ValueError,
    SyntaxError,
    TypeError,
    RecursionError,
    MemoryError,
    tokenize.TokenError,
)
_MOST_RANK: Final = 32
_MOST_ELEMENTS: Final = 1 << 40

NO_NPY: Final = frozenset({"BF16", "BYTES"})
"""Datatypes that numpy cannot save so."""


def read(content: bytes) -> Array:
    """The array, a view of `content`, of any dtype without objects; raises InvalidInput."""
    head = io.BytesIO(content[: _MOST_HEADER_BYTES + 16])
    try:
        shape, fortran_order, dtype = _read_header(head)
    except _UNREADABLE as error:
        # numpy's own message may hold an address of this process's memory.
        raise _refused(
            "The body is not an array that numpy saved: its header cannot be read. Make it with "
            "`numpy.save(file, array)`; formats 1.0 and 2.0 are taken."
        ) from error
    # A dtype may have a shape of its own, which adds to the array's.
    plain = not (dtype.hasobject or dtype.subdtype) and dtype.itemsize > 0
    if not plain or len(shape) > _MOST_RANK:
        raise _refused("The array's elements are no plain numbers; see GET /models for what is.")
    if any(type(size) is not int for size in shape):
        raise _refused(f"The array's header says shape {list(shape)}, which are no sizes.")
    size = len(content) - head.tell()
    if min(shape, default=0) < 0 or prod(shape) * dtype.itemsize != size:
        raise _refused(f"The array's header says shape {list(shape)}, {size} bytes follow it.")
    if prod(max(one, 1) for one in shape) > _MOST_ELEMENTS:
        raise _refused(f"The array's shape {list(shape)} is larger than any request.")
    start = head.tell() if size else 0
    flat = np.frombuffer(content, dtype, prod(shape), start)
    return flat.reshape(shape[::-1]).T if fortran_order else flat.reshape(shape)


def head_of(datatype: str, shape: tuple[int, ...]) -> bytes | None:
    """What stands before the bytes of such a tensor; None where numpy cannot save it."""
    if datatype in NO_NPY:
        return None
    head = io.BytesIO()
    described = {
        "descr": npy_format.dtype_to_descr(DTYPES[datatype]),
        "fortran_order": False,
        "shape": shape,
    }
    npy_format.write_array_header_1_0(head, described)
    return head.getvalue()


def name_of(datatype: str) -> str:
    """What numpy calls it, byte order included."""
    return DTYPES[datatype].str


def _read_header(head: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy_format.read_magic(head)
    with warnings.catch_warnings():
        # Of a header that Python 2 wrote; it is read all the same.
        warnings.simplefilter("ignore")
        if version == (1, 0):
            return npy_format.read_array_header_1_0(head, max_header_size=_MOST_HEADER_BYTES)
        if version == (2, 0):
            return npy_format.read_array_header_2_0(head, max_header_size=_MOST_HEADER_BYTES)
    raise ValueError(f"format {version[0]}.{version[1]}; 1.0 and 2.0 are taken")


def _refused(detail: str) -> InvalidInput:
    return InvalidInput(detail, faults=[Fault("", detail)])
