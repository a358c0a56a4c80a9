"""The versions that a worker has: found in the folder, tried, described; served, or refused."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from asyncinfer import models
from asyncinfer.engine import Engine
from asyncinfer.errors import ModelRefused, StartError, UnknownModel
from asyncinfer.models import ModelFile, Signature
from asyncinfer.worker import versions
from asyncinfer.worker.shelf import Label, Shelf, label_of
from asyncinfer.worker.trial import trial
from asyncinfer.worker.versions import Version

log = logging.getLogger(__name__)

_FEW: Final = 8
"""So many models are loaded before the first job is claimed; of more, one."""

_SETTLED_SECONDS: Final = 0.3
"""A file is whole when it looks the same twice, so far apart: not everyone publishes by rename."""

_IN_PLACE: Final = "was changed in place; what was loaded is served on. Publish a new version."


class Source(Struct, frozen=True):
    """Where the models are."""

    model_dir: Path
    wanted: tuple[str, ...] = ()
    """Names; none means all."""
    model_file: Path | None = None
    """This one file, and nothing of the folder."""

    @property
    def watched(self) -> Path:
        return self.model_file.parent if self.model_file else self.model_dir

    def files(self) -> list[ModelFile]:
        """Raises OSError when the folder cannot be read."""
        if self.model_file:
            return [models.bare_file(self.model_file)] if self.model_file.is_file() else []
        files = models.scan(self.model_dir)
        return [file for file in files if not self.wanted or file.model in self.wanted]


class Library:
    """All changes happen in the loop, between two awaits; `on_change` is called after each."""

    def __init__(self, source: Source, shelf: Shelf, *, allow_custom_ops: bool = False) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self._allow_custom_ops = allow_custom_ops
        self._source = source
        self._shelf = shelf
        self._versions: dict[Label, Version] = {}
        self._contested: Mapping[Label, str] = {}
        self._leaving: dict[Label, tuple[Version, float]] = {}
        self._served: dict[str, Version] = {}

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
        return (self._source.model_file or self._source.model_dir).absolute()

    @property
    def loading(self) -> list[str]:
        """Models of which no version was loaded yet, and one can still be."""
        unknown = {one.file.model for one in self._versions.values() if one.is_unknown}
        return sorted(unknown - {model for model, _ in self.described()})

    @property
    def served(self) -> Mapping[str, Version]:
        """By model, the version for jobs that ask for none; also of models that are leaving."""
        return self._served

    @property
    def names(self) -> list[str]:
        """Of the models that are served, or will be once they are described."""
        known = {one.file.model for one in self._versions.values() if one.is_unknown}
        return sorted(known | self._served.keys())

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
        """What is in the folder and is served."""
        described = self.described()
        return {label: described[label] for label in described if label not in self._contested}

    def problems(self) -> dict[Label, str]:
        """What is not served, or not as it is now; under no version, what is wrong for all."""
        found = versions.problems(self._versions.values())
        return found | versions.missing_defaults(self._versions) | dict(self._contested)

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
            engine = await self._shelf.fetch(found.file, models.size_bytes(found.stamp))
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

    def _what_it_has(self, model: str | None) -> str:
        its_versions = [version for name, version in self.announced() if name == model]
        return ", ".join(its_versions) or ", ".join(sorted(self._served)) or "none"

    # --- at the start --------------------------------------------------------------------------

    def open(self, load: Callable[[ModelFile], Engine], default_model: str | None) -> None:
        """Loads what is served, of many models only one; raises StartError without any."""
        files = self._files_at_start()
        self._versions = {label_of(one): versions.look(one) for one in files}
        found = {file.model for file in files}
        first = models.default_model(default_model, found)
        names = sorted(found, key=lambda name: (name != first, name))
        for name in names:
            if len(names) <= _FEW or not self.described():
                self._open_one([file for file in files if file.model == name], load)
        if not self.described():
            raise StartError(
                f"No model to serve in {self._source.watched}. Put an ONNX file there, as "
                "<name>/1/model.onnx or <name>.onnx, or set MODEL_DIR."
            )
        self._changed()

    def _files_at_start(self) -> list[ModelFile]:
        files = self._source.files()
        if missing := set(self._source.wanted) - {file.model for file in files}:
            raise StartError(
                f"MODELS names {', '.join(sorted(missing))}, which {self._source.watched} does not "
                "have."
            )
        return files

    def _open_one(self, files: Sequence[ModelFile], load: Callable[[ModelFile], Engine]) -> None:
        """Loads the version to serve; where it is broken, the next."""
        for file in sorted(files, key=lambda file: file.rank, reverse=True):
            version = self._versions[label_of(file)]
            try:
                engine = load(file)
            except ModelRefused as error:
                self._refuse(version, error.detail)
                continue
            self._take(version, engine)
            return

    async def describe(self) -> None:
        """Loads once whatever was not, to know what it takes; the default model came first."""
        while left := [one for one in self._versions.values() if one.is_unknown]:
            version = max(left, key=lambda one: (one.file.model not in self._served, one.file.rank))
            try:
                engine = await self._shelf.load(version.file)
            except ModelRefused as error:
                self._refuse(version, error.detail)
            else:
                self._take(version, engine)
            self._changed()
            if self._served.get(version.file.model) != self._versions.get(version.label):
                self._shelf.drop(version.label)

    # --- what changed in the folder ------------------------------------------------------------

    async def rescan(self) -> None:
        """Takes in what is new, and lets go of what is gone."""
        seen = await self._look()
        while seen is not None and self._differences(seen):
            await asyncio.sleep(_SETTLED_SECONDS)
            again = await self._look()
            if again is None:
                return
            unsettled = {label for label in {*seen, *again} if seen.get(label) != again.get(label)}
            settled = {*self._differences(again)} - unsettled
            await self._settle(again, settled)
            seen = again if unsettled else None

    async def _look(self) -> dict[Label, Version] | None:
        try:
            seen = await asyncio.to_thread(self._seen)
        except OSError as error:
            log.warning("The models stay as they are: %s", error)
            return None
        return {
            label: versions.with_config_in_force(
                one, self._versions.get(label), self._served.get(one.file.model)
            )
            for label, one in seen.items()
        }

    def _seen(self) -> dict[Label, Version]:
        return {label_of(file): versions.look(file) for file in self._source.files()}

    def _differences(self, seen: Mapping[Label, Version]) -> list[Label]:
        """Labels that are new, gone or changed since they were last judged."""
        return [
            label
            for label in {**self._versions, **seen}
            if not versions.same(self._versions.get(label), seen.get(label))
        ]

    async def _settle(self, seen: Mapping[Label, Version], labels: Iterable[Label]) -> None:
        # The lowest first, so that a worker that finds three new versions serves them in order.
        for label in sorted(labels, key=lambda label: (label[0], models.age(label[1]))):
            if found := seen.get(label):
                await self._judge(found, self._versions.get(label))
            else:
                self._leave(label)
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
            await self._try(found, known)

    async def _is_altered(self, known: Version, found: Version) -> bool:
        if known.stamp == found.stamp and not known.is_altered:
            return False
        return not await asyncio.to_thread(versions.same_content, known, found)

    async def _try(self, found: Version, known: Version | None) -> None:
        """Loads a version beside all that runs, once a child process could."""
        size_bytes = models.size_bytes(found.stamp)
        problem = found.file.problem or await trial(
            found.file, size_bytes, allow_custom_ops=self._allow_custom_ops
        )
        if problem:
            self._note(known or found, found, problem)
            return
        try:
            engine = await self._shelf.load(found.file)
        except ModelRefused as error:
            self._note(known or found, found, error.detail)
            return
        before = self._served.get(found.file.model)
        self._take(found, engine)
        self._leaving.pop(found.label, None)
        self._changed()
        served = self._served[found.file.model]
        for other in {found.label, before.label if before else found.label} - {served.label}:
            # Runs under way keep it; a job that asks for it by its number loads it again.
            self._shelf.drop(other)
        log.info("%s is ready.", found.file.shown)

    def _take(self, version: Version, engine: Engine) -> None:
        self._keep(msgspec.structs.replace(version, signature=engine.signature))
        self._shelf.put(version.file, engine, models.size_bytes(version.stamp))

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
        self._keep(Version(file, found.stamp, known.signature, problem, is_altered, refused))

    def _keep(self, version: Version) -> None:
        """Logs what is wrong, unless that is known of this version or of another of its model."""
        model = version.file.model
        others = (one for one in self._versions.values() if one.file.model == model)
        known = {problem for one in others for problem in one.complaints}
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

    def forget(self, labels: Iterable[Label]) -> None:
        """Removed versions that nothing waits for any more."""
        for label in labels:
            del self._leaving[label]
            self._shelf.drop(label)
        self._changed()

    def _changed(self) -> None:
        ranked = sorted(self._servable(), key=lambda version: version.file.rank)
        self._served = {version.file.model: version for version in ranked}
        self.on_change()

    def _servable(self) -> Iterator[Version]:
        announced = self.announced()
        here = {model for model, _ in announced}
        yield from (version for label, version in self._versions.items() if label in announced)
        yield from (one for (model, _), (one, _) in self._leaving.items() if model not in here)
