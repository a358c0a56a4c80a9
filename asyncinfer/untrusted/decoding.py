"""Decoders for bytes that anyone may have written: values in Redis, and cursors of clients.

No function here raises, whatever the bytes are. Unreadable bytes become None, or text with
replacement characters if people should see that something was there.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from math import isfinite
from typing import Final, TypeVar

T = TypeVar("T")

DECODE_ERRORS: Final = (ValueError, RecursionError, OverflowError, MemoryError)
"""All errors that msgspec and Python's converters raise for bad content. DecodeError and
UnicodeDecodeError are ValueErrors; a deeply nested document raises RecursionError."""

MAX_TIME_MS: Final = 253_402_300_799_999
"""The last millisecond of the year 9999, the last that RFC 3339 can express."""

_MAX_DIGITS: Final = 19


def lenient_decoder(decode: Callable[[bytes], T]) -> Callable[[bytes | None], T | None]:
    """A version of `decode` that returns None for missing or corrupt bytes, and never raises. It
    catches the errors in DECODE_ERRORS."""

    def read(stored: bytes | None) -> T | None:
        if stored is None:
            return None
        try:
            return decode(stored)
        except DECODE_ERRORS:
            return None

    return read


def text(stored: bytes) -> str:
    """Text for people: bytes that are not UTF-8 become replacement characters."""
    return stored.decode("utf-8", "replace")


def name(stored: bytes | None) -> str | None:
    """A name that is used as a key; None if the bytes are missing or not UTF-8.

    No release of asyncinfer writes such a name, and JSON could not carry it.
    """
    if stored is None:
        return None
    try:
        return stored.decode()
    except UnicodeDecodeError:
        return None


def whole_number(stored: bytes) -> int | None:
    """The value of at most 19 digits without a sign; None for anything else."""
    return int(stored) if stored.isdigit() and len(stored) <= _MAX_DIGITS else None


def finite(stored: bytes | float | None) -> float | None:
    """The number, parsed if it comes as bytes; None if it is missing, unreadable, infinite or
    NaN."""
    if stored is None:
        return None
    try:
        number = float(stored)
    except DECODE_ERRORS:
        return None
    return number if isfinite(number) else None


def time(time_ms: float | None) -> datetime | None:
    """The UTC time of milliseconds since 1970; None outside of the years 1 to 9999."""
    if time_ms is None:
        return None
    try:
        return datetime.fromtimestamp(time_ms / 1000, UTC)
    except (*DECODE_ERRORS, OSError):
        return None
