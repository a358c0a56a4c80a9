"""The versions that a worker has: found in the folder, tried, described; served, or refused."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from asyncinfer.engine import Engine
from asyncinfer.errors import ModelDirUnreadable, ModelRefused, UnknownModel
from asyncinfer.models.folder import Listing, ModelFile, total_bytes, version_order
from asyncinfer.models.signature import Signature
from asyncinfer.worker.models import versions
from asyncinfer.worker.models.engine_cache import Label, Shelf, label_of
from asyncinfer.worker.models.sandbox import trial
from asyncinfer.worker.models.source import Source
from asyncinfer.worker.models.versions import Version

log = logging.getLogger(__name__)

_SETTLED_SECONDS: Final = 0.3
"""A file is whole when it looks the same twice, so far apart: not everyone publishes by rename."""

_IN_PLACE: Final = "was changed in place; what was loaded is served on. Publish a new version."


class Library:
    """All changes happen in the loop, between two awaits; `on_change` is called after each.

    A version is served once it is described and the announcer has confirmed it: another worker may
    serve another file under its name.
    """

    def __init__(self, source: Source, shelf: Shelf, *, allow_custom_ops: bool = False) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self.on_confirmed: Callable[[], None] = lambda: None
        """Called when versions begin to be served that were announced just now."""
        self._allow_custom_ops = allow_custom_ops
        self._source = source
        self._shelf = shelf
        self._versions: dict[Label, Version] = {}
        self._order: Mapping[str, int] = {}
        self._asked_for: set[Label] = set()
        """Versions that jobs asked for before they were loaded."""
        self._on_trial: set[Label] = set()
        """What came into the folder, until it was tried."""
        self._confirmed: set[Label] = set()
        self._contested: Mapping[Label, str] = {}
        self._leaving: dict[Label, tuple[Version, float]] = {}
        self._served: dict[str, Version] = {}
        self._passed_over: tuple[str, ...] = ()
        self._unreadable = ""
        self._told_nothing = ""
        self._is_rescanning = self._is_glancing = False
        self._is_out_of_date = False
        """The folder changed since the rescan that is under way began."""

    def close(self) -> None:
        """No more is loaded; what is loaded stays for who runs it."""
        self._shelf.close()

    # --- what there is -------------------------------------------------------------------------

    @property
    def watched(self) -> Path:
        return self._source.watched

    @property
    def model_dir(self) -> Path:
        """The folder that is served, or the one file; absolute."""
        return self._source.path

    @property
    def is_for_all(self) -> bool:
        """Whether it serves whatever the folder has: no model was named."""
        return not (self._source.wanted or self._source.model_file)

    @property
    def loading(self) -> list[str]:
        """Models of which no version was loaded yet, and one can still be."""
        return sorted(
            {model for model, _ in self._unknown()} - {one for one, _ in self.described()}
        )

    @property
    def loading_versions(self) -> dict[str, list[str]]:
        """Of models with a version that was loaded, those that were not yet, and still can be."""
        described = {model for model, _ in self.described()}
        found: dict[str, list[str]] = {}
        for model, version in sorted(self._unknown()):
            if model in described:
                found.setdefault(model, []).append(version)
        return found

    def nothing_served(self) -> str:
        """Why no model is served and none is about to be; empty otherwise."""
        if self._served or self._unknown() or self.unconfirmed:
            return ""
        place, problems = self._source.path, [*self.problems().values()]
        if not self._versions:
            return (
                f"There is no model in {place} yet. Put an ONNX file there, as "
                "<name>/1/model.onnx or <name>.onnx; it is served without a restart."
            )
        count = len({one.file.model for one in self._versions.values()})
        which = f"None of the {count} models in" if count > 1 else "The only model in"
        if self._source.model_file:
            which = "The model"
        can = "can" if count > 1 else "cannot"
        return (
            f"{which} {place} {can} be served: {problems[0].rstrip('.')}. Mend or replace it there."
        )

    @property
    def served(self) -> Mapping[str, Version]:
        """By model, the version for jobs that ask for none; also of models that are leaving."""
        return self._served

    @property
    def names(self) -> list[str]:
        """Of the models that are served, or will be once they are loaded."""
        return sorted({model for model, _ in {*self._unknown(), *self.announced()}})

    @property
    def is_loading(self) -> bool:
        """Whether a thread loads a version just now."""
        return self._shelf.is_loading

    @property
    def loaded(self) -> list[Label]:
        return self._shelf.labels

    @property
    def leaving(self) -> dict[Label, float]:
        """Removed versions, and for how many seconds; they still run jobs that waited for them."""
        now = time.monotonic()
        return {label: now - since for label, (_, since) in self._leaving.items()}

    def described(self) -> dict[Label, Signature]:
        """What is in the folder and can be loaded."""
        return {
            label: version.signature
            for label, version in self._versions.items()
            if version.signature
        }

    def announced(self) -> dict[Label, Signature]:
        """What is in the folder, can be loaded, and no other worker serves from another file."""
        described = self.described()
        return {label: described[label] for label in described if label not in self._contested}

    def problems(self) -> dict[Label, str]:
        """What is not served, or not as it is now; under no version, what is wrong for all."""
        judged = [one for label, one in self._versions.items() if label not in self._on_trial]
        found = versions.problems(judged)
        missing = {(model, versions.OF_ALL_VERSIONS): why for model, why in self._missing().items()}
        return found | versions.missing_defaults(self._versions) | missing | dict(self._contested)

    def default_versions(self) -> dict[str, str | None]:
        """By model in the folder, the version served where that is not for being the highest."""
        here = {model for model, _ in self.announced()}
        served = {model: one for model, one in self._served.items() if model in here}
        return {
            model: None if one.file.config.default_version is None else one.file.version
            for model, one in served.items()
        }

    # --- engines -------------------------------------------------------------------------------

    async def fetch(self, model: str | None, version: str | None) -> Engine:
        """The engine, loaded in a thread if need be; raises UnknownModel for what is not served."""
        found = self._find(model, version)
        if engine := self._shelf.get(found.label):
            return engine
        if found.is_altered:
            raise UnknownModel(f"It cannot be loaded again: {found.problem}")
        try:
            engine = await self._shelf.fetch(found.file, total_bytes(found.stamp))
        except ModelRefused as error:
            raise UnknownModel(f"It cannot be loaded any more: {error.detail}") from error
        if found.signature and engine.signature.sha256 != found.signature.sha256:
            self._shelf.drop(found.label)
            raise UnknownModel(f"{found.file.shown} {_IN_PLACE}")
        return engine

    def _find(self, model: str | None, version: str | None) -> Version:
        found = self._served.get(model or "")
        if version is not None and found is not None and found.file.version != version:
            label = (found.file.model, version)
            left = self._leaving.get(label)
            found = left[0] if left else self._versions.get(label)
        if found is None or found.signature is None or found.label in self._contested:
            asked = f"version {version} of model {model!r}" if version else f"model {model!r}"
            raise UnknownModel(f"This worker has no {asked}; it has {self._what_it_has(model)}.")
        return found

    def loads_soon(self, model: str, version: str | None) -> bool:
        """Whether a job waits for what is in the folder and is not loaded yet. That comes next."""
        if version is None and model in self._served:
            return False
        unknown = self._unknown()
        wanted = {
            label
            for label in unknown | self.unconfirmed
            if label[0] == model and version in (None, label[1])
        }
        self._asked_for |= wanted & unknown
        return bool(wanted)

    def _unknown(self) -> set[Label]:
        """What is in the folder and was neither loaded nor refused yet."""
        return self._on_trial | {one.label for one in self._versions.values() if one.is_unknown}

    def _missing(self) -> dict[str, str]:
        found = {one.file.model for one in self._versions.values()}
        return {
            name: f"MODELS names it, but {self._source.path} has no such model. Put it there, or "
            "correct MODELS"
            for name in self._source.missing(found)
        }

    def _what_it_has(self, model: str | None) -> str:
        its_versions = [version for name, version in self.announced() if name == model]
        return ", ".join(its_versions) or ", ".join(sorted(self._served)) or "none"

    # --- at the start --------------------------------------------------------------------------

    def open(self) -> None:
        """Finds what there is, and loads nothing; raises StartError when the settings can never
        give a model."""
        files = self._without_passed_over(self._source.at_start())
        self._versions = {label_of(file): versions.look(file) for file in files}
        for model, problem in self._missing().items():
            log.error("Model %s: %s", model, problem)
        self._tell_when_nothing_is_served()

    def load_first(self, names: Iterable[str]) -> None:
        """Of what is found, these models are loaded first, in this order."""
        self._order = {name: place for place, name in enumerate(dict.fromkeys(names))}

    async def describe(self) -> None:
        """Loads once each version that was not, to know what it takes. Of each model first the
        version to serve, or the next where that is broken; then all the others."""
        while version := self._next():
            await self._describe(version)
            self._changed()

    def _next(self) -> Version | None:
        described = {model for model, _ in self.described()}
        last = len(self._order)

        def turn(version: Version) -> tuple[bool, bool, int, str, bool, int]:
            file = version.file
            is_chosen, age = file.rank
            return (
                version.label not in self._asked_for,
                file.model in described,
                self._order.get(file.model, last),
                file.model,
                not is_chosen,
                -age,
            )

        left = (one for one in self._versions.values() if one.is_unknown)
        return min(left, key=turn, default=None)

    async def _describe(self, version: Version) -> None:
        engine = await self._loaded(version.file)
        if self._versions.get(version.label) is not version:
            return  # the file was replaced or removed meanwhile
        if isinstance(engine, str):
            self._refuse(version, engine)
        else:
            self._take(version, engine, displaces=False)

    # --- what changed in the folder ------------------------------------------------------------

    async def rescan(self) -> None:
        """Takes in what is new, and lets go of what is gone.

        Called again before it is done, it only glances: a file on trial may take a minute, in
        which a model that was removed must not be served on, nor a new one be unknown.
        """
        if self._is_rescanning:
            self._is_out_of_date = True
            await self._glance()
            return
        self._is_rescanning = self._is_out_of_date = True
        try:
            while self._is_out_of_date:
                self._is_out_of_date = False
                await self._rescan()
        finally:
            self._is_rescanning = False
            self._on_trial.clear()
            self._tell_when_nothing_is_served()

    async def _glance(self) -> None:
        """Beside a rescan: lets go of what is gone, and says what will be looked at next."""
        if self._is_glancing:
            return
        self._is_glancing = True
        try:
            before = await self._look()
            await asyncio.sleep(_SETTLED_SECONDS)
            seen = await self._look()
        finally:
            self._is_glancing = False
        if before is None or seen is None or not self._is_rescanning:
            return
        gone = self._versions.keys() - before.keys() - seen.keys()
        to_come = self._to_be_tried(seen) - self._on_trial
        for label in gone:
            self._leave(label)
        self._on_trial |= to_come
        if gone or to_come:
            self._changed()

    async def _rescan(self) -> None:
        seen = await self._look()
        while seen is not None and self._differences(seen):
            self._expect(seen)
            await asyncio.sleep(_SETTLED_SECONDS)
            again = await self._look()
            if again is None:
                return
            unsettled = {label for label in {*seen, *again} if seen.get(label) != again.get(label)}
            settled = {*self._differences(again)} - unsettled
            await self._settle(again, settled)
            seen = again if unsettled else None

    def _expect(self, seen: Mapping[Label, Version]) -> None:
        """What is new, and what was refused and looks different now: its copy may go on still."""
        self._on_trial = self._to_be_tried(seen)
        if self._on_trial:
            self.on_change()

    def _to_be_tried(self, seen: Mapping[Label, Version]) -> set[Label]:
        return {one for one in self._differences(seen) if one in seen} - self.described().keys()

    async def _look(self) -> dict[Label, Version] | None:
        try:
            seen = await asyncio.to_thread(self._seen)
        except ModelDirUnreadable as error:
            if error.detail != self._unreadable:
                log.warning("The models stay as they are: %s", error.detail)
            self._unreadable = error.detail
            return None
        if self._unreadable:
            log.info("%s can be read again.", self.watched)
        self._unreadable = ""
        return versions.still_there(self._versions, seen) | {
            label: versions.with_config_in_force(
                one, self._versions.get(label), self._served.get(one.file.model)
            )
            for label, one in seen.items()
        }

    def _seen(self) -> dict[Label, Version]:
        return {label_of(file): versions.look(file) for file in self._files()}

    def _files(self) -> list[ModelFile]:
        """Raises ModelDirUnreadable."""
        return self._without_passed_over(self._source.listing())

    def _without_passed_over(self, found: Listing) -> list[ModelFile]:
        """Logs once what is passed over."""
        for line in found.passed_over:
            if line not in self._passed_over:
                log.info("%s.", line)
        self._passed_over = found.passed_over
        return found.files

    def _differences(self, seen: Mapping[Label, Version]) -> list[Label]:
        """Labels that are new, gone or changed since they were last judged."""
        return [
            label
            for label in {**self._versions, **seen}
            if not versions.same(self._versions.get(label), seen.get(label))
        ]

    async def _settle(self, seen: Mapping[Label, Version], labels: Iterable[Label]) -> None:
        # What is gone first: to load a large file takes a while. Then the lowest version first, so
        # that a worker that finds three new ones serves them in order.
        def turn(label: Label) -> tuple[bool, str, int]:
            return label in seen, label[0], version_order(label[1])

        for label in sorted(labels, key=turn):
            if found := seen.get(label):
                await self._judge(found, self._versions.get(label))
            elif label in self._versions:
                self._leave(label)
            self._on_trial.discard(label)
            self._changed()

    async def _judge(self, found: Version, known: Version | None) -> None:
        if known is None:
            await self._try(found, None)
        elif known.signature:
            await self._reconsider(known, found)
        elif known.stamp == found.stamp and versions.loads_alike(found.file, known.file):
            self._note(known, found, known.problem)
        else:
            await self._try(found, None)

    def _leave(self, label: Label) -> None:
        version = self._versions.pop(label)
        self._confirmed.discard(label)
        if version.signature:
            log.info("%s is gone; what waits for it still runs.", version.file.shown)
            self._leaving[label] = (version, time.monotonic())

    async def _reconsider(self, known: Version, found: Version) -> None:
        """A version that is served looks different now."""
        if found.file.problem:
            self._note(known, found, found.file.problem)
        elif await self._is_altered(known, found):
            self._note(known, found, f"{found.file.shown} {_IN_PLACE}", is_altered=True)
        elif versions.loads_alike(found.file, known.file):
            self._note(known, found, "")
        else:
            # Of the same content, so what is served can be loaded again from where that is now.
            moved = msgspec.structs.replace(known.file, path=found.file.path)
            await self._try(found, msgspec.structs.replace(known, file=moved))

    async def _is_altered(self, known: Version, found: Version) -> bool:
        if found.stamp in (known.loaded, known.stamp) and not known.is_altered:
            return False
        return not await asyncio.to_thread(versions.same_content, known, found)

    async def _try(self, found: Version, known: Version | None) -> None:
        """Loads a version beside all that runs, once a child process could."""
        size_bytes = total_bytes(found.stamp)
        problem = found.file.problem or await trial(
            found.file, size_bytes, allow_custom_ops=self._allow_custom_ops
        )
        engine = problem or await self._loaded(found.file)
        if isinstance(engine, str):
            self._note(known or found, found, engine)
            return
        self._take(found, engine)
        self._leaving.pop(found.label, None)
        self._changed()
        log.info("%s is ready.", found.file.shown)

    async def _loaded(self, file: ModelFile) -> Engine | str:
        """The engine, or why there is none: whatever is wrong with one file stops no other."""
        try:
            return await self._shelf.load(file)
        except ModelRefused as error:
            return error.detail
        except Exception as error:
            log.exception("%s could not be loaded.", file.shown)
            return f"{file.shown}: it could not be loaded: {type(error).__name__}: {error}"

    def _take(self, version: Version, engine: Engine, *, displaces: bool = True) -> None:
        """Keeps the engine of the version that is served; a job that asks for another by its
        number loads it again."""
        self._asked_for.discard(version.label)
        loaded = {"signature": engine.signature, "loaded": version.stamp}
        self._keep(msgspec.structs.replace(version, **loaded))
        self._shelf.drop(version.label)
        its_versions = (one for one in self._announced() if one.file.model == version.file.model)
        best = max(its_versions, key=lambda one: one.file.rank, default=None)
        if best and best.label == version.label:
            size_bytes = total_bytes(version.stamp)
            self._shelf.put(version.file, engine, size_bytes, displaces=displaces)

    def _refuse(self, version: Version, problem: str) -> None:
        self._note(version, version, problem)

    def _note(
        self, known: Version, found: Version, problem: str, *, is_altered: bool = False
    ) -> None:
        """Keeps what `known` could, with what is wrong with what was `found`."""
        file, refused = found.file, None
        if known.signature and not versions.loads_alike(found.file, known.file):
            wrong = found.file.toml_problem
            file, refused = msgspec.structs.replace(known.file, toml_problem=wrong), found.file
        said = (problem, is_altered, refused, known.loaded)
        self._keep(Version(file, found.stamp, known.signature, *said))

    def _keep(self, version: Version) -> None:
        """Logs what is wrong, unless that is known of this version or of another of its model."""
        model = version.file.model
        # What nobody has tried yet was not logged yet, though its model.toml is known to be wrong.
        others = [one for one in self._versions.values() if one.file.model == model]
        known = {said for one in others if not one.is_unknown for said in one.complaints}
        for problem in dict.fromkeys(version.complaints):
            if problem and problem not in known:
                log.error("Model %s: %s", model, problem)
        self._versions[version.label] = version

    # --- told by the announcer -----------------------------------------------------------------

    def contest(self, contested: Mapping[Label, str]) -> None:
        """Versions that another worker serves from another file: they are not served here."""
        if contested != self._contested:
            for label in contested.keys() - self._contested.keys():
                log.error("Model %s version %s: %s", *label, contested[label])
            self._contested = dict(contested)
            self._changed()

    @property
    def unconfirmed(self) -> set[Label]:
        """What can be served and was not announced yet."""
        return self.announced().keys() - self._confirmed

    def confirm(self, labels: Iterable[Label]) -> bool:
        """These were announced, so that they may be served; returns whether any is served now
        that was not."""
        new = self.unconfirmed.intersection(labels)
        self._confirmed |= new
        if new:
            self._settle_what_is_served()
            self.on_confirmed()
        return bool(new)

    @property
    def contested(self) -> Mapping[Label, str]:
        return self._contested

    def forget(self, labels: Iterable[Label]) -> None:
        """Removed versions that nothing waits for any more."""
        for label in labels:
            del self._leaving[label]
            self._shelf.drop(label)
        self._changed()

    def _changed(self) -> None:
        self._settle_what_is_served()
        self._tell_when_nothing_is_served()
        self.on_change()

    def _settle_what_is_served(self) -> None:
        before = self._served
        ranked = sorted(self._servable(), key=lambda version: version.file.rank)
        self._served = {version.file.model: version for version in ranked}
        for model, version in before.items():
            now = self._served.get(model)
            # Runs under way keep the engine; one whose file is gone could not be loaded again.
            if now and now.label != version.label and version.label in self._versions:
                self._shelf.drop(version.label)

    def _servable(self) -> Iterator[Version]:
        confirmed = [one for one in self._announced() if one.label in self._confirmed]
        here = {one.file.model for one in confirmed}
        yield from confirmed
        yield from (one for (model, _), (one, _) in self._leaving.items() if model not in here)

    def _announced(self) -> Iterator[Version]:
        announced = self.announced()
        yield from (version for label, version in self._versions.items() if label in announced)

    def _tell_when_nothing_is_served(self) -> None:
        reason = self.nothing_served()
        if reason and reason != self._told_nothing:
            log.warning("%s", reason)
        self._told_nothing = reason
