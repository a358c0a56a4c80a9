"""What a worker says of itself and its models, and what it hears of others'."""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final

import msgspec
from msgspec import Struct

from asyncinfer.errors import RedisRefused, RequestError, StorageFull
from asyncinfer.models.folder import OF_ALL_VERSIONS, valid_name
from asyncinfer.models.signature import Signature, read_signature
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import (
    ANNOUNCE_SECONDS,
    Announcements,
    WorkerSays,
    serves,
    worker_says,
)
from asyncinfer.repository.store import Store
from asyncinfer.worker.models.engine_cache import Label
from asyncinfer.worker.models.folder_differences import Differences, differences, lacking, told
from asyncinfer.worker.models.library import Library
from asyncinfer.worker.models.queues import Queues

log = logging.getLogger(__name__)
_limited = LimitedLog(log)


_LIVES_SECONDS: Final = 5 * ANNOUNCE_SECONDS
_APIS_KNOW_SECONDS: Final = 5.0
"""Until then an API may still send jobs for what was removed."""

_MOST_LEAVING_SECONDS: Final = 60.0
"""A queue that other versions keep busy says nothing of who waits for a removed one."""


_FULL_ROUND_SECONDS: Final = 0.7 * ANNOUNCE_SECONDS
"""Rounds that news cause sooner announce only what is new: with 300 models to load there are 300
rounds, and each version costs one a call."""

_MOST_RETRACTED: Final = 100
_MOST_LOADING: Final = 10_000

_MOST_PROBLEMS: Final = 200
_LONGEST_PROBLEM: Final = 1000
_MORE: Final = "…"
"""In place of a model, for how many problems are not listed. No model has this name."""


class Said(Struct, frozen=True):
    """The part of an announcement that changes all the time."""

    about: Mapping[str, Any]
    paces: Mapping[str, float]


