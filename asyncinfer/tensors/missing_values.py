"""NaN and the infinities in JSON, which has no numbers for them.

They are the strings "NaN", "Infinity" and "-Infinity", as in ProtoJSON, in results and in inputs;
an input may have null for NaN, as most other writers of JSON have.
"""

import math
from typing import Any, Final

WORDS: Final = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

_TOKENS: Final = (b'"NaN"', b'"Infinity"', b'"-Infinity"', b"null")
_ZERO: Final = b" 0 "
"""With spaces, so that it stands only where the whole element was the word: `1null` is no `10`."""


def is_gap(element: object) -> bool:
    """Whether a parsed element stands for NaN or an infinity."""
    return element is None or (type(element) is str and element in WORDS)


def with_zeros(text: bytes) -> bytes:
    """JSON with a zero for each word, to be read as numbers; the text itself if it has none."""
    for token in _TOKENS:
        text = text.replace(token, _ZERO)
    return text


def in_words(value: Any) -> Any:
    """Nested lists and tables with a word for each number that JSON does not have."""
    if isinstance(value, dict):
        return {name: in_words(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [in_words(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
