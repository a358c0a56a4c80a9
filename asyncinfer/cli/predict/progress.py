"""The progress bar of `predict`, on stderr if that is a terminal."""

import contextlib
import sys
from collections.abc import Iterator
from typing import IO, Any, Final

from asyncinfer.client import ProgressBar

_LOOK: Final[dict[str, Any]] = {
    "bar_format": "{n:,} rows {elapsed}<{remaining}{postfix} |{bar:30}|",
    "dynamic_ncols": True,
    "leave": False,
}


class _AboveBar:
    """A stream to a terminal; the lines that are written to it appear above the bar."""

    def __init__(self, stream: IO[str], bar: ProgressBar) -> None:
        self._stream = stream
        self._bar = bar

    def write(self, lines: str) -> int:
        """Writes whole lines; the bar would cover the start of one that goes on."""
        with self._bar.hidden():
            return self._stream.write(lines)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def progress(
    total: int | None, file_format: str, output: str | None
) -> Iterator[ProgressBar | None]:
    """Shows a bar for `total` rows on stderr until the end of the block; yields it.

    `total` None is an unknown number. There is no bar in a pipe, or if the results scroll by on the
    terminal: then it yields None. `file_format` is the format of the output, and `output` its file,
    None for stdout.
    """
    to_terminal = output is None and sys.stdout.isatty()
    if not sys.stderr.isatty() or (to_terminal and file_format != "table"):
        yield None
        return
    bar = ProgressBar(total, **_LOOK)
    stdout: Any = _AboveBar(sys.stdout, bar) if to_terminal else sys.stdout
    stderr: Any = _AboveBar(sys.stderr, bar)
    with (
        contextlib.closing(bar),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        yield bar
