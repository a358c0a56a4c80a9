"""What `top` draws: one look at queues and workers, as wide as the terminal is."""

import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from asyncinfer.cli.output import console, rate, seconds, show, status, styled, table
from asyncinfer.cli.starved_queues import mend_starved, queue_name, told_starved, waiting_jobs

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from asyncinfer.cli.safe_text import SafeText
    from asyncinfer.cli.top.snapshot import Seen
    from asyncinfer.schemas.operations import Percentiles, Queue, Worker

_WIDE: Final = 120
"""From so many columns on, all is shown."""


class _Column(NamedTuple):
    title: str
    cell: Callable[[Any], object]
    narrow: bool = True
    """Whether 80 columns have room for it."""


def _queues() -> Sequence[_Column]:
    return (
        _Column("MODEL", _model),
        _Column("WAIT", lambda it: _waiting(it)),
        _Column("HIGH", lambda it: it.waiting.high, False),
        _Column("LOW", lambda it: it.waiting.low, False),
        _Column("DELAYED", lambda it: it.delayed, False),
        _Column("RUN", lambda it: it.running),
        _Column("DEAD", lambda it: styled(str(it.dead), "red" if it.dead else "")),
        _Column("AGE", lambda it: seconds(it.oldest_age_seconds)),
        _Column("IN/s", lambda it: rate(it.submitted_per_second)),
        _Column("OUT/s", lambda it: rate(it.completed_per_second)),
        _Column("FAIL/s", lambda it: rate(it.failed_per_second), False),
        _Column("WAIT p50 p95", lambda it: _pair(it.wait_seconds), False),
        _Column("RUN p50 p95", lambda it: _pair(it.run_seconds)),
        _Column("BACKLOG", _backlog, False),
        _Column("WORKERS", lambda it: it.workers, False),
        _Column("SLOTS", lambda it: it.slots),
    )


def _workers() -> Sequence[_Column]:
    return (
        _Column("WORKER", lambda it: it.worker),
        _Column("STATE", lambda it: status(it.state)),
        _Column("HOST", lambda it: it.host, False),
        _Column("PID", lambda it: it.pid),
        _Column("BUSY", lambda it: f"{'?' if it.busy is None else it.busy}/{it.slots}"),
        _Column("UP", lambda it: seconds(it.uptime_seconds)),
        _Column("DONE", lambda it: it.jobs_done and f"{it.jobs_done.completed:,}"),
        _Column("FAILED", lambda it: it.jobs_done and f"{it.jobs_done.failed:,}", False),
        _Column("HEARD", lambda it: f"{seconds(it.heard_seconds)} ago", False),
        _Column("MODELS", lambda it: ", ".join(it.models), False),
        _Column("PROBLEMS", _problems),
    )


def say(seen: "Seen") -> None:
    """For a pipe, or a terminal that keeps it."""
    wide = not sys.stdout.isatty() or console().width >= _WIDE
    console().print(_title(seen, ""), soft_wrap=True)
    _show(_queues(), _of_interest(seen.queues), wide)
    if seen.workers:
        console().print()
        _show(_workers(), seen.workers, wide)
    if problems := _problems_of(seen.queues):
        console().print()
        console().print(problems, soft_wrap=True)


def screen(seen: "Seen", to: "Console", trouble: str) -> "RenderableType":
    from rich.console import Group

    wide = to.width >= _WIDE
    queues = _table(_queues(), _of_interest(seen.queues), wide)
    workers = "" if seen.workers is None else _table(_workers(), seen.workers, wide)
    problems = _problems_of(seen.queues) or ""
    return Group(_title(seen, trouble), "", queues, "", workers, "", problems)


def _title(seen: "Seen", trouble: str) -> Any:
    at = datetime.fromtimestamp(seen.at).astimezone().strftime("%H:%M:%S")
    waiting = sum(waiting_jobs(one) for one in seen.queues)
    line = styled("asyncinfer", "bold")
    line.append(f"  {seen.source}  {at}  {waiting:,} waiting  ", "")
    line.append(f"{sum(one.running for one in seen.queues):,} running  ", "")
    if seen.workers is None:
        line.append("workers are shown to keys with the scope admin", "dim")
    else:
        plural = "s" * (len(seen.workers) != 1)
        line.append(f"{len(seen.workers)} worker{plural}", "" if seen.workers else "bold red")
    if trouble:
        line.append(f"\n{trouble}", "bold red")
    return line


def _show(columns: Sequence[_Column], things: Sequence[Any], wide: bool) -> None:
    chosen = [one for one in columns if wide or one.narrow]
    rows = [[one.cell(it) for one in chosen] for it in things]
    show([one.title for one in chosen], rows, numeric=_numeric(chosen))


def _table(columns: Sequence[_Column], things: Sequence[Any], wide: bool) -> "RenderableType":
    chosen = [one for one in columns if wide or one.narrow]
    rows = [[one.cell(it) for one in chosen] for it in things]
    return table([one.title for one in chosen], rows, numeric=_numeric(chosen))


def _numeric(columns: Sequence[_Column]) -> list[str]:
    texts = ("MODEL", "WORKER", "STATE", "HOST", "MODELS", "PROBLEMS")
    return [one.title for one in columns if one.title not in texts]


def _model(queue: "Queue") -> object:
    name = queue_name(queue)
    if queue.starved:
        return styled(f"{name} no worker", "bold red")
    return styled(f"{name} paused", "yellow") if queue.paused else name


def _waiting(queue: "Queue") -> object:
    waiting = waiting_jobs(queue)
    return styled(f"{waiting:,}", "bold red" if waiting and not queue.slots else "")


def _backlog(queue: "Queue") -> object:
    """How long the jobs take, unless nobody runs them."""
    if queue.starved:
        return styled("no worker", "bold red")
    return styled("paused", "yellow") if queue.paused else seconds(queue.backlog_seconds)


def _of_interest(queues: Sequence["Queue"]) -> list["Queue"]:
    """Without those of models that were served once: they have no worker and no job."""
    return [
        one
        for one in queues
        if one.workers or one.paused or waiting_jobs(one) + one.delayed + one.running + one.dead
    ]


def _problems_of(queues: Sequence["Queue"]) -> "SafeText | None":
    starved = [one for one in queues if one.starved]
    if not starved:
        return None
    text = styled("PROBLEMS", "bold")
    for one in starved:
        text.append(f"\n{told_starved(one)}", "bold red")
        text.append(f"\n  -> {mend_starved(one)}", "cyan")
    return text


def _pair(found: "Percentiles | None") -> str | None:
    return None if found is None else f"{seconds(found.p50)} {seconds(found.p95)}"


def _problems(worker: "Worker") -> object:
    count = sum(map(len, worker.problems.values()))
    return styled(str(count), "bold red") if count else None
