"""Batches: along which axes jobs may be stacked, stacking inputs, splitting outputs. No I/O."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from msgspec import Struct

from asyncinfer.errors import ModelFailed
from asyncinfer.models.batching_obstacles import Obstacle, Reason
from asyncinfer.models.signature import Signature
from asyncinfer.tensors.datatypes import Array, Feeds, TensorSpec, dims

MAX_RUN_BYTES: Final = 64 << 20
"""The largest size of the inputs of a shared run; a single job may have more."""

MAX_RUN_ROWS: Final = 4096

Axes = tuple[int | None, ...]


class BatchPlan(Struct, frozen=True):
    """How the jobs of a model share a run.

    For each input by name, and for each output in order: the axis of its rows, or None if it has
    no rows, so that all jobs must have the same input, and all get the same output.
    """

    inputs: dict[str, int | None]
    outputs: Axes
    pad: dict[str, tuple[str | None, ...]] = {}
    """Per input the names of dimensions that are padded, by axis; empty without padding."""
    unpad: tuple[tuple[str | None, ...], ...] = ()
    """Per output the names of dimensions that are cut to the job's own size, by axis."""


def batch_plan(signature: Signature) -> BatchPlan | None:
    """The plan of a model; None if each of its jobs runs alone."""
    if not signature.batched:
        return None
    axes = signature.input_axes or (0,) * len(signature.inputs)
    outputs = signature.output_axes or (0,) * len(signature.outputs)
    inputs = {spec.name: axis for spec, axis in zip(signature.inputs, axes, strict=True)}
    if not signature.pad:
        return BatchPlan(inputs, outputs)
    pad = {spec.name: _padded_names(spec, inputs[spec.name]) for spec in signature.inputs}
    known = {name for names in pad.values() for name in names}
    unpad = tuple(
        tuple(name if name in known else None for name in _padded_names(spec, axis))
        for spec, axis in zip(signature.outputs, outputs, strict=True)
    )
    return BatchPlan(inputs, outputs, pad, unpad)


def _padded_names(spec: TensorSpec, axis: int | None) -> tuple[str | None, ...]:
    """By axis the symbol of a dimension, None for the rows and for dimensions without a symbol.

    All are None for a tensor without rows.
    """
    if axis is None:
        return (None,) * len(dims(spec))
    return tuple(
        dim if isinstance(dim, str) and at != axis else None for at, dim in enumerate(dims(spec))
    )


# --- candidate axes ----------------------------------------------------------------------------


def candidate_axes(inputs: Sequence[TensorSpec]) -> list[Axes]:
    """Axes of the inputs along which jobs may be stacked, the most likely first; to be probed.

    Beyond those that names suggest, it has the first dimensions that are dynamic, whatever their
    names, because converters give each input its own name; and, with them, the only dynamic
    dimension of inputs whose first dimension is fixed, such as a state.
    """
    found = axes_by_name(inputs)
    first = forced_axes(0, inputs)
    if any(axis == 0 for axis in first) and all(spec.shape is not None for spec in inputs):
        found += [first, tuple(_only_open(spec, inputs) for spec in inputs)]
    return _by_inputs(found)


def axes_by_name(inputs: Sequence[TensorSpec]) -> list[Axes]:
    """The candidates that dimension names suggest, those that stack the most inputs first.

    These are the first dimensions, if all dynamic ones have the same name or no name; and for each
    name that is the first dimension of an input or contains "batch", the dimensions of that name.
    The list is empty if an input may have any number of dimensions.
    """
    if any(spec.shape is None for spec in inputs):
        return []
    found: list[Axes] = []
    first = forced_axes(0, inputs)
    names = {dims(spec)[0] for spec, axis in zip(inputs, first, strict=True) if axis == 0}
    if names and len(names - {None}) <= 1:
        found.append(first)
    symbols = dict.fromkeys(dim for spec in inputs for dim in dims(spec) if isinstance(dim, str))
    by_name = [_axes_named(symbol, inputs) for symbol in symbols if _counts_rows(symbol, inputs)]
    found += [axes for axes in by_name if axes is not None]
    return _by_inputs(found)


def _by_inputs(found: Sequence[Axes]) -> list[Axes]:
    """The candidates without duplicates, those that stack the most inputs first."""
    ordered = sorted(found, key=lambda axes: sum(axis is None for axis in axes))
    return list(dict.fromkeys(ordered))


def forced_axes(axis: int, inputs: Sequence[TensorSpec]) -> Axes:
    """`axis` for every input in which it is dynamic, else None."""
    return tuple(axis if _open_at(spec, axis) else None for spec in inputs)


