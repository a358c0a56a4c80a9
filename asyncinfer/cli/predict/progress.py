"""The progress bar of `predict`, on stderr if that is a terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID


class Progress:
    """Shows nothing."""

    def advance(self, *, failed: bool) -> None:
        pass


class _BarProgress(Progress):
    def __init__(self, bar: "Bar", task: "TaskID") -> None:
        self._bar = bar
        self._task = task
        self._failed = 0

    def advance(self, *, failed: bool) -> None:
        self._failed += failed
        text = f"{self._failed:,} failed" if self._failed else ""
        self._bar.update(self._task, advance=1, failed=text)


@contextmanager
def progress(total: int | None, file_format: str, output: str | None) -> Iterator[Progress]:
    """A bar for `total` rows; none in a pipe, or if the results scroll by on the terminal.

    `file_format` is the format of the output, and `output` its file, None for stdout.
    """
    to_terminal = output is None and sys.stdout.isatty()
    if not sys.stderr.isatty() or (to_terminal and file_format != "table"):
        yield Progress()
        return
    with _bar(redirect_stdout=to_terminal) as bar:
        yield _BarProgress(bar, bar.add_task("rows", total=total, failed=""))


def _bar(*, redirect_stdout: bool) -> Any:
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
