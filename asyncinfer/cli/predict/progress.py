"""The progress bar of `predict`, on stderr if that is a terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID


class ProgressDisplay:
    """The progress of a run; this base class shows nothing."""

    def advance(self, *, failed: bool) -> None:
        """Counts one row that is done; `failed` if it has an error."""
        pass


class _BarProgress(ProgressDisplay):
    """A bar that also shows the number of failed rows."""

    def __init__(self, bar: "Bar", task: "TaskID") -> None:
        self._bar = bar
        self._task = task
        self._failed = 0

    def advance(self, *, failed: bool) -> None:
        """Moves the bar by one row, and counts it as failed if it has an error."""
        self._failed += failed
        text = f"{self._failed:,} failed" if self._failed else ""
        self._bar.update(self._task, advance=1, failed=text)


@contextmanager
def progress(total: int | None, file_format: str, output: str | None) -> Iterator[ProgressDisplay]:
    """Shows a bar for `total` rows on stderr until the end of the block; yields its counter.

    `total` None is an unknown number. There is no bar in a pipe, or if the results scroll by on the
    terminal. `file_format` is the format of the output, and `output` its file, None for stdout.
    """
    to_terminal = output is None and sys.stdout.isatty()
    if not sys.stderr.isatty() or (to_terminal and file_format != "table"):
        yield ProgressDisplay()
        return
    with _bar(redirect_stdout=to_terminal) as bar:
        yield _BarProgress(bar, bar.add_task("rows", total=total, failed=""))


def _bar(*, redirect_stdout: bool) -> Any:
    """A bar of rich on stderr that disappears at its end, and is not shown yet."""
    from rich import progress as rich_progress

    from asyncinfer.cli.output import console

    return rich_progress.Progress(
        rich_progress.TextColumn("{task.completed:,.0f} rows"),
        rich_progress.BarColumn(bar_width=30),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("[red]{task.fields[failed]}"),
        console=console(stderr=True),
        redirect_stdout=redirect_stdout,
        transient=True,
    )