def declared_output_axes(
    inputs: Sequence[TensorSpec], axes: Axes, outputs: Sequence[TensorSpec]
) -> tuple[int | None, ...]:
    """The axis of the rows in each output, as far as the graph declares it, else None.

    `axes` are those of the inputs, at least one of which must not be None.
    """
    names = {dims(spec)[at] for spec, at in zip(inputs, axes, strict=True) if at is not None}
    usual = next(at for at in axes if at is not None)
    return tuple(_declared_axis(spec, names - {None}, usual) for spec in outputs)


def _declared_axis(spec: TensorSpec, names: set[int | str | None], usual: int) -> int | None:
    """The axis of an output that has one of `names`, else `usual` if it is dynamic there.

    None if several axes have such a name, or neither holds.
    """
    at = [index for index, dim in enumerate(dims(spec)) if dim in names]
    if len(at) == 1:
        return at[0]
    return usual if not at and _open_at(spec, usual) else None


def find_obstacle(specs: Sequence[TensorSpec], axis: int = 0) -> Reason | None:
    """Why inputs cannot be stacked along `axis`; None if they can.

    The reason is that of the first input that cannot.
    """
    for spec in specs:
        if spec.shape is None:
            return Reason(Obstacle.ANY_RANK, {"name": spec.name})
    for spec in specs:
        if not dims(spec):
            return Reason(Obstacle.SCALAR, {"name": spec.name})
        if not _open_at(spec, axis):
            where = "the first dimension" if axis == 0 else f"dimension {axis}"
            size = dims(spec)[axis] if axis < len(dims(spec)) else "nothing"
            named = {"name": spec.name, "where": where, "size": size}
            opened = next((at for at in range(len(dims(spec))) if _open_at(spec, at)), None)
            if opened is None:
                return Reason(Obstacle.FIXED, named)
            return Reason(Obstacle.OTHER_OPEN, {**named, "open": opened})
    return None if specs else Reason(Obstacle.NO_INPUT)


def _open_at(spec: TensorSpec, axis: int) -> bool:
    """Whether the tensor has this axis, and it has no fixed size."""
    return axis < len(dims(spec)) and not isinstance(dims(spec)[axis], int)


def _only_open(spec: TensorSpec, inputs: Sequence[TensorSpec]) -> int | None:
    """The first dimension if it is dynamic, else the only dynamic one; None if not exactly one is.

    Also None if another input has its name, such as the length of a text.
    """
    opened = [at for at in range(len(dims(spec))) if _open_at(spec, at)]
    if opened[:1] == [0]:
        return 0
    if len(opened) != 1:
        return None
    name = dims(spec)[opened[0]]
    others = [dim for other in inputs if other is not spec for dim in dims(other)]
    return None if name is not None and name in others else opened[0]


def _counts_rows(symbol: str, inputs: Sequence[TensorSpec]) -> bool:
    """Whether a symbol probably counts rows: by its name, or as the first dimension of an input."""
    return "batch" in symbol.lower() or any(dims(spec)[:1] == (symbol,) for spec in inputs)


def _axes_named(symbol: str, inputs: Sequence[TensorSpec]) -> Axes | None:
    """The axis with this symbol in each input; None if an input has it twice."""
    if any(dims(spec).count(symbol) > 1 for spec in inputs):
        return None
    return tuple(dims(spec).index(symbol) if symbol in dims(spec) else None for spec in inputs)


# --- stack and split ---------------------------------------------------------------------------


def run_key(feeds: Feeds, plan: BatchPlan) -> tuple[object, ...] | None:
    """A hashable key, equal for jobs which may share a run; None if the job must run alone.

    It has, for each input of the job: its name, its dtype and its sizes except the rows and padded
    dimensions; for an input that is not stacked, also its content. A job runs alone if an input has
    a size of 0, if its inputs differ in their number of rows, or if no input has rows.
    """
    key: list[object] = []
    rows = 0
    for name, array in feeds.items():
        axis = plan.inputs[name]
        shape = array.shape
        if 0 in shape:  # a model may treat an empty array unlike one with rows
            return None
        if axis is None:
            key.append((name, array.dtype, shape, _content(array)))
            continue
        if rows not in (0, shape[axis]):
            return None
        rows = shape[axis]
        if plan.pad:
            padded = plan.pad[name]
            shape = tuple(-1 if padded[at] else size for at, size in enumerate(shape))
        key.append((name, array.dtype, shape[:axis], shape[axis + 1 :]))
    return tuple(key) if rows else None


def _content(array: Array) -> object:
    """A hashable value that is equal for arrays with equal elements."""
    return tuple(array.ravel().tolist()) if array.dtype == object else array.tobytes()


def row_count(feeds: Feeds, plan: BatchPlan | None) -> int:
    """The number of rows of a job; 0 if its inputs differ in it or have none, 1 without a plan."""
    if plan is None:
        return 1
    rows = -1
    for name, array in feeds.items():
        axis = plan.inputs[name]
        if axis is not None:
            if rows not in (-1, array.shape[axis]):
                return 0
            rows = array.shape[axis]
    return max(rows, 0)


