"""Announcements: a worker writes its status and models to Redis, and reads those of others."""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Final

import msgspec

from asyncinfer.errors import PermissionDenied, RedisUnavailable, StorageFull
from asyncinfer.models.folder import OF_ALL_VERSIONS, is_valid_name
from asyncinfer.models.signature import Signature, read_signature
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import (
    ANNOUNCE_INTERVAL_SECONDS,
    Announcements,
    WorkerAnnouncement,
    serves_or_loads,
)
from asyncinfer.repository.intake import why_no_jobs
from asyncinfer.repository.redis_errors import log_refused
from asyncinfer.repository.store import Store
from asyncinfer.timeouts import set_within
from asyncinfer.worker.models.engine_cache import Label
from asyncinfer.worker.models.folder_differences import (
    Differences,
    find_differences,
    lacking_problems,
    startup_warning,
)
from asyncinfer.worker.models.library import Library
from asyncinfer.worker.models.queues import Queues

_log = logging.getLogger(__name__)
_limited_log = LimitedLog(_log)

WorkerStatus = Mapping[str, Any]

_EXPIRY_SECONDS: Final = 5 * ANNOUNCE_INTERVAL_SECONDS
"""A worker that did not announce itself for so long counts as dead."""

_HUNG_EXPIRY_SECONDS: Final = 30.0
"""How long the state of a hung worker that has ended is shown: two scrapes of Prometheus."""

_API_CACHE_SECONDS: Final = 5.0
"""For so long an API may still submit jobs for a removed version."""

_MAX_LEAVING_SECONDS: Final = 60.0
"""A removed version is dropped after this time, even if the queue of its model is not empty: other
versions may keep it busy."""

_FULL_ROUND_SECONDS: Final = 0.7 * ANNOUNCE_INTERVAL_SECONDS
"""Rounds that come sooner announce only what is new: with 300 models to load there are 300 rounds,
and each version costs a round one call."""

_MAX_RETRACTED: Final = 100
_MAX_LOADING: Final = 10_000

_MAX_PROBLEMS: Final = 200
_MAX_PROBLEM_CHARS: Final = 1000
_MORE_PROBLEMS: Final = "…"
"""The key, in place of a model's name, of a note on how many problems are not listed."""


