"""The signature of a model: names, datatypes and shapes of its inputs and outputs."""

import re
from collections.abc import Sequence
from math import prod
from typing import Any, Final

import msgspec

from asyncinfer.engine.runtime import ort
from asyncinfer.errors import ModelRefused
from asyncinfer.models.folder import ModelFile
from asyncinfer.models.onnx_graph import Graph
from asyncinfer.models.signature import MAX_ROWS, Signature
from asyncinfer.tensors.datatypes import Dim, TensorSpec

_MAX_OPTIONAL: Final = 32
_MAX_OPTIONAL_ELEMENTS: Final = 4096

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

_PLACEHOLDER_NAMES: Final = frozenset(
    {"", "any", "dyn", "dynamic", "n/a", "nan", "nil", "none", "null"}
    | {"undefined", "unk", "unknown", "unspecified"}
)
"""Names that converters give to dimensions of which they know nothing. If they counted as names,
all dimensions of that name would have to be equal, as height and width of an image, both `?`."""

_PUNCTUATION: Final = re.compile(r"^[\W_]+|[\W_]+$")
_NEGATIVE: Final = re.compile(r"\s*-\s*\d+\s*")

_CASTS: Final[dict[str, str]] = {
    **dict.fromkeys(("int2", "int4"), "INT8"),
    **dict.fromkeys(("uint2", "uint4"), "UINT8"),
    **dict.fromkeys(("float4e2m1", "float8e8m0"), "FLOAT16"),
    **dict.fromkeys(("float8e4m3fn", "float8e4m3fnuz", "float8e5m2", "float8e5m2fnuz"), "FLOAT16"),
}
"""Element types that cannot be sent or shown, and the type that can hold all of their numbers."""

_PARTS: Final = "its real and its imaginary part as two tensors of numbers"
_TENSOR: Final = re.compile(r"tensor\((\w+)\)")

_OUTPUT_KINDS: Final = (
    ("seq(map", "a list of maps that are not scores", "export it with zipmap off"),
    ("seq(", "a list of tensors", "let the graph join them into one (ConcatFromSequence)"),
    ("map(", "a map", "let the graph give keys and values as tensors"),
    ("sparse_tensor", "a sparse tensor", "let the graph make it dense"),
    ("optional(", "a value that may be missing", "let the graph always give it"),
)
"""The beginning of an output's type, what it is, and what to do."""

_INPUT_KINDS: Final = (
    ("seq(map", "a list of maps", "let the graph take keys and values as tensors"),
    ("seq(", "a list of tensors", "let the graph take one tensor, and split it itself"),
    ("map(", "a map", "let the graph take keys and values as tensors"),
    ("sparse_tensor", "a sparse tensor", "let the graph take it dense"),
    ("optional(", "a value that may be missing and is no tensor", "let the graph take a tensor"),
)


def describe(
    file: ModelFile, session: ort.InferenceSession, sha256: str, graph: Graph | None
) -> Signature:
    """The signature by the graph and `model.toml`, before any run; `graph` is None if it was too
    large to be read, and `sha256` is that of the file, in hex. Raises ModelRefused for inputs and
    outputs that cannot be served."""
    config = file.config
    # ONNX Runtime shows a scalar and a tensor of any number of dimensions in the same way.
    open_ranks = graph.unknown_rank if graph else frozenset[str]()
    try:
        needed = (_input(node, file, open_ranks) for node in session.get_inputs())
        inputs = (*needed, *_overridable_inputs(session))
        outputs = _select_outputs(_outputs(session.get_outputs(), file, open_ranks), file)
    except UnicodeDecodeError as error:
        raise ModelRefused(
            f"{file.display_path}: a name in it is not UTF-8, so it is damaged"
        ) from error
    return Signature(
        model=file.model,
        version=file.version,
        sha256=sha256,
        inputs=inputs,
        outputs=outputs,
        labels=config.labels or tuple(map(str, config.classes)),
        description=config.description or session.get_modelmeta().description,
        max_rows=config.limits.max_rows_per_job or MAX_ROWS,
        max_batch_jobs=config.batching.max_jobs,
        max_batch_rows=config.batching.max_rows,
        max_wait_ms=config.batching.max_wait_ms,
        pad=config.batching.pad,
        scores=config.scores,
    )


