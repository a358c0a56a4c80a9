"""The model folder; a model's signature, and input checked against it.

Reads files and JSON only: the API imports it, and the API never loads a model.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from operator import mul
from pathlib import Path
from stat import S_ISREG
from typing import Any, Final, TypeAlias

import msgspec
from msgspec import Struct

from asyncinfer import decoding, faults, mismatches, tensors
from asyncinfer.errors import Fault, ModelRefused
from asyncinfer.mismatches import Given
from asyncinfer.model_toml import ModelConfig, Scores, read_config
from asyncinfer.tensors import DTYPES, Array, Feeds, TensorSpec

MAX_ROWS: Final = 10_000
"""Rows that one job may have where `model.toml` says nothing."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_RESERVED: Final = frozenset({"stats"})
_VERSION: Final = re.compile(r"0|[1-9][0-9]{0,17}")
_MEANT: Final = re.compile(r"\D{0,8}?0*(0|[1-9][0-9]{0,17})", re.ASCII)
"""A name that says which version it was meant for, such as `v1` or `01`."""

NAME_RULE: Final = (
    "a model's name is 1 to 64 letters, digits, dots, hyphens or underscores, "
    "begins with a letter or digit, and is not `stats`"
)


class Signature(Struct, frozen=True):
    """What a worker announces of one version of a model."""

    model: str
    version: str
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...] = ()
    """Names of the classes, by number."""
    description: str = ""
    batched: bool = False
    """Whether rows of several jobs may be stacked along the first dimension."""
    batching: str = ""
    """Why, or why not, in words."""
    max_rows: int = MAX_ROWS
    """The most that the first dimension may have in one job, where the graph leaves it open."""
    example: Any = None
    """A JSON value that works as `data`; None where there is none to show."""
    input_axes: tuple[int | None, ...] = ()
    """Where jobs share runs: per input the axis that is stacked; None: equal in all jobs."""
    output_axes: tuple[int | None, ...] = ()
    """Per output the axis that is split; None: one answer for all jobs."""
    max_batch_jobs: int | None = None
    max_batch_rows: int | None = None
    max_wait_ms: float = 0.0
    """How long a job may wait for others to run with."""
    pad: bool = False
    """Whether named dimensions beside the rows may differ, filled up with zeros."""
    keys: tuple[int | str, ...] = ()
    """What the model itself calls its classes, by number, where that is not the number."""
    scores: Scores = "probabilities"
    """What the scores of a labelled classifier are; of logits the softmax is shown."""
    example_inputs: dict[str, Any] | None = None
    """A JSON value for each input by name: those that `model.toml` shows, or all of several."""


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

    @property
    def is_bare(self) -> bool:
        return self.path.parent.name != self.version

    @property
    def shown(self) -> str:
        """The path as people know it: from the model folder on."""
        return "/".join(self.path.parts[-1:] if self.is_bare else self.path.parts[-3:])

    @property
    def rank(self) -> tuple[bool, int]:
        """Of the versions that can be served, the highest rank is the one that is."""
        return str(self.config.default_version) == self.version, age(self.version)


# --- the folder --------------------------------------------------------------------------------


def age(version: str) -> int:
    """Orders versions, oldest first; a folder that is no version comes before all."""
    return int(version) if _VERSION.fullmatch(version) else -1


_read_signature = decoding.reader(msgspec.json.Decoder(Signature).decode)
_MOST_ELEMENTS: Final = 1 << 48
_MOST_EXAMPLE_DEPTH: Final = 2 * tensors.MOST_DIMENSIONS


def read_signature(body: bytes | None) -> Signature | None:
    """What a worker announced, as JSON; None where it is corrupt, or describes no model that
    this release could take inputs for."""
    signature = _read_signature(body)
    if signature is None or age(signature.version) < 0:
        return None
    specs = (*signature.inputs, *signature.outputs)
    examples = (signature.example, signature.example_inputs)
    sound = all(map(_is_sound, specs)) and all(map(_is_shallow, examples))
    return signature if sound and 0 < signature.max_rows <= _MOST_ELEMENTS else None


def _is_sound(spec: TensorSpec) -> bool:
    dims = tensors.dims(spec)
    sizes = [dim for dim in dims if isinstance(dim, int)]
    return (
        spec.datatype in DTYPES
        and len(dims) <= tensors.MOST_DIMENSIONS
        and all(0 <= size <= _MOST_ELEMENTS for size in sizes)
    )


