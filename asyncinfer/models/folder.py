"""The model folder: its models and versions, with the problem of each that cannot be served.

A problem stops nothing else: what cannot be served is listed with its `problem`, in words that
name the file and the remedy. Only `model.toml` and labels files are opened here.
"""

import errno
import itertools
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from stat import S_ISREG
from typing import Final, TypeAlias

import msgspec
from msgspec import Struct

from asyncinfer.errors import ModelRefused
from asyncinfer.jobs import NAME_PATTERN
from asyncinfer.models.config import ModelConfig, read_file
from asyncinfer.untrusted import file_access
from asyncinfer.untrusted.printable import printable_name

OF_ALL_VERSIONS: Final = ""
"""Stands for the version in a problem of a whole model."""

_NAME: Final = re.compile(NAME_PATTERN)
_RESERVED: Final = frozenset({"stats"})
_VERSION: Final = re.compile(r"0|[1-9][0-9]{0,17}")
_LIKELY_VERSION: Final = re.compile(r"\D{0,8}?0*(0|[1-9][0-9]{0,17})", re.ASCII)
"""A name that is not a version but probably means one, such as `v1` or `01`."""

NAME_RULE: Final = (
    "a model's name is 1 to 64 letters, digits, dots, hyphens or underscores, "
    "begins with a letter or digit, and is not `stats`"
)

_IGNORED: Final = (".", "_")
_MAX_NAMED: Final = 5
_MAX_STAMPED_FILES: Final = 10_000
_MAX_SEARCHED_FOLDERS: Final = 20


class ModelFile(Struct, frozen=True):
    """One version of a model in the folder."""

    model: str
    version: str
    path: Path
    config: ModelConfig = ModelConfig()
    problem: str = ""
    """Why it cannot be served, as far as is known without opening it; `Engine.load` raises it."""
    toml_problem: str = ""
    """The problem of its `model.toml`, if there is one; `config` then has only defaults."""

    is_unreadable_folder: bool = False
    """True if it stands for a folder that cannot be read, so that its versions are unknown."""

    @property
    def is_single_file(self) -> bool:
        """Whether the model is a file without a folder of its own."""
        return self.path.parent.name != self.version

    @property
    def display_path(self) -> str:
        """The path for people, relative to the model folder."""
        return _shown(self.path, 1 if self.is_single_file else 3)

    @property
    def rank(self) -> tuple[bool, int]:
        """A sort key: of the versions that can be served, the one with the highest rank is."""
        return str(self.config.default_version) == self.version, version_order(self.version)


class FolderListing(Struct, frozen=True):
    """The content of a model folder."""

    files: list[ModelFile]
    ignored: tuple[str, ...] = ()
    """A message for each unreadable folder that cannot be a model, such as lost+found."""


def version_order(version: str) -> int:
    """A sort key: the oldest version is lowest, and a name that is not a version is -1."""
    return int(version) if _VERSION.fullmatch(version) else -1


def is_valid_name(name: str) -> bool:
    """Whether it may be the name of a model, as NAME_RULE says."""
    return _NAME.fullmatch(name) is not None and name not in _RESERVED


def read_folder(model_dir: Path) -> FolderListing:
    """All versions of all models, by name; of each model first the one to serve, then the newest.

    Raises OSError if the folder itself cannot be read.
    """
    found: dict[str, list[ModelFile]] = {}
    duplicates: list[ModelFile] = []
    ignored: list[str] = []
    for entry in sorted(_entries(model_dir), key=_precedence):
        try:
            files = _read_entry(entry)
        except OSError as error:
            why = f"{file_access.os_error_reason(error)}. Its name cannot be that of a model"
            ignored.append(f"{_shown(entry, 1)} is ignored: it {why}")
            continue
        if not files:
            continue
        winner = found.setdefault(files[0].model, files)[0]
        if winner is not files[0] and is_valid_name(winner.model):
            why = f"is not served, since {winner.display_path} has its name; rename or remove one"
            problem = f"{_shown(entry, 1)}: {why}"
            duplicates.append(ModelFile(winner.model, OF_ALL_VERSIONS, entry, problem=problem))
    files = [file for files in (*found.values(), duplicates) for file in files]
    return FolderListing(files, tuple(ignored))


def scan(model_dir: Path) -> list[ModelFile]:
    """The versions of `read_folder`."""
    return read_folder(model_dir).files


def single_file_model(path: Path) -> ModelFile:
    """The model that is a single file, in any folder: version 1, named by the file's stem.

    It has a `problem` if its name or the file cannot be used; the file need not exist.
    """
    file = ModelFile(_model_name(path.stem), "1", path)
    problem = _name_problem(path.stem, file.display_path) or _problem(path, file.display_path)
    return msgspec.structs.replace(file, problem=problem)


def served_versions(files: Sequence[ModelFile]) -> dict[str, ModelFile]:
    """By model name, the version to serve: the configured one, else the newest.

    Files with a problem are not left out.
    """
    return {file.model: file for file in sorted(files, key=lambda file: file.rank)}


Stamp: TypeAlias = tuple[tuple[str, int, int], ...]