class Announcer:
    """One `announce` is one round: say, hear, and settle what follows."""

    def __init__(
        self,
        store: Store,
        worker_id: str,
        library: Library,
        queues: Queues,
        said: Callable[[], Said],
        on_queues: Callable[[], None],
    ) -> None:
        self._store = store
        self._worker_id = worker_id
        self._library = library
        self._queues = queues
        self._on_queues = on_queues
        self._said = said
        self._announcements = Announcements(store)
        self._heard: dict[str, tuple[WorkerSays, float]] = {}
        """What each other worker said last, and when that was read."""
        self._one_round = asyncio.Lock()
        self._announced: dict[Label, Signature] = {}
        self._full_round_at = -_FULL_ROUND_SECONDS
        self._retracted: dict[Label, None] = {}
        """Versions whose file went while this worker ran, the last one last."""
        self._differences: Differences | None = None
        """From the folders of others; None until they were heard."""

    async def announce(self) -> None:
        async with self._one_round:  # the first one of a start is called from two places
            new = self._library.unconfirmed
            try:
                await self._announce(new)
            finally:
                # What could not be announced is served too: a full Redis is freed by running jobs.
                self._library.confirm(new)

    async def _announce(self, new: Collection[Label]) -> None:
        said = self._said()
        # Before the models: an API must not find a model announced, and no default to say which
        # queue is its own.
        try:
            await self._queues.settle()
        finally:
            if self._queues.are_others:
                self._on_queues()
        # Then who we are, and at last what we have: who finds another file announced looks for a
        # worker that lives and has it, and who removes one for others that still have it.
        await self._say_who(said)
        others = await self._others()
        is_other_folder = self._compare(others, said)
        contested = await self._announce_models(others)
        is_contested_otherwise = contested.keys() != self._contested()
        if is_contested_otherwise:
            self._library.contest(contested)
        if self._library.confirm(new) or is_contested_otherwise or is_other_folder:
            await self._say_who(self._said())
        await self._announcements.announce_default_versions(self._library.default_versions())
        await self._retract()
        await self._settle_leaving(others)
        await self._announcements.announce_paces(said.paces)

    async def retract(self) -> None:
        await self._announcements.retract_worker(self._worker_id)
        await self._announcements.announce_paces(self._said().paces)

    async def is_elsewhere(self, model: str, version: str | None) -> bool:
        """Whether another worker has what this one has not (yet, or any more).

        One that was heard of lately counts too: a Redis that was emptied knows of it again when
        it announces itself, and its jobs must not fail meanwhile.
        """
        await self._others()
        versions = [says.versions.get(model, {}) for says, _ in self._heard.values()]
        return any(one if version is None else version in one for one in versions)

    def _compare(self, others: Sequence[WorkerSays], said: Said) -> bool:
        """Notes how other folders differ from this one; returns whether that is news."""
        library, before = self._library, self._differences
        folder = str(library.model_dir)
        models = {*library.names, *(model for model, _ in library.described() | library.problems())}
        heard = others if library.is_for_all else ()
        now = self._differences = differences(folder, models, said.about["started_ms"], heard)
        if before is None:
            self._tell(told(folder, now), models, others)
        return now != (before or Differences())

    def _tell(
        self, other_folder: str, models: Collection[str], others: Iterable[WorkerSays]
    ) -> None:
        """Once, at the start: what is not as a person may think."""
        if other_folder:
            log.warning("%s", other_folder)
        default = self._queues.default_model
        if default and default not in models and not any(serves(one, default) for one in others):
            log.warning(
                "No worker that is alive has the default model %r, so requests that name no model "
                "wait. Start one that has it, or set DEFAULT_MODEL to another.",
                default,
            )

    def _contested(self) -> set[Label]:
        return self._library.described().keys() - self._library.announced().keys()

    async def _say_who(self, said: Said) -> None:
        about = {**said.about, **self._models()}
        await self._announcements.announce_worker(self._worker_id, about, _LIVES_SECONDS)

    def _models(self) -> dict[str, Any]:
        """As `repository.inspect.WorkerSays` reads it."""
        versions: dict[str, dict[str, str]] = {}
        for (model, version), signature in self._library.announced().items():
            versions.setdefault(model, {})[version] = signature.sha256
        served = {name: one.file.version for name, one in self._library.served.items()}
        default = self._queues.default_model
        known_default = {"default_model": default} if default or self._queues.has_no_default else {}
        return {
            "models": sorted(served),
            **known_default,
            "versions": versions,
            "served": served,
            "problems": _bounded(self._problems()),
            "loading": self._library.loading[:_MOST_LOADING],
            "loading_versions": _first(self._library.loading_versions, _MOST_LOADING),
            "model_dir": str(self._library.model_dir),
            "loaded": ["/".join(label) for label in self._library.loaded],
        }

    def _problems(self) -> dict[Label, str]:
        """What is wrong with versions here, and which models of other workers are not here."""
        found = self._library.problems()
        if self._differences:
            folder = str(self._library.model_dir)
            for model, problem in lacking(folder, self._differences).items():
                found.setdefault((model, OF_ALL_VERSIONS), problem)
        return found

    async def _others(self) -> list[WorkerSays]:
        bodies = await self._announcements.workers()
        others = {one: worker_says(body) for one, body in bodies.items() if one != self._worker_id}
        now = time.monotonic()
        lately = {one: it for one, it in self._heard.items() if now - it[1] < _LIVES_SECONDS}
        self._heard = lately | {one: (says, now) for one, says in others.items()}
        return list(others.values())

    # --- what we have --------------------------------------------------------------------------

    async def _announce_models(self, others: Sequence[WorkerSays]) -> dict[Label, str]:
        """Announces each version, unless a living worker serves another file of its name: what is
        new, and from time to time all."""
        began_at = time.monotonic()
        is_full = began_at - self._full_round_at >= _FULL_ROUND_SECONDS
        described = self._library.described()
        due = {
            label: signature
            for label, signature in described.items()
            if is_full or self._announced.get(label) is not signature
        }
        before = self._library.contested
        contested = {one: before[one] for one in before if one in described and one not in due}
        names = sorted({model for model, _ in due})
        await self._announcements.announce_model_names(names)
        for model in names:
            known = await self._announcements.announced_versions(model)
            for version, signature in _of(model, due):
                if rival := await self._announce_version(known.get(version), signature, others):
                    contested[model, version] = rival
        self._announced = described
        if is_full:
            self._full_round_at = began_at
        return contested

    async def _announce_version(
        self, stored: bytes | None, ours: Signature, others: Sequence[WorkerSays]
    ) -> str:
        """Why ours must not be served; empty when it is what is announced now."""
        body = msgspec.json.encode(ours)
        if stored is None:
            stored = await self._announcements.announce_first(ours.model, ours.version, body)
        if stored == body:
            return ""
        if rival := _rival(stored, ours, others):
            return rival
        await self._announcements.announce_models({ours.model: {ours.version: body}})
        return ""

    # --- what we had ---------------------------------------------------------------------------

    async def _settle_leaving(self, others: Sequence[WorkerSays]) -> None:
        done = []
        for (model, version), seconds in self._library.leaving.items():
            elsewhere = any(model in one.versions for one in others)
            if await self._may_forget(model, seconds, elsewhere=elsewhere):
                done.append((model, version))
        if done:
            self._library.forget(done)

    async def _retract(self) -> None:
        """In each round, since an older dump brings back what was announced in its time."""
        self._retracted |= dict.fromkeys(self._library.leaving)
        here = self._library.described().keys()
        labels = [label for label in self._retracted if label not in here][-_MOST_RETRACTED:]
        self._retracted = dict.fromkeys(labels)
        for model, version in labels:
            # Asked for only now: a worker that was just started with it has said so by then.
            if await self._announcements.is_announced(model, version) and not any(
                version in one.versions.get(model, {}) for one in await self._others()
            ):
                await self._announcements.retract_version(model, version)

    async def _may_forget(self, model: str, seconds: float, *, elsewhere: bool) -> bool:
        """Whether no job can wait for it: other workers take them, or none is left."""
        here = any(name == model for name, _ in self._library.announced())
        if elsewhere and not here:
            return True
        if seconds < _APIS_KNOW_SECONDS:
            return False
        if here and seconds > _MOST_LEAVING_SECONDS:
            return True
        queue = keys.queue(self._store.n, model, self._queues.default_model)
        return await self._store.is_empty(queue)


