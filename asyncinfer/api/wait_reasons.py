"""Why an unfinished job is not run now: decided from what is known here, without Redis."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from msgspec import UNSET, UnsetType

from asyncinfer import jobs
from asyncinfer.api.worker_snapshot import Absence, Workforce
from asyncinfer.errors import StorageFull
from asyncinfer.jobs import Record, Status, longest_backoff_seconds
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import Stored
from asyncinfer.schemas.responses import WaitingFor

_MOST_KEPT: Final = 10_000
_SHOWN_REASONS: Final = 3
_SHOWN_CHARACTERS: Final = 64
"""A model's name has no more; what a stranger wrote into a record may."""

_DISK_FULL: Final = WaitingFor(
    "disk_full",
    "Redis cannot save to its disk, so it takes no writes: no job begins or ends. Free space on "
    "the disk of DATA_DIR, or of your Redis; its log says more. The jobs go on by themselves then.",
)
_STORAGE_FULL: Final = WaitingFor(
    "storage_full",
    "Redis has reached its maxmemory. Jobs that were accepted are run when it is their turn, but "
    "none are taken in. Give Redis more memory, or let jobs expire sooner (JOB_TTL).",
)
_STARTING: Final = WaitingFor(
    "starting", "The worker of this server was started just now; it is about to say what it has."
)


class Reasons:
    """What is to be mended first comes first: a server that takes no writes, then a start that
    lies ahead, a pause, no worker, one that starts, and at last a try that failed.

    A start that lies ahead comes before a pause and a missing worker, since the job would not run
    with them mended; its message tells of them too.
    """

    def __init__(
        self, workforce: Workforce, store: Store, default_model: Callable[[], str | None]
    ) -> None:
        self._workforce = workforce
        self._n = store.n
        self._max_errors = store.policy.max_errors
        self._default_model = default_model

    def of(self, stored: Stored) -> WaitingFor | UnsetType | None:
        """Of a stored job; UNSET of one that has ended. A stranger's is the default model's."""
        if stored.record:
            return self.of_record(stored.record, stored.status)
        general = self._of_all(self._n, self._default_model() or "", None)
        return general if stored.status == "pending" else _unless_pending(general, stored.status)

    def of_queue(self, record: Record) -> WaitingFor | None:
        """Why no job like the one with this record is run, whenever it is to start."""
        return self._of_all(record.queue, record.model, record.version)

    def of_record(
        self, record: Record, status: Status = "pending"
    ) -> WaitingFor | UnsetType | None:
        """Of a job with this record, such as one that was just submitted."""
        general = self._of_all(record.queue, record.model, record.version)
        if status != "pending":
            return _unless_pending(general, status)
        if record.options.delay_seconds:
            general = _delayed(record, general)
        if general is None and record.errors:
            return _retry(record.errors, self._max_errors)
        return general

    def _of_all(self, queue: str, model: str, version: str | None) -> WaitingFor | None:
        """What holds for all jobs of a model and version; worked out once for each look."""
        worked_out = self._workforce.worked_out
        key = (queue, model, version)
        try:
            return worked_out[key]
        except KeyError:
            if len(worked_out) >= _MOST_KEPT:
                worked_out.clear()
            reason = worked_out[key] = self._reason(queue, model, version)
            return reason

    def _reason(self, queue: str, model: str, version: str | None) -> WaitingFor | None:
        refusal = self._workforce.refusal
        if isinstance(refusal, StorageFull):
            return _STORAGE_FULL
        if refusal and refusal.is_disk_full:
            return _DISK_FULL
        missing = self._missing(model, version)
        if queue not in self._workforce.paused:
            return missing
        shown = model[:_SHOWN_CHARACTERS]
        paused = f"{shown} is paused: resume it with `asyncinfer resume {shown}`."
        return WaitingFor("paused", f"{paused} {missing.message}" if missing else paused)

    def _missing(self, model: str, version: str | None) -> WaitingFor | None:
        if self._workforce.has(model, version):
            return None
        shown = model[:_SHOWN_CHARACTERS] or "the default model"
        if version is not None and self._workforce.has(model):
            shown = f"version {version[:_SHOWN_CHARACTERS]} of {shown}"
        if self._workforce.is_loading(model, version):
            return WaitingFor("starting", f"A worker is loading {shown}.")
        if self._workforce.own_worker_is_starting:
            return _STARTING
        absence = self._workforce.absence(model, version)
        if absence is None:
            return None
        why = self._workforce.refused(model)[:_SHOWN_REASONS]
        remedy = f"Start one with `asyncinfer work`, with {shown} in its MODEL_DIR."
        return WaitingFor("no_worker", " ".join((_since(shown, absence), *why, remedy)))


def _unless_pending(general: WaitingFor | None, status: Status) -> WaitingFor | UnsetType | None:
    """A running job waits for nothing but to be stored; an ended one has no such field."""
    if status in jobs.TERMINAL:
        return UNSET
    return general if general is _DISK_FULL else None


def _since(shown: str, absence: Absence) -> str:
    seconds = time.time() - absence.since
    when = f"{_moment(absence.since)} ({_duration(seconds)})"
    if absence.was_seen:
        return f"No worker has had {shown} since {when}."
    return f"No worker has had {shown} since this API began to look at {when}."


def _delayed(record: Record, general: WaitingFor | None) -> WaitingFor | None:
    """`general`, unless the job's own start lies ahead."""
    if general is _DISK_FULL or general is _STORAGE_FULL:
        return general
    start = record.created_ms / 1000 + record.options.delay_seconds
    ahead = start - time.time()
    if ahead <= 0:
        return general
    message = f"It is to start at {_moment(start)}, in {_duration(ahead)} (delay_seconds)."
    return WaitingFor("delayed", f"{message} {general.message}" if general else message)


def _retry(errors: int, max_errors: int) -> WaitingFor:
    return WaitingFor(
        "retry",
        f"Try {errors} of {max_errors} failed in a way that may pass. The next one begins at most "
        f"{_duration(longest_backoff_seconds(errors))} after it, once a worker is free.",
    )


def _moment(at: float) -> str:
    """A time in UTC; without its date if that is today's. Of a time that has none, a dash."""
    try:
        moment = datetime.fromtimestamp(at, UTC)
    except (ValueError, OverflowError, OSError):
        return "-"
    is_today = moment.date() == datetime.now(UTC).date()
    return moment.strftime("%H:%M:%SZ" if is_today else "%Y-%m-%d %H:%M:%SZ")


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
