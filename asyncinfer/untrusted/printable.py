"""Text from elsewhere without the characters that command a terminal or reorder a line.

A job's result, a model's description or a stranger's status may hold any character. A terminal
obeys C0, DEL and C1 controls (ECMA-48; U+009B alone begins a sequence in UTF-8), bidirectional
controls change the order in which a line is read (CVE-2021-42574), and U+2028 and U+2029 break it.
"""

import os
from typing import Final

_CONTROLS: Final = (*range(0x20), *range(0x7F, 0xA0))
_BIDIRECTIONAL: Final = (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_UNSAFE: Final = (*_CONTROLS, *_BIDIRECTIONAL, 0x2028, 0x2029)
_LAYOUT: Final = "\n\t"
_LONGEST_NAME: Final = 80

_ONE_LINE: Final = {code: repr(chr(code))[1:-1] for code in _UNSAFE}
_TEXT: Final = {code: shown for code, shown in _ONE_LINE.items() if chr(code) not in _LAYOUT}
_JSON: Final = {code: f"\\u{code:04x}" for code in _TEXT}


def printable(text: str) -> str:
    """Unsafe characters as visible escapes, such as `\\x1b`; line ends and tabs stay."""
    return text if _is_plain(text) else text.translate(_TEXT)


def printable_line(text: str) -> str:
    """The same on one line: a line end becomes `\\n`, so that no text can forge a second line."""
    return text if _is_plain(text) else text.translate(_ONE_LINE)


def printable_name(name: str) -> str:
    """The name of a file on one line, bounded, and such that UTF-8 can carry it: bytes that are
    none of it are shown as `\\xff`."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return printable_line(text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}…")


def printable_json(text: str) -> str:
    """JSON of the same value: outside its strings, where an escape means the same character, the
    JSON that we write has none of these."""
    return text if _is_plain(text) else text.translate(_JSON)


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable()
