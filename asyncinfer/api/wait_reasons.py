"""The reasons why unfinished jobs are not run now, decided without a call to Redis."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, Literal

from msgspec import UNSET, UnsetType

from asyncinfer import jobs
from asyncinfer.api.queue_looks import Stall, Whereabouts
from asyncinfer.api.worker_snapshot import Absence, WorkerSnapshot
from asyncinfer.errors import DiskFull, ReadOnlyReplica, StorageFull, WritesRefused
from asyncinfer.jobs import Record, Status, max_backoff_seconds
from asyncinfer.repository.inspect.queue_look import Loss
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import StoredJob
from asyncinfer.schemas.responses import WaitingFor

_MAX_CACHED: Final = 10_000
_SHOWN_REASONS: Final = 3
_SHOWN_CHARACTERS: Final = 64
"""A model's name has at most this many; a record of an external job may have more."""

_DISK_FULL: Final = WaitingFor(
    "disk_full",
    "Redis cannot save to its disk, so it takes no writes: no job begins or ends. Free space on "
    "the disk of DATA_DIR, or of your Redis; its log says more. Jobs then continue by themselves.",
)
_STORAGE_FULL: Final = WaitingFor(
    "storage_full",
    "Redis has reached its maxmemory. Accepted jobs are run in their turn, but no new ones are "
    "accepted. Raise maxmemory (of the embedded Valkey: EMBEDDED_MAXMEMORY), or let jobs expire "
    "sooner (JOB_TTL).",
)
_NO_ENDS: Final = frozenset({"disk_full", "redis_read_only", "too_few_replicas"})
"""Codes of a Redis that stores no ends of jobs."""

_NO_WRITES: Final = _NO_ENDS | {"storage_full"}
_STARTING: Final = WaitingFor(
    "starting", "The worker of this server was just started and is about to announce its models."
)


