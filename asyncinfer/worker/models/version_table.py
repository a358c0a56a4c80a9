"""What a worker knows of the versions in its model folder; reads, loads and logs nothing."""

from collections.abc import Iterable, Iterator, Mapping

from asyncinfer.errors import UnknownModel
from asyncinfer.models.folder import OF_ALL_VERSIONS
from asyncinfer.models.signature import Signature
from asyncinfer.worker.models import versions
from asyncinfer.worker.models.engine_cache import Label
from asyncinfer.worker.models.source import ModelSource
from asyncinfer.worker.models.versions import Version


class VersionTable:
    """The versions of a worker's model folder: which are loaded, served, refused or removed, and
    which to load next. `Library` changes it, between two awaits, and calls `update_served` then.

    A version is served once it was loaded and announced, since another worker may serve another
    file under its name.
    """

    def __init__(self, source: ModelSource) -> None:
        self.by_label: dict[Label, Version] = {}
        """The versions that are in the folder."""
        self.served: dict[str, Version] = {}
        """By model the version for jobs that name none; also of removed models that still run
        jobs."""
        self.untried_files: set[Label] = set()
        """Versions that came into the folder or changed while the worker ran, until they are
        tried."""
        self.contested_problems: Mapping[Label, str] = {}
        """By version that another worker serves from another file, a text that says so; it is not
        served."""
        self._source = source
        self._load_order: Mapping[str, int] = {}
        self._requested: set[Label] = set()
        """Untried versions that jobs wait for; they are loaded first."""
        self._announced_labels: set[Label] = set()
        self._removed: dict[Label, tuple[Version, float]] = {}

    # --- what is served, and what is not ---------------------------------------------------------

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

    @property
    def names(self) -> list[str]:
        """The names of the models that can be served now, or perhaps once they are loaded;
        sorted."""
        return sorted(
            {model for model, _ in {*self._untried_labels(), *self.uncontested_signatures()}}
        )

    def signatures(self) -> dict[Label, Signature]:
        """The signatures of the versions in the folder that were loaded at least once."""
        return {
            label: version.signature
            for label, version in self.by_label.items()
            if version.signature
        }

    def uncontested_signatures(self) -> dict[Label, Signature]:
        """As `signatures`, without versions that another worker serves from another file."""
        return {
            label: signature
            for label, signature in self.signatures().items()
            if label not in self.contested_problems
        }

    @property
    def unannounced_labels(self) -> set[Label]:
        """The versions that may be served but were not announced yet."""
        return self.uncontested_signatures().keys() - self._announced_labels

    def default_versions(self) -> dict[str, str | None]:
        """By served model in the folder, its default version if `model.toml` sets one; None if the
        highest version is the default."""
        here = {model for model, _ in self.uncontested_signatures()}
        return {
            model: None if version.file.config.default_version is None else version.file.version
            for model, version in self.served.items()
            if model in here
        }

    def problems(self) -> dict[Label, str]:
        """Why versions are not served, or not as they are in the folder now. Problems of a whole
        model are under the version OF_ALL_VERSIONS."""
        tried = [
            version for label, version in self.by_label.items() if label not in self.untried_files
        ]
        missing = {
            (model, OF_ALL_VERSIONS): problem for model, problem in self.missing_problems().items()
        }
        return {
            **versions.version_problems(tried),
            **versions.missing_default_problems(self.by_label),
            **missing,
            **self.contested_problems,
        }

    def missing_problems(self) -> dict[str, str]:
        """The problem of each model that MODELS names and the folder does not have."""
        found = {version.file.model for version in self.by_label.values()}
        return {
            name: f"MODELS names it, but {self._source.path} has no such model. Put it there, or "
            "correct MODELS"
            for name in self._source.missing_models(found)
        }

    def why_nothing_is_served(self) -> str:
        """Why no model is served, and none will be without a change in the folder; empty
        otherwise."""
        if self.served or self._untried_labels() or self.unannounced_labels:
            return ""
        path, problems = self._source.path, [*self.problems().values()]
        if not self.by_label:
            return (
                f"There is no model in {path} yet. Put an ONNX file there, as "
                "<name>/1/model.onnx or <name>.onnx; it is served without a restart."
            )
        count = len({version.file.model for version in self.by_label.values()})
        subject = f"None of the {count} models in" if count > 1 else "The only model in"
        if self._source.model_file:
            subject = "The model"
        can = "can" if count > 1 else "cannot"
        problem = problems[0].rstrip(".")
        return f"{subject} {path} {can} be served: {problem}. Mend or replace it there."

    def find_served(self, model: str | None, version: str | None) -> Version:
        """The version to run a job on; raises UnknownModel if it is not served.

        `version` None is the default version; a removed version is found too while jobs wait for
        it. `model` None, of a job that means a default model when there is none, is never found.
        """
        found = self.served.get(model or "")
        if version is not None and found is not None and found.file.version != version:
            label = (found.file.model, version)
            removed = self._removed.get(label)
            found = removed[0] if removed else self.by_label.get(label)
        if found is None or found.signature is None or found.label in self.contested_problems:
            wanted = f"version {version} of model {model!r}" if version else f"model {model!r}"
            raise UnknownModel(f"This worker has no {wanted}; it has {self._names_served(model)}.")
        return found

    # --- which to load --------------------------------------------------------------------------

    def will_load(self, model: str, version: str | None) -> bool:
        """Whether a version (None: any) that is not served is in the folder, and may be served once
        it is tried or announced. False for None if the model is served. Has such versions loaded
        before others."""
        if version is None and model in self.served:
            return False
        untried = self._untried_labels()
        wanted = {
            label
            for label in untried | self.unannounced_labels
            if label[0] == model and version in (None, label[1])
        }
        self._requested |= wanted & untried
        return bool(wanted)

    def load_first(self, names: Iterable[str]) -> None:
        """Has these models loaded before others, in this order; unknown names are ignored."""
        self._load_order = {name: place for place, name in enumerate(dict.fromkeys(names))}

    def next_untried(self) -> Version | None:
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

        untried = (version for version in self.by_label.values() if version.is_untried)
        return min(untried, key=load_order, default=None)

    def differences(self, seen: Mapping[Label, Version]) -> list[Label]:
        """The versions that are new, removed or changed since they were last tried."""
        return [
            label
            for label in {**self.by_label, **seen}
            if not versions.is_same(self.by_label.get(label), seen.get(label))
        ]

    def labels_to_try(self, seen: Mapping[Label, Version]) -> set[Label]:
        """The new and changed versions that cannot be served from an earlier load."""
        changed = {label for label in self.differences(seen) if label in seen}
        return changed - self.signatures().keys()

    # --- changes ---------------------------------------------------------------------------------

    def keep(self, version: Version) -> list[str]:
        """Adds a version or replaces it. Returns what is wrong with it, without what was known of
        this version or another one of its model."""
        # The problems of untried versions were not logged yet, though a wrong model.toml is known.
        known = {
            problem
            for other in self.by_label.values()
            if other.file.model == version.file.model and not other.is_untried
            for problem in other.problems_to_log
        }
        self.by_label[version.label] = version
        if version.signature:
            self._requested.discard(version.label)
        return [
            problem
            for problem in dict.fromkeys(version.problems_to_log)
            if problem and problem not in known
        ]

    def remove(self, label: Label, now_seconds: float) -> bool:
        """Notes that a version, which must be known, was removed from the folder at this monotonic
        time. Returns whether it was loaded: then it still runs the jobs that wait for it, until
        `drop_removed`."""
        version = self.by_label.pop(label)
        self._announced_labels.discard(label)
        if version.signature:
            self._removed[label] = (version, now_seconds)
        return version.signature is not None

    def seconds_since_removal(self, now_seconds: float) -> dict[Label, float]:
        """By removed version that still runs jobs which waited for it, the seconds since it was
        removed from the folder."""
        return {label: now_seconds - removed_at for label, (_, removed_at) in self._removed.items()}

    def drop_removed(self, label: Label) -> None:
        """Drops a removed version for good, since no job waits for it any more, or it is there
        again; does nothing if it is not removed."""
        self._removed.pop(label, None)

    def mark_announced(self, labels: Iterable[Label]) -> bool:
        """Marks those of these versions that may be served as announced. Returns whether there are
        any that were not marked before."""
        new = self.unannounced_labels.intersection(labels)
        self._announced_labels |= new
        return bool(new)

    def is_best(self, label: Label) -> bool:
        """Whether this version is the one to serve for its model once it is announced."""
        rivals = [other for other in self._uncontested_versions() if other.file.model == label[0]]
        best = max(rivals, key=lambda other: other.file.rank, default=None)
        return best is not None and best.label == label

    def update_served(self) -> list[Label]:
        """Chooses the default version of each model. Returns those whose place another one took,
        without the removed ones, which could not be loaded again."""
        before = self.served
        ranked = sorted(self._servable_versions(), key=lambda version: version.file.rank)
        self.served = {version.file.model: version for version in ranked}
        return [
            version.label
            for model, version in before.items()
            if (now := self.served.get(model))
            and now.label != version.label
            and version.label in self.by_label
        ]

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
        yield from (version for label, version in self.by_label.items() if label in labels)

    def _untried_labels(self) -> set[Label]:
        """The versions in the folder that were neither loaded nor refused yet."""
        untried = {version.label for version in self.by_label.values() if version.is_untried}
        return self.untried_files | untried

    def _names_served(self, model: str | None) -> str:
        """For a message: the versions of the model that can be served, else the served models, else
        "none"."""
        numbers = [version for name, version in self.uncontested_signatures() if name == model]
        return ", ".join(numbers) or ", ".join(sorted(self.served)) or "none"
