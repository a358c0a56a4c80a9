"""Who works, as this API last saw it, at most a second ago: workers, pauses, a full Redis.

Answers tell from it why a job waits. It is read beside the requests, since none of them may cost
another call to Redis.
"""

import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import anyio
from msgspec import Struct

from asyncinfer.errors import RedisRefused, RedisUnavailable, StorageFull, WritesRefused
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository.announcements import (
    ANNOUNCE_SECONDS,
    WorkerSays,
    models_to_come,
    worker_says,
)
from asyncinfer.repository.inspect.listing import Inspection
from asyncinfer.repository.store import Store
from asyncinfer.schemas.operations import shown_worker
from asyncinfer.schemas.responses import WaitingFor

_REFRESH_SECONDS: Final = 0.9
_GRACE_SECONDS: Final = ANNOUNCE_SECONDS + 1.0
"""How long a model may be without a worker before that is told: a worker that is replaced is back
within it, and a Redis that was emptied has heard of every worker again."""

_OWN_WORKER_SECONDS: Final = 15.0
"""A worker has said what is in its folder by then, also where two cores start everything."""

_MOST_ABSENT: Final = 10_000

_log = LimitedLog(logging.getLogger(__name__))

Wanted = tuple[str, str | None]
"""A model, and the version that is asked for, if any."""


class Absence(Struct, frozen=True):
    """That no worker has a model, and since when; times are of `time.time`."""

    since: float
    was_seen: bool
    """A worker had it until then; else this API began to look then, and has seen none."""