def read_stamp(file: ModelFile) -> Stamp:
    """Path in the folder, size in bytes and modification time in ns of each file of a version.

    ONNX's external data is among them. Stamps are compared to notice changes. The stamp is empty if
    the model file is gone. Files that may not be examined are left out.
    """
    folder = file.path.parent
    if not file_access.is_file(file.path):
        return ()
    below = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
    paths = [file.path] if file.is_single_file else itertools.islice(below, _MAX_STAMPED_FILES)
    return tuple(sorted(_stamped(paths, folder)))


def total_bytes(stamp: Stamp) -> int:
    """The number of bytes of all files of a stamp."""
    return sum(size for _, size, _ in stamp)


def _stamped(paths: Iterable[Path], folder: Path) -> Iterator[tuple[str, int, int]]:
    """Yields path in the folder, size in bytes and modification time in ns of each regular file."""
    for path in paths:
        try:
            status = path.stat()
        except OSError:  # a broken link, or a file that was deleted meanwhile
            continue
        if S_ISREG(status.st_mode):
            yield str(path.relative_to(folder)), status.st_size, status.st_mtime_ns


# --- an entry of the folder --------------------------------------------------------------------


def _entries(folder: Path) -> list[Path]:
    """The entries that are not hidden; raises OSError, also if names can be read but not files."""
    if file_access.is_folder(folder) and not file_access.may_enter(folder):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    return [entry for entry in folder.iterdir() if not entry.name.startswith(_IGNORED)]


def _precedence(entry: Path) -> tuple[str, int, str]:
    """A sort key: a folder comes before the single file of its name, `.onnx` before `.ONNX`."""
    if not _is_onnx(entry) or file_access.is_folder(entry):
        return entry.name, 0, entry.name
    return entry.stem, 1 if entry.suffix == ".onnx" else 2, entry.name


def _is_onnx(path: Path) -> bool:
    return path.suffix.lower() == ".onnx"


def _read_entry(entry: Path) -> list[ModelFile]:
    """The versions in an entry; raises OSError for an unreadable folder that cannot be a model."""
    if file_access.is_folder(entry):
        return _read_model(entry)
    if _is_onnx(entry):
        return [single_file_model(entry)]
    if is_valid_name(entry.name) and not entry.suffix and file_access.is_inaccessible(entry):
        return [_unreadable_model(entry, _problem(entry, _shown(entry, 1)))]
    return []


def _unreadable_model(entry: Path, problem: str) -> ModelFile:
    """A model of which only the name is known."""
    return ModelFile(
        _model_name(entry.name), OF_ALL_VERSIONS, entry, problem=problem, is_unreadable_folder=True
    )


def _model_name(name: str) -> str:
    """The name of a model; one that is not valid is made printable."""
    return name if is_valid_name(name) else printable_name(name)


def _name_problem(name: str, shown: str) -> str:
    """Why a name cannot be that of a model, after `shown`; "" if it can."""
    return "" if is_valid_name(name) else f"{shown}: cannot have this name; rename it: {NAME_RULE}"


def _problem(path: Path, shown: str) -> str:
    """Why a file cannot be read, after `shown`; "" if it can."""
    words = file_access.unreadable_reason(path)
    return f"{shown}: {words}" if words else ""


def _shown(path: Path, parts: int) -> str:
    """The last `parts` names of a path, made printable."""
    return "/".join(map(printable_name, path.parts[-parts:]))


# --- the folder of a model ---------------------------------------------------------------------


def _read_model(folder: Path) -> list[ModelFile]:
    """The versions in the folder of a model, the one to serve first; empty if it is no model.

    Raises OSError for an unreadable folder that cannot be a model.
    """
    try:
        entries = sorted(_entries(folder))
    except OSError as error:
        if not is_valid_name(folder.name):
            raise
        return [_unreadable_model(folder, f"{folder.name}: {file_access.os_error_reason(error)}")]
    found = {entry.name: file for entry in entries if (file := _version_file(entry))}
    if not found:
        return _misplaced_model(folder, entries)
    names = {entry.name for entry in entries}
    model = _read_model_toml(folder)
    files = [_version(model, name, *file, names) for name, file in found.items()]
    return sorted(files, key=lambda file: (file.rank, file.version), reverse=True)


def _version_file(entry: Path) -> tuple[Path, str] | None:
    """The model file of a version, and its problem or ""; None if the entry is not a version."""
    usual = entry / "model.onnx"
    has_version_name = _LIKELY_VERSION.fullmatch(entry.name) is not None
    if not file_access.is_folder(entry):
        is_bad = has_version_name and file_access.is_inaccessible(entry)
        return (usual, _problem(entry, _shown(entry, 2))) if is_bad else None
    try:
        entries = sorted(_entries(entry))
    except OSError as error:
        problem = f"{_shown(entry, 2)}: {file_access.os_error_reason(error)}"
        return (usual, problem) if has_version_name else None
    if usual in entries:
        return usual, _problem(usual, _shown(usual, 3))
    return _only_onnx_file(entry, usual, entries)


