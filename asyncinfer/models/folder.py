"""The model folder as people have it: its models, and what else lies there.

One bad thing stops no other: what cannot be served is listed with its `problem`, in words that
name the file and what mends it. Nothing is opened here but `model.toml` and labels files.
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
from asyncinfer.models.config import ModelConfig, read_file
from asyncinfer.untrusted import file_access
from asyncinfer.untrusted.printable import printable_name

OF_ALL_VERSIONS: Final = ""
"""In place of a version, for what is wrong with a model as a whole."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_RESERVED: Final = frozenset({"stats"})
_VERSION: Final = re.compile(r"0|[1-9][0-9]{0,17}")
_MEANT: Final = re.compile(r"\D{0,8}?0*(0|[1-9][0-9]{0,17})", re.ASCII)
"""A name that says which version it was meant for, such as `v1` or `01`."""

NAME_RULE: Final = (
    "a model's name is 1 to 64 letters, digits, dots, hyphens or underscores, "
    "begins with a letter or digit, and is not `stats`"
)

_IGNORED: Final = (".", "_")
_MOST_NAMED: Final = 5
_MOST_STAMPED: Final = 10_000
_MOST_LOOKED_INTO: Final = 20


class ModelFile(Struct, frozen=True):
    """One version of a model as found in the folder."""

    model: str
    version: str
    path: Path
    config: ModelConfig = ModelConfig()
    problem: str = ""
    """Why it cannot be served, known before anybody opened it; `Engine.load` raises it."""
    toml_problem: str = ""
    """What is wrong with its `model.toml`; the `config` is not from there, then."""

    is_hidden: bool = False
    """Whether it stands for a folder that cannot be read, so that nobody knows what it has."""

    @property
    def is_bare(self) -> bool:
        return self.path.parent.name != self.version

    @property
    def shown(self) -> str:
        """The path as people know it: from the model folder on."""
        return _shown(self.path, 1 if self.is_bare else 3)

    @property
    def rank(self) -> tuple[bool, int]:
        """Of the versions that can be served, the highest rank is the one that is."""
        return str(self.config.default_version) == self.version, version_order(self.version)


class Listing(Struct, frozen=True):
    """What a model folder holds."""

    files: list[ModelFile]
    passed_over: tuple[str, ...] = ()
    """Of folders that cannot be read and can be no model's, such as lost+found: which, and why."""


def version_order(version: str) -> int:
    """Orders versions, oldest first; a folder that is no version comes before all."""
    return int(version) if _VERSION.fullmatch(version) else -1


def valid_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and name not in _RESERVED


def read_folder(model_dir: Path) -> Listing:
    """Every version of every model, by name; first the one to serve, then the newest.

    Raises OSError where the folder itself cannot be read.
    """
    found: dict[str, list[ModelFile]] = {}
    second: list[ModelFile] = []
    passed_over: list[str] = []
    for entry in sorted(_entries(model_dir), key=_precedence):
        try:
            files = _read_entry(entry)
        except OSError as error:
            why = f"{file_access.why(error)}. Its name can be no model's"
            passed_over.append(f"{_shown(entry, 1)} is passed over: it {why}")
            continue
        if files and found.setdefault(files[0].model, files) is not files:
            second += _outdone(entry, files[0], found[files[0].model][0])
    files = [file for files in (*found.values(), second) for file in files]
    return Listing(files, tuple(passed_over))


def scan(model_dir: Path) -> list[ModelFile]:
    return read_folder(model_dir).files


def bare_file(path: Path) -> ModelFile:
    """The model that one file is, wherever it lies."""
    file = ModelFile(_named(path.stem), "1", path)
    problem = _name_problem(path.stem, file.shown) or _problem(path, file.shown)
    return msgspec.structs.replace(file, problem=problem)


def to_serve(files: Sequence[ModelFile]) -> dict[str, ModelFile]:
    """Of each model the version to serve."""
    return {file.model: file for file in sorted(files, key=lambda file: file.rank)}


Stamp: TypeAlias = tuple[tuple[str, int, int], ...]


