"""The tables of `top`: a snapshot of queues and workers, as wide as the terminal."""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from asyncinfer.cli.output import console, print_table, rate, seconds, status, styled, table
from asyncinfer.cli.starved_queues import queue_name, starved_remedy, starved_text, waiting_jobs

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from asyncinfer.cli.safe_text import SafeText
    from asyncinfer.cli.top.snapshot import Snapshot
    from asyncinfer.schemas.operations import Percentiles, Queue, Worker

_WIDE: Final = 120
"""The width in characters from which all columns are shown."""

_LATE_SECONDS: Final = 60.0
"""A webhook that is due for so long is one that no process takes."""


class _Column(NamedTuple):
    """A column of a table; `cell` makes the cell from a Queue or a Worker."""

    title: str
    cell: Callable[[Any], object]
    narrow: bool = True
    """Whether it is shown on a terminal of 80 characters too."""


def _queues() -> Sequence[_Column]:
    """The columns of the table of queues, from left to right."""
    return (
        _Column("MODEL", _model),
        _Column("WAIT", _waiting),
        _Column("HIGH", lambda queue: queue.waiting.high, False),
        _Column("LOW", lambda queue: queue.waiting.low, False),
        _Column("DELAYED", lambda queue: queue.delayed, False),
        _Column("RUN", lambda queue: queue.running),
        _Column("DEAD", lambda queue: styled(str(queue.dead), "red" if queue.dead else "")),
        _Column("AGE", lambda queue: seconds(queue.oldest_age_seconds)),
        _Column("IN/s", lambda queue: rate(queue.submitted_per_second)),
        _Column("OUT/s", lambda queue: rate(queue.completed_per_second)),
        _Column("FAIL/s", lambda queue: rate(queue.failed_per_second), False),
        _Column("WAIT p50 p95", lambda queue: _pair(queue.wait_seconds), False),
        _Column("RUN p50 p95", lambda queue: _pair(queue.run_seconds)),
        _Column("BACKLOG", _backlog, False),
        _Column("WORKERS", lambda queue: queue.workers, False),
        _Column("SLOTS", lambda queue: queue.slots),
    )


def _workers() -> Sequence[_Column]:
    """The columns of the table of workers, from left to right."""
    return (
        _Column("WORKER", lambda worker: worker.worker),
        _Column("STATE", lambda worker: status(worker.state)),
        _Column("HOST", lambda worker: worker.host, False),
        _Column("PID", lambda worker: worker.pid),
        _Column(
            "BUSY", lambda worker: f"{'?' if worker.busy is None else worker.busy}/{worker.slots}"
        ),
        _Column("UP", lambda worker: seconds(worker.uptime_seconds)),
        _Column("DONE", lambda worker: worker.jobs_done and f"{worker.jobs_done.completed:,}"),
        _Column(
            "FAILED", lambda worker: worker.jobs_done and f"{worker.jobs_done.failed:,}", False
        ),
        _Column("LAST SEEN", lambda worker: f"{seconds(worker.heard_seconds)} ago", False),
        _Column("MODELS", lambda worker: ", ".join(worker.models), False),
        _Column("PROBLEMS", _problems),
    )


def say(snapshot: "Snapshot") -> None:
    """Prints a snapshot once on stdout: queues, workers if the key may see them, and problems.

    In a pipe, and on a terminal of 120 characters or more, it has all columns.
    """
    wide = not sys.stdout.isatty() or console().width >= _WIDE
    console().print(_title(snapshot, ""), soft_wrap=True)
    print_table(_table(_queues(), _relevant(snapshot.queues), wide))
    if snapshot.workers:
        console().print()
        print_table(_table(_workers(), snapshot.workers, wide))
    for note in (_webhooks_of(snapshot.queues), _problems_of(snapshot.queues)):
        if note:
            console().print()
            console().print(note, soft_wrap=True)


def screen(snapshot: "Snapshot", target: "Console", error_text: str) -> "RenderableType":
    """The content of the live view for a snapshot, as wide as the console `target`.

    `error_text` says why the snapshot could not be refreshed; "" if it is fresh.
    """
    from rich.console import Group

    wide = target.width >= _WIDE
    queues = _table(_queues(), _relevant(snapshot.queues), wide)
    workers = "" if snapshot.workers is None else _table(_workers(), snapshot.workers, wide)
    webhooks, problems = _webhooks_of(snapshot.queues), _problems_of(snapshot.queues) or ""
    notes = (webhooks, "", problems) if webhooks else (problems,)
    return Group(_title(snapshot, error_text), "", queues, "", workers, "", *notes)


