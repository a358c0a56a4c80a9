"""One version of a model as a worker knows it, and what tells two looks at it apart."""

import hashlib
from collections.abc import Collection, Mapping

import msgspec
from msgspec import Struct

from asyncinfer.models import onnx_file
from asyncinfer.models.folder import OF_ALL_VERSIONS as OF_ALL_VERSIONS
from asyncinfer.models.folder import ModelFile, Stamp, read_stamp
from asyncinfer.models.signature import Signature
from asyncinfer.worker.models.engine_cache import Label, label_of


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
    loaded: Stamp = ()
    """Of the files that the signature was made of."""

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
    return Version(file, read_stamp(file))


def same(known: Version | None, seen: Version | None) -> bool:
    if known is None or seen is None:
        return known is seen
    return known.stamp == seen.stamp and (known.refused or known.file) == seen.file


def loads_alike(one: ModelFile, other: ModelFile) -> bool:
    """Whether they differ at most in what is wrong with a `model.toml` that is not in force."""
    return msgspec.structs.replace(one, toml_problem=other.toml_problem) == other


def same_content(known: Version, found: Version) -> bool:
    """Whether the files are those that the signature was made of, wherever they lie now.

    Other files beside them count for nothing: a file manager leaves some where it was used.
    Reads the model's file, so call it in a thread.
    """
    if not known.signature:
        return False
    if known.loaded == found.stamp:
        return True
    try:
        with found.file.path.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != known.signature.sha256:
                return False
        beside = onnx_file.weights_files(found.file.path)
    except (OSError, ValueError):
        return False
    if found.file.config.session.custom_ops is not None:
        beside |= {name for name, _, _ in (*known.loaded, *found.stamp)}
        beside.discard(found.file.path.name)
    return _only(beside, known.loaded) == _only(beside, found.stamp)


def _only(names: set[str], stamp: Stamp) -> set[tuple[str, int, int]]:
    return {one for one in stamp if one[0] in names}


def with_config_in_force(found: Version, known: Version | None, served: Version | None) -> Version:
    """A wrong `model.toml` leaves the one before in force, also for versions that are new."""
    before = known if known and known.signature else served
    wrong = found.file.toml_problem
    if not wrong or before is None:
        return found
    problem = "" if found.file.problem == wrong else found.file.problem
    file = msgspec.structs.replace(found.file, config=before.file.config, problem=problem)
    return msgspec.structs.replace(found, file=file)


def still_there(
    known: Mapping[Label, Version], seen: Mapping[Label, Version]
) -> dict[Label, Version]:
    """Versions in folders that cannot be read now: as far as anybody knows, they are as before."""
    hidden = {one.file.model for one in seen.values() if one.file.is_hidden}
    return {
        label: msgspec.structs.replace(one, file=one.refused or one.file)
        for label, one in known.items()
        if one.file.model in hidden and one.signature and label not in seen
    }


def problems(versions: Collection[Version]) -> dict[Label, str]:
    """What is wrong with each version, and once per model with its `model.toml`."""
    found: dict[Label, str] = {}
    for one in versions:
        if one.problem and one.problem != one.file.toml_problem:
            found[one.label] = one.problem
    for one in versions:
        label, wrong = (one.file.model, OF_ALL_VERSIONS), one.file.toml_problem
        if wrong and wrong not in found.get(label, ""):
            found[label] = f"{found[label]}; {wrong}" if label in found else wrong
    return found


def missing_defaults(versions: Mapping[Label, Version]) -> dict[Label, str]:
    wanted = {(one.file.model, one.file.config.default_version) for one in versions.values()}
    labels = {(model, str(version)) for model, version in wanted if version is not None}
    return {
        label: "model.toml makes it the default, but it is not there"
        for label in labels - versions.keys()
    }
