"""The binary format in which tensors are stored with a job: a tag, a header and their bytes.

`0x01`, the header's length (4 bytes, little-endian), the header (msgpack: name, datatype and shape
of each tensor), then the tensors in that order, little-endian and row-major as in the Open
Inference Protocol, each starting at a multiple of 16. JSON text never begins with the tag.
"""

import functools
import io
import struct
from collections.abc import Mapping, Sequence
from math import prod
from typing import Final

import msgspec
import numpy as np
from msgspec import Struct

from asyncinfer.tensors.datatypes import DTYPES, Array, datatype_of
from asyncinfer.untrusted.decoding import DECODE_ERRORS

TAG: Final = b"\x01"
"""The first byte of packed tensors."""

_ALIGNMENT: Final = 16
_MAX_ELEMENTS: Final = 1 << 48
"""Also limits empty tensors, with sizes of 0 taken as 1: numpy rejects shapes whose product
overflows."""
_MAX_RANK: Final = 32
"""The limit of numpy before version 2."""
_PREFIX: Final = struct.Struct("<cI")
_LENGTH: Final = struct.Struct("<I")


class PackedTensor(Struct, frozen=True, array_like=True):
    """One entry of the header; `size` is in bytes."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    size: int


class DamagedPayload(ValueError):
    """The bytes begin with the tag, but are not packed tensors."""


class TooManyStrings(DamagedPayload):
    """A tensor has more strings than its shape allows."""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[PackedTensor, ...]).decode


def is_packed(payload: bytes) -> bool:
    """Whether the payload begins with the tag of packed tensors; it may be damaged all the same."""
    return payload[:1] == TAG


def pack(tensors: Mapping[str, Array]) -> bytes:
    """Packs the tensors into one payload, in their order; each string is stored after its length.

    Raises KeyError for an array whose dtype is not in DTYPES.
    """
    parts = [(name, array, _bytes_of(array)) for name, array in tensors.items()]
    header = _encode(
        [
            PackedTensor(name, datatype_of(array), array.shape, len(content))
            for name, array, content in parts
        ]
    )
    chunks: list[bytes | memoryview] = [_PREFIX.pack(TAG, len(header)), header]
    end = _PREFIX.size + len(header)
    for _, _, content in parts:
        chunks += [bytes(-end % _ALIGNMENT), content]
        end += -end % _ALIGNMENT + len(content)
    return b"".join(chunks)


def unpack(payload: bytes) -> dict[str, Array]:
    """The tensors by name, as read-only views of `payload`; strings are `str` objects of their own.

    Raises DamagedPayload.
    """
    tensors, starts = read_layout(payload)
    return {
        tensor.name: _array_of(tensor, payload, start)
        for tensor, start in zip(tensors, starts, strict=True)
    }


def unpack_uniform(payloads: Sequence[bytes]) -> list[dict[str, Array]] | None:
    """`unpack` of several payloads at once, in much less time per payload.

    Returns one dict per payload, whose arrays have the shape in its header: they are rows of one
    array `(payloads, *shape)` per name. Returns None unless all headers are equal and without
    BYTES and BOOL. Raises DamagedPayload if the first payload is corrupt.
    """
    first = payloads[0]
    tensors, starts = read_layout(first)
    head = first[: _PREFIX.size + _PREFIX.unpack_from(first)[1]]
    if any(tensor.datatype in ("BYTES", "BOOL") for tensor in tensors):
        return None
    if any(len(other) != len(first) or not other.startswith(head) for other in payloads):
        return None
    table = np.frombuffer(b"".join(payloads), np.uint8).reshape(len(payloads), len(first))
    names = [tensor.name for tensor in tensors]
    columns = [
        np.ascontiguousarray(table[:, start : start + tensor.size])
        .view(DTYPES[tensor.datatype])
        .reshape(len(payloads), *tensor.shape)
        for tensor, start in zip(tensors, starts, strict=True)
    ]
    return [dict(zip(names, arrays, strict=True)) for arrays in zip(*columns, strict=True)]


def read_layout(payload: bytes) -> tuple[tuple[PackedTensor, ...], tuple[int, ...]]:
    """The header entries of a payload, and the offset in it of each tensor's bytes.

    Raises DamagedPayload, also if the payload has another length than its header says.
    """
    try:
        _, length = _PREFIX.unpack_from(payload)
    except struct.error as error:
        raise DamagedPayload("the payload is cut short") from error
    tensors, starts, end = _layout(payload[_PREFIX.size : _PREFIX.size + length])
    if len(payload) != end:
        raise DamagedPayload(f"the payload has {len(payload)} bytes, its header says {end}")
    return tensors, starts


@functools.lru_cache(maxsize=512)
def _layout(header: bytes) -> tuple[tuple[PackedTensor, ...], tuple[int, ...], int]:
    """Entries, offsets and the payload's length; raises DamagedPayload.

    Cached: most jobs of a model have one header.
    """
    try:
        tensors = _decode(header)
    except DECODE_ERRORS as error:
        raise DamagedPayload(f"the header cannot be read: {error}") from error
    starts = []
    end = _PREFIX.size + len(header)
    for tensor in tensors:
        datatype, shape = tensor.datatype, tensor.shape
        if datatype not in DTYPES or min(shape, default=0) < 0 or tensor.size < 0:
            raise DamagedPayload(f"{tensor.name!r} is not a tensor: {datatype}{list(shape)}")
        if prod(max(size, 1) for size in shape) > _MAX_ELEMENTS or len(shape) > _MAX_RANK:
            raise DamagedPayload(f"{tensor.name!r} has an impossible shape")
        if datatype != "BYTES" and tensor.size != prod(shape) * DTYPES[datatype].itemsize:
            raise DamagedPayload(
                f"{tensor.name!r} has {tensor.size} bytes, which its shape forbids"
            )
        end += -end % _ALIGNMENT
        starts.append(end)
        end += tensor.size
    return tensors, tuple(starts), end


def _bytes_of(array: Array) -> bytes | memoryview:
    """The bytes of an array as they are stored; without a copy if it is contiguous."""
    if array.dtype == object:
        return pack_strings(array.ravel().tolist())
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _array_of(tensor: PackedTensor, payload: bytes, start: int) -> Array:
    """The array of a tensor whose bytes begin at `start` in the payload; raises DamagedPayload."""
    count = prod(tensor.shape)
    if tensor.datatype != "BYTES":
        flat = np.frombuffer(payload, DTYPES[tensor.datatype], count, start if count else 0)
        return flat.reshape(tensor.shape)
    strings = unpack_strings(memoryview(payload)[start : start + tensor.size], max_count=count)
    if len(strings) != count:
        raise DamagedPayload(f"{tensor.name!r} has {len(strings)} strings, its shape has {count}")
    array = np.empty(len(strings), dtype=object)
    array[:] = strings
    return array.reshape(tensor.shape)


def pack_strings(strings: Sequence[str]) -> bytes:
    """The strings as BYTES of the Open Inference Protocol: UTF-8, each after its length."""
    # Not joined from a list: its two objects for each string would take 50 times the bytes of a
    # short one.
    packed = io.BytesIO()
    for text in strings:
        content = text.encode()
        packed.write(_LENGTH.pack(len(content)))
        packed.write(content)
    return packed.getvalue()


def unpack_strings(content: memoryview, *, max_count: int) -> list[str]:
    """Decodes BYTES into strings.

    Raises DamagedPayload, which says which string is cut short or not UTF-8, and TooManyStrings as
    soon as there are more than `max_count`.
    """
    strings: list[str] = []
    at = 0
    while at < len(content):
        if len(strings) == max_count:
            raise TooManyStrings(f"there are more than {max_count} strings")
        if at + _LENGTH.size > len(content):
            raise DamagedPayload(f"the length of string {len(strings)} is cut short")
        (size,) = _LENGTH.unpack_from(content, at)
        at += _LENGTH.size
        if at + size > len(content):
            raise DamagedPayload(f"string {len(strings)} is cut short")
        try:
            strings.append(str(content[at : at + size], "utf-8"))
        except UnicodeDecodeError as error:
            raise DamagedPayload(f"string {len(strings)} is not UTF-8") from error
        at += size
    return strings