def _title(snapshot: "Snapshot", error_text: str) -> Any:
    """A line with source, time and totals; `error_text`, unless it is empty, is a second one."""
    at = snapshot.at.astimezone().strftime("%H:%M:%S")
    waiting = sum(waiting_jobs(queue) for queue in snapshot.queues)
    line = styled("asyncinfer", "bold")
    line.append(f"  {snapshot.source}  {at}  {waiting:,} waiting  ", "")
    line.append(f"{sum(queue.running for queue in snapshot.queues):,} running  ", "")
    if snapshot.workers is None:
        line.append("workers are shown to keys with the scope admin", "dim")
    else:
        plural = "s" * (len(snapshot.workers) != 1)
        line.append(
            f"{len(snapshot.workers)} worker{plural}", "" if snapshot.workers else "bold red"
        )
    if error_text:
        line.append(f"\n{error_text}", "bold red")
    return line


def _table(columns: Sequence[_Column], items: Sequence[Any], wide: bool) -> "Table":
    """A table with a row for each of `items`; without the wide columns unless `wide`."""
    shown = [column for column in columns if wide or column.narrow]
    rows = [[column.cell(item) for column in shown] for item in items]
    return table([column.title for column in shown], rows, numeric=_numeric(shown))


def _numeric(columns: Sequence[_Column]) -> list[str]:
    """The titles of the columns whose cells are numbers, which are aligned to the right."""
    texts = ("MODEL", "WORKER", "STATE", "HOST", "MODELS", "PROBLEMS")
    return [column.title for column in columns if column.title not in texts]


def _model(queue: "Queue") -> object:
    """The cell of a queue's name, marked if no worker has the model or if it is paused."""
    name = queue_name(queue)
    if queue.starved:
        return styled(f"{name} no worker", "bold red")
    return styled(f"{name} paused", "yellow") if queue.paused else name


def _waiting(queue: "Queue") -> object:
    """The cell of the number of waiting jobs; red if there are some and no slot for them."""
    waiting = waiting_jobs(queue)
    return styled(f"{waiting:,}", "bold red" if waiting and not queue.slots else "")


def _backlog(queue: "Queue") -> object:
    """The cell of the time that the waiting jobs will take, or why none of them is run."""
    if queue.starved:
        return styled("no worker", "bold red")
    return styled("paused", "yellow") if queue.paused else seconds(queue.backlog_seconds)


def _relevant(queues: Sequence["Queue"]) -> list["Queue"]:
    """The queues without those that have no worker, no job and no webhook and are not paused.

    Those are of models that are no longer served.
    """
    return [
        queue
        for queue in queues
        if queue.workers
        or queue.paused
        or waiting_jobs(queue) + queue.delayed + queue.running + queue.dead
        or queue.webhooks.pending + queue.webhooks.given_up
    ]


def _webhooks_of(queues: Sequence["Queue"]) -> "SafeText | None":
    """A line on the webhooks of all queues; None if none is to be delivered or was given up."""
    counts = [queue.webhooks for queue in queues]
    pending, due = (sum(one.pending for one in counts), sum(one.due for one in counts))
    given_up = sum(one.given_up for one in counts)
    if not pending and not given_up:
        return None
    text = styled("WEBHOOKS", "bold")
    text.append(f"  {pending:,} to come", "")
    if due:
        oldest = max(one.oldest_due_seconds or 0.0 for one in counts)
        style = "bold red" if oldest > _LATE_SECONDS else ""
        text.append(f", {due:,} due, oldest {seconds(oldest)}", style)
    if given_up:
        text.append(f", {given_up:,} given up", "red")
    text.append("  -> asyncinfer webhooks", "cyan")
    return text


def _problems_of(queues: Sequence["Queue"]) -> "SafeText | None":
    """Lines on the starved queues, each with what to do; None if there is none."""
    starved = [queue for queue in queues if queue.starved]
    if not starved:
        return None
    text = styled("PROBLEMS", "bold")
    for queue in starved:
        text.append(f"\n{starved_text(queue)}", "bold red")
        text.append(f"\n  -> {starved_remedy(queue)}", "cyan")
    return text


def _pair(times: "Percentiles | None") -> str | None:
    """The p50 and p95, as `12 ms 40 ms`; None for None."""
    return None if times is None else f"{seconds(times.p50)} {seconds(times.p95)}"


def _problems(worker: "Worker") -> object:
    """The cell of the number of versions that a worker does not serve; None if there are none."""
    count = sum(map(len, worker.problems.values()))
    return styled(str(count), "bold red") if count else None
