"""What people see: tables and colour on a terminal, plain text in a pipe, JSON where asked."""

import sys
from collections.abc import Callable, Iterable, Sequence
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
    """Colour and the terminal's width on a terminal, neither in a pipe; NO_COLOR is honoured."""
    from asyncinfer.cli.safe_text import SafeConsole

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return SafeConsole(file=stream, width=width, highlight=False, emoji=False, markup=False)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, numeric: Iterable[str] = ()
) -> "Table":
    """A cell may be text, a rich renderable, or a value to be shown as text; None is a dash."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    right = set(numeric)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(_cell, row))
    return made


def show(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, numeric: Iterable[str] = ()
) -> None:
    _print(table(columns, rows, numeric=numeric))


def show_facts(rows: Iterable[Sequence[object]]) -> None:
    """Names and values of one thing, without a header."""
    made = table(("", ""), rows)
    made.show_header = False
    _print(made)


def _print(made: "Table") -> None:
    """In a pipe no line ends with what fills a column up."""
    to = console()
    if to.is_terminal:
        to.print(made)
        return
    with to.capture() as shown:
        to.print(made)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in shown.get().splitlines()))
    sys.stdout.flush()


def styled(text: str, style: str) -> "SafeText":
    from asyncinfer.cli.safe_text import SafeText

    return SafeText(text, style)


def say_json(value: Any) -> None:
    """One value, indented for people and diffs."""
    _say_json(msgspec.json.format(msgspec.json.encode(value), indent=2))


def say_json_line(value: Any) -> None:
    _say_json(msgspec.json.encode(value))


def _say_json(content: bytes) -> None:
    """In a pipe as it is; what a terminal shows has the same value."""
    text = content.decode()
    sys.stdout.write((printable_json(text) if sys.stdout.isatty() else text) + "\n")
    sys.stdout.flush()


def _cell(value: object) -> Any:
    if value is None or value == "":
        return "-"
    return value if hasattr(value, "__rich_console__") else str(value)


# --- values ----------------------------------------------------------------------------------

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
    return styled(text, STATUS_STYLES.get(text, ""))


def seconds(value: float | None) -> str | None:
    """With the unit that reads best: 850 µs, 12 ms, 3.4 s, 5 min, 2 h."""
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
    """In bytes, with a binary unit."""
    unit = 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    return (
        f"{value:.0f} {_UNITS[unit]}" if value >= 10 or not unit else f"{value:.1f} {_UNITS[unit]}"
    )


def rate(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def ago(moment: datetime | None, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> str:
    if moment is None:
        return "-"
    return f"{seconds(max(0.0, (now() - moment).total_seconds()))} ago"


def say(text: str) -> None:
    """On stdout, as it is where that is no terminal."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def say_aside(line: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"{printable_line(line)}\n")


def counted(count: int, thing: str) -> str:
    """As `1 job`, `2 jobs`."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"