def with_keys(signature: Signature, maps: Sequence[int], keys: tuple[int | str, ...]) -> Signature:
    """The signature with the outputs `maps` (positions) as matrices that have a column for each of
    these keys; the keys are the labels, unless there are others."""
    outputs = [
        msgspec.structs.replace(spec, shape=(None, len(keys))) if at in maps else spec
        for at, spec in enumerate(signature.outputs)
    ]
    labels = signature.labels or tuple(str(key) for key in keys)
    return msgspec.structs.replace(signature, outputs=tuple(outputs), keys=keys, labels=labels)


def with_observed_shapes(
    outputs: Sequence[TensorSpec], axes: Sequence[int | None], ranks: Sequence[int]
) -> tuple[TensorSpec, ...]:
    """The outputs, with shapes corrected where the probes gave others than the file declares:
    `ranks` as seen, and the axis of the rows (`axes`, None: no rows) open. Unchanged if `ranks` is
    empty, since there was no probe."""
    if not ranks:
        return tuple(outputs)
    return tuple(map(_with_observed_shape, outputs, axes, ranks))


def _with_observed_shape(spec: TensorSpec, axis: int | None, rank: int) -> TensorSpec:
    """One output with the rank and the open axis that were seen; an output that may have any rank
    stays so."""
    if spec.shape is None:
        return spec
    if len(spec.shape) != rank:
        return msgspec.structs.replace(spec, shape=(None,) * rank)
    if axis is None or not isinstance(spec.shape[axis], int):
        return spec
    shape = (*spec.shape[:axis], None, *spec.shape[axis + 1 :])
    return msgspec.structs.replace(spec, shape=shape)


def check_rows(signature: Signature, file: ModelFile) -> None:
    """Raises ModelRefused if the scores have their rows on another axis than the first."""
    for spec, axis in zip(signature.outputs, signature.output_axes, strict=False):
        if spec.name == signature.score_output and axis:
            raise ModelRefused(
                f"{file.model}/model.toml: labels name columns, but `{spec.name}` has its rows in "
                f"dimension {axis}; Transpose it in the graph, or leave `labels` out"
            )


def shape_of(sizes: Sequence[Dim]) -> tuple[Dim, ...]:
    """A declared shape, with None for negative sizes and for names that mean "unknown"."""
    return tuple(_dim(size) for size in sizes)


def _dim(size: Dim) -> Dim:
    """A dimension without names and sizes that mean "unknown"."""
    if isinstance(size, int):
        return size if size >= 0 else None
    if size is None or _NEGATIVE.fullmatch(size):
        return None
    return None if _PUNCTUATION.sub("", size).casefold() in _PLACEHOLDER_NAMES else size


def _shape(node: Any, open_ranks: frozenset[str]) -> tuple[Dim, ...] | None:
    """The shape of an input or output; None if it may have any rank, as its name is among
    `open_ranks`."""
    return None if not node.shape and node.name in open_ranks else shape_of(node.shape)


def _input(node: Any, file: ModelFile, open_ranks: frozenset[str]) -> TensorSpec:
    """The spec of one input; raises ModelRefused if no request can carry it."""
    inner = node.type.removeprefix("optional(")
    optional = inner != node.type
    kind = inner.removesuffix(")") if optional else inner
    if kind not in _DATATYPES:
        raise _input_error(node, kind, file)
    return TensorSpec(node.name, _DATATYPES[kind], _shape(node, open_ranks), optional)