class WaitReasons:
    """Decides why a job waits. Of several reasons the one to resolve first counts: a server that
    takes no writes, a start time in the future, a pause, no worker, a starting worker, a failed
    attempt; and for who reads a single job, a lost worker, workers without a free slot, and last
    the jobs ahead of it.

    A start time in the future comes before a pause and a missing worker, since without these the
    job would not run either; its message names them too.
    """

    def __init__(
        self, snapshot: WorkerSnapshot, store: Store, default_model: Callable[[], str | None]
    ) -> None:
        """`default_model` returns the present default model, None if it is not known."""
        self._snapshot = snapshot
        self._n = store.queue_name
        self._max_errors = store.policy.max_errors
        self._max_deliveries = store.policy.max_deliveries
        self._default_model = default_model

    def of(self, stored: StoredJob) -> WaitingFor | UnsetType | None:
        """Why a stored job waits: None if nothing is wrong, UNSET if it has ended. An external job
        belongs to the default model. Never raises."""
        if stored.record:
            return self.of_record(stored.record, stored.status)
        general = self._general_reason(self._n, self._default_model() or "", None)
        return (
            general if stored.status == "pending" else _not_pending_reason(general, stored.status)
        )

    def of_seen(
        self, reason: WaitingFor | UnsetType | None, seen: Whereabouts
    ) -> WaitingFor | UnsetType | None:
        """Why a job waits whose whereabouts are known: `reason`, which is what the other methods
        return, if there is one; else a lost worker, workers without a free slot, and last the jobs
        ahead of it."""
        if reason is not None:
            return reason
        if seen.loss:
            return _lost_worker(seen.loss, self._max_deliveries)
        if seen.deliveries:
            return _redelivered(seen, self._max_deliveries)
        if seen.stall:
            return _no_free_slot(seen.stall, seen)
        return _behind(seen) if seen.position and seen.position.ahead else None

    def of_queue(self, record: Record) -> WaitingFor | None:
        """Why no job with the queue, model and version of this record is run, whatever its start
        time; None if nothing is wrong."""
        return self._general_reason(record.queue, record.model, record.version)

    def of_record(
        self, record: Record, status: Status = "pending"
    ) -> WaitingFor | UnsetType | None:
        """Why a job with this record and status waits, such as one that was just submitted: None if
        nothing is wrong, UNSET if it has ended."""
        general = self._general_reason(record.queue, record.model, record.version)
        if status != "pending":
            return _not_pending_reason(general, status)
        if record.options.delay_seconds:
            general = _delayed(record, general)
        if general is None and record.errors:
            return _retry(record.errors, self._max_errors)
        return general

    def _general_reason(self, queue: str, model: str, version: str | None) -> WaitingFor | None:
        """The reason that holds for all jobs of a model and version (None: of any version), None if
        there is none; decided once per refresh of the snapshot."""
        wait_reasons = self._snapshot.wait_reasons
        key = (queue, model, version)
        try:
            return wait_reasons[key]
        except KeyError:
            if len(wait_reasons) >= _MAX_CACHED:
                wait_reasons.clear()
            reason = wait_reasons[key] = self._reason(queue, model, version)
            return reason

    def _reason(self, queue: str, model: str, version: str | None) -> WaitingFor | None:
        """The first that applies: a Redis that takes no writes, a pause, a missing worker; else
        None. The message of a pause also names a missing worker."""
        refusal = self._snapshot.writes_refusal
        if isinstance(refusal, StorageFull):
            return _STORAGE_FULL
        if isinstance(refusal, DiskFull):
            return _DISK_FULL
        if isinstance(refusal, WritesRefused):
            return _writes_refused(refusal)
        missing = self._missing_worker(model, version)
        if queue not in self._snapshot.paused:
            return missing
        shown = model[:_SHOWN_CHARACTERS]
        paused = f"{shown} is paused: resume it with `asyncinfer resume {shown}`."
        return WaitingFor("paused", f"{paused} {missing.message}" if missing else paused)

    def _missing_worker(self, model: str, version: str | None) -> WaitingFor | None:
        """Why no worker can run the model (version None: any version): none has it, or one is
        loading it. None if one has it, or if its absence is not certain yet."""
        if self._snapshot.has(model, version):
            return None
        shown = model[:_SHOWN_CHARACTERS] or "the default model"
        if version is not None and self._snapshot.has(model):
            shown = f"version {version[:_SHOWN_CHARACTERS]} of {shown}"
        if self._snapshot.is_loading(model, version):
            return WaitingFor("starting", f"A worker is loading {shown}.")
        if self._snapshot.own_worker_is_starting:
            return _STARTING
        absence = self._snapshot.absence(model, version)
        if absence is None:
            return None
        why = self._snapshot.refusal_reasons(model)[:_SHOWN_REASONS]
        remedy = f"Start one with `asyncinfer work`, with {shown} in its MODEL_DIR."
        return WaitingFor("no_worker", " ".join((_since(shown, absence), *why, remedy)))


def _not_pending_reason(
    general: WaitingFor | None, status: Status
) -> WaitingFor | UnsetType | None:
    """The reason of a running job: what keeps its end from being stored, else None. UNSET for an
    ended one."""
    if status in jobs.TERMINAL:
        return UNSET
    return general if general and general.code in _NO_ENDS else None


def _writes_refused(refusal: WritesRefused) -> WaitingFor:
    """The reason of all jobs while Redis refuses writes, but not since its disk is full."""
    message = f"Redis takes no writes, so no job begins or ends: {refusal.reason}."
    code: Literal["redis_read_only", "too_few_replicas"] = (
        "redis_read_only" if isinstance(refusal, ReadOnlyReplica) else "too_few_replicas"
    )
    return WaitingFor(code, f"{message} Jobs then continue by themselves.")


def _since(shown: str, absence: Absence) -> str:
    """A sentence on how long no worker has had what is `shown`."""
    seconds = time.time() - absence.since
    when = f"{_moment(absence.since)} ({_duration(seconds)})"
    if absence.was_seen:
        return f"No worker has had {shown} since {when}."
    return f"No worker has had {shown} since this API first looked at {when}."