class Announcer:
    """Announces a worker and its models, reads what other workers announce, and tells the library
    which versions are served, contested or may be dropped. There is one instance per worker."""

    def __init__(
        self,
        store: Store,
        worker_id: str,
        library: Library,
        queues: Queues,
        read_status: Callable[[], WorkerStatus],
        on_queues_changed: Callable[[], None],
    ) -> None:
        """`read_status` gives the fields of `WorkerAnnouncement` that do not tell of models;
        `on_queues_changed` is called when a round has changed which queues are served."""
        self._store = store
        self._worker_id = worker_id
        self._library = library
        self._table = library.table
        self._folder = str(library.source.path)
        self._queues = queues
        self._on_queues_changed = on_queues_changed
        self._read_status = read_status
        self._announcements = Announcements(store)
        self._last_seen: dict[str, tuple[WorkerAnnouncement, float]] = {}
        """By other worker its last announcement, and when that was read."""
        self._round_lock = asyncio.Lock()
        self._announced: dict[Label, Signature] = {}
        self._full_round_at = -_FULL_ROUND_SECONDS
        self._removed: dict[Label, None] = {}
        """Versions whose file was removed while this worker ran, in order of removal."""
        self._differences: Differences | None = None
        """From the folders of other workers; None until their announcements were read."""

    async def announce(self) -> None:
        """Makes one round of announcements; waits for a round under way first. Versions that were
        new when it began may be served after it, also if it failed.

        Raises RedisUnavailable, StorageFull or RedisRefused.
        """
        async with self._round_lock:  # the first round of a start is called from two places
            new = self._table.unannounced_labels
            try:
                await self._announce(new)
            except PermissionDenied:
                # Begins the refusal in the log, if it is also why Redis takes no jobs.
                await why_no_jobs(self._store)
                raise
            finally:
                # Also where a version could not be announced: a full Redis is freed by running
                # jobs.
                self._library.mark_announced(new)
            if self._store.report and self._store.report.refusal.is_active:
                # Ends the refusal in the log, if Redis takes jobs again.
                await why_no_jobs(self._store)

    async def _announce(self, new: Collection[Label]) -> None:
        """The steps of a round, whose order matters; `new` are the versions to be served then."""
        status = self._read_status()
        # The default model comes before the models: it says which queue a model has, which an API
        # needs as soon as it finds the model announced.
        full: StorageFull | None = None
        try:
            await self._queues.synchronize()
        except StorageFull as error:
            # The announcement of a worker is taken even then: it must not count as dead.
            full = error
        finally:
            if self._queues.have_changed:
                self._on_queues_changed()
        # The worker comes before its models: other workers verify a conflicting file against live
        # workers, and check before they retract a version whether another worker still has it.
        await self._announce_worker(status)
        if full:
            raise full
        others = await self._read_others()
        is_other_folder = self._compare_folders(others, status)
        contested_problems = await self._announce_models(others)
        before = self._table.signatures().keys() & self._table.contested_problems.keys()
        is_contested_otherwise = contested_problems.keys() != before
        if is_contested_otherwise:
            self._library.set_contested(contested_problems)
        if self._library.mark_announced(new) or is_contested_otherwise or is_other_folder:
            await self._announce_worker(self._read_status())
        await self._announcements.announce_default_versions(self._table.default_versions())
        await self._retract_removed()
        await self._drop_removed_versions(others)
        await self._announcements.announce_paces(status["seconds_per_job"])

    async def retract(self) -> None:
        """Removes this worker's announcement, at its end; its models stay announced. That of a hung
        worker stays for a while, since nobody would see its state else: it may end at once. Raises
        RedisUnavailable or StorageFull."""
        status = self._read_status()
        if status["state"] == "hung":
            await self._announce_worker(status, _HUNG_EXPIRY_SECONDS)
        else:
            await self._announcements.retract_worker(self._worker_id)
        await self._announcements.announce_paces(status["seconds_per_job"])

    async def is_elsewhere(self, model: str, version: str | None) -> bool:
        """Whether another worker has a version (None: any version) of the model. Raises
        RedisUnavailable.

        A worker that was seen lately counts too: after Redis was emptied it is missing there until
        its next announcement, and its jobs must not fail meanwhile.
        """
        await self._read_others()
        versions = [other.versions.get(model, {}) for other, _ in self._last_seen.values()]
        return any(bool(theirs) if version is None else version in theirs for theirs in versions)

    def _compare_folders(self, others: Sequence[WorkerAnnouncement], status: WorkerStatus) -> bool:
        """Notes how other folders differ from this one; returns whether that has changed since the
        last round, the first time whether there are differences. Logs them the first time."""
        before, table = self._differences, self._table
        models = {
            *table.names,
            *(model for model, _ in table.signatures() | table.problems()),
        }
        comparable = others if self._library.source.serves_all_models else ()
        now = find_differences(self._folder, models, status["started_ms"], comparable)
        self._differences = now
        if before is None:
            self._warn_at_start(startup_warning(self._folder, now), models, others)
        return now != (before or Differences())

    def _warn_at_start(
        self, other_folder: str, models: Collection[str], others: Iterable[WorkerAnnouncement]
    ) -> None:
        """Logs what the operator may have set up otherwise than intended: the line `other_folder`,
        empty if there is none, and a default model that no live worker has. `models` are all names
        known here."""
        if other_folder:
            _log.warning("%s", other_folder)
        default = self._queues.default_model
        if (
            default
            and default not in models
            and not any(serves_or_loads(other, default) for other in others)
        ):
            _log.warning(
                "No worker that is alive has the default model %r, so requests that name no model "
                "wait. Start one that has it, or set DEFAULT_MODEL to another.",
                default,
            )

    async def _announce_worker(
        self, status: WorkerStatus, ttl_seconds: float = _EXPIRY_SECONDS
    ) -> None:
        """Writes the announcement of this worker, by default until it has missed a few rounds."""
        about = {**status, **self._models_status()}
        await self._announcements.announce_worker(self._worker_id, about, ttl_seconds)

    def _models_status(self) -> dict[str, Any]:
        """The fields of `WorkerAnnouncement` that tell of models and the default model."""
        versions: dict[str, dict[str, str]] = {}
        for (model, version), signature in self._table.uncontested_signatures().items():
            versions.setdefault(model, {})[version] = signature.sha256
        served = {name: version.file.version for name, version in self._table.served.items()}
        default = self._queues.default_model
        known_default = {"default_model": default} if default or self._queues.has_no_default else {}
        return {
            "models": sorted(served),
            **known_default,
            "versions": versions,
            "served": served,
            "problems": _bounded_problems(self._problems()),
            "loading": self._table.loading[:_MAX_LOADING],
            "loading_versions": _first_versions(self._table.loading_versions, _MAX_LOADING),
            "model_dir": self._folder,
            "loaded": ["/".join(label) for label in self._library.cache.labels],
        }

    def _problems(self) -> dict[Label, str]:
        """The problems of versions here, and of models that only other workers have, for which the
        version is OF_ALL_VERSIONS."""
        found = self._table.problems()
        if self._differences:
            for model, problem in lacking_problems(self._folder, self._differences).items():
                found.setdefault((model, OF_ALL_VERSIONS), problem)
        return found

    async def _read_others(self) -> list[WorkerAnnouncement]:
        """What other live workers announce now; notes when each was last seen. Raises
        RedisUnavailable."""
        others = await self._announcements.read_workers()
        others.pop(self._worker_id, None)
        now = time.monotonic()
        lately = {
            worker_id: (other, seen_at)
            for worker_id, (other, seen_at) in self._last_seen.items()
            if now - seen_at < _EXPIRY_SECONDS
        }
        self._last_seen = lately | {worker_id: (other, now) for worker_id, other in others.items()}
        return list(others.values())

    # --- versions in the folder ------------------------------------------------------------------

    async def _announce_models(self, others: Sequence[WorkerAnnouncement]) -> dict[Label, str]:
        """Announces new versions, and from time to time all. Returns the contested ones, which a
        live worker serves from another file, each with a text that says so."""
        began_at = time.monotonic()
        is_full = began_at - self._full_round_at >= _FULL_ROUND_SECONDS
        signatures = self._table.signatures()
        due = {
            label: signature
            for label, signature in signatures.items()
            if is_full or self._announced.get(label) is not signature
        }
        contested_problems = {
            label: problem
            for label, problem in self._table.contested_problems.items()
            if label in signatures and label not in due
        }
        names = sorted({model for model, _ in due})
        await self._announcements.announce_model_names(names)
        for model in names:
            known = await self._announcements.read_versions(model)
            for label, signature in due.items():
                if label[0] == model and (
                    conflict := await self._announce_version(known.get(label[1]), signature, others)
                ):
                    contested_problems[label] = conflict
        self._announced = signatures
        if is_full:
            self._full_round_at = began_at
        return contested_problems

    async def _announce_version(
        self, stored: bytes | None, ours: Signature, others: Sequence[WorkerAnnouncement]
    ) -> str:
        """Announces a version in place of `stored`, the signature as JSON that is announced now
        (None: none is), unless a live worker serves that.

        Returns why ours must not be served, empty if it may and is announced now.
        """
        body = msgspec.json.encode(ours)
        if stored is None:
            stored = await self._announcements.announce_if_absent(ours.model, ours.version, body)
        if stored == body:
            return ""
        if conflict := _conflict(stored, ours, others):
            return conflict
        await self._announcements.announce_models({ours.model: {ours.version: body}})
        return ""

    # --- removed versions ------------------------------------------------------------------------

    async def _drop_removed_versions(self, others: Sequence[WorkerAnnouncement]) -> None:
        """Has the library drop removed versions for which no job can wait any more."""
        finished = []
        removed = self._table.seconds_since_removal(time.monotonic())
        for (model, version), seconds in removed.items():
            elsewhere = any(model in other.versions for other in others)
            if await self._may_drop(model, seconds, elsewhere=elsewhere):
                finished.append((model, version))
        if finished:
            self._library.drop_removed(finished)

    async def _retract_removed(self) -> None:
        """Removes the announcements of the versions removed last that no other worker has. Repeated
        in each round, since a Redis that starts from an older dump has them again."""
        self._removed |= dict.fromkeys(self._table.seconds_since_removal(time.monotonic()))
        here = self._table.signatures().keys()
        labels = [label for label in self._removed if label not in here][-_MAX_RETRACTED:]
        self._removed = dict.fromkeys(labels)
        for model, version in labels:
            # Other workers are read after the check: one that was just started with this version
            # has announced itself by then.
            if await self._announcements.is_announced(model, version) and not any(
                version in other.versions.get(model, {}) for other in await self._read_others()
            ):
                await self._announcements.retract_version(model, version)

    async def _may_drop(self, model: str, seconds: float, *, elsewhere: bool) -> bool:
        """Whether a version of the model that was removed `seconds` ago may be dropped, since no
        job can wait for it here. True at once if only other workers have the model now
        (`elsewhere`: they have it); else after a few seconds if its queue is empty, and after a
        minute if it has other versions here, which may keep the queue busy."""
        here = any(name == model for name, _ in self._table.uncontested_signatures())
        if elsewhere and not here:
            return True
        if seconds < _API_CACHE_SECONDS:
            return False
        if here and seconds > _MAX_LEAVING_SECONDS:
            return True
        queue = keys.queue(self._store.queue_name, model, self._queues.default_model)
        return await self._store.is_queue_empty(queue)


