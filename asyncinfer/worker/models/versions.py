"""One version of a model as a worker knows it, and how it differs from what is in the folder."""

import hashlib
from collections.abc import Collection, Mapping

import msgspec
from msgspec import Struct

from asyncinfer.models import onnx_file
from asyncinfer.models.folder import OF_ALL_VERSIONS, ModelFile, Stamp, read_stamp
from asyncinfer.models.signature import Signature
from asyncinfer.worker.models.engine_cache import Label, label_of


class Version(Struct, frozen=True):
    """One version. Without a signature it was not loaded yet, or cannot be loaded (`problem`)."""

    file: ModelFile
    stamp: Stamp
    signature: Signature | None = None
    problem: str = ""
    is_altered: bool = False
    """Whether the file has other content now than when the signature was made."""
    refused: ModelFile | None = None
    """The file as it is now, where `file` is an earlier state that is still served: this one was
    refused, and is not tried again."""
    loaded: Stamp = ()
    """The stamp of the files when the signature was made."""

    @property
    def is_untried(self) -> bool:
        """Whether it was neither loaded nor refused yet."""
        return not (self.signature or self.problem)

    @property
    def label(self) -> Label:
        return label_of(self.file)

    @property
    def problems_to_log(self) -> tuple[str, str]:
        """What is wrong with the version, and with its `model.toml`; empty where nothing is."""
        return self.problem, self.file.toml_problem


def read_version(file: ModelFile) -> Version:
    """An untried version, with the sizes and times of its files as they are now; the model's file
    is not opened."""
    return Version(file, read_stamp(file))


def is_same(known: Version | None, seen: Version | None) -> bool:
    """Whether the files and the configuration are unchanged, by size and time; None stands for no
    such version."""
    if known is None or seen is None:
        return known is seen
    return known.stamp == seen.stamp and (known.refused or known.file) == seen.file


def loads_the_same(first: ModelFile, second: ModelFile) -> bool:
    """Whether both would be loaded from the same path with the same configuration; a `model.toml`
    that is wrong, and so not in force, makes no difference."""
    return msgspec.structs.replace(first, toml_problem=second.toml_problem) == second


def has_same_content(known: Version, found: Version) -> bool:
    """Whether the files are those that the signature was made of, also if they were moved. False if
    that is unknown, since they cannot be read or `known` was never loaded.

    Other files beside them make no difference: file managers leave some behind. Reads the model's
    file, so call it in a thread.
    """
    if not known.signature:
        return False
    if known.loaded == found.stamp:
        return True
    try:
        with found.file.path.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != known.signature.sha256:
                return False
        beside = onnx_file.weights_locations(found.file.path)
    except (OSError, ValueError):
        return False
    if found.file.config.session.custom_ops is not None:
        beside |= {name for name, _, _ in (*known.loaded, *found.stamp)}
        beside.discard(found.file.path.name)
    return _files_named(beside, known.loaded) == _files_named(beside, found.stamp)


def _files_named(names: set[str], stamp: Stamp) -> set[tuple[str, int, int]]:
    """The entries of a stamp for the files of these names."""
    return {entry for entry in stamp if entry[0] in names}


def with_config_in_force(found: Version, known: Version | None, served: Version | None) -> Version:
    """The version as `found`, but with the last valid configuration if its `model.toml` is wrong:
    that of the version itself (`known`), or for a new version that of the `served` one. Unchanged
    if there is neither."""
    before = known if known and known.signature else served
    toml_problem = found.file.toml_problem
    if not toml_problem or before is None:
        return found
    problem = "" if found.file.problem == toml_problem else found.file.problem
    file = msgspec.structs.replace(found.file, config=before.file.config, problem=problem)
    return msgspec.structs.replace(found, file=file)


def hidden_but_loaded(
    known: Mapping[Label, Version], seen: Mapping[Label, Version]
) -> dict[Label, Version]:
    """The known versions that were loaded and lie in folders that cannot be read now: they are
    taken to be unchanged. `seen` are the versions that the folder has now."""
    hidden = {version.file.model for version in seen.values() if version.file.is_unreadable_folder}
    return {
        label: msgspec.structs.replace(version, file=version.refused or version.file)
        for label, version in known.items()
        if version.file.model in hidden and version.signature and label not in seen
    }


def version_problems(versions: Collection[Version]) -> dict[Label, str]:
    """What is wrong with each version that has a problem, and, under the version OF_ALL_VERSIONS,
    with the `model.toml` of a model."""
    found: dict[Label, str] = {}
    for version in versions:
        if version.problem and version.problem != version.file.toml_problem:
            found[version.label] = version.problem
    for version in versions:
        label, problem = (version.file.model, OF_ALL_VERSIONS), version.file.toml_problem
        if problem and problem not in found.get(label, ""):
            found[label] = f"{found[label]}; {problem}" if label in found else problem
    return found


def missing_default_problems(versions: Mapping[Label, Version]) -> dict[Label, str]:
    """The problem of each default version that a `model.toml` names and the folder lacks."""
    wanted = {
        (version.file.model, version.file.config.default_version) for version in versions.values()
    }
    labels = {(model, str(version)) for model, version in wanted if version is not None}
    return {
        label: "model.toml makes it the default, but it is not there"
        for label in labels - versions.keys()
    }
