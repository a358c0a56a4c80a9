"""How far a client has read the changes, as text from which any process can continue."""

from typing import Annotated, Final

from msgspec import Meta, Struct

from asyncinfer.errors import InvalidQuery
from asyncinfer.repository.inspect.cursors import cursor_bytes, decode_cursor
from asyncinfer.repository.inspect.log import Place

_MAX_CHARACTERS: Final = 32 << 10
"""A position may name hundreds of queues; a header has the same limit."""

_BASE_CHARACTERS: Final = 16


class Position(Struct, frozen=True, array_like=True):
    """How far a follower has been sent changes, over all queues."""

    base_ms: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    """Older changes have been sent, in every queue."""
    acknowledged: dict[str, Place] = {}
    """By queue, the place up to which changes have been sent, if later than `base_ms`."""
    ended: int = 0
    """For a job, the round whose end was sent; for a group, 1 once its `done` was sent; else 0."""


def encode_position(position: Position) -> bytes:
    """The position as the text of an event's id."""
    return cursor_bytes(position)


def split_position(position: Position) -> tuple[bytes, bytes]:
    """`encode_position` in two parts, of which the second does not depend on the base.

    MessagePack has one byte for the array and nine for a base of more than 32 bits, which any time
    since February 1970 has; with the next two bytes they are 16 characters of Base64. A smaller
    base is not split: the second part is empty.
    """
    text = encode_position(position)
    split = _BASE_CHARACTERS if position.base_ms >> 32 else len(text)
    return text[:split], text[split:]


def decode_position(text: str) -> Position:
    """Returns the position in an event's id. Raises InvalidQuery if the text is not a position."""
    try:
        return decode_cursor(text, Position, _MAX_CHARACTERS)
    except ValueError as error:
        raise InvalidQuery(
            "Last-Event-ID (or `last_event_id`) is not the id of an event of this server; leave "
            "it out to begin with a snapshot."
        ) from error
