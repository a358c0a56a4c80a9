"""How tensors are stored with a job: a tag, what they are, their bytes.

`0x01`, the header's length (4 bytes, little-endian), the header (msgpack: name, datatype and shape
of each tensor), then the tensors in that order, little-endian and row-major as in the Open
Inference Protocol, each beginning at a multiple of 16. JSON text never begins with the tag.
"""

import functools
import struct
from collections.abc import Mapping, Sequence
from math import prod
from typing import Final

import msgspec
import numpy as np
from msgspec import Struct

from asyncinfer.tensors.datatypes import DTYPES, Array, datatype_of
from asyncinfer.untrusted.decoding import UNREADABLE

TAG: Final = b"\x01"
"""The first byte of packed tensors."""

_ALIGNMENT: Final = 16
_MOST_ELEMENTS: Final = 1 << 48
"""Of an empty tensor too: numpy refuses shapes whose product overflows."""
_MOST_RANK: Final = 32
"""Numpy's own until version 2."""
_PREFIX: Final = struct.Struct("<cI")
_LENGTH: Final = struct.Struct("<I")


class PackedTensor(Struct, frozen=True, array_like=True):
    """One entry of the header; `size` in bytes."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    size: int


class DamagedPayload(ValueError):
    """Bytes that are not packed tensors, though they begin like it."""


class TooManyStrings(DamagedPayload):
    """More strings than the shape of their tensor takes."""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[PackedTensor, ...]).decode


def is_packed(payload: bytes) -> bool:
    return payload[:1] == TAG


def pack(tensors: Mapping[str, Array]) -> bytes:
    """The tensors in one payload; strings are stored with their length before each."""
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
    """What was packed, as read-only views of `payload`; raises DamagedPayload."""
    tensors, starts = layout(payload)
    return {
        one.name: _array_of(one, payload, start) for one, start in zip(tensors, starts, strict=True)
    }


def unpack_alike(payloads: Sequence[bytes]) -> list[dict[str, Array]] | None:
    """`unpack` of several at once; None unless all describe the same numbers in the same shapes.

    Raises DamagedPayload where the first is damaged.
    """
    first = payloads[0]
    tensors, starts = layout(first)
    head = first[: _PREFIX.size + _PREFIX.unpack_from(first)[1]]
    if any(one.datatype in ("BYTES", "BOOL") for one in tensors):
        return None
    if any(len(one) != len(first) or not one.startswith(head) for one in payloads):
        return None
    table = np.frombuffer(b"".join(payloads), np.uint8).reshape(len(payloads), len(first))
    names = [one.name for one in tensors]
    columns = [
        np.ascontiguousarray(table[:, start : start + one.size])
        .view(DTYPES[one.datatype])
        .reshape(len(payloads), *one.shape)
        for one, start in zip(tensors, starts, strict=True)
    ]
    return [dict(zip(names, arrays, strict=True)) for arrays in zip(*columns, strict=True)]


def layout(payload: bytes) -> tuple[tuple[PackedTensor, ...], tuple[int, ...]]:
    """The tensors of a payload, and where each one's bytes begin; raises DamagedPayload."""
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
    """Kept, since the jobs of one model mostly look the same."""
    try:
        tensors = _decode(header)
    except UNREADABLE as error:
        raise DamagedPayload(f"the header cannot be read: {error}") from error
    starts = []
    end = _PREFIX.size + len(header)
    for one in tensors:
        if one.datatype not in DTYPES or min(one.shape, default=0) < 0 or one.size < 0:
            raise DamagedPayload(f"{one.name!r} is no tensor: {one.datatype}{list(one.shape)}")
        nowhere_zero = prod(max(size, 1) for size in one.shape)
        if nowhere_zero > _MOST_ELEMENTS or len(one.shape) > _MOST_RANK:
            raise DamagedPayload(f"{one.name!r} has an impossible shape")
        if one.datatype != "BYTES" and one.size != prod(one.shape) * _item_bytes(one.datatype):
            raise DamagedPayload(f"{one.name!r} has {one.size} bytes, not what its shape takes")
        end += -end % _ALIGNMENT
        starts.append(end)
        end += one.size
    return tensors, tuple(starts), end


def _item_bytes(datatype: str) -> int:
    return np.dtype(DTYPES[datatype]).itemsize


def _bytes_of(array: Array) -> bytes | memoryview:
    if array.dtype == object:
        return pack_strings(array.ravel().tolist())
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _array_of(one: PackedTensor, payload: bytes, start: int) -> Array:
    if one.datatype != "BYTES":
        count = prod(one.shape)
        flat = np.frombuffer(payload, DTYPES[one.datatype], count, start if count else 0)
        return flat.reshape(one.shape)
    strings = unpack_strings(memoryview(payload)[start : start + one.size], most=prod(one.shape))
    if len(strings) != prod(one.shape):
        raise DamagedPayload(f"{one.name!r} has {len(strings)} strings, not what its shape takes")
    array = np.empty(len(strings), dtype=object)
    array[:] = strings
    return array.reshape(one.shape)


def pack_strings(strings: Sequence[str]) -> bytes:
    """The Open Inference Protocol's BYTES: each string behind its length."""
    chunks = []
    for text in strings:
        content = text.encode()
        chunks += [_LENGTH.pack(len(content)), content]
    return b"".join(chunks)


def unpack_strings(content: memoryview, *, most: int) -> list[str]:
    """The reverse; raises DamagedPayload, which says where, also for what is not UTF-8, and
    TooManyStrings as soon as there are more than `most`."""
    strings: list[str] = []
    at = 0
    while at < len(content):
        if len(strings) == most:
            raise TooManyStrings(f"there are more than {most} strings")
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
