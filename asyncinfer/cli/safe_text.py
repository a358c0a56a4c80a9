"""Text and consoles of rich that escape control characters and read no string as markup.

They escape in pipes too, since `asyncinfer jobs | head` ends on a terminal; programs read --json or
--to.
"""

from typing import Any

from rich.console import Console
from rich.style import Style
from rich.text import Text

from asyncinfer.untrusted.printable import printable


class SafeConsole(Console):
    """A console that escapes each string it prints, cells and titles included.

    Rich measures and draws every string by way of `render_str`.
    """

    def render_str(self, text: str, **more: Any) -> Text:
        """The string as escaped Text, without markup or emoji codes, whatever `more` says."""
        return super().render_str(printable(text), **{**more, "markup": False, "emoji": False})


class SafeText(Text):
    """Text of rich that escapes control characters of all strings it is made of."""

    def __init__(self, text: str = "", style: str | Style = "", **more: Any) -> None:
        super().__init__(printable(text), style, **more)

    def append(self, text: "Text | str", style: "str | Style | None" = None) -> "SafeText":
        """Adds text, in a style if it is a string, and returns this same object."""
        super().append(printable(text) if isinstance(text, str) else text, style)
        return self