def _is_shallow(value: object, depth: int = _MOST_EXAMPLE_DEPTH) -> bool:
    """Whether an example can be shown: an answer with it is nested deeper still."""
    inner = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(inner, list):
        return True
    return depth > 0 and all(_is_shallow(one, depth - 1) for one in inner)


def valid_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and name not in _RESERVED


def find_model_dir(
    explicit: Path | None, *, cwd: Path, package: Path = Path(__file__).parent
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
    known = set(names)
    if "iris" in known:
        return "iris"
    return known.pop() if len(known) == 1 else None


def scan(model_dir: Path) -> list[ModelFile]:
    """Every version of every model in the folder, by name; first the one to serve, then the newest.

    One that is broken already at this point is listed with its `problem` and stops no other.
    """
    found: dict[str, list[ModelFile]] = {}
    for entry in sorted(model_dir.iterdir()):
        files = [] if entry.name.startswith((".", "_")) else _read_entry(entry)
        # A folder comes before the bare file of its name, and wins over it.
        if files:
            found.setdefault(files[0].model, files)
    return [file for files in found.values() for file in files]


def bare_file(path: Path) -> ModelFile:
    """The model that one file is, wherever it lies."""
    return _named(ModelFile(path.stem, "1", path))


def to_serve(files: Sequence[ModelFile]) -> dict[str, ModelFile]:
    """Of each model the version to serve."""
    return {file.model: file for file in sorted(files, key=lambda file: file.rank)}


Stamp: TypeAlias = tuple[tuple[str, int, int], ...]


def stamp(file: ModelFile) -> Stamp:
    """Name, size and time of change in ns of each file that a version is made of, ONNX's external
    data included; empty once it is gone."""
    folder = file.path.parent
    try:
        paths = [file.path] if file.is_bare else sorted(folder.rglob("*"))
        stats = [(path, path.stat()) for path in paths]
    except OSError:
        return ()
    return tuple(
        (str(path.relative_to(folder)), it.st_size, it.st_mtime_ns)
        for path, it in stats
        if S_ISREG(it.st_mode)
    )


def size_bytes(stamp: Stamp) -> int:
    return sum(size for _, size, _ in stamp)


def _read_entry(entry: Path) -> list[ModelFile]:
    if entry.suffix == ".onnx" and entry.is_file():
        return [bare_file(entry)]
    if not entry.is_dir():
        return []
    try:
        return _read_folder(entry)
    except OSError as error:
        problem = f"{entry.name}: cannot be read: {error.strerror}"
        return [ModelFile(entry.name, "1", entry, problem=problem)]


def _read_folder(folder: Path) -> list[ModelFile]:
    paths = {
        entry.name: entry / "model.onnx"
        for entry in folder.iterdir()
        if not entry.name.startswith((".", "_"))
    }
    names = [name for name, path in paths.items() if path.is_file()]
    if names:
        model = _named(_configured(ModelFile(folder.name, "1", folder), folder))
        files = [_version(model, name, paths) for name in names]
        return sorted(files, key=lambda file: (file.rank, file.version), reverse=True)
    stray = next(folder.glob("*.onnx"), None)
    if stray is None:
        return []
    shown = f"{folder.name}/{stray.name}"
    problem = f"{shown}: has no version folder: move it to {folder.name}/1/model.onnx"
    return [ModelFile(folder.name, "1", stray, problem=problem)]


def _version(model: ModelFile, name: str, paths: Mapping[str, Path]) -> ModelFile:
    problem = model.problem
    if not _VERSION.fullmatch(name):
        meant = _MEANT.fullmatch(name)
        to = meant[1] if meant and meant[1] not in paths else f"a whole number, or to _{name}"
        problem = f"{model.model}/{name}: is no version: rename {name} to {to}"
    return msgspec.structs.replace(model, version=name, path=paths[name], problem=problem)


def _named(file: ModelFile) -> ModelFile:
    if valid_name(file.model):
        return file
    return msgspec.structs.replace(file, problem=f"{file.shown}: rename it: {NAME_RULE}")


def _configured(file: ModelFile, folder: Path) -> ModelFile:
    path = folder / "model.toml"
    if not path.exists():
        return file
    try:
        config = read_config(path.read_bytes(), f"{folder.name}/{path.name}", folder)
    except ModelRefused as error:
        return msgspec.structs.replace(file, problem=error.detail, toml_problem=error.detail)
    return msgspec.structs.replace(file, config=config)


# --- input -------------------------------------------------------------------------------------


def data_input(signature: Signature) -> TensorSpec | None:
    """The input that a request's `data` is for: the only one that must be there."""
    if len(signature.inputs) == 1:
        return signature.inputs[0]
    required = [spec for spec in signature.inputs if not spec.optional]
    return required[0] if len(required) == 1 else None


def check_data(data: bytes | msgspec.Raw, signature: Signature) -> Array:
    """The model's input from the JSON text of a request's `data`: the shape that it takes.

    Raises InvalidInput with every fault, each a JSON pointer that starts with /data. The API
    and the worker both call this, because strangers bypass the API.
    """
    spec = data_input(signature)
    if spec is None:
        raise faults.refusal([Fault("/data", _no_data(signature))])
    data = bytes(data)
    model, max_rows = signature.model, signature.max_rows
    if len(data) > _MANY_BYTES:
        _check_rows(_rows_by_brackets(data, spec), spec, signature)
    try:
        array = tensors.decode(data, spec)
    except (ValueError, OverflowError) as error:
        problem = f"cannot be read: {error}"
    else:
        if array.shape and array.shape[0] > max_rows:
            _check_rows(array.shape[0], spec, signature)
        if tensors.fits(array.shape, spec):
            return array
        takes = f"{model} takes shape {tensors.shape_words(spec)}"
        problem = f"its shape is {list(array.shape)}, {takes}"
    found = faults.find(data, spec, model=model, max_rows=max_rows)
    raise faults.refusal(found, otherwise=problem)


_MANY_BYTES: Final = 64 << 10


def _rows_by_brackets(data: bytes, spec: TensorSpec) -> int:
    """How many rows a long text of numbers holds, before any is read: those that are too many
    must cost next to nothing. 0 where only reading tells."""
    dims = tensors.dims(spec)
    inner = dims[1:-1]
    known = all(isinstance(size, int) and size > 0 for size in inner)
    if spec.datatype not in tensors.RANGES or not known or not dims:
        return 0
    most = data.count(b",") + 1
    if len(dims) == 1:
        return most
    sizes = itertools.accumulate((int(size or 1) for size in inner), mul, initial=1)
    return min(most, (data.count(b"[") - 1) // sum(sizes))


def _check_rows(rows: int, spec: TensorSpec, signature: Signature) -> None:
    if tensors.is_open(spec) and rows > signature.max_rows:
        detail = faults.too_many_rows(
            str(rows), spec, model=signature.model, max_rows=signature.max_rows
        )
        raise faults.refusal([Fault("/data", detail)])


def check_data_alike(data: Sequence[bytes], signature: Signature) -> list[Array] | None:
    """`check_data` of several at once, for a third of what it takes one by one; None unless each
    is numbers that fit, in rows of one shape."""
    spec = data_input(signature)
    if spec is None or not tensors.is_open(spec) or spec.datatype in ("BYTES", "BOOL"):
        return None
    try:
        rows, counts = tensors.decode_rows(data, spec)
    except (ValueError, OverflowError):
        return None
    if not (min(counts) > 0 and max(counts) <= signature.max_rows):
        return None
    if not tensors.fits(rows.shape, spec):
        return None
    ends = itertools.accumulate(counts, initial=0)
    return [rows[start:end] for start, end in itertools.pairwise(ends)]


def check_inputs(feeds: Feeds, signature: Signature) -> Feeds:
    """The model's inputs from named tensors, in the order of the signature.

    Raises InvalidInput with every fault, each a JSON pointer that starts with /inputs. Called by
    the API and by the worker.
    """
    refuse_misfits(mismatches.described(feeds), signature, mismatches.broken_booleans(feeds))
    return {spec.name: feeds[spec.name] for spec in signature.inputs if spec.name in feeds}


def refuse_misfits(
    given: Sequence[Given], signature: Signature, others: Iterable[Fault] = ()
) -> None:
    """Raises InvalidInput where tensors so described do not fit, or there are `others`."""
    found = mismatches.find(
        given, signature.inputs, model=signature.model, max_rows=signature.max_rows
    )
    if all_faults := [*found, *others]:
        raise faults.refusal(all_faults)


def _no_data(signature: Signature) -> str:
    names = ", ".join(spec.name for spec in signature.inputs)
    if not names:
        return f"{signature.model} takes no input"
    return (
        f"{signature.model} takes {len(signature.inputs)} inputs ({names}), `data` is one; send "
        '`"inputs": [{"name", "shape", "datatype", "data"}]`'
    )