def _only_onnx_file(folder: Path, usual: Path, entries: list[Path]) -> tuple[Path, str] | None:
    """The only ONNX file of a version, and its problem or "", if none is called model.onnx.

    If there are several, the path `usual` with a problem. None if there is none.
    """
    candidates = [entry for entry in entries if _is_onnx(entry)]
    if len(candidates) > 1:
        names = [printable_name(file.name) for file in candidates]
        more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
        return usual, (
            f"{_shown(folder, 2)}: has several ONNX files, and none is model.onnx: "
            f"{', '.join(names[:_MAX_NAMED])}{more}; give that name to the one to serve"
        )
    if candidates:
        (only,) = candidates
        if not only.name.isprintable():
            return usual, f"{_shown(only, 3)}: rename it to model.onnx"
        return only, _problem(only, _shown(only, 3))
    if _VERSION.fullmatch(folder.name):
        below = itertools.chain.from_iterable(map(_entries_below, entries))
        if deep := next(filter(_is_onnx, below), None):
            to = f"{_shown(folder, 2)}/model.onnx"
            return usual, f"{_shown(deep, 4)}: lies a folder too deep; move it to {to}"
    return None


def _entries_below(folder: Path) -> list[Path]:
    """The entries of a folder, by name; none if it cannot be read or is a file."""
    try:
        return sorted(_entries(folder)) if file_access.is_folder(folder) else []
    except OSError:
        return []


def _misplaced_model(folder: Path, entries: list[Path]) -> list[ModelFile]:
    """The problem of a folder without versions that has an ONNX file in a wrong place.

    Empty if it has none: then it is no model.
    """
    model, name = _model_name(folder.name), printable_name(folder.name)
    files = (entry for entry in entries if _is_onnx(entry) and file_access.is_file(entry))
    if misplaced := next(files, None):
        shown = _shown(misplaced, 2)
        problem = f"{shown}: has no version folder: move it to {name}/1/model.onnx"
        return [ModelFile(model, "1", misplaced, problem=problem)]
    if _is_onnx(folder):
        return [_unreadable_model(folder, f"{name}: {file_access.unreadable_reason(folder)}")]
    inner = itertools.islice(filter(file_access.is_folder, entries), _MAX_SEARCHED_FOLDERS)
    deep = next(filter(_has_version, inner), None)
    if deep:
        shown = _shown(deep, 2)
        problem = f"{shown}: lies a folder too deep; move it up, or set MODEL_DIR to {name}"
        return [ModelFile(model, OF_ALL_VERSIONS, folder, problem=problem)]
    return []


def _has_version(folder: Path) -> bool:
    """Whether it is the folder of a model: it has a version with a model.onnx."""
    return any(
        file_access.is_file(entry / "model.onnx")
        for entry in _entries_below(folder)
        if _VERSION.fullmatch(entry.name)
    )


def _version(
    model: ModelFile, name: str, path: Path, problem: str, names: Collection[str]
) -> ModelFile:
    """The version in the inner folder `name`, from the template `model`.

    `path` is its model file, `problem` what is known of it, and `names` are all entries beside it.
    """
    problem = problem or model.problem
    if not _VERSION.fullmatch(name):
        shown = printable_name(name)
        likely = _LIKELY_VERSION.fullmatch(name)
        to = likely[1] if likely and likely[1] not in names else f"a whole number, or to _{shown}"
        problem = f"{model.model}/{shown}: is not a version: rename {shown} to {to}"
    return msgspec.structs.replace(model, version=printable_name(name), path=path, problem=problem)


def _read_model_toml(folder: Path) -> ModelFile:
    """A template for the versions of a model: its name, with the config of its `model.toml`.

    It has a problem if the name or the model.toml cannot be used.
    """
    name = _model_name(folder.name)
    file = ModelFile(name, "1", folder, problem=_name_problem(folder.name, name))
    path = folder / "model.toml"
    if file.problem or not os.path.lexists(path):
        return file
    try:
        config = read_file(path, f"{name}/{path.name}")
    except ModelRefused as error:
        return msgspec.structs.replace(file, problem=error.detail, toml_problem=error.detail)
    return msgspec.structs.replace(file, config=config)


def find_model_dir(
    explicit: Path | None, *, cwd: Path, package: Path = Path(__file__).parents[1]
) -> Path:
    """The folder to serve: the explicit one, else `./model`, else the shipped one.

    It need not exist. `package` is the folder of this package, which tests replace.
    """
    if explicit is not None:
        return explicit
    # A wheel carries `_models`; an editable install has the repository's own folder.
    candidates = (cwd / "model", package / "_models")
    return next((folder for folder in candidates if folder.is_dir()), package.parent / "model")


def default_model(explicit: str | None, names: Iterable[str]) -> str | None:
    """The model of requests that name none; None if every request must name one.

    That is the explicit one, even if it is not among `names`; else iris; else the only one.
    """
    if explicit is not None:
        return explicit
    known = set(filter(is_valid_name, names))
    if "iris" in known:
        return "iris"
    return known.pop() if len(known) == 1 else None
