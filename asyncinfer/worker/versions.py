"""One version of a model as a worker knows it, and what tells two looks at it apart."""

import hashlib
from collections.abc import Iterable, Mapping

import msgspec
from msgspec import Struct

from asyncinfer import models
from asyncinfer.models import ModelFile, Signature, Stamp
from asyncinfer.worker.shelf import Label, label_of

OF_ALL_VERSIONS = ""
"""In place of a version, for what is wrong with a model's `model.toml`."""


class Version(Struct, frozen=True):
    """One version; without a signature it was not loaded yet, or cannot be (`problem`)."""

    file: ModelFile
    stamp: Stamp
    signature: Signature | None = None
    problem: str = ""
    is_altered: bool = False
    """Whether the file is no longer what the signature was made of."""
    refused: ModelFile | None = None
    """What `file` looks like since, where that was refused: it is not tried again and again."""

    @property
    def is_unknown(self) -> bool:
        return not (self.signature or self.problem)

    @property
    def label(self) -> Label:
        return label_of(self.file)

    @property
    def complaints(self) -> tuple[str, str]:
        return self.problem, self.file.toml_problem


def look(file: ModelFile) -> Version:
    return Version(file, models.stamp(file))


def same(known: Version | None, seen: Version | None) -> bool:
    if known is None or seen is None:
        return known is seen
    return known.stamp == seen.stamp and (known.refused or known.file) == seen.file


def loads_alike(one: ModelFile, other: ModelFile) -> bool:
    """Whether they differ at most in what is wrong with a `model.toml` that is not in force."""
    return msgspec.structs.replace(one, toml_problem=other.toml_problem) == other


def same_content(known: Version, found: Version) -> bool:
    """Whether only times differ, and only the model file's; reads it, so call it in a thread."""
    changed = {*known.stamp} ^ {*found.stamp}
    if not known.signature or {name for name, _, _ in changed} != {found.file.path.name}:
        return False
    try:
        with found.file.path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest() == known.signature.sha256
    except OSError:
        return False


def with_config_in_force(found: Version, known: Version | None, served: Version | None) -> Version:
    """A wrong `model.toml` leaves the one before in force, also for versions that are new."""
    before = known if known and known.signature else served
    if not found.file.toml_problem or before is None:
        return found
    file = msgspec.structs.replace(found.file, config=before.file.config, problem="")
    return msgspec.structs.replace(found, file=file)


def problems(versions: Iterable[Version]) -> dict[Label, str]:
    """What is wrong with each version, and once per model with its `model.toml`."""
    found: dict[Label, str] = {}
    for one in versions:
        if one.file.toml_problem:
            found[one.file.model, OF_ALL_VERSIONS] = one.file.toml_problem
        if one.problem and one.problem != one.file.toml_problem:
            found[one.label] = one.problem
    return found


def missing_defaults(versions: Mapping[Label, Version]) -> dict[Label, str]:
    wanted = {(one.file.model, one.file.config.default_version) for one in versions.values()}
    labels = {(model, str(version)) for model, version in wanted if version is not None}
    return {
        label: "model.toml makes it the default, but it is not there"
        for label in labels - versions.keys()
    }
