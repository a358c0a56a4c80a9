"""A stream of bytes as its lines, however it was split on its way."""

from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import Final

from msgspec import Struct

_BLANK: Final = b" \t\r"


class Line(Struct, frozen=True):
    """A line that is not blank. `number` counts all of them, from 1; `text` is None where it was
    longer than allowed."""

    number: int
    text: bytes | None


class Lines:
    """Cuts what comes at line ends. A line without one is held only up to `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._number = 0
        self._begun: list[bytes] = []
        """The pieces of the line that has not ended yet."""
        self._begun_bytes = 0

    def cut(self, data: bytes) -> Iterator[Line]:
        """The lines that end in `data`."""
        *ended, begun = data.split(b"\n")
        if ended:
            self._begin(ended[0])
            yield from self._end()
            for piece in ended[1:]:
                if piece:
                    yield from self._line(piece)
                else:
                    self._number += 1
        self._begin(begun)

    def rest(self) -> Iterator[Line]:
        """The last line, which may come without an end."""
        yield from self._end()

    def _begin(self, piece: bytes) -> None:
        self._begun_bytes += len(piece)
        # One byte more than allowed may still be the `\r` of its end.
        if self._begun_bytes > self._max_bytes + 1:
            self._begun.clear()
        elif piece:
            self._begun.append(piece)

    def _end(self) -> Iterator[Line]:
        if self._begun_bytes > self._max_bytes + 1:
            self._number += 1
            yield Line(self._number, None)
        else:
            pieces = self._begun
            yield from self._line(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        self._begun, self._begun_bytes = [], 0

    def _line(self, text: bytes) -> Iterator[Line]:
        self._number += 1
        text = text.removesuffix(b"\r")
        if self._number == 1:  # a byte order mark alone is a blank line
            text = text.removeprefix(BOM_UTF8)
        if len(text) > self._max_bytes:
            yield Line(self._number, None)
        elif text.strip(_BLANK):
            yield Line(self._number, text)
