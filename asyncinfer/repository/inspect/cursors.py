"""Where a listing or a stream stopped, as text that a client hands back to go on."""

import base64
from typing import Final, TypeVar

import msgspec

from asyncinfer.untrusted.decoding import UNREADABLE

T = TypeVar("T")

MOST_CHARACTERS: Final = 4096
"""Of a listing's cursor, which names a place, a queue and a job."""


_encode: Final = msgspec.msgpack.Encoder().encode


def encode_cursor(place: object) -> str:
    return cursor_bytes(place).decode()


def cursor_bytes(place: object) -> bytes:
    return base64.urlsafe_b64encode(_encode(place)).rstrip(b"=")


def decode_cursor(text: str, kind: type[T], most_characters: int = MOST_CHARACTERS) -> T:
    """Raises ValueError for what `encode_cursor` did not make of this kind.

    A text that is too long is not looked at: whoever sends it pays nothing for its decoding.
    """
    if len(text) > most_characters:
        raise ValueError(f"a cursor of {len(text)} characters")
    try:
        return msgspec.msgpack.decode(
            base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), type=kind
        )
    except UNREADABLE as error:
        raise ValueError("not a cursor") from error
