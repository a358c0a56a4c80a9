"""The workers, pauses and a full Redis as this API last saw them, at most a second ago.

Answers use it to say why a job waits. It is read in the background, since no request may cost
another call to Redis.
"""

import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import anyio
from msgspec import Struct

from asyncinfer.errors import RedisUnavailable
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository.announcements import (
    ANNOUNCE_INTERVAL_SECONDS,
    WorkerAnnouncement,
    decode_worker_announcement,
    upcoming_models,
)
from asyncinfer.repository.inspect.listing import Inspection
from asyncinfer.repository.intake import why_no_jobs
from asyncinfer.repository.store import Refused, Store
from asyncinfer.schemas.operations import public_worker_name
from asyncinfer.schemas.responses import WaitingFor

_REFRESH_SECONDS: Final = 0.9
_GRACE_SECONDS: Final = ANNOUNCE_INTERVAL_SECONDS + 1.0
"""How long a model may be without a worker before answers say so: a replaced worker is back within
this time, and after Redis was emptied every worker has announced itself again."""

_OWN_WORKER_SECONDS: Final = 15.0
"""By then a worker has announced what is in its folder, even if two cores start everything."""

_MAX_ABSENT: Final = 10_000

_log = LimitedLog(logging.getLogger(__name__))

RequestedVersion = tuple[str, str | None]
"""A model, and the requested version, or None for any."""


class Absence(Struct, frozen=True):
    """Since when no worker has a model, or a version of it."""

    since: float
    """By `time.time`."""
    was_seen: bool
    """Whether a worker had the model until `since`; else this API first looked then."""