def _bounded_problems(found: Mapping[Label, str]) -> dict[str, dict[str, str]]:
    """The first problems as {model: {version: text}}. Names that can be a model's come first, since
    a folder may hold any number of other files."""
    problems: dict[str, dict[str, str]] = {}
    labels = sorted(found, key=lambda label: (not is_valid_name(label[0]), label))
    for model, version in labels[:_MAX_PROBLEMS]:
        problems.setdefault(model, {})[version] = found[model, version][:_MAX_PROBLEM_CHARS]
    if (more := len(found) - _MAX_PROBLEMS) > 0:
        reason = f"{more} more problems are not listed; the log of the worker has them"
        problems[_MORE_PROBLEMS] = {OF_ALL_VERSIONS: reason}
    return problems


def _first_versions(by_model: Mapping[str, Sequence[str]], count: int) -> dict[str, list[str]]:
    """The first `count` versions of all models together, by model."""
    first: dict[str, list[str]] = {}
    labels = ((model, version) for model, versions in by_model.items() for version in versions)
    for model, version in islice(labels, count):
        first.setdefault(model, []).append(version)
    return first


def _conflict(stored: bytes, ours: Signature, others: Sequence[WorkerAnnouncement]) -> str:
    """Why our version must not be served: `stored` names another file, and a live worker serves
    that. Empty otherwise, and if `stored` cannot be read."""
    theirs = read_signature(stored)
    if theirs is None:
        return ""
    sha256 = theirs.sha256
    if sha256 == ours.sha256:
        return ""
    if not any(other.versions.get(ours.model, {}).get(ours.version) == sha256 for other in others):
        return ""
    return (
        f"another worker serves another file as this version (sha256 {sha256[:12]}…, here "
        f"{ours.sha256[:12]}…). Publish this one under a new version."
    )


async def announce_forever(
    announce: Callable[[], Awaitable[None]],
    news: asyncio.Event,
    on_answered: Callable[[], None],
    on_failed: Callable[[RedisUnavailable], None],
) -> None:
    """Calls `announce` every few seconds, and at once when `news` is set, which it clears. Ends
    only by cancellation: errors are logged.

    `on_answered` is called after each round that Redis has answered, also if its memory is full,
    and `on_failed` after one that it did not answer, or refused.
    """
    while True:
        news.clear()
        try:
            await announce()
            on_answered()
        except StorageFull:
            # Redis has answered, and jobs still finish, so the worker is as ready as before.
            on_answered()
        except RedisUnavailable as error:
            log_refused(_limited_log, "Announce", error)
            on_failed(error)
        except Exception as error:
            _limited_log.unexpected("An announcement failed.", error)
        await set_within(news, ANNOUNCE_INTERVAL_SECONDS * random.uniform(0.8, 1.2))
