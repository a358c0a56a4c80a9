"""Follows the model folder of a worker: loads new versions, and drops removed ones."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import msgspec

from asyncinfer.engine import Engine
from asyncinfer.errors import ModelDirUnreadable, ModelRefused, UnknownModel
from asyncinfer.models.folder import FolderListing, ModelFile, total_bytes, version_order
from asyncinfer.worker.models import versions
from asyncinfer.worker.models.engine_cache import EngineCache, Label, label_of
from asyncinfer.worker.models.sandbox import try_in_child
from asyncinfer.worker.models.source import ModelSource
from asyncinfer.worker.models.version_table import VersionTable
from asyncinfer.worker.models.versions import Version

_log = logging.getLogger(__name__)

_UNCHANGED_SECONDS: Final = 0.3
"""A file counts as completely written if it is unchanged for so long: not everyone publishes by
rename."""

_IN_PLACE: Final = "was changed in place; what was loaded is served on. Publish a new version."


class Library:
    """Loads the versions in the model folder, tries new ones first, and keeps `table` up to date.
    There is one instance per worker; call `open` first.

    All changes happen in the event loop, between two awaits; `on_change` is called after each.
    """

    def __init__(
        self, source: ModelSource, cache: EngineCache, *, allow_custom_ops: bool = False
    ) -> None:
        """Reads nothing yet. The callbacks are called in the event loop."""
        self.source = source
        self.table = VersionTable(source)
        self.on_change: Callable[[], None] = lambda: None
        """Called after each change of what is in the folder, loaded, refused or served."""
        self.on_served: Callable[[], None] = lambda: None
        """Called when versions begin to be served, as they were announced just now."""
        self._allow_custom_ops = allow_custom_ops
        self.cache = cache
        self._passed_over: tuple[str, ...] = ()
        self._unreadable = ""
        self._last_warning = ""
        self._is_rescanning = self._is_updating_beside_rescan = False
        self._changed_meanwhile = False
        """Whether the folder may have changed since the rescan that is under way began."""

    # --- engines -------------------------------------------------------------------------------

    async def fetch(self, model: str | None, version: str | None) -> Engine:
        """The engine of a version (None: the default version) of a model, loaded in a thread if
        need be; found as by `VersionTable.find_served`. It stays usable if the cache drops it.

        Raises UnknownModel for a version that is not served, that cannot be loaded again, or whose
        file was changed in place.
        """
        found = self.table.find_served(model, version)
        if engine := self.cache.get(found.label):
            return engine
        if found.is_altered:
            raise UnknownModel(f"It cannot be loaded again: {found.problem}")
        try:
            engine = await self.cache.fetch(found.file, total_bytes(found.stamp))
        except ModelRefused as error:
            raise UnknownModel(f"It cannot be loaded any more: {error.detail}") from error
        if found.signature and engine.signature.sha256 != found.signature.sha256:
            self.cache.drop(found.label)
            raise UnknownModel(f"{found.file.display_path} {_IN_PLACE}")
        return engine

    # --- at the start --------------------------------------------------------------------------

    def open(self) -> None:
        """Reads the folder, and loads nothing. Raises StartError when the folder cannot be read or
        the settings can give no model."""
        self.table.by_label = self._versions_in(self.source.listing_at_start())
        for model, problem in self.table.missing_problems().items():
            _log.error("Model %s: %s", model, problem)
        self._warn_if_nothing_is_served()

    async def load_untried(self) -> None:
        """Loads each untried version once, to learn its signature: of each model first the default
        version, or the next one where that is broken; then all others. Returns when all were tried,
        and raises nothing for a bad file."""
        while version := self.table.next_untried():
            await self._load_first_time(version)
            self._changed()

    async def _load_first_time(self, version: Version) -> None:
        """Loads a version, without a trial in a child, and notes its signature or its problem;
        neither if it was replaced or removed meanwhile."""
        engine = await self._load_or_problem(version.file)
        if self.table.by_label.get(version.label) is not version:
            return  # the file was replaced or removed meanwhile
        if isinstance(engine, str):
            self._keep_with_problem(version, version, engine)
        else:
            self._add_loaded(version, engine, displaces=False)

    # --- changes in the folder -------------------------------------------------------------------

    async def rescan(self) -> None:
        """Reads the folder and applies what has changed: loads new versions, drops removed ones.
        Returns when that is done, and raises nothing for a bad file or an unreadable folder.

        A call during another one returns soon: it drops removed versions and notes new ones, as the
        trial of a file may take a minute. The rescan under way then reads the folder again.
        """
        if self._is_rescanning:
            self._changed_meanwhile = True
            await self._update_beside_rescan()
            return
        self._is_rescanning = self._changed_meanwhile = True
        try:
            while self._changed_meanwhile:
                self._changed_meanwhile = False
                await self._rescan()
        finally:
            self._is_rescanning = False
            self.table.untried_files.clear()
            self._warn_if_nothing_is_served()

    async def _update_beside_rescan(self) -> None:
        """During a rescan: drops removed versions, and notes new ones as untried; calls `on_change`
        if there are any. Does nothing while another call is under way."""
        if self._is_updating_beside_rescan:
            return
        self._is_updating_beside_rescan = True
        try:
            before = await self._read_folder()
            await asyncio.sleep(_UNCHANGED_SECONDS)
            seen = await self._read_folder()
        finally:
            self._is_updating_beside_rescan = False
        if before is None or seen is None or not self._is_rescanning:
            return
        removed = self.table.by_label.keys() - before.keys() - seen.keys()
        added = self.table.labels_to_try(seen) - self.table.untried_files
        for label in removed:
            self._remove(label)
        self.table.untried_files |= added
        if removed or added:
            self._changed()

    async def _rescan(self) -> None:
        """Reads the folder until it is the same twice, and applies the changes in between: those
        of files that are still being written wait for the next reading."""
        seen = await self._read_folder()
        while seen is not None and self.table.differences(seen):
            # New files are announced as loading while they may still be written.
            self.table.untried_files = self.table.labels_to_try(seen)
            if self.table.untried_files:
                self.on_change()
            await asyncio.sleep(_UNCHANGED_SECONDS)
            again = await self._read_folder()
            if again is None:
                return
            unfinished = {label for label in {*seen, *again} if seen.get(label) != again.get(label)}
            complete = {*self.table.differences(again)} - unfinished
            await self._apply_changes(again, complete)
            seen = again if unfinished else None

    async def _read_folder(self) -> dict[Label, Version] | None:
        """The versions in the folder, read in a thread; None if it cannot be read, which is logged
        once. Loaded versions in folders that cannot be read now are included unchanged."""
        try:
            seen = await asyncio.to_thread(lambda: self._versions_in(self.source.listing()))
        except ModelDirUnreadable as error:
            if error.detail != self._unreadable:
                _log.warning("The models stay as they are: %s", error.detail)
            self._unreadable = error.detail
            return None
        if self._unreadable:
            _log.info("%s can be read again.", self.source.watched_folder)
        self._unreadable = ""
        known, served = self.table.by_label, self.table.served
        return versions.hidden_but_loaded(known, seen) | {
            label: versions.with_config_in_force(
                version, known.get(label), served.get(version.file.model)
            )
            for label, version in seen.items()
        }

    def _versions_in(self, listing: FolderListing) -> dict[Label, Version]:
        """The versions of a listing with the present state of their files, which it reads. Logs
        once which other files are no models."""
        for line in listing.ignored:
            if line not in self._passed_over:
                _log.info("%s.", line)
        self._passed_over = listing.ignored
        return {label_of(file): versions.read_version(file) for file in listing.files}

    async def _apply_changes(self, seen: Mapping[Label, Version], labels: Iterable[Label]) -> None:
        """Drops, checks or loads each of the changed versions `labels`; calls `on_change` after
        each. `seen` is what the folder has now."""

        # Removed ones first, as loading a large file takes a while. Then the lowest version first,
        # so that a worker that finds three new ones serves them in order.
        def order(label: Label) -> tuple[bool, str, int]:
            return label in seen, label[0], version_order(label[1])

        for label in sorted(labels, key=order):
            if found := seen.get(label):
                await self._apply_change(found, self.table.by_label.get(label))
            elif label in self.table.by_label:
                self._remove(label)
            self.table.untried_files.discard(label)
            self._changed()

    async def _apply_change(self, found: Version, known: Version | None) -> None:
        """Decides about a version that is new (`known` is None) or has changed to `found`: loads
        it, keeps serving the earlier state, or notes what is wrong. Returns when that is done."""
        if known is None:
            await self._try_and_load(found, None)
        elif known.signature:
            await self._check_loaded(known, found)
        elif known.stamp == found.stamp and versions.loads_the_same(found.file, known.file):
            self._keep_with_problem(known, found, known.problem)
        else:
            await self._try_and_load(found, None)

    def _remove(self, label: Label) -> None:
        """Notes that a version, which must be known, was removed from the folder."""
        path = self.table.by_label[label].file.display_path
        if self.table.remove(label, time.monotonic()):
            _log.info("%s was removed; jobs that wait for it still run.", path)

    async def _check_loaded(self, known: Version, found: Version) -> None:
        """Decides about a version that was loaded and has changed. It is served on as it was loaded
        if its file has other content; it is tried and loaded again if only its configuration or
        path has changed."""
        if found.file.problem:
            self._keep_with_problem(known, found, found.file.problem)
        elif await self._is_altered(known, found):
            self._keep_with_problem(
                known, found, f"{found.file.display_path} {_IN_PLACE}", is_altered=True
            )
        elif versions.loads_the_same(found.file, known.file):
            self._keep_with_problem(known, found, "")
        else:
            # The content is the same, so the loaded version can be loaded again from its new path.
            moved = msgspec.structs.replace(known.file, path=found.file.path)
            await self._try_and_load(found, msgspec.structs.replace(known, file=moved))

    async def _is_altered(self, known: Version, found: Version) -> bool:
        """Whether the file has other content than when it was loaded; read in a thread, if its
        size or time has changed."""
        if found.stamp in (known.loaded, known.stamp) and not known.is_altered:
            return False
        return not await asyncio.to_thread(versions.has_same_content, known, found)

    async def _try_and_load(self, found: Version, known: Version | None) -> None:
        """Tries a version in a child process, then loads it here while other models run; that may
        take minutes.

        Where that fails, the earlier state `known` is kept, if there is one, with the problem.
        """
        size_bytes = total_bytes(found.stamp)
        problem = found.file.problem or await try_in_child(
            found.file, size_bytes, allow_custom_ops=self._allow_custom_ops
        )
        engine = problem or await self._load_or_problem(found.file)
        if isinstance(engine, str):
            self._keep_with_problem(known or found, found, engine)
            return
        self._add_loaded(found, engine)
        self.table.drop_removed(found.label)
        self._changed()
        _log.info("%s is ready.", found.file.display_path)

    async def _load_or_problem(self, file: ModelFile) -> Engine | str:
        """The engine, loaded in a thread without the cache, or the problem as text. Never raises: a
        bad file must not keep others from being loaded."""
        try:
            return await self.cache.load(file)
        except ModelRefused as error:
            return error.detail
        except Exception as error:
            _log.exception("%s could not be loaded.", file.display_path)
            return f"{file.display_path}: it could not be loaded: {type(error).__name__}: {error}"

    def _add_loaded(self, version: Version, engine: Engine, *, displaces: bool = True) -> None:
        """Notes a version as loaded, with its signature. Puts the engine into the cache if it is
        the version to serve for its model; other versions are loaded again when a job names one.
        `displaces` as for `EngineCache.put`."""
        loaded = {"signature": engine.signature, "loaded": version.stamp}
        self._log_and_keep(msgspec.structs.replace(version, **loaded))
        self.cache.drop(version.label)
        if self.table.is_best(version.label):
            size_bytes = total_bytes(version.stamp)
            self.cache.put(version.file, engine, size_bytes, displaces=displaces)

    def _keep_with_problem(
        self, known: Version, found: Version, problem: str, *, is_altered: bool = False
    ) -> None:
        """Keeps the version as `known`, with the problem of its present state `found`; that state
        is not tried again until it changes. An empty `problem` means that nothing is wrong.
        `is_altered`: the file has other content than what was loaded."""
        file, refused = found.file, None
        if known.signature and not versions.loads_the_same(found.file, known.file):
            file = msgspec.structs.replace(known.file, toml_problem=found.file.toml_problem)
            refused = found.file
        self._log_and_keep(
            Version(file, found.stamp, known.signature, problem, is_altered, refused, known.loaded)
        )

    def _log_and_keep(self, version: Version) -> None:
        """Keeps the version, and logs what is wrong with it unless that was logged for this version
        or another one of its model."""
        for problem in self.table.keep(version):
            _log.error("Model %s: %s", version.file.model, problem)

    # --- calls of the announcer ------------------------------------------------------------------

    def set_contested(self, contested_problems: Mapping[Label, str]) -> None:
        """Replaces the contested versions, which are not served since another worker serves them
        from another file; all others may be served. The texts say so, and each new one is logged.
        Does nothing if nothing has changed."""
        if contested_problems != self.table.contested_problems:
            for label in contested_problems.keys() - self.table.contested_problems.keys():
                _log.error("Model %s version %s: %s", *label, contested_problems[label])
            self.table.contested_problems = dict(contested_problems)
            self._changed()

    def mark_announced(self, labels: Iterable[Label]) -> bool:
        """Call once these versions were announced: those that may be served are from now on, and
        `on_served` is called. Returns whether there are any that were not marked before."""
        is_new = self.table.mark_announced(labels)
        if is_new:
            self._update_served()
            self.on_served()
        return is_new

    def drop_removed(self, labels: Iterable[Label]) -> None:
        """Drops removed versions for good, with their engines, since no job waits for them any
        more."""
        for label in labels:
            self.table.drop_removed(label)
            self.cache.drop(label)
        self._changed()

    def _changed(self) -> None:
        """Updates what is served after any change, and calls `on_change`."""
        self._update_served()
        self._warn_if_nothing_is_served()
        self.on_change()

    def _update_served(self) -> None:
        """Chooses the default version of each model, and drops the engine of the one before unless
        that was removed from the folder."""
        for label in self.table.update_served():
            self.cache.drop(label)  # runs under way keep the engine

    def _warn_if_nothing_is_served(self) -> None:
        """Logs why no model is served, once for each reason."""
        reason = self.table.why_nothing_is_served()
        if reason and reason != self._last_warning:
            _log.warning("%s", reason)
        self._last_warning = reason