class WorkerSnapshot:
    """What workers announce: `run` reads it every second, and answers use the last state. One
    object for each API process, empty until the first `refresh`."""

    def __init__(
        self,
        inspection: Inspection,
        store: Store,
        queues: Callable[[], Sequence[str]],
        grace_seconds: float = _GRACE_SECONDS,
        own_worker_since_ms: int | None = None,
    ) -> None:
        """`queues` returns the queues whose pauses to read. `grace_seconds` is how long a worker
        may be gone before `absence` reports it. `own_worker_since_ms` is when `serve` started its
        own worker, in Unix time; None without one."""
        self._inspection = inspection
        self._store = store
        self._queues = queues
        self._grace_seconds = grace_seconds
        self._own_worker_since_ms = own_worker_since_ms
        """When `serve` started its own worker; None once that has announced itself."""
        self._own_worker_due_at = time.monotonic() + _OWN_WORKER_SECONDS
        self._lock = anyio.Lock()
        self._announcement_bodies: dict[str, bytes] = {}
        self.workers: Mapping[str, WorkerAnnouncement] = {}
        """Announcements of living workers, by the names that everyone may see."""
        self._loading: frozenset[str] = frozenset()
        """Models that a living worker has in its folder and has not loaded yet."""
        self._loading_versions: frozenset[tuple[str, str]] = frozenset()
        """Versions of served models that a living worker has not loaded yet."""
        self.paused: frozenset[str] = frozenset()
        """Queues that are paused."""
        self.writes_refusal: Refused | None = None
        """Why Redis takes no jobs; None if it does."""
        self.redis_error: RedisUnavailable | None = None
        """Why the last refresh failed, in which case the state is that of an earlier one."""
        self.wait_reasons: dict[tuple[str, str, str | None], WaitingFor | None] = {}
        """A cache of why jobs wait, by queue, model and version, until the next refresh."""
        self._served: dict[str, set[str] | None] = {}
        """By model, the versions whose jobs living workers claim; None means any, since a worker
        of an older release does not say which."""
        self._leaving: frozenset[str] = frozenset()
        """Models that were removed from the folder, whose waiting jobs workers still run."""
        self._left_at: dict[RequestedVersion, tuple[float, float]] = {}
        """When a model's last worker was first missing, by `time.monotonic` and `time.time`."""
        self._first_refresh_at = 0.0
        """When the first refresh was, by `time.time`; 0 before it."""
        self._certain_at = 0.0
        """Until then no absence is reported, by `time.monotonic`: after an outage of Redis workers
        must first announce themselves again."""
        self._is_complete = True

    async def run(self) -> None:
        """Refreshes every second until cancelled; logs errors that are not expected, and goes
        on."""
        while True:
            await anyio.sleep(_REFRESH_SECONDS)
            try:
                await self.refresh()
            except Exception as error:
                # Anyone may write anything into Redis; no content may end this task.
                _log.unexpected("The announcements of workers could not be read.", error)

    async def refresh(self) -> None:
        """Reads workers, pauses and whether Redis takes writes now, and empties `wait_reasons`.
        Does not raise if Redis does not answer: keeps the last state and sets `redis_error`."""
        async with self._lock:
            try:
                seen = await self._inspection.live_workers(self._queues())
                writes_refusal = await why_no_jobs(self._store)
            except RedisUnavailable as redis_error:
                self.redis_error = redis_error
                self._certain_at = (
                    time.monotonic() + self._grace_seconds if self._first_refresh_at else 0.0
                )
                return
            self.redis_error = None
            if self.writes_refusal or writes_refusal:
                # Workers that could not announce themselves meanwhile may still be alive.
                self._certain_at = time.monotonic() + self._grace_seconds
            self.writes_refusal, self.paused, self._is_complete = (
                writes_refusal,
                seen.paused,
                seen.is_complete,
            )
            self._first_refresh_at = self._first_refresh_at or time.time()
            if seen.workers != self._announcement_bodies:
                self._announcement_bodies = seen.workers
                self._use_announcements(seen.workers)
            self.wait_reasons = {}

    def has(self, model: str, version: str | None = None) -> bool:
        """Whether a living worker claims jobs of a version of the model (None: of any)."""
        versions = self._served.get(model, _NO_VERSIONS)
        return versions is None or (bool(versions) if version is None else version in versions)

    def absence(self, model: str, version: str | None) -> Absence | None:
        """Since when no living worker has a version of a model (None: any). None if a worker has
        it, if it has been gone for less than the grace time, or if that is not certain."""
        now = time.monotonic()
        is_certain = self._first_refresh_at and self._is_complete and now >= self._certain_at
        if self.has(model, version) or not is_certain:
            return None
        left_at = self._left_at.get((model, version)) or self._left_at.get((model, None))
        if left_at is None:
            return Absence(self._first_refresh_at, was_seen=False)
        missed_at, since = left_at
        if now - missed_at < self._grace_seconds:
            return None
        return Absence(since, was_seen=True)

    @property
    def own_worker_is_starting(self) -> bool:
        """Whether `serve` has just started its own worker, which has not announced itself yet."""
        return self._own_worker_since_ms is not None and (
            time.monotonic() < self._own_worker_due_at
        )

    def has_in_folder(self, model: str, version: str | None) -> bool:
        """Whether a living worker has a version in its folder (None: any) and claims its jobs. A
        worker also claims waiting jobs of a model that was removed; that does not count here. A
        worker that does not announce its versions counts only for None."""
        versions = self._served.get(model, _NO_VERSIONS)
        if versions is None:
            return version is None and model not in self._leaving
        return bool(versions) if version is None else version in versions

    def is_loading(self, model: str, version: str | None) -> bool:
        """Whether a living worker has not yet loaded the model, or this version of it; None means
        no version in particular."""
        return model in self._loading or (model, version) in self._loading_versions

    def refusal_reasons(self, model: str) -> list[str]:
        """Sentences on why living workers refuse to serve versions of a model in their folders,
        each once, though many workers may say it; empty if none refuses."""
        reasons = (
            f"{f'Version {version}' if version else 'It'} is not served: {reason}."
            for _, worker in sorted(self.workers.items())
            for version, reason in sorted(worker.problems.get(model, {}).items())
        )
        return list(dict.fromkeys(reasons))

    def _is_own_worker(self, worker: WorkerAnnouncement) -> bool:
        """Whether it is the worker that `serve` started, not an earlier one, whose announcement
        remains for 15 s after a kill."""
        since_ms = self._own_worker_since_ms
        return since_ms is not None and (
            worker.host == socket.gethostname() and (worker.started_ms or 0) >= since_ms
        )

    def _use_announcements(self, bodies: Mapping[str, bytes]) -> None:
        """Replaces the state by these announcements, by worker id, and notes which models have lost
        all workers and when."""
        self.workers = {
            public_worker_name(worker_id): decode_worker_announcement(body)
            for worker_id, body in bodies.items()
        }
        workers = self.workers.values()
        if any(map(self._is_own_worker, workers)):
            self._own_worker_since_ms = None
        self._loading = frozenset(model for worker in workers for model in upcoming_models(worker))
        ready = [worker for worker in workers if worker.state == "ready"]
        self._loading_versions = frozenset(
            (model, version)
            for worker in ready
            for model, versions in worker.loading_versions.items()
            for version in versions
        )
        served = _served(ready)
        self._leaving = _leaving(ready)
        before, after = _requestable_versions(self._served), _requestable_versions(served)
        now = (time.monotonic(), time.time())
        for model_version in before - after:
            self._left_at[model_version] = now
        for model_version in after & self._left_at.keys():
            del self._left_at[model_version]
        while len(self._left_at) > _MAX_ABSENT:
            del self._left_at[next(iter(self._left_at))]
        self._served = served


_NO_VERSIONS: Final[frozenset[str]] = frozenset()


def _served(ready: Sequence[WorkerAnnouncement]) -> dict[str, set[str] | None]:
    """By model the versions that these workers serve; None if a worker does not say which. `ready`
    are the workers that claim jobs."""
    served: dict[str, set[str] | None] = {}
    for worker in ready:
        for model in worker.models:
            versions = worker.versions.get(model)
            known = served.get(model, set())
            served[model] = None if versions is None or known is None else known | versions.keys()
    return served


def _leaving(ready: Sequence[WorkerAnnouncement]) -> frozenset[str]:
    """Models that no worker has in its folder any more. A worker of a release that does not
    announce its folder does not announce versions either, so its models do not count."""
    leaving = {model for worker in ready for model in worker.models if model not in worker.versions}
    return frozenset(leaving) - {
        model
        for worker in ready
        for model in worker.models
        if worker.model_dir is None or model in worker.versions
    }


def _requestable_versions(served: Mapping[str, set[str] | None]) -> set[RequestedVersion]:
    """Each served model, with each of its versions and with None for any."""
    models: set[RequestedVersion] = {(model, None) for model in served}
    return models | {
        (model, version) for model, versions in served.items() for version in versions or ()
    }