def input_bytes(feeds: Feeds) -> int:
    """The number of bytes of all inputs together; strings count as references to them."""
    size = 0
    for array in feeds.values():
        size += array.nbytes
    return size


def stack(jobs: Sequence[Feeds], plan: BatchPlan | None) -> Feeds:
    """Stacks the inputs of jobs that have the same `run_key`, in the order of `jobs`.

    An input with rows becomes one array with the rows of all jobs along `plan.inputs[name]`, such
    as `(rows, *dims)` for axis 0; padded dimensions get the largest size. An input without rows
    is taken from the first job. A single job, or any without a plan, is returned as it is.
    """
    if len(jobs) == 1 or plan is None:
        return jobs[0]
    stacked: dict[str, Array] = {}
    for name, first in jobs[0].items():
        axis = plan.inputs[name]
        if axis is None:
            stacked[name] = first
            continue
        arrays = [feeds[name] for feeds in jobs]
        if plan.pad and any(plan.pad[name]):
            arrays = _padded(arrays, axis)
        stacked[name] = np.concatenate(arrays, axis=axis)
    return stacked


def _padded(arrays: Sequence[Array], axis: int) -> list[Array]:
    """Copies of arrays, padded at their ends to the largest size of each axis but `axis`.

    They are padded with zeros, or with empty strings.
    """
    longest = np.max([array.shape for array in arrays], axis=0)
    padded = []
    for array in arrays:
        widths = [(0, int(high) - size) for high, size in zip(longest, array.shape, strict=True)]
        widths[axis] = (0, 0)
        fill_value = "" if array.dtype == object else np.zeros((), array.dtype)
        padded.append(np.pad(array, widths, constant_values=fill_value))
    return padded


def split(
    outputs: Sequence[Array], jobs: Sequence[Feeds], plan: BatchPlan | None
) -> list[list[Array]]:
    """The outputs of each job, from the outputs of their stacked inputs: the reverse of `stack`.

    Each job gets views of its rows along `plan.outputs`, such as `(own rows, *dims)` for axis 0,
    cut to its own size where its inputs were padded; an output without rows goes to every job.
    Raises ModelFailed if the rows of an output are not as many as those of the inputs.
    """
    if len(jobs) == 1 or plan is None:
        return [list(outputs)]
    pieces = [
        [
            output if axis is None else output[(slice(None),) * axis + (slice(start, end),)]
            for output, axis in zip(outputs, plan.outputs, strict=True)
        ]
        for start, end in row_spans(outputs, jobs, plan)
    ]
    if not any(any(names) for names in plan.unpad):
        return pieces
    return [_unpadded(piece, feeds, jobs, plan) for piece, feeds in zip(pieces, jobs, strict=True)]


def _unpadded(
    piece: Sequence[Array], feeds: Feeds, jobs: Sequence[Feeds], plan: BatchPlan
) -> list[Array]:
    """The outputs of one job, cut to its own sizes; raises ModelFailed if a size is unexpected.

    `piece` has its rows of each output, and `jobs` the inputs of all jobs of the run.
    """
    own = _sizes(feeds, plan)
    all_sizes = [_sizes(job, plan) for job in jobs]
    longest = {name: max(sizes[name] for sizes in all_sizes) for name in own}
    cut = []
    for output, names in zip(piece, plan.unpad, strict=True):
        if not any(names):
            cut.append(output)
            continue
        for size, name in zip(output.shape, names, strict=True):
            if name is not None and size != longest[name]:
                raise ModelFailed(f"`{name}` is {size} in an output, {longest[name]} in the inputs")
        ends = [slice(None) if name is None else slice(own[name]) for name in names]
        cut.append(output[tuple(ends)])
    return cut


def _sizes(feeds: Feeds, plan: BatchPlan) -> dict[str, int]:
    """By symbol, the size of each padded dimension in a job's inputs."""
    return {
        symbol: size
        for name, array in feeds.items()
        for symbol, size in zip(plan.pad[name], array.shape, strict=True)
        if symbol is not None
    }


def row_spans(
    outputs: Sequence[Array], jobs: Sequence[Feeds], plan: BatchPlan
) -> Iterator[tuple[int, int]]:
    """Start and end of each job's rows in the outputs of their stacked inputs, in order.

    Raises ModelFailed if the rows of an output are not as many as those of the inputs.
    """
    ends = list(itertools.accumulate((row_count(feeds, plan) for feeds in jobs), initial=0))
    for output, axis in zip(outputs, plan.outputs, strict=True):
        if axis is not None and (output.ndim <= axis or output.shape[axis] != ends[-1]):
            raise ModelFailed(
                f"an output of shape {list(output.shape)} for {ends[-1]} rows of input"
            )
    return itertools.pairwise(ends)
