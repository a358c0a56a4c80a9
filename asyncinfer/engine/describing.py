"""What a loaded graph takes and gives, in words that others can read."""

from collections.abc import Sequence
from math import prod
from typing import Any, Final

import msgspec

from asyncinfer import models
from asyncinfer.engine.runtime import ort
from asyncinfer.errors import ModelRefused
from asyncinfer.models import ModelFile, Signature
from asyncinfer.tensors import TensorSpec

_MOST_OPTIONAL: Final = 32
_LONGEST_OPTIONAL_ELEMENTS: Final = 4096

_DATATYPES: Final[dict[str, str]] = {
    "tensor(bool)": "BOOL",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(float16)": "FP16",
    "tensor(bfloat16)": "BF16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}

_MAPS: Final = frozenset({"seq(map(int64,tensor(float)))", "seq(map(string,tensor(float)))"})

_REASONS: Final = (
    ("seq(map", "a list of maps that are not scores", "export it with zipmap off"),
    ("seq(", "a list of tensors", "let the graph join them into one"),
    ("map(", "a map", "let the graph give keys and values as tensors"),
    ("sparse_tensor", "a sparse tensor", "let the graph make it dense"),
    ("optional(", "a value that may be missing", "let the graph always give it"),
)
"""How a type begins, what it is, and what to do."""


def describe(file: ModelFile, session: ort.InferenceSession, sha256: str) -> Signature:
    """The signature before anything ran; raises ModelRefused for what cannot be served."""
    config = file.config
    try:
        inputs = (*_inputs(session.get_inputs(), file), *_overridable(session))
        outputs = _kept(_outputs(session.get_outputs(), file), file)
    except UnicodeDecodeError as error:
        raise ModelRefused(f"{file.shown}: a name in it is not UTF-8, so it is damaged") from error
    return Signature(
        model=file.model,
        version=file.version,
        sha256=sha256,
        inputs=inputs,
        outputs=outputs,
        labels=config.labels or tuple(map(str, config.classes)),
        description=config.description or session.get_modelmeta().description,
        max_rows=config.limits.max_rows_per_job or models.MAX_ROWS,
        max_batch_jobs=config.batching.max_jobs,
        max_batch_rows=config.batching.max_rows,
        max_wait_ms=config.batching.max_wait_ms,
        pad=config.batching.pad,
        scores=config.scores,
    )


def with_keys(signature: Signature, maps: Sequence[int], keys: tuple[int | str, ...]) -> Signature:
    """The signature once the maps' keys are known: each a matrix with a column per key."""
    outputs = [
        msgspec.structs.replace(spec, shape=(None, len(keys))) if at in maps else spec
        for at, spec in enumerate(signature.outputs)
    ]
    labels = signature.labels or tuple(str(key) for key in keys)
    return msgspec.structs.replace(signature, outputs=tuple(outputs), keys=keys, labels=labels)


def check_labels(signature: Signature, file: ModelFile) -> None:
    """Raises ModelRefused where the labels of `model.toml` can name no columns of scores."""
    labels, shown = signature.labels, f"{file.model}/model.toml"
    if not labels:
        return
    widths = [spec.shape[1] for spec in signature.outputs if len(spec.shape) == 2]
    if not any(width == len(labels) or not isinstance(width, int) for width in widths):
        raise ModelRefused(
            f"{shown}: {len(labels)} labels, but no output of shape [batch, {len(labels)}]"
        )
    if len(labels) == 1 and not signature.keys:
        # Else every row of a regressor would be of that class.
        raise ModelRefused(
            f"{shown}: 1 label, but a class is one of two or more columns of scores; leave "
            "`labels` out for a model that gives one number a row"
        )


def _inputs(nodes: Sequence[Any], file: ModelFile) -> list[TensorSpec]:
    return [_input(node, file) for node in nodes]


def _input(node: Any, file: ModelFile) -> TensorSpec:
    inner = node.type.removeprefix("optional(")
    optional = inner != node.type
    kind = inner.removesuffix(")") if optional else inner
    if kind not in _DATATYPES:
        raise _refused(node, file)
    return TensorSpec(node.name, _DATATYPES[kind], tuple(node.shape), optional)


def _overridable(session: ort.InferenceSession) -> list[TensorSpec]:
    """Inputs for which the graph has a value; not its weights, where it lists these too."""
    nodes = [
        node
        for node in session.get_overridable_initializers()
        if node.type in _DATATYPES and prod(node.shape) <= _LONGEST_OPTIONAL_ELEMENTS
    ]
    if len(nodes) > _MOST_OPTIONAL:
        return []
    return [
        TensorSpec(node.name, _DATATYPES[node.type], tuple(node.shape), optional=True)
        for node in nodes
    ]


def _outputs(nodes: Sequence[Any], file: ModelFile) -> dict[str, TensorSpec]:
    wanted = file.config.outputs
    found = {}
    for node in nodes:
        if node.type in _DATATYPES:
            spec = TensorSpec(node.name, _DATATYPES[node.type], tuple(node.shape))
        elif node.type in _MAPS:
            spec = TensorSpec(node.name, "FP32", (None, None))
        elif wanted and node.name not in wanted:
            continue
        else:
            raise _refused(node, file)
        found[node.name] = spec
    return found


def _kept(outputs: dict[str, TensorSpec], file: ModelFile) -> tuple[TensorSpec, ...]:
    names = file.config.outputs or tuple(outputs)
    for name in names:
        if name not in outputs or names.count(name) > 1:
            problem = "twice" if name in outputs else f"not one of {', '.join(outputs)}"
            raise ModelRefused(f"{file.model}/model.toml: outputs: `{name}` is {problem}")
    return tuple(outputs[name] for name in names)


def _refused(node: Any, file: ModelFile) -> ModelRefused:
    kinds = (rest for begin, *rest in _REASONS if node.type.startswith(begin))
    what, remedy = next(kinds, ("a value of another kind", "let the graph give a tensor"))
    return ModelRefused(
        f"{file.shown}: `{node.name}` is {what} ({node.type}), which cannot be served; {remedy}"
    )
