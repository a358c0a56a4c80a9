"""Reads bytes that anyone may have written: what Redis holds, and what clients hand back.

No function here raises, whatever the bytes are. What cannot be read comes back as None, or as
text with a replacement character where a person is to see that something was there.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from math import isfinite
from typing import Final, TypeVar

T = TypeVar("T")

UNREADABLE: Final = (ValueError, RecursionError, OverflowError, MemoryError)
"""All that msgspec and Python's own converters raise for content. A DecodeError and a
UnicodeDecodeError are ValueErrors; a document that is nested deep is a RecursionError."""

LAST_MS: Final = 253_402_300_799_999
"""The last millisecond of the year 9999, which is the last that RFC 3339 can write."""

_MOST_DIGITS: Final = 19


def reader(decode: Callable[[bytes], T]) -> Callable[[bytes | None], T | None]:
    """A decoder that returns None for bytes that are missing or corrupt."""

    def read(stored: bytes | None) -> T | None:
        if stored is None:
            return None
        try:
            return decode(stored)
        except UNREADABLE:
            return None

    return read


def text(stored: bytes) -> str:
    """Text to be shown: JSON can carry it, whatever the bytes were."""
    return stored.decode("utf-8", "replace")


def name(stored: bytes | None) -> str | None:
    """The name of something that is looked up by it; None where the bytes are not UTF-8.

    No release of ours makes such a name, and JSON could not carry it.
    """
    if stored is None:
        return None
    try:
        return stored.decode()
    except UnicodeDecodeError:
        return None


def whole_number(stored: bytes) -> int | None:
    """A number of at most 19 digits without a sign."""
    return int(stored) if stored.isdigit() and len(stored) <= _MOST_DIGITS else None


def finite(stored: bytes | float | None) -> float | None:
    """A number that is neither infinite nor NaN."""
    if stored is None:
        return None
    try:
        number = float(stored)
    except UNREADABLE:
        return None
    return number if isfinite(number) else None


def time(time_ms: float | None) -> datetime | None:
    """Milliseconds since 1970 as a time; None outside of the years 1 to 9999."""
    if time_ms is None:
        return None
    try:
        return datetime.fromtimestamp(time_ms / 1000, UTC)
    except (*UNREADABLE, OSError):
        return None
