"""Numbers in the cells of a table, and what is wrong with a cell that has none."""

import contextlib
import math
import re
from typing import Final

_SHOWN_CHARACTERS: Final = 40
_MISSING: Final = frozenset({"", "nan", "na", "n/a", "#n/a", "<na>", "null", "none"})
"""The texts of a missing value, in lower case, as pandas and R write them."""
_INFINITE: Final = {word: float(word) for word in ("inf", "infinity", "-inf", "-infinity")}
_DECIMAL_COMMA: Final = re.compile(r"[+-]?\d+,\d+(e[+-]?\d+)?", re.IGNORECASE)
_SEPARATORS: Final = ("\t", ";", "|", " ", ",")


BEYOND_ALL_NUMBERS: Final = "is beyond the largest number, 1.8e308"
"""What is wrong with a text such as `1e400`."""


class WordCell(ValueError):
    """A cell is neither a number nor like one."""


def parse_cell(text: str) -> int | float | None:
    """The number in a cell, which may be an infinity; None for a missing value, as `NaN` or `NA`.

    Raises ValueError if the cell has something else, a WordCell if that is not like a number. The
    model may refuse a missing value.
    """
    word = text.strip().lower()
    if word in _MISSING:
        return None
    value = parse_number(word)
    if value is None and word not in _INFINITE:
        raise _cell_error(text, word)
    return _INFINITE[word] if value is None else value


def parse_number(word: str) -> int | float | None:
    """An int or a float; None if the word is no number, or one that JSON has not, as `inf`."""
    with contextlib.suppress(ValueError):
        return int(word)
    with contextlib.suppress(ValueError):
        value = float(word)
        return value if abs(value) < float("inf") else None
    return None


def separator_in(text: str) -> str | None:
    """The character that separates several numbers in a text; None if it is anything else."""
    for separator in _SEPARATORS:
        parts = text.split(separator)
        if len(parts) > 1 and all(is_like_number(part) for part in parts):
            return separator
    return None


def separator_word(separator: str) -> str:
    """A separator as --separator takes it."""
    return "tab" if separator == "\t" else f"'{separator}'"


def is_like_number(text: str) -> bool:
    """Whether a text is a number, also one with a decimal comma or out of range."""
    word = text.strip()
    return parse_number(word) is not None or _near_number(word) is not None


def _near_number(word: str) -> str | None:
    """Why a word is no number although it is like one; None if it is not."""
    if _DECIMAL_COMMA.fullmatch(word):
        return "has a decimal comma; write a point"
    with contextlib.suppress(ValueError):
        if word[-1:].isdigit() and math.isinf(float(word)):
            return BEYOND_ALL_NUMBERS
    return None


def _cell_error(text: str, word: str) -> ValueError:
    """The error for a cell without a number; `word` is its text in lower case, without blanks."""
    shown = repr(text[:_SHOWN_CHARACTERS])
    if reason := _near_number(word):
        return ValueError(f"{shown} {reason}")
    if separator := separator_in(word):
        named = separator_word(separator)
        return ValueError(
            f"{shown} is no number; if {named} separates the columns, add --separator {named}"
        )
    return WordCell(f"{shown} is no number")
