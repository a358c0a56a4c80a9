"""The signature of a model: its inputs, outputs, labels, and how its jobs are batched."""

from typing import Any, Final

import msgspec
from msgspec import Struct

from asyncinfer.models.config import Scores
from asyncinfer.models.folder import version_order
from asyncinfer.tensors import datatypes
from asyncinfer.tensors.datatypes import DTYPES, TensorSpec
from asyncinfer.untrusted import decoding

MAX_ROWS: Final = 10_000
"""The limit of rows in one job, if `model.toml` has none."""


class Signature(Struct, frozen=True):
    """The description of one version of a model, as a worker announces it."""

    model: str
    version: str
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...] = ()
    """Names of the classes, by column of the scores."""
    description: str = ""
    batched: bool = False
    """Whether the rows of several jobs may be stacked into one run."""
    batching: str = ""
    """Why jobs are batched or not, in words."""
    max_rows: int = MAX_ROWS
    """The limit of the first dimension in one job, if it is dynamic."""
    example: Any = None
    """A JSON value that works as `data`; None if none is known."""
    input_axes: tuple[int | None, ...] = ()
    """If batched: per input the axis that is stacked, or None if it must be equal in all jobs."""
    output_axes: tuple[int | None, ...] = ()
    """If batched: per output the axis that is split, or None if all jobs get the whole output. Else
    the axis of its rows, or None if it has none; empty if that is not known."""
    max_batch_jobs: int | None = None
    max_batch_rows: int | None = None
    max_wait_ms: float = 0.0
    """How long a job may wait for other jobs to share its run."""
    pad: bool = False
    """Whether other named dimensions than the rows may differ, and are padded with zeros."""
    keys: tuple[int | str, ...] = ()
    """If the model returns scores as maps: the key of each column of the score matrix."""
    scores: Scores = "probabilities"
    """What the scores of a labelled classifier are; logits are shown as their softmax."""
    example_inputs: dict[str, Any] | None = None
    """A JSON value by input name: for the inputs in the example of `model.toml`, or for all inputs
    of a model that has several."""
    score_output: str = ""
    """The output with a column per label; empty: results name no class."""
    class_output: str = ""
    """The output that has the class of each row; empty: the class is the column of its highest
    score."""
    class_values: tuple[int | str | None, ...] = ()
    """By column, the value of `class_output` that stands for it, or None if that is unknown; empty:
    the values are the columns themselves."""


_read_signature = decoding.lenient_decoder(msgspec.json.Decoder(Signature).decode)
_MAX_ELEMENTS: Final = 1 << 48
_MAX_EXAMPLE_DEPTH: Final = 2 * datatypes.MAX_DIMENSIONS


def read_signature(body: bytes | None) -> Signature | None:
    """Decodes an announced signature, which is JSON; None if it is missing or corrupt.

    Also None if it describes a model that this release could not accept inputs for, such as one
    with an unknown datatype or an impossible shape. Raises nothing.
    """
    signature = _read_signature(body)
    if signature is None or version_order(signature.version) < 0:
        return None
    specs = (*signature.inputs, *signature.outputs)
    examples = (signature.example, signature.example_inputs)
    is_valid = all(map(_is_valid, specs)) and all(map(_is_shallow, examples))
    return signature if is_valid and 0 < signature.max_rows <= _MAX_ELEMENTS else None


def _is_valid(spec: TensorSpec) -> bool:
    """Whether the datatype is known and the shape is one that an array can have."""
    dims = datatypes.dims(spec)
    sizes = [dim for dim in dims if isinstance(dim, int)]
    return (
        spec.datatype in DTYPES
        and len(dims) <= datatypes.MAX_DIMENSIONS
        and all(0 <= size <= _MAX_ELEMENTS for size in sizes)
    )


def _is_shallow(value: object, depth: int = _MAX_EXAMPLE_DEPTH) -> bool:
    """Whether an example can be shown: an answer that contains it is nested even deeper."""
    inner = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(inner, list):
        return True
    return depth > 0 and all(_is_shallow(item, depth - 1) for item in inner)


def data_input(signature: Signature) -> TensorSpec | None:
    """The input that a request's `data` is for: the only one, or the only required one.

    None if there is no such input.
    """
    if len(signature.inputs) == 1:
        return signature.inputs[0]
    required = [spec for spec in signature.inputs if not spec.optional]
    return required[0] if len(required) == 1 else None