class Workforce:
    """Background role: `run` looks each second, answers read what it saw."""

    def __init__(
        self,
        inspection: Inspection,
        store: Store,
        queues: Callable[[], Sequence[str]],
        grace_seconds: float = _GRACE_SECONDS,
        own_worker_since_ms: int | None = None,
    ) -> None:
        self._inspection = inspection
        self._store = store
        self._queues = queues
        self._grace_seconds = grace_seconds
        self._own_worker_since_ms = own_worker_since_ms
        """Until the worker that is started beside this API has spoken."""
        self._own_worker_due_at = time.monotonic() + _OWN_WORKER_SECONDS
        self._lock = anyio.Lock()
        self._bodies: dict[str, bytes] = {}
        self.workers: Mapping[str, WorkerSays] = {}
        """By the names that everyone may see, what the living ones say."""
        self.loading: frozenset[str] = frozenset()
        """Models that a living worker has in its folder and does not serve yet."""
        self._loading_versions: frozenset[tuple[str, str]] = frozenset()
        """Of models that are served, versions that a living worker has yet to load."""
        self.paused: frozenset[str] = frozenset()
        """Queues that are paused."""
        self.refusal: StorageFull | WritesRefused | None = None
        """Why Redis takes no writes."""
        self.trouble: RedisUnavailable | None = None
        """Why the last look saw nothing; what is known is from before it, then."""
        self.worked_out: dict[tuple[str, str, str | None], WaitingFor | None] = {}
        """Why jobs wait, by queue, model and version: kept here until the next look."""
        self._served: dict[str, set[str] | None] = {}
        """By model, the versions that living workers claim jobs of; None: any, since an older
        release does not say which."""
        self._leaving: frozenset[str] = frozenset()
        """Models that were removed, of which workers run what waits."""
        self._left_at: dict[Wanted, tuple[float, float]] = {}
        """When a model's last worker was missed first, by `time.monotonic` and `time.time`."""
        self._began_at = 0.0
        """When the first look was, by `time.time`; 0: none was."""
        self._sure_at = 0.0
        """Until then no absence is told: after an outage of Redis workers announce themselves."""
        self._is_whole = True

    async def run(self) -> None:
        """Keeps the picture fresh; runs as long as the API does."""
        while True:
            await anyio.sleep(_REFRESH_SECONDS)
            try:
                await self.refresh()
            except Exception as error:
                # Redis holds what anyone may write; no content may end this role.
                _log.unexpected("What the workers say could not be read.", error)

    async def refresh(self) -> None:
        """Looks now. While Redis does not answer, all stays as it was seen last."""
        async with self._lock:
            try:
                seen = await self._inspection.workforce(self._queues())
                refusal = await self._refusal()
            except RedisUnavailable as trouble:
                self.trouble = trouble
                self._sure_at = time.monotonic() + self._grace_seconds if self._began_at else 0.0
                return
            self.trouble = None
            if self.refusal or refusal:
                # Workers that could not announce themselves meanwhile live all the same.
                self._sure_at = time.monotonic() + self._grace_seconds
            self.refusal, self.paused, self._is_whole = refusal, seen.paused, seen.is_whole
            self._began_at = self._began_at or time.time()
            if seen.workers != self._bodies:
                self._bodies = seen.workers
                self._take(seen.workers)
            self.worked_out = {}

    def has(self, model: str, version: str | None = None) -> bool:
        """Whether a living worker claims jobs of a version of the model (None: of any)."""
        versions = self._served.get(model, _NO_VERSIONS)
        return versions is None or (bool(versions) if version is None else version in versions)

    def absence(self, model: str, version: str | None) -> Absence | None:
        """That no living worker has a version of a model (None: any); None where one has, or
        where it is not known for sure."""
        now = time.monotonic()
        is_sure = self._began_at and self._is_whole and now >= self._sure_at
        if self.has(model, version) or not is_sure:
            return None
        left_at = self._left_at.get((model, version)) or self._left_at.get((model, None))
        if left_at is None:
            return Absence(self._began_at, was_seen=False)
        missed_at, since = left_at
        if now - missed_at < self._grace_seconds:
            return None
        return Absence(since, was_seen=True)

    @property
    def own_worker_is_starting(self) -> bool:
        """Whether the worker beside this API was started just now and has not spoken yet."""
        return self._own_worker_since_ms is not None and (
            time.monotonic() < self._own_worker_due_at
        )

    def names(self, model: str, version: str | None) -> bool:
        """Whether a living worker has a version in its folder (None: any) and claims jobs of it.
        Of what was removed there it only runs what waits."""
        versions = self._served.get(model, _NO_VERSIONS)
        if versions is None:
            return version is None and model not in self._leaving
        return bool(versions) if version is None else version in versions

    def is_loading(self, model: str, version: str | None) -> bool:
        """Whether a living worker has yet to load the model, or this version of it."""
        return model in self.loading or (model, version) in self._loading_versions

    def refused(self, model: str) -> list[str]:
        """Why living workers do not serve versions of a model that lies in their folders."""
        return [
            f"{f'Version {version}' if version else 'It'} is not served: {reason}."
            for _, says in sorted(self.workers.items())
            for version, reason in sorted(says.problems.get(model, {}).items())
        ]

    def _is_own(self, says: WorkerSays) -> bool:
        """Of what earlier workers said some is left for 15 s after a kill."""
        since_ms = self._own_worker_since_ms
        return since_ms is not None and (
            says.host == socket.gethostname() and (says.started_ms or 0) >= since_ms
        )

    async def _refusal(self) -> StorageFull | WritesRefused | None:
        try:
            await self._store.check_writes()
        except (StorageFull, WritesRefused) as error:
            return error
        except RedisRefused:
            # A user without the right to this command; the workers are seen all the same.
            return None
        return None

    def _take(self, bodies: Mapping[str, bytes]) -> None:
        self.workers = {shown_worker(one): worker_says(body) for one, body in bodies.items()}
        said = self.workers.values()
        if any(map(self._is_own, said)):
            self._own_worker_since_ms = None
        self.loading = frozenset(model for one in said for model in models_to_come(one))
        ready = [one for one in said if one.state == "ready"]
        self._loading_versions = frozenset(
            (model, version)
            for one in ready
            for model, versions in one.loading_versions.items()
            for version in versions
        )
        served = _served(ready)
        self._leaving = _leaving(ready)
        before, after = _wanted(self._served), _wanted(served)
        now = (time.monotonic(), time.time())
        for wanted in before - after:
            self._left_at[wanted] = now
        for wanted in after & self._left_at.keys():
            del self._left_at[wanted]
        while len(self._left_at) > _MOST_ABSENT:
            del self._left_at[next(iter(self._left_at))]
        self._served = served


_NO_VERSIONS: Final[frozenset[str]] = frozenset()


def _served(ready: Sequence[WorkerSays]) -> dict[str, set[str] | None]:
    served: dict[str, set[str] | None] = {}
    for one in ready:
        for model in one.models:
            versions = one.versions.get(model)
            known = served.get(model, set())
            served[model] = None if versions is None or known is None else known | versions.keys()
    return served


def _leaving(ready: Sequence[WorkerSays]) -> frozenset[str]:
    """A release that does not say which folder it serves does not say versions either."""
    leaving = {model for one in ready for model in one.models if model not in one.versions}
    return frozenset(leaving) - {
        model
        for one in ready
        for model in one.models
        if one.model_dir is None or model in one.versions
    }


def _wanted(served: Mapping[str, set[str] | None]) -> set[Wanted]:
    """All that can be asked for and is served."""
    models: set[Wanted] = {(model, None) for model in served}
    return models | {
        (model, version) for model, versions in served.items() for version in versions or ()
    }
