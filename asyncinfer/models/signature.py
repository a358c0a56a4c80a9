"""What a worker announces of a model: its inputs, outputs, labels and how its jobs are batched."""

from typing import Any, Final

import msgspec
from msgspec import Struct

from asyncinfer.models.config import Scores
from asyncinfer.models.folder import version_order
from asyncinfer.tensors import datatypes
from asyncinfer.tensors.datatypes import DTYPES, TensorSpec
from asyncinfer.untrusted import decoding

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
_MOST_EXAMPLE_DEPTH: Final = 2 * datatypes.MOST_DIMENSIONS


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
    dims = datatypes.dims(spec)
    sizes = [dim for dim in dims if isinstance(dim, int)]
    return (
        spec.datatype in DTYPES
        and len(dims) <= datatypes.MOST_DIMENSIONS
        and all(0 <= size <= _MOST_ELEMENTS for size in sizes)
    )


def _is_shallow(value: object, depth: int = _MOST_EXAMPLE_DEPTH) -> bool:
    """Whether an example can be shown: an answer with it is nested deeper still."""
    inner = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(inner, list):
        return True
    return depth > 0 and all(_is_shallow(one, depth - 1) for one in inner)


# --- input -------------------------------------------------------------------------------------


def data_input(signature: Signature) -> TensorSpec | None:
    """The input that a request's `data` is for: the only one that must be there."""
    if len(signature.inputs) == 1:
        return signature.inputs[0]
    required = [spec for spec in signature.inputs if not spec.optional]
    return required[0] if len(required) == 1 else None
