"""What is wrong with a text that is not JSON, and where."""

import re
from typing import Final

_ESCAPE = re.compile(rb"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)
_HIGH: Final = range(0xD800, 0xDC00)
_LOW: Final = range(0xDC00, 0xE000)
_PREFIX: Final = "JSON is malformed: "
_TRUNCATED: Final = "Input data was truncated"
_OF_HALF_A_PAIR: Final = ("surrogate pair", "hex escape", _TRUNCATED)
"""What msgspec says of half a surrogate pair, as of other faults."""


def parse_problem(error: Exception, text: bytes) -> str:
    """What msgspec's error about a text means, and at which byte. The error may be a DecodeError,
    UnicodeDecodeError or RecursionError."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start})"
    message = str(error).removeprefix(_PREFIX)
    if any(words in message for words in _OF_HALF_A_PAIR) and (found := _half_pair(text)):
        escape, place = found
        return (
            f"the escape {escape} is half of a surrogate pair, and no character by itself "
            f"(byte {place})"
        )
    return f"truncated (byte {len(text)})" if message == _TRUNCATED else message


def _half_pair(text: bytes) -> tuple[str, int] | None:
    """The first escape of a surrogate without its other half, and its place; None without one."""
    open_high: re.Match[bytes] | None = None
    for escape in _ESCAPE.finditer(text):
        unit = int(escape[1], 16) if escape[1] else 0
        if open_high:
            if unit in _LOW and escape.start() == open_high.end():
                open_high = None
                continue
            break
        if unit in _LOW:
            open_high = escape
            break
        if unit in _HIGH:
            open_high = escape
    return open_high and (open_high[0].decode(), open_high.start())
