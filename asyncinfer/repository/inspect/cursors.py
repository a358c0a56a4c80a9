"""Cursors: the place where a listing or a stream stopped, as text for the next request."""

import base64
from typing import Final, TypeVar

import msgspec

from asyncinfer.errors import InvalidQuery
from asyncinfer.untrusted.decoding import DECODE_ERRORS

T = TypeVar("T")

MAX_CURSOR_CHARACTERS: Final = 4096
"""The longest cursor of a listing, which names a place, a queue and a job."""

_encode: Final = msgspec.msgpack.Encoder().encode


def encode_cursor(place: object) -> str:
    """`place` is a struct; the cursor is base64 text that is safe in a URL."""
    return cursor_bytes(place).decode()


def cursor_bytes(place: object) -> bytes:
    return base64.urlsafe_b64encode(_encode(place)).rstrip(b"=")


def parse_cursor(text: str | None, kind: type[T]) -> T | None:
    """The place in a cursor of a listing, None without one. Raises InvalidQuery for any other
    text."""
    if text is None:
        return None
    try:
        return decode_cursor(text, kind)
    except ValueError as error:
        raise InvalidQuery(
            "`cursor` is not one that this path gave for this query; leave it out to start at the "
            "newest."
        ) from error


def decode_cursor(text: str, kind: type[T], max_characters: int = MAX_CURSOR_CHARACTERS) -> T:
    """The place, of the type `kind`, in a cursor. Raises ValueError for any other text.

    A text that is too long is not decoded: it would cost its sender nothing.
    """
    if len(text) > max_characters:
        raise ValueError(f"a cursor of {len(text)} characters")
    try:
        return msgspec.msgpack.decode(
            base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), type=kind
        )
    except DECODE_ERRORS as error:
        raise ValueError("not a cursor") from error
