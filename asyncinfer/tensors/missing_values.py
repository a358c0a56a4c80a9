"""NaN and infinities in JSON, which has no numbers for them.

In inputs and results they are the strings "NaN", "Infinity" and "-Infinity", as in ProtoJSON. An
input may also have null for NaN, because most other JSON writers do.
"""

import math
from typing import Any, Final

NONFINITE_WORDS: Final = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

_TOKENS: Final = (b'"NaN"', b'"Infinity"', b'"-Infinity"', b"null")
_ZERO: Final = b" 0 "
"""With spaces, so that a word next to a digit stays invalid: `1null` does not become `10`."""


def is_missing_value(element: object) -> bool:
    """Whether a parsed JSON element stands for NaN or an infinity: null, or one of
    NONFINITE_WORDS."""
    return element is None or (type(element) is str and element in NONFINITE_WORDS)


def replace_with_zeros(text: bytes) -> bytes:
    """JSON with a zero for each missing value, so that it decodes as numbers.

    Returns the same object if there are none. The length may change. It also replaces them where
    they are strings, so call it for numbers only.
    """
    for token in _TOKENS:
        text = text.replace(token, _ZERO)
    return text


def as_nonfinite_words(value: Any) -> Any:
    """A copy of nested lists and dicts, with a string for each NaN and infinity.

    Tuples become lists; other values are unchanged.
    """
    if isinstance(value, dict):
        return {name: as_nonfinite_words(member) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [as_nonfinite_words(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