def _overridable_inputs(session: ort.InferenceSession) -> list[TensorSpec]:
    """Optional inputs for which the graph has a value. Weights, which some graphs list too, are
    left out: large ones, and all if there are many."""
    nodes = [
        node
        for node in session.get_overridable_initializers()
        if node.type in _DATATYPES and prod(node.shape) <= _MAX_OPTIONAL_ELEMENTS
    ]
    if len(nodes) > _MAX_OPTIONAL:
        return []
    return [
        TensorSpec(node.name, _DATATYPES[node.type], shape_of(node.shape), optional=True)
        for node in nodes
    ]


def _outputs(
    nodes: Sequence[Any], file: ModelFile, open_ranks: frozenset[str]
) -> dict[str, TensorSpec]:
    """The outputs by name; a map of scores becomes an FP32 matrix. Raises ModelRefused for an
    output that cannot be served, unless `outputs` in model.toml leaves it out."""
    wanted = file.config.outputs
    found = {}
    for node in nodes:
        if node.type in _DATATYPES:
            spec = TensorSpec(node.name, _DATATYPES[node.type], _shape(node, open_ranks))
        elif node.type in _MAPS:
            spec = TensorSpec(node.name, "FP32", (None, None))
        elif wanted and node.name not in wanted:
            continue
        else:
            raise _output_error(node, file, is_only=len(nodes) == 1)
        found[node.name] = spec
    return found


def _select_outputs(outputs: dict[str, TensorSpec], file: ModelFile) -> tuple[TensorSpec, ...]:
    """The outputs that model.toml names, in its order, else all; raises ModelRefused for a name
    that is unknown or there twice."""
    names = file.config.outputs or tuple(outputs)
    for name in names:
        if name not in outputs or names.count(name) > 1:
            problem = "twice" if name in outputs else f"not one of {', '.join(outputs)}"
            raise ModelRefused(f"{file.model}/model.toml: outputs: `{name}` is {problem}")
    return tuple(outputs[name] for name in names)


def _output_error(node: Any, file: ModelFile, *, is_only: bool) -> ModelRefused:
    """Makes the error for an output that cannot be served."""
    others = "" if is_only else ", or keep other outputs with `outputs` in model.toml"
    if problem := _element_problem(node.type):
        what, cast = problem
        remedy = f"Cast it to {cast} in the graph" if cast else f"let the graph give {_PARTS}"
        return _error(node, what, remedy + others, file)
    kinds = (rest for prefix, *rest in _OUTPUT_KINDS if node.type.startswith(prefix))
    what, remedy = next(kinds, ("a value of another kind", "let the graph give a tensor"))
    return _error(node, f"{what} ({node.type}), which cannot be served", remedy + others, file)


def _input_error(node: Any, kind: str, file: ModelFile) -> ModelRefused:
    """Makes the error for an input that no request can carry; `kind` is its type, of an optional
    input the type inside."""
    if problem := _element_problem(kind):
        what, cast = problem
        take = f"{cast} and Cast it" if cast else _PARTS
        remedy = f"let the graph take {take}"
        return _error(node, what, remedy, file)
    kinds = (rest for prefix, *rest in _INPUT_KINDS if node.type.startswith(prefix))
    what, remedy = next(kinds, ("a value of another kind", "let the graph take a tensor"))
    return _error(node, f"{what} ({node.type}), which no request can carry", remedy, file)


def _element_problem(kind: str) -> tuple[str, str] | None:
    """What is wrong with the elements of a tensor of the type `kind`, and the ONNX type that can
    hold them, empty if none can. None if the type is no tensor."""
    found = _TENSOR.fullmatch(kind)
    if not found:
        return None
    if found[1].startswith("complex"):
        return f"of type {found[1]}, which JSON does not have", ""
    return f"of type {found[1]}, which neither JSON nor numpy has", _CASTS.get(found[1], "FLOAT")


def _error(node: Any, what: str, remedy: str, file: ModelFile) -> ModelRefused:
    """Makes the error about an input or output: what it is, and what to do."""
    return ModelRefused(f"{file.display_path}: `{node.name}` is {what}; {remedy}")
