"""Where a listing or a stream stopped, as text that a client hands back to go on."""

import base64
from typing import TypeVar

import msgspec

T = TypeVar("T")


def encode_cursor(place: object) -> str:
    return base64.urlsafe_b64encode(msgspec.msgpack.encode(place)).decode().rstrip("=")


def decode_cursor(text: str, kind: type[T]) -> T:
    """Raises ValueError for what `encode_cursor` did not make of this kind."""
    try:
        return msgspec.msgpack.decode(
            base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), type=kind
        )
    except msgspec.DecodeError as error:
        raise ValueError(text) from error