def read_stamp(file: ModelFile) -> Stamp:
    """Name, size and time of change in ns of each file that a version is made of, ONNX's external
    data included; empty once it is gone. What may not be looked at is left out."""
    folder = file.path.parent
    if not file_access.is_file(file.path):
        return ()
    paths = [file.path] if file.is_bare else _files_below(folder)
    return tuple(sorted(_stamped(paths, folder)))


def total_bytes(stamp: Stamp) -> int:
    return sum(size for _, size, _ in stamp)


def _files_below(folder: Path) -> Iterator[Path]:
    below = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
    return itertools.islice(below, _MOST_STAMPED)


def _stamped(paths: Iterable[Path], folder: Path) -> Iterator[tuple[str, int, int]]:
    for path in paths:
        try:
            it = path.stat()
        except OSError:  # a link that leads nowhere, or a file that went meanwhile
            continue
        if S_ISREG(it.st_mode):
            yield str(path.relative_to(folder)), it.st_size, it.st_mtime_ns


# --- an entry of the folder --------------------------------------------------------------------


def _entries(folder: Path) -> list[Path]:
    """What is not hidden; raises OSError, also where the names could be read and no more."""
    if file_access.is_folder(folder) and not file_access.may_enter(folder):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    return [entry for entry in folder.iterdir() if not entry.name.startswith(_IGNORED)]


def _precedence(entry: Path) -> tuple[str, int, str]:
    """A folder comes before the bare file of its name, which comes before one in capitals."""
    if not _is_onnx(entry) or file_access.is_folder(entry):
        return entry.name, 0, entry.name
    return entry.stem, 1 if entry.suffix == ".onnx" else 2, entry.name


def _is_onnx(path: Path) -> bool:
    return path.suffix.lower() == ".onnx"


def _read_entry(entry: Path) -> list[ModelFile]:
    """Raises OSError for a folder that cannot be read and can be no model's."""
    if file_access.is_folder(entry):
        return _read_model(entry)
    if _is_onnx(entry):
        return [bare_file(entry)]
    if valid_name(entry.name) and not entry.suffix and file_access.is_lost(entry):
        return [_whole(entry, _problem(entry, _shown(entry, 1)))]
    return []


def _whole(entry: Path, problem: str) -> ModelFile:
    """A model of which nothing but its name is known."""
    return ModelFile(_named(entry.name), OF_ALL_VERSIONS, entry, problem=problem, is_hidden=True)


def _outdone(entry: Path, file: ModelFile, winner: ModelFile) -> list[ModelFile]:
    """What another has the name of."""
    if not valid_name(file.model):
        return []
    shown = _shown(entry, 1)
    problem = f"{shown}: is not served, since {winner.shown} has its name; rename or remove one"
    return [ModelFile(file.model, OF_ALL_VERSIONS, entry, problem=problem)]


def _named(name: str) -> str:
    return name if valid_name(name) else printable_name(name)


def _name_problem(name: str, shown: str) -> str:
    return "" if valid_name(name) else f"{shown}: rename it: {NAME_RULE}"


def _problem(path: Path, shown: str) -> str:
    words = file_access.why_unreadable(path)
    return f"{shown}: {words}" if words else ""


def _shown(path: Path, parts: int) -> str:
    return "/".join(map(printable_name, path.parts[-parts:]))


# --- the folder of a model ---------------------------------------------------------------------


def _read_model(folder: Path) -> list[ModelFile]:
    try:
        entries = sorted(_entries(folder))
    except OSError as error:
        if not valid_name(folder.name):
            raise
        return [_whole(folder, f"{folder.name}: {file_access.why(error)}")]
    found = {entry.name: file for entry in entries if (file := _model_in(entry))}
    if not found:
        return _astray(folder, entries)
    names = {entry.name for entry in entries}
    model = _configured(folder)
    files = [_version(model, name, *file, names) for name, file in found.items()]
    return sorted(files, key=lambda file: (file.rank, file.version), reverse=True)


def _model_in(entry: Path) -> tuple[Path, str] | None:
    """The file of a version, and what is wrong with it; None for what is no version."""
    usual = entry / "model.onnx"
    is_meant = _MEANT.fullmatch(entry.name) is not None
    if not file_access.is_folder(entry):
        is_bad = is_meant and file_access.is_lost(entry)
        return (usual, _problem(entry, _shown(entry, 2))) if is_bad else None
    try:
        entries = sorted(_entries(entry))
    except OSError as error:
        return (usual, f"{_shown(entry, 2)}: {file_access.why(error)}") if is_meant else None
    if usual in entries:
        return usual, _problem(usual, _shown(usual, 3))
    return _other_model_in(entry, usual, entries)


