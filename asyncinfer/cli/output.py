"""Output for people and programs: tables, JSON, lines on stdout and stderr, values with units."""

import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec

from asyncinfer.untrusted.printable import printable, printable_json, printable_line

if TYPE_CHECKING:
    from rich.table import Table

    from asyncinfer.cli.safe_text import SafeConsole, SafeText

_PIPE_WIDTH: Final = 100_000
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


def console(*, stderr: bool = False) -> "SafeConsole":
    """A new console for stdout or stderr, which escapes control characters.

    In a pipe it has no colour and does not wrap; NO_COLOR is honoured.
    """
    from asyncinfer.cli.safe_text import SafeConsole

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return SafeConsole(file=stream, width=width, highlight=False, emoji=False, markup=False)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, numeric: Iterable[str] = ()
) -> "Table":
    """A table for rich to print; columns named in `numeric` are aligned to the right.

    A cell is text, a rich renderable or a value shown by `str`; None and "" become a dash.
    """
    from rich.table import Table

    result = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    right = set(numeric)
    for column in columns:
        result.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        result.add_row(*map(_cell, row))
    return result


def show(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, numeric: Iterable[str] = ()
) -> None:
    """Prints a table on stdout; the arguments are those of `table`."""
    print_table(table(columns, rows, numeric=numeric))


def show_facts(rows: Iterable[Sequence[object]]) -> None:
    """Prints pairs of a name and a value on stdout, without a header."""
    facts = table(("", ""), rows)
    facts.show_header = False
    print_table(facts)


def print_table(printed: "Table") -> None:
    """Prints a table on stdout; in a pipe without the spaces that fill up the last column."""
    target = console()
    if target.is_terminal:
        target.print(printed)
        return
    with target.capture() as captured:
        target.print(printed)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))
    sys.stdout.flush()


def styled(text: str, style: str) -> "SafeText":
    """Text in a style of rich; control characters are escaped."""
    from asyncinfer.cli.safe_text import SafeText

    return SafeText(text, style)


def say_json(value: Any) -> None:
    """Prints a value on stdout as JSON, indented for people and diffs; also structs of msgspec."""
    _say_json(msgspec.json.format(msgspec.json.encode(value), indent=2))


def say_json_line(value: Any) -> None:
    """Prints a value on stdout as JSON in one line, and flushes."""
    _say_json(msgspec.json.encode(value))


def _say_json(content: bytes) -> None:
    """Prints JSON and a line end, and flushes.

    On a terminal control characters become escapes, which decode to the same value.
    """
    text = content.decode()
    sys.stdout.write((printable_json(text) if sys.stdout.isatty() else text) + "\n")
    sys.stdout.flush()


def _cell(value: object) -> Any:
    """A value as rich takes it: None and "" as a dash, a renderable unchanged, else its `str`."""
    if value is None or value == "":
        return "-"
    return value if hasattr(value, "__rich_console__") else str(value)


# --- values --------------------------------------------------------------------------------

STATUS_STYLES: Final = {
    "pending": "yellow",
    "processing": "cyan",
    "completed": "green",
    "failed": "bold red",
    "cancelled": "dim",
    "starting": "yellow",
    "ready": "green",
    "draining": "yellow",
    "hung": "bold red",
}


def status(text: str) -> "SafeText":
    """A status of a job or worker in its colour; one that is not known has no colour."""
    return styled(text, STATUS_STYLES.get(text, ""))


def seconds(value: float | None) -> str | None:
    """A number of seconds as text with a fitting unit, as 850 µs, 12 ms, 3.4 s, 5 min or 2 h.

    None for None.
    """
    if not value:
        return None if value is None else "0 s"
    steps: tuple[tuple[float, float, str], ...] = (
        (0.001, 1e6, "µs"),
        (0.01, 1e3, "ms"),
        (1, 1e3, "ms"),
        (10, 1, "s"),
        (120, 1, "s"),
        (7200, 1 / 60, "min"),
        (172_800, 1 / 3600, "h"),
    )
    digits = {0.01: 1, 10: 1}
    for below, factor, unit in steps:
        if value < below:
            return f"{value * factor:.{digits.get(below, 0)}f} {unit}"
    return f"{value / 86_400:.0f} d"


def size(value: float) -> str:
    """A number of bytes with a binary unit, as `1.5 MiB`."""
    unit = 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    return f"{value:.{1 if unit and value < 10 else 0}f} {_UNITS[unit]}"


def rate(value: float | None) -> str | None:
    """A number per second, with one decimal below 10; None for None."""
    return None if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def ago(moment: datetime | None) -> str:
    """The time since a moment, as `12 s ago`; a dash for None."""
    if moment is None:
        return "-"
    return f"{seconds(max(0.0, (datetime.now(UTC) - moment).total_seconds()))} ago"


def utc(moment: datetime | None) -> str:
    """A moment in UTC to the second, as RFC 3339 writes it; "" for None."""
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z") if moment else ""


def say(text: str) -> None:
    """Writes text to stdout and flushes, without a line end of its own.

    On a terminal control characters become escapes.
    """
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def say_on_stderr(line: str) -> None:
    """Writes one line to stderr, with control characters and line ends inside it escaped."""
    sys.stderr.write(f"{printable_line(line)}\n")


def counted(count: int, thing: str) -> str:
    """A count with its noun, as `1 job` or `2 jobs`."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"
