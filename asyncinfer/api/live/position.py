"""How far a client was told of changes, as text that any process can go on from."""

from typing import Annotated, Final

from msgspec import Meta, Struct

from asyncinfer.errors import InvalidQuery
from asyncinfer.repository.inspect.cursors import cursor_bytes, decode_cursor
from asyncinfer.repository.inspect.log import Place

_MOST_CHARACTERS: Final = 32 << 10
"""A position may name hundreds of queues; a header is no longer than this either."""


_BASE_CHARACTERS: Final = 16


class Position(Struct, frozen=True, array_like=True):
    """How far a follower was told, over all queues; any process can go on from it."""

    base_ms: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    """What is older has been told, in every queue."""
    told: dict[str, Place] = {}
    """By queue, where it is later than that."""
    ended: int = 0
    """The round whose end was told, of a job; 1 when that of a group was."""


def encode_position(position: Position) -> bytes:
    return cursor_bytes(position)


def split_position(position: Position) -> tuple[bytes, bytes]:
    """`encode_position` in two parts, of which the second does not depend on the base.

    MessagePack has one byte for the array and nine for a base of more than 32 bits, which any since
    1970 is; with two of what follows they are 16 characters of Base64. A lesser base is not split.
    """
    text = encode_position(position)
    split = _BASE_CHARACTERS if position.base_ms >> 32 else len(text)
    return text[:split], text[split:]


def decode_position(text: str) -> Position:
    """Raises InvalidQuery when it is none."""
    try:
        return decode_cursor(text, Position, _MOST_CHARACTERS)
    except ValueError as error:
        raise InvalidQuery(
            "Last-Event-ID (or `last_event_id`) is not the id of an event of this server; leave "
            "it out to begin with a snapshot."
        ) from error
