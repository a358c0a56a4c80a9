"""The lines of a stream of bytes that arrives in chunks of any size."""

from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import Final

from msgspec import Struct

_BLANK: Final = b" \t\r"


class Line(Struct, frozen=True):
    """A line that is not blank. `number` counts all lines, from 1; `text` is None if the line was
    longer than allowed."""

    number: int
    text: bytes | None


class LineSplitter:
    """Splits chunks at line ends. Of a line that has not ended it holds at most `max_bytes`. One
    object for each stream."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._number = 0
        self._partial: list[bytes] = []
        """The pieces of the line that has not ended yet."""
        self._partial_bytes = 0

    @property
    def partial_bytes(self) -> int:
        """Bytes held of the line that has not ended yet."""
        return min(self._partial_bytes, self._max_bytes) if self._partial else 0

    def cut(self, data: bytes) -> Iterator[Line]:
        """Yields the lines that end in `data`, without line ends; take them all before the next
        call. Blank lines are counted, but not yielded."""
        *ended, partial = data.split(b"\n")
        if ended:
            self._extend_partial(ended[0])
            yield from self._end_partial()
            for piece in ended[1:]:
                if piece:
                    yield from self._line(piece)
                else:
                    self._number += 1
        self._extend_partial(partial)

    def rest(self) -> Iterator[Line]:
        """Yields the last line, if the stream did not end with a line end; call it after the last
        `cut`."""
        yield from self._end_partial()

    def _extend_partial(self, piece: bytes) -> None:
        """Adds a piece to the line that has not ended; drops the text of one that is too long."""
        self._partial_bytes += len(piece)
        # One byte more than allowed may still be the `\r` of the line end.
        if self._partial_bytes > self._max_bytes + 1:
            self._partial.clear()
        elif piece:
            self._partial.append(piece)

    def _end_partial(self) -> Iterator[Line]:
        """Yields the line whose end was reached, and begins an empty one."""
        if self._partial_bytes > self._max_bytes + 1:
            self._number += 1
            yield Line(self._number, None)
        else:
            pieces = self._partial
            yield from self._line(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        self._partial, self._partial_bytes = [], 0

    def _line(self, text: bytes) -> Iterator[Line]:
        """Counts a line and yields it, unless it is blank."""
        self._number += 1
        text = text.removesuffix(b"\r")
        if self._number == 1:  # a byte order mark alone is a blank line
            text = text.removeprefix(BOM_UTF8)
        if len(text) > self._max_bytes:
            yield Line(self._number, None)
        elif text.strip(_BLANK):
            yield Line(self._number, text)
