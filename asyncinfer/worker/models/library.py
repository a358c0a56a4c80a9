"""The versions in a worker's model folder: which are loaded, served, refused or removed."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from asyncinfer.engine import Engine
from asyncinfer.errors import ModelDirUnreadable, ModelRefused, UnknownModel
from asyncinfer.models.folder import FolderListing, ModelFile, total_bytes, version_order
from asyncinfer.models.signature import Signature
from asyncinfer.worker.models import versions
from asyncinfer.worker.models.engine_cache import EngineCache, Label, label_of
from asyncinfer.worker.models.sandbox import try_in_child
from asyncinfer.worker.models.source import ModelSource
from asyncinfer.worker.models.versions import Version

_log = logging.getLogger(__name__)

_UNCHANGED_SECONDS: Final = 0.3
"""A file counts as completely written if it is unchanged for so long: not everyone publishes by
rename."""

_IN_PLACE: Final = "was changed in place; what was loaded is served on. Publish a new version."


class Library:
    """Follows the model folder: loads and tries versions, and decides which are served. There is
    one instance per worker; call `open` first.

    A version is served once it was loaded and the announcer has announced it, since another worker
    may serve another file under its name. All changes happen in the event loop, between two awaits;
    `on_change` is called after each.
    """

    def __init__(
        self, source: ModelSource, cache: EngineCache, *, allow_custom_ops: bool = False
    ) -> None:
        """Reads nothing yet. The callbacks are called in the event loop."""
        self.on_change: Callable[[], None] = lambda: None
        """Called after each change of what is in the folder, loaded, refused or served."""
        self.on_served: Callable[[], None] = lambda: None
        """Called when versions begin to be served, as they were announced just now."""
        self._allow_custom_ops = allow_custom_ops
        self._source = source
        self._cache = cache
        self._versions: dict[Label, Version] = {}
        self._load_order: Mapping[str, int] = {}
        self._requested: set[Label] = set()
        """Untried versions that jobs wait for; they are loaded first."""
        self._untried_files: set[Label] = set()
        """Versions that came into the folder or changed while the worker ran, until they are
        tried."""
        self._announced_labels: set[Label] = set()
        self._contested_problems: Mapping[Label, str] = {}
        self._removed: dict[Label, tuple[Version, float]] = {}
        self._served: dict[str, Version] = {}
        self._passed_over: tuple[str, ...] = ()
        self._unreadable = ""
        self._last_warning = ""
        self._is_rescanning = self._is_updating_beside_rescan = False
        self._changed_meanwhile = False
        """Whether the folder may have changed since the rescan that is under way began."""

    def close(self) -> None:
        """Loads nothing more; runs under way keep their engines."""
        self._cache.close()

    # --- what is in the folder and what is served ------------------------------------------------

    @property
    def watched_folder(self) -> Path:
        """The folder to watch for changes."""
        return self._source.watched_folder

    @property
    def model_dir(self) -> Path:
        """The folder that is served, or the one file, as an absolute path."""
        return self._source.path

    @property
    def serves_all_models(self) -> bool:
        """Whether all models of the folder are served, as neither MODELS nor MODEL is set."""
        return not (self._source.wanted or self._source.model_file)

    @property
    def loading(self) -> list[str]:
        """Models without a loaded version, but with one that is not tried yet; sorted."""
        untried = {model for model, _ in self._untried_labels()}
        return sorted(untried - {model for model, _ in self.signatures()})

    @property
    def loading_versions(self) -> dict[str, list[str]]:
        """By model with a loaded version, its versions that are not tried yet."""
        loaded = {model for model, _ in self.signatures()}
        found: dict[str, list[str]] = {}
        for model, version in sorted(self._untried_labels()):
            if model in loaded:
                found.setdefault(model, []).append(version)
        return found

    def why_nothing_is_served(self) -> str:
        """Why no model is served, and none will be without a change in the folder; empty
        otherwise."""
        if self._served or self._untried_labels() or self.unannounced_labels:
            return ""
        path, problems = self._source.path, [*self.problems().values()]
        if not self._versions:
            return (
                f"There is no model in {path} yet. Put an ONNX file there, as "
                "<name>/1/model.onnx or <name>.onnx; it is served without a restart."
            )
        count = len({version.file.model for version in self._versions.values()})
        subject = f"None of the {count} models in" if count > 1 else "The only model in"
        if self._source.model_file:
            subject = "The model"
        can = "can" if count > 1 else "cannot"
        problem = problems[0].rstrip(".")
        return f"{subject} {path} {can} be served: {problem}. Mend or replace it there."

    @property
    def served(self) -> Mapping[str, Version]:
        """By model the version for jobs that name none; also of removed models that still run
        jobs."""
        return self._served

    @property
    def names(self) -> list[str]:
        """The names of the models that can be served now, or perhaps once they are loaded;
        sorted."""
        return sorted(
            {model for model, _ in {*self._untried_labels(), *self.uncontested_signatures()}}
        )

    @property
    def is_loading(self) -> bool:
        """Whether a thread loads a version just now."""
        return self._cache.is_loading

    @property
    def loaded(self) -> list[Label]:
        """The versions whose engines are in memory, the least recently used first."""
        return self._cache.labels

    @property
    def seconds_since_removal(self) -> dict[Label, float]:
        """By removed version that still runs jobs which waited for it, the seconds since it was
        removed from the folder."""
        now = time.monotonic()
        return {label: now - removed_at for label, (_, removed_at) in self._removed.items()}

    def signatures(self) -> dict[Label, Signature]:
        """The signatures of the versions in the folder that were loaded at least once."""
        return {
            label: version.signature
            for label, version in self._versions.items()
            if version.signature
        }

    def uncontested_signatures(self) -> dict[Label, Signature]:
        """As `signatures`, without versions that another worker serves from another file."""
        return {
            label: signature
            for label, signature in self.signatures().items()
            if label not in self._contested_problems
        }

    def problems(self) -> dict[Label, str]:
        """Why versions are not served, or not as they are in the folder now. Problems of a whole
        model are under the version OF_ALL_VERSIONS."""
        tried = [
            version for label, version in self._versions.items() if label not in self._untried_files
        ]
        missing = {
            (model, versions.OF_ALL_VERSIONS): problem
            for model, problem in self._missing_problems().items()
        }
        return {
            **versions.version_problems(tried),
            **versions.missing_default_problems(self._versions),
            **missing,
            **self._contested_problems,
        }

    def default_versions(self) -> dict[str, str | None]:
        """By served model in the folder, its default version if `model.toml` sets one; None if the
        highest version is the default."""
        here = {model for model, _ in self.uncontested_signatures()}
        return {
            model: None if version.file.config.default_version is None else version.file.version
            for model, version in self._served.items()
            if model in here
        }

    # --- engines -------------------------------------------------------------------------------

    async def fetch(self, model: str | None, version: str | None) -> Engine:
        """The engine of a version (None: the default version) of a model, loaded in a thread if
        need be; found as by `_find_served`. It stays usable if the cache drops it.

        Raises UnknownModel for a version that is not served, that cannot be loaded again, or whose
        file was changed in place.
        """
        found = self._find_served(model, version)
        if engine := self._cache.get(found.label):
            return engine
        if found.is_altered:
            raise UnknownModel(f"It cannot be loaded again: {found.problem}")
        try:
            engine = await self._cache.fetch(found.file, total_bytes(found.stamp))
        except ModelRefused as error:
            raise UnknownModel(f"It cannot be loaded any more: {error.detail}") from error
        if found.signature and engine.signature.sha256 != found.signature.sha256:
            self._cache.drop(found.label)
            raise UnknownModel(f"{found.file.display_path} {_IN_PLACE}")
        return engine

    def _find_served(self, model: str | None, version: str | None) -> Version:
        """The version to run a job on; raises UnknownModel if it is not served.

        `version` None is the default version; a removed version is found too while jobs wait for
        it. `model` None, of a job that means a default model when there is none, is never found.
        """
        found = self._served.get(model or "")
        if version is not None and found is not None and found.file.version != version:
            label = (found.file.model, version)
            removed = self._removed.get(label)
            found = removed[0] if removed else self._versions.get(label)
        if found is None or found.signature is None or found.label in self._contested_problems:
            wanted = f"version {version} of model {model!r}" if version else f"model {model!r}"
            raise UnknownModel(f"This worker has no {wanted}; it has {self._names_served(model)}.")
        return found

    def will_load(self, model: str, version: str | None) -> bool:
        """Whether a version (None: any) that is not served is in the folder, and may be served once
        it is tried or announced. False for None if the model is served. Has such versions loaded
        before others."""
        if version is None and model in self._served:
            return False
        untried = self._untried_labels()
        wanted = {
            label
            for label in untried | self.unannounced_labels
            if label[0] == model and version in (None, label[1])
        }
        self._requested |= wanted & untried
        return bool(wanted)

    def _untried_labels(self) -> set[Label]:
        """The versions in the folder that were neither loaded nor refused yet."""
        untried = {version.label for version in self._versions.values() if version.is_untried}
        return self._untried_files | untried

    def _missing_problems(self) -> dict[str, str]:
        """The problem of each model that MODELS names and the folder does not have."""
        found = {version.file.model for version in self._versions.values()}
        return {
            name: f"MODELS names it, but {self._source.path} has no such model. Put it there, or "
            "correct MODELS"
            for name in self._source.missing_models(found)
        }

    def _names_served(self, model: str | None) -> str:
        """For a message: the versions of the model that can be served, else the served models, else
        "none"."""
        numbers = [version for name, version in self.uncontested_signatures() if name == model]
        return ", ".join(numbers) or ", ".join(sorted(self._served)) or "none"

    # --- at the start --------------------------------------------------------------------------

    def open(self) -> None:
        """Reads the folder, and loads nothing. Raises StartError when the folder cannot be read or
        the settings can give no model."""
        files = self._log_passed_over(self._source.listing_at_start())
        self._versions = {label_of(file): versions.read_version(file) for file in files}
        for model, problem in self._missing_problems().items():
            _log.error("Model %s: %s", model, problem)
        self._warn_if_nothing_is_served()

    def load_first(self, names: Iterable[str]) -> None:
        """Has these models loaded before others, in this order; unknown names are ignored."""
        self._load_order = {name: place for place, name in enumerate(dict.fromkeys(names))}

    async def load_untried(self) -> None:
        """Loads each untried version once, to learn its signature: of each model first the default
        version, or the next one where that is broken; then all others. Returns when all were tried,
        and raises nothing for a bad file."""
        while version := self._next_untried():
            await self._load_first_time(version)
            self._changed()

    def _next_untried(self) -> Version | None:
        """The version to load next; None when all were loaded or refused."""
        loaded = {model for model, _ in self.signatures()}
        last = len(self._load_order)

        def load_order(version: Version) -> tuple[bool, bool, int, str, bool, int]:
            """Sort key: first what jobs wait for, then models without a loaded version."""
            file = version.file
            is_chosen, age = file.rank
            return (
                version.label not in self._requested,
                file.model in loaded,
                self._load_order.get(file.model, last),
                file.model,
                not is_chosen,
                -age,
            )

        untried = (version for version in self._versions.values() if version.is_untried)
        return min(untried, key=load_order, default=None)

    async def _load_first_time(self, version: Version) -> None:
        """Loads a version, without a trial in a child, and notes its signature or its problem;
        neither if it was replaced or removed meanwhile."""
        engine = await self._load_or_problem(version.file)
        if self._versions.get(version.label) is not version:
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
            self._untried_files.clear()
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
        removed = self._versions.keys() - before.keys() - seen.keys()
        added = self._labels_to_try(seen) - self._untried_files
        for label in removed:
            self._remove(label)
        self._untried_files |= added
        if removed or added:
            self._changed()

    async def _rescan(self) -> None:
        """Reads the folder until it is the same twice, and applies the changes in between: those
        of files that are still being written wait for the next reading."""
        seen = await self._read_folder()
        while seen is not None and self._differences(seen):
            self._announce_untried(seen)
            await asyncio.sleep(_UNCHANGED_SECONDS)
            again = await self._read_folder()
            if again is None:
                return
            unfinished = {label for label in {*seen, *again} if seen.get(label) != again.get(label)}
            complete = {*self._differences(again)} - unfinished
            await self._apply_changes(again, complete)
            seen = again if unfinished else None

    def _announce_untried(self, seen: Mapping[Label, Version]) -> None:
        """Notes which versions are new, or were refused and have changed, and calls `on_change`
        if there are any: they are announced as loading while their files may still be written."""
        self._untried_files = self._labels_to_try(seen)
        if self._untried_files:
            self.on_change()

    def _labels_to_try(self, seen: Mapping[Label, Version]) -> set[Label]:
        """The new and changed versions that cannot be served from an earlier load."""
        changed = {label for label in self._differences(seen) if label in seen}
        return changed - self.signatures().keys()

    async def _read_folder(self) -> dict[Label, Version] | None:
        """The versions in the folder, read in a thread; None if it cannot be read, which is logged
        once. Loaded versions in folders that cannot be read now are included unchanged."""
        try:
            seen = await asyncio.to_thread(self._read_versions)
        except ModelDirUnreadable as error:
            if error.detail != self._unreadable:
                _log.warning("The models stay as they are: %s", error.detail)
            self._unreadable = error.detail
            return None
        if self._unreadable:
            _log.info("%s can be read again.", self.watched_folder)
        self._unreadable = ""
        return versions.hidden_but_loaded(self._versions, seen) | {
            label: versions.with_config_in_force(
                version, self._versions.get(label), self._served.get(version.file.model)
            )
            for label, version in seen.items()
        }

    def _read_versions(self) -> dict[Label, Version]:
        """The versions in the folder as they are now; blocks, so call it in a thread. Raises
        ModelDirUnreadable."""
        return {label_of(file): versions.read_version(file) for file in self._listed_files()}

    def _listed_files(self) -> list[ModelFile]:
        """Reads the folder, and logs which other files are no models; raises ModelDirUnreadable."""
        return self._log_passed_over(self._source.listing())

    def _log_passed_over(self, listing: FolderListing) -> list[ModelFile]:
        """The files of the listing. Logs once which other files are no models."""
        for line in listing.ignored:
            if line not in self._passed_over:
                _log.info("%s.", line)
        self._passed_over = listing.ignored
        return listing.files

    def _differences(self, seen: Mapping[Label, Version]) -> list[Label]:
        """The versions that are new, removed or changed since they were last tried."""
        return [
            label
            for label in {**self._versions, **seen}
            if not versions.is_same(self._versions.get(label), seen.get(label))
        ]

    async def _apply_changes(self, seen: Mapping[Label, Version], labels: Iterable[Label]) -> None:
        """Drops, checks or loads each of the changed versions `labels`; calls `on_change` after
        each. `seen` is what the folder has now."""

        # Removed ones first, as loading a large file takes a while. Then the lowest version first,
        # so that a worker that finds three new ones serves them in order.
        def order(label: Label) -> tuple[bool, str, int]:
            return label in seen, label[0], version_order(label[1])

        for label in sorted(labels, key=order):
            if found := seen.get(label):
                await self._apply_change(found, self._versions.get(label))
            elif label in self._versions:
                self._remove(label)
            self._untried_files.discard(label)
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
        """Notes that a version, which must be known, was removed from the folder. One that was
        loaded still runs the jobs that wait for it, until `drop_removed`."""
        version = self._versions.pop(label)
        self._announced_labels.discard(label)
        if version.signature:
            _log.info("%s was removed; jobs that wait for it still run.", version.file.display_path)
            self._removed[label] = (version, time.monotonic())

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
        self._removed.pop(found.label, None)
        self._changed()
        _log.info("%s is ready.", found.file.display_path)

    async def _load_or_problem(self, file: ModelFile) -> Engine | str:
        """The engine, loaded in a thread without the cache, or the problem as text. Never raises: a
        bad file must not keep others from being loaded."""
        try:
            return await self._cache.load(file)
        except ModelRefused as error:
            return error.detail
        except Exception as error:
            _log.exception("%s could not be loaded.", file.display_path)
            return f"{file.display_path}: it could not be loaded: {type(error).__name__}: {error}"

    def _add_loaded(self, version: Version, engine: Engine, *, displaces: bool = True) -> None:
        """Notes a version as loaded, with its signature. Puts the engine into the cache if it is
        the version to serve for its model; other versions are loaded again when a job names one.
        `displaces` as for `EngineCache.put`."""
        self._requested.discard(version.label)
        loaded = {"signature": engine.signature, "loaded": version.stamp}
        self._log_and_keep(msgspec.structs.replace(version, **loaded))
        self._cache.drop(version.label)
        rivals = (
            other
            for other in self._uncontested_versions()
            if other.file.model == version.file.model
        )
        best = max(rivals, key=lambda other: other.file.rank, default=None)
        if best and best.label == version.label:
            size_bytes = total_bytes(version.stamp)
            self._cache.put(version.file, engine, size_bytes, displaces=displaces)

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
        model = version.file.model
        # The problems of untried versions were not logged yet, though a wrong model.toml is known.
        logged = {
            problem
            for other in self._versions.values()
            if other.file.model == model and not other.is_untried
            for problem in other.problems_to_log
        }
        for problem in dict.fromkeys(version.problems_to_log):
            if problem and problem not in logged:
                _log.error("Model %s: %s", model, problem)
        self._versions[version.label] = version

    # --- calls of the announcer ------------------------------------------------------------------

    def set_contested(self, contested_problems: Mapping[Label, str]) -> None:
        """Replaces the contested versions, which are not served since another worker serves them
        from another file; all others may be served. The texts say so, and each new one is logged.
        Does nothing if nothing has changed."""
        if contested_problems != self._contested_problems:
            for label in contested_problems.keys() - self._contested_problems.keys():
                _log.error("Model %s version %s: %s", *label, contested_problems[label])
            self._contested_problems = dict(contested_problems)
            self._changed()

    @property
    def unannounced_labels(self) -> set[Label]:
        """The versions that may be served but were not announced yet."""
        return self.uncontested_signatures().keys() - self._announced_labels

    def mark_announced(self, labels: Iterable[Label]) -> bool:
        """Call once these versions were announced: those that may be served are from now on, and
        `on_served` is called. Returns whether there are any that were not marked before."""
        new = self.unannounced_labels.intersection(labels)
        self._announced_labels |= new
        if new:
            self._update_served()
            self.on_served()
        return bool(new)

    @property
    def contested_problems(self) -> Mapping[Label, str]:
        """By version that another worker serves from another file, a text that says so."""
        return self._contested_problems

    def drop_removed(self, labels: Iterable[Label]) -> None:
        """Drops removed versions for good, with their engines, since no job waits for them any
        more. Each must be among `seconds_since_removal`."""
        for label in labels:
            del self._removed[label]
            self._cache.drop(label)
        self._changed()

    def _changed(self) -> None:
        """Updates what is served after any change, and calls `on_change`."""
        self._update_served()
        self._warn_if_nothing_is_served()
        self.on_change()

    def _update_served(self) -> None:
        """Chooses the default version of each model, and drops the engine of the one before unless
        that was removed from the folder."""
        before = self._served
        ranked = sorted(self._servable_versions(), key=lambda version: version.file.rank)
        self._served = {version.file.model: version for version in ranked}
        for model, version in before.items():
            now = self._served.get(model)
            # Runs under way keep the engine. A removed version could not be loaded again.
            if now and now.label != version.label and version.label in self._versions:
                self._cache.drop(version.label)

    def _servable_versions(self) -> Iterator[Version]:
        """The versions that were announced, and removed versions of models that have no other."""
        announced = [
            version
            for version in self._uncontested_versions()
            if version.label in self._announced_labels
        ]
        models = {version.file.model for version in announced}
        yield from announced
        yield from (
            version for (model, _), (version, _) in self._removed.items() if model not in models
        )

    def _uncontested_versions(self) -> Iterator[Version]:
        """The versions of `uncontested_signatures`, whether or not they were announced yet."""
        labels = self.uncontested_signatures().keys()
        yield from (version for label, version in self._versions.items() if label in labels)

    def _warn_if_nothing_is_served(self) -> None:
        """Logs why no model is served, once for each reason."""
        reason = self.why_nothing_is_served()
        if reason and reason != self._last_warning:
            _log.warning("%s", reason)
        self._last_warning = reason
