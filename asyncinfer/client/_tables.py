"""Lists that a notebook shows as tables: what stands in each row."""

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, TypeVar

from asyncinfer.client import _display
from asyncinfer.schemas.operations import AuditEntry, Queue, Worker
from asyncinfer.schemas.webhook_views import WebhookHost

_T = TypeVar("_T")


class Table(list[_T]):
    """A list, which a notebook shows as a table with a row for each element."""

    def __init__(
        self, kind: str, elements: Iterable[_T], row_of: Callable[[_T], Mapping[str, Any]]
    ) -> None:
        """`kind` is the title; `row_of` gives the values of an element by column."""
        super().__init__(elements)
        self._kind = kind
        self._row_of = row_of

    def _repr_html_(self) -> str:
        return _display.table_card(self._kind, list(map(self._row_of, self)))


def queue_row(queue: Queue) -> dict[str, Any]:
    """The row of a queue: its jobs, who runs them, and how fast."""
    waits, runs = queue.wait_seconds, queue.run_seconds
    return {
        "model": queue.model or queue.queue,
        "waiting": queue.waiting.high + queue.waiting.normal + queue.waiting.low,
        "delayed": queue.delayed,
        "running": queue.running,
        "dead": queue.dead,
        "oldest": _duration(queue.oldest_age_seconds),
        "workers": queue.workers,
        "slots": queue.slots,
        "jobs/s": f"{queue.completed_per_second:,.3g}",
        "waits, p95": _duration(waits.p95 if waits else None),
        "runs, p95": _duration(runs.p95 if runs else None),
        "state": "paused" if queue.paused else "starved" if queue.starved else "",
    }


def worker_row(worker: Worker) -> dict[str, Any]:
    """The row of a worker: what it does, and since when."""
    done = worker.jobs_done
    return {
        "worker": worker.worker,
        "state": f"{worker.state}, isolating" if worker.isolating else worker.state,
        "host": worker.host,
        "busy": f"{'?' if worker.busy is None else worker.busy} of {worker.slots}",
        "completed": done and done.completed,
        "failed": done and done.failed,
        "cancelled": done and done.cancelled,
        "up": _duration(worker.uptime_seconds),
        "heard": f"{_duration(worker.heard_seconds)} ago",
        "loaded": ", ".join(reversed(worker.loaded)),
        "problems": sum(map(len, worker.problems.values())) or "",
    }


def host_row(host: WebhookHost) -> dict[str, Any]:
    """The row of a host that webhooks go to."""
    return {
        "host": host.host,
        "pending": host.pending,
        "failing": host.failing,
        "given up": host.given_up,
        "last answer": host.last_error or host.last_status,
        "last": time_text(host.last_at),
        "next": time_text(host.next_at),
    }


def audit_row(entry: AuditEntry) -> dict[str, Any]:
    """The row of an entry of the audit log."""
    return {
        "at": time_text(entry.at),
        "action": entry.action,
        "of": ", ".join(f"{name} {value}" for name, value in entry.filter.items()),
        "jobs": entry.jobs,
        "tenant": entry.tenant,
        "key": entry.key,
        "outcome": entry.outcome,
    }


def time_text(time: datetime | None) -> str:
    """A time to the second with its zone; empty for None."""
    return "" if time is None else time.isoformat(" ", "seconds")


def _duration(seconds: float | None) -> str:
    """A number of seconds with a fitting unit; empty for None."""
    return "" if seconds is None else _display.duration(seconds)