def _other_model_in(folder: Path, usual: Path, entries: list[Path]) -> tuple[Path, str] | None:
    """The only ONNX file of a version, whatever its name."""
    candidates = [entry for entry in entries if _is_onnx(entry)]
    if len(candidates) > 1:
        names = [printable_name(one.name) for one in candidates]
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        return usual, (
            f"{_shown(folder, 2)}: has several ONNX files, and none is model.onnx: "
            f"{', '.join(names[:_MOST_NAMED])}{more}; give that name to the one to serve"
        )
    if candidates:
        (only,) = candidates
        if not only.name.isprintable():
            return usual, f"{_shown(only, 3)}: rename it to model.onnx"
        return only, _problem(only, _shown(only, 3))
    if _VERSION.fullmatch(folder.name) and (
        deep := _first_onnx(filter(file_access.is_folder, entries))
    ):
        to = f"{_shown(folder, 2)}/model.onnx"
        return usual, f"{_shown(deep, 4)}: lies a folder too deep; move it to {to}"
    return None


def _first_onnx(folders: Iterable[Path]) -> Path | None:
    for folder in folders:
        try:
            entries = sorted(_entries(folder))
        except OSError:
            continue
        if found := next(filter(_is_onnx, entries), None):
            return found
    return None


def _astray(folder: Path, entries: list[Path]) -> list[ModelFile]:
    """An ONNX file that lies in a model's folder and in none of a version."""
    model, name = _named(folder.name), printable_name(folder.name)
    stray = next((one for one in entries if _is_onnx(one) and file_access.is_file(one)), None)
    if stray:
        shown = _shown(stray, 2)
        problem = f"{shown}: has no version folder: move it to {name}/1/model.onnx"
        return [ModelFile(model, "1", stray, problem=problem)]
    if _is_onnx(folder):
        return [_whole(folder, f"{name}: {file_access.why_unreadable(folder)}")]
    inner = itertools.islice(filter(file_access.is_folder, entries), _MOST_LOOKED_INTO)
    deep = next((one for one in inner if _has_version(one)), None)
    if deep:
        shown = _shown(deep, 2)
        problem = f"{shown}: lies a folder too deep; move it up, or set MODEL_DIR to {name}"
        return [ModelFile(model, OF_ALL_VERSIONS, folder, problem=problem)]
    return []


def _has_version(folder: Path) -> bool:
    """Whether it is the folder of a model."""
    try:
        entries = _entries(folder)
    except OSError:
        return False
    return any(
        file_access.is_file(one / "model.onnx") for one in entries if _VERSION.fullmatch(one.name)
    )


def _version(
    model: ModelFile, name: str, path: Path, problem: str, names: Collection[str]
) -> ModelFile:
    problem = problem or model.problem
    if not _VERSION.fullmatch(name):
        shown = printable_name(name)
        meant = _MEANT.fullmatch(name)
        to = meant[1] if meant and meant[1] not in names else f"a whole number, or to _{shown}"
        problem = f"{model.model}/{shown}: is no version: rename {shown} to {to}"
    return msgspec.structs.replace(model, version=printable_name(name), path=path, problem=problem)


def _configured(folder: Path) -> ModelFile:
    """The model without a version, with what its `model.toml` says."""
    name = _named(folder.name)
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
    """The folder to serve: the one asked for, else `./model`, else the shipped one."""
    if explicit is not None:
        return explicit
    # A wheel carries `_models`; an editable install has the repository's own folder.
    candidates = (cwd / "model", package / "_models")
    return next((folder for folder in candidates if folder.is_dir()), package.parent / "model")


def default_model(explicit: str | None, names: Iterable[str]) -> str | None:
    """The model of a request that names none; None where every request must name one."""
    if explicit is not None:
        return explicit
    known = set(filter(valid_name, names))
    if "iris" in known:
        return "iris"
    return known.pop() if len(known) == 1 else None
