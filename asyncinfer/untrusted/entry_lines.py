"""Files that have an entry in each line: which lines count, and which are broken."""

import codecs
from collections.abc import Iterator

from msgspec import Struct


class BrokenLine(Struct, frozen=True):
    """A line that is ignored; `number` counts from 1. Its text is not kept: it may be a secret."""

    number: int
    reason: str


def numbered_lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """The lines that are neither empty nor comments, with their numbers from 1."""
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith(b"#"):
            yield number, line


def three_words(line: bytes) -> tuple[str, str, str]:
    """The first three words of a line, empty where it has fewer; what follows is a comment. Raises
    ValueError, which does not repeat the line, if it is not UTF-8."""
    try:
        first, second, third, *_ = [*line.decode().split(), "", "", ""]
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    return first, second, third
