"""The progress of many rows: a bar in a terminal or notebook, or the log. The only door to tqdm."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol

from asyncinfer.client._arguments import checks_arguments
from asyncinfer.untrusted.printable import printable_line

_log: Final = logging.getLogger("asyncinfer.client")


class Progress(Protocol):
    def advance(self, rows: int, errors: int = 0) -> None:
        """Counts rows that are done, `errors` of them with an error."""

    def say(self, line: str) -> None:
        """Reports why no results come, or that they come again."""

    def close(self) -> None:
        """Removes or completes the bar; call it once, at the end."""


class LogProgress:
    """Reports to the log, without a bar."""

    def advance(self, rows: int, errors: int = 0) -> None:
        """Does nothing."""

    def say(self, line: str) -> None:
        """Writes the line to the log as a warning."""
        _log.warning("%s", printable_line(line))

    def close(self) -> None:
        """Does nothing."""


class ProgressBar:
    """A bar on stderr of the rows that are done, their rate, and the time that is left.

        bar = ProgressBar(len(rows), "flowers")
        for result in client.map(rows, progress=False):
            bar.advance(1)
        bar.close()

    `total` is the number of rows, None if that is unknown; `title` stands before the bar. `look`
    are more arguments of tqdm: with `leave=False` the bar disappears when it is closed.
    """

    @checks_arguments
    def __init__(self, total: int | None, title: str = "", **look: Any) -> None:
        with warnings.catch_warnings():
            # A notebook without widgets gets a bar of text, and tqdm warns of that.
            warnings.simplefilter("ignore")
            from tqdm.auto import tqdm

            self._bar: Any = tqdm(total=total, desc=title, unit="row", unit_scale=True, **look)
        self._errors = 0

    def advance(self, rows: int, errors: int = 0) -> None:
        """Moves the bar, and shows the number of all errors so far if it has changed."""
        if errors:
            self._errors += errors
            self._bar.set_postfix(errors=self._errors, refresh=False)
        self._bar.update(rows)

    def say(self, line: str) -> None:
        """Prints the line on stderr, above the bar; also from another thread."""
        self._bar.write(printable_line(line), file=sys.stderr)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Takes the bar off the screen for a block that writes to it; also in another thread."""
        with self._bar.external_write_mode(file=self._bar.fp):
            yield

    def close(self) -> None:
        """Shows all rows that are done, and ends the bar."""
        self._bar.refresh()
        self._bar.close()