def _delayed(record: Record, general: WaitingFor | None) -> WaitingFor | None:
    """The reason `delayed`, with the message of `general`, if the job's start time is in the
    future; else `general`. A Redis that takes no writes comes first."""
    if general and general.code in _NO_WRITES:
        return general
    start = record.created_ms / 1000 + record.options.delay_seconds
    seconds = start - time.time()
    if seconds <= 0:
        return general
    message = f"It starts at {_moment(start)}, in {_duration(seconds)} (delay_seconds)."
    return WaitingFor("delayed", f"{message} {general.message}" if general else message)


def _retry(errors: int, max_errors: int) -> WaitingFor:
    """The reason of a job that waits for its next try after `errors` failed ones."""
    return WaitingFor(
        "retry",
        f"Try {errors} of {max_errors} failed with an error that may be temporary. The next one "
        f"begins at most {_duration(max_backoff_seconds(errors))} after it, once a worker is "
        "free.",
    )


def _lost_worker(loss: Loss, max_deliveries: int) -> WaitingFor:
    """The reason of a running job whose worker is lost."""
    seconds = _duration(loss.seconds)
    lost = loss.deliveries + 1
    then = (
        f"fails in at most {seconds}, since that is worker {lost} of {max_deliveries} that is lost "
        "with it"
        if lost >= max_deliveries
        else f"runs again in at most {seconds}, as soon as a slot is free"
    )
    return WaitingFor(
        "worker_lost", f"Its worker does not answer. If it stays away, the job {then}."
    )


def _redelivered(seen: Whereabouts, max_deliveries: int) -> WaitingFor:
    """The reason of a job that waits again, since its worker was lost."""
    return WaitingFor(
        "worker_lost",
        f"Its worker was lost, {seen.deliveries} of {max_deliveries} that it may lose. It is among "
        "the next in turn, and runs alone as soon as a slot is free.",
    )


def _no_free_slot(stall: Stall, seen: Whereabouts) -> WaitingFor:
    """The reason of a job whose workers run other jobs for long."""
    ahead = seen.position.ahead if seen.position else 0
    since = f"No job of its queue has run for {_duration(stall.seconds)}"
    ones = (
        f"{stall.isolating} of its {stall.workers} workers" if stall.workers > 1 else "its worker"
    )
    alone = (
        f"{ones} may run only one job at a time, one with which a worker was lost before or which "
        "was too slow in a batch"
    )
    busy = "the slots of its workers run jobs of other models, or a worker does not answer"
    why = [alone] * bool(stall.isolating) + [busy] * (stall.isolating < stall.workers)
    then = f"It waits behind {ahead:,} more." if ahead else "It is the next of its queue."
    return WaitingFor("no_free_slot", f"{since}: {'; '.join(why)}. {then}")


def _behind(seen: Whereabouts) -> WaitingFor:
    """The reason of a job that has others ahead of it."""
    assert seen.position
    about = "about " if seen.position.is_about else ""
    jobs_ahead = f"{seen.position.ahead:,} {'job' if seen.position.ahead == 1 else 'jobs'}"
    eta = "" if seen.eta_seconds is None else f", some {_duration(seen.eta_seconds)}"
    return WaitingFor("queue", f"It waits behind {about}{jobs_ahead}{eta}.")


def _moment(at: float) -> str:
    """A time in UTC, without its date if that is today; a dash if the number is no valid time. `at`
    is in seconds of Unix time."""
    try:
        moment = datetime.fromtimestamp(at, UTC)
    except (ValueError, OverflowError, OSError):
        return "-"
    is_today = moment.date() == datetime.now(UTC).date()
    return moment.strftime("%H:%M:%SZ" if is_today else "%Y-%m-%d %H:%M:%SZ")


def _duration(seconds: float) -> str:
    """A duration in whole s, min, h or d, in the largest unit of which there are two; `0 s` if
    negative."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
