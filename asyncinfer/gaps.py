"""NaN and the infinities in JSON, which has no numbers for them.

They are the strings "NaN", "Infinity" and "-Infinity", as in ProtoJSON, in results and in inputs;
an input may have null for NaN, as most other writers of JSON have.
"""

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

WORDS: Final = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

_TOKENS: Final = (b'"NaN"', b'"Infinity"', b'"-Infinity"', b"null")
_ZERO: Final = b" 0 "
"""With spaces, so that it stands only where the whole element was the word: `1null` is no `10`."""

_IRREGULAR: Final = "its arrays are not of equal lengths and depths"


def is_gap(element: object) -> bool:
    """Whether a parsed element stands for NaN or an infinity."""
    return element is None or (type(element) is str and element in WORDS)


def with_zeros(text: bytes) -> bytes:
    """JSON with a zero for each word, to be read as numbers; the text itself if it has none."""
    for token in _TOKENS:
        text = text.replace(token, _ZERO)
    return text


def put_back(array: npt.NDArray[Any], text: bytes) -> None:
    """Gives the elements that `with_zeros` replaced in `text` their values.

    `array` was read from that, so the text is numbers and words alone: the number of an element is
    how many commas come before it, and one letter tells each word from all else. Raises ValueError
    unless that is so.
    """
    codes = np.frombuffer(text, np.uint8)
    commas = np.flatnonzero(codes == ord(","))
    if array.size != len(commas) + 1:
        raise ValueError(_IRREGULAR)
    elements = array.reshape(-1)
    for letter in b"au":
        elements[np.searchsorted(commas, np.flatnonzero(codes == letter))] = math.nan
    infinite = np.flatnonzero(codes == ord("I"))
    is_negative = codes[infinite - 1] == ord("-")
    elements[np.searchsorted(commas, infinite)] = np.where(is_negative, -math.inf, math.inf)


def in_words(value: Any) -> Any:
    """Nested lists and tables with a word for each number that JSON does not have."""
    if isinstance(value, dict):
        return {name: in_words(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [in_words(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
