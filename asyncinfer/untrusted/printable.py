"""Text from elsewhere, with visible escapes for characters that control a terminal or reorder text.

A job's result, a model's description or an external job's status may hold any character. A terminal
obeys C0, DEL and C1 controls (ECMA-48; U+009B alone begins a sequence in UTF-8), bidirectional
controls change the order in which a line is read (CVE-2021-42574), and U+2028 and U+2029 break it.
"""

import os
from typing import Final

_CONTROLS: Final = (*range(0x20), *range(0x7F, 0xA0))
_BIDIRECTIONAL: Final = (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_UNSAFE: Final = (*_CONTROLS, *_BIDIRECTIONAL, 0x2028, 0x2029)
_LAYOUT: Final = "\n\t"
_MAX_NAME_CHARACTERS: Final = 80

_ONE_LINE: Final = {code: repr(chr(code))[1:-1] for code in _UNSAFE}
_TEXT: Final = {code: escape for code, escape in _ONE_LINE.items() if chr(code) not in _LAYOUT}
_JSON: Final = {code: f"\\u{code:04x}" for code in _TEXT}


def printable(text: str) -> str:
    """The text with unsafe characters as visible escapes, such as `\\x1b`; line ends and tabs
    stay."""
    return text if _is_plain(text) else text.translate(_TEXT)


def printable_line(text: str) -> str:
    """The text with unsafe characters as visible escapes, line ends and tabs too (`\\n`, `\\t`), so
    that it stays on one line and cannot fake a second one."""
    return text if _is_plain(text) else text.translate(_ONE_LINE)


def printable_name(name: str, max_characters: int = _MAX_NAME_CHARACTERS) -> str:
    """The name of a file or a job on one line, cut after `max_characters` with an ellipsis; bytes
    that are not UTF-8 are shown as `\\xff`."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return printable_line(text if len(text) <= max_characters else f"{text[:max_characters]}…")


def printable_json(text: str) -> str:
    """JSON text with unsafe characters escaped. Its value stays the same: the JSON that asyncinfer
    writes has such characters only inside strings, where an escape means the same character."""
    return text if _is_plain(text) else text.translate(_JSON)


def _is_plain(text: str) -> bool:
    """True if no character needs an escape, as in printable ASCII. False means that some may."""
    return text.isascii() and text.isprintable()
