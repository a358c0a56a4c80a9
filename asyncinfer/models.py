"""The model folder; a model's signature, and input checked against it.

Reads files and JSON only: the API imports it, and the API never loads a model.
"""

import itertools
from collections.abc import Iterable, Sequence
from operator import mul
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from asyncinfer import decoding, faults, mismatches, tensors
from asyncinfer.errors import Fault
from asyncinfer.mismatches import Given
from asyncinfer.model_folder import NAME_RULE as NAME_RULE
from asyncinfer.model_folder import Listing as Listing
from asyncinfer.model_folder import ModelFile as ModelFile
from asyncinfer.model_folder import Stamp as Stamp
from asyncinfer.model_folder import bare_file as bare_file
from asyncinfer.model_folder import read_folder as read_folder
from asyncinfer.model_folder import read_stamp as read_stamp
from asyncinfer.model_folder import scan as scan
from asyncinfer.model_folder import to_serve as to_serve
from asyncinfer.model_folder import total_bytes as total_bytes
from asyncinfer.model_folder import valid_name as valid_name
from asyncinfer.model_folder import version_order as version_order
from asyncinfer.model_toml import Scores
from asyncinfer.tensors import DTYPES, Array, Feeds, TensorSpec

MAX_ROWS: Final = 10_000
"""Rows that one job may have where `model.toml` says nothing."""


class Signature(Struct, frozen=True):
    """What a worker announces of one version of a model."""

    model: str
    version: str
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...] = ()
    """Names of the classes, by column of the scores."""
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
    """The keys of the maps that the model gives for scores, by column of the matrix."""
    scores: Scores = "probabilities"
    """What the scores of a labelled classifier are; of logits the softmax is shown."""
    example_inputs: dict[str, Any] | None = None
    """A JSON value for each input by name: those that `model.toml` shows, or all of several."""
    score_output: str = ""
    """The output whose columns the labels name; empty: the result names no class."""
    class_output: str = ""
    """The output that is the class of a row; empty: the class is the column of its highest
    score."""
    class_values: tuple[int | str | None, ...] = ()
    """By column, the value of `class_output` that means it, None where that is not known; empty:
    the values are the columns themselves."""


# --- the folder --------------------------------------------------------------------------------


_read_signature = decoding.reader(msgspec.json.Decoder(Signature).decode)
_MOST_ELEMENTS: Final = 1 << 48
_MOST_EXAMPLE_DEPTH: Final = 2 * tensors.MOST_DIMENSIONS


def read_signature(body: bytes | None) -> Signature | None:
    """What a worker announced, as JSON; None where it is corrupt, or describes no model that
    this release could take inputs for."""
    signature = _read_signature(body)
    if signature is None or version_order(signature.version) < 0:
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
    known = set(filter(valid_name, names))
    if "iris" in known:
        return "iris"
    return known.pop() if len(known) == 1 else None


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
