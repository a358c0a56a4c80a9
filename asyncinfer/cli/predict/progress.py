"""How far it is, on stderr where that is a terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID


class Progress:
    """Counts, and shows nothing."""

    def advance(self, *, failed: bool) -> None:
        pass


class _Shown(Progress):
    def __init__(self, bar: "Bar", task: "TaskID") -> None:
        self._bar = bar
        self._task = task
        self._failed = 0

    def advance(self, *, failed: bool) -> None:
        self._failed += failed
        told = f"{self._failed:,} failed" if self._failed else ""
        self._bar.update(self._task, advance=1, failed=told)


@contextmanager
def progress(total: int | None, form: str, output: str | None) -> Iterator[Progress]:
    """Nothing where the answers themselves pass by on the terminal."""
    to_terminal = output is None and sys.stdout.isatty()
    if not sys.stderr.isatty() or (to_terminal and form != "table"):
        yield Progress()
        return
    with _bar(redirect_stdout=to_terminal) as bar:
        yield _Shown(bar, bar.add_task("rows", total=total, failed=""))


def _bar(*, redirect_stdout: bool) -> Any:
    from rich import progress as parts

    from asyncinfer.cli.output import console

    return parts.Progress(
        parts.TextColumn("{task.completed:,.0f} rows"),
        parts.BarColumn(bar_width=30),
        parts.TimeElapsedColumn(),
        parts.TimeRemainingColumn(),
        parts.TextColumn("[red]{task.fields[failed]}"),
        console=console(stderr=True),
        redirect_stdout=redirect_stdout,
        transient=True,
    )