def _bounded(found: Mapping[Label, str]) -> dict[str, dict[str, str]]:
    """{model: {version: problem}}; a folder may hold any number, so that those come first whose
    name can be a model's."""
    problems: dict[str, dict[str, str]] = {}
    labels = sorted(found, key=lambda label: (not valid_name(label[0]), label))
    for model, version in labels[:_MOST_PROBLEMS]:
        problems.setdefault(model, {})[version] = found[model, version][:_LONGEST_PROBLEM]
    if (left := len(found) - _MOST_PROBLEMS) > 0:
        reason = f"{left} more problems are not listed; the log of the worker has them"
        problems[_MORE] = {OF_ALL_VERSIONS: reason}
    return problems


def _first(versions: Mapping[str, Sequence[str]], most: int) -> dict[str, list[str]]:
    """As many of all versions, by model."""
    found: dict[str, list[str]] = {}
    labels = ((model, version) for model, its in versions.items() for version in its)
    for model, version in islice(labels, most):
        found.setdefault(model, []).append(version)
    return found


def _of(model: str, described: Mapping[Label, Signature]) -> Iterator[tuple[str, Signature]]:
    return ((label[1], signature) for label, signature in described.items() if label[0] == model)


def _rival(stored: bytes, ours: Signature, others: Sequence[WorkerSays]) -> str:
    """Why ours must not be served; empty where the file is the same, or nobody serves the other."""
    theirs = read_signature(stored)
    if theirs is None:
        return ""
    sha256 = theirs.sha256
    if sha256 == ours.sha256:
        return ""
    if not any(one.versions.get(ours.model, {}).get(ours.version) == sha256 for one in others):
        return ""
    return (
        f"another worker serves another file as this version (sha256 {sha256[:12]}…, here "
        f"{ours.sha256[:12]}…). Publish this one under a new version."
    )


async def announce_forever(
    announce: Callable[[], Awaitable[None]],
    news: asyncio.Event,
    on_answered: Callable[[], None],
) -> None:
    """Calls `announce` every few seconds, and at once when there is news. Ends by cancellation."""
    while True:
        news.clear()
        try:
            await announce()
            on_answered()
        except StorageFull:
            # What runs still finishes, so the worker is as ready as it was.
            on_answered()
        except RedisRefused as error:
            _limited.warning(f"Announce: {error.detail}")
        except RequestError as error:
            log.debug("Announce: %s", error.detail)
        except Exception as error:
            _limited.unexpected("An announcement failed.", error)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANNOUNCE_SECONDS * random.uniform(0.8, 1.2)):
                await news.wait()
