"""Which jobs may share a run, along which axes; stack and split. Pure."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from msgspec import Struct

from asyncinfer.errors import ModelFailed
from asyncinfer.models.batching_obstacles import Off, Reason
from asyncinfer.models.signature import Signature
from asyncinfer.tensors.datatypes import Array, Feeds, TensorSpec, dims

MAX_RUN_BYTES: Final = 64 << 20
"""Inputs of a run that jobs share; one job alone may have more."""

MAX_RUN_ROWS: Final = 4096

Axes = tuple[int | None, ...]


class Plan(Struct, frozen=True):
    """How the jobs of a model share a run: per input and output its axis of rows, or None."""

    inputs: dict[str, int | None]
    outputs: Axes
    pad: dict[str, tuple[str | None, ...]] = {}
    """Per input the names of its dimensions that are filled up; empty without padding."""
    unpad: tuple[tuple[str | None, ...], ...] = ()


def plan_of(signature: Signature) -> Plan | None:
    """None where every job runs alone."""
    if not signature.batched:
        return None
    axes = signature.input_axes or (0,) * len(signature.inputs)
    outputs = signature.output_axes or (0,) * len(signature.outputs)
    inputs = {spec.name: axis for spec, axis in zip(signature.inputs, axes, strict=True)}
    if not signature.pad:
        return Plan(inputs, outputs)
    pad = {spec.name: _named(spec, inputs[spec.name]) for spec in signature.inputs}
    known = {name for names in pad.values() for name in names}
    unpad = tuple(
        tuple(name if name in known else None for name in _named(spec, axis))
        for spec, axis in zip(signature.outputs, outputs, strict=True)
    )
    return Plan(inputs, outputs, pad, unpad)


def _named(spec: TensorSpec, axis: int | None) -> tuple[str | None, ...]:
    """The symbols of the dimensions beside the rows; an input without rows has none."""
    if axis is None:
        return (None,) * len(dims(spec))
    return tuple(
        dim if isinstance(dim, str) and at != axis else None for at, dim in enumerate(dims(spec))
    )


# --- which axes come into question -------------------------------------------------------------


def candidates(inputs: Sequence[TensorSpec]) -> list[Axes]:
    """Axes of the inputs along which rows of jobs may be stacked, to be tried, the likeliest first.

    Besides those that the names say: the first dimensions that are open whatever they are called,
    since converters give each a name of its own; and with them the only open dimension of inputs
    whose first one is fixed, such as a state.
    """
    found = declared(inputs)
    first: Axes = tuple(0 if _open_at(spec, 0) else None for spec in inputs)
    if any(axis == 0 for axis in first) and all(spec.shape is not None for spec in inputs):
        found += [first, tuple(_only_open(spec, inputs) for spec in inputs)]
    return _by_inputs(found)


def declared(inputs: Sequence[TensorSpec]) -> list[Axes]:
    """The same as far as the names say so.

    The first dimensions where all that are open bear one name or none; else each name that is
    some input's first dimension, or calls itself a batch. None where an input may have any number
    of dimensions.
    """
    if any(spec.shape is None for spec in inputs):
        return []
    found: list[Axes] = []
    first: Axes = tuple(0 if _open_at(spec, 0) else None for spec in inputs)
    names = {dims(spec)[0] for spec, axis in zip(inputs, first, strict=True) if axis == 0}
    if names and len(names - {None}) <= 1:
        found.append(first)
    symbols = dict.fromkeys(dim for spec in inputs for dim in dims(spec) if isinstance(dim, str))
    by_name = [_along(symbol, inputs) for symbol in symbols if _counts_rows(symbol, inputs)]
    found += [axes for axes in by_name if axes is not None]
    return _by_inputs(found)


def _by_inputs(found: Sequence[Axes]) -> list[Axes]:
    """Each once, those first that stack the most inputs."""
    ordered = sorted(found, key=lambda axes: sum(axis is None for axis in axes))
    return list(dict.fromkeys(ordered))


def forced(axis: int, inputs: Sequence[TensorSpec]) -> Axes:
    """`axis` of every input that has it open."""
    return tuple(axis if _open_at(spec, axis) else None for spec in inputs)


def declared_axes(
    inputs: Sequence[TensorSpec], axes: Axes, outputs: Sequence[TensorSpec]
) -> tuple[int | None, ...]:
    """Where the outputs have the rows, as far as the graph says so."""
    names = {dims(spec)[at] for spec, at in zip(inputs, axes, strict=True) if at is not None}
    usual = next(at for at in axes if at is not None)
    return tuple(_declared_axis(spec, names - {None}, usual) for spec in outputs)


def _declared_axis(spec: TensorSpec, names: set[int | str | None], usual: int) -> int | None:
    at = [index for index, dim in enumerate(dims(spec)) if dim in names]
    if len(at) == 1:
        return at[0]
    return usual if not at and _open_at(spec, usual) else None


def obstacle(specs: Sequence[TensorSpec], axis: int = 0) -> Reason | None:
    """Why the first of these that cannot be stacked cannot."""
    for spec in specs:
        if spec.shape is None:
            return Reason(Off.ANY_RANK, {"name": spec.name})
    for spec in specs:
        if not dims(spec):
            return Reason(Off.SCALAR, {"name": spec.name})
        if not _open_at(spec, axis):
            where = "the first dimension" if axis == 0 else f"dimension {axis}"
            size = dims(spec)[axis] if axis < len(dims(spec)) else "nothing"
            named = {"name": spec.name, "where": where, "size": size}
            opened = next((at for at in range(len(dims(spec))) if _open_at(spec, at)), None)
            if opened is None:
                return Reason(Off.FIXED, named)
            return Reason(Off.OTHER_OPEN, {**named, "open": opened})
    return None if specs else Reason(Off.NO_INPUT)


def _open_at(spec: TensorSpec, axis: int) -> bool:
    return axis < len(dims(spec)) and not isinstance(dims(spec)[axis], int)


def _only_open(spec: TensorSpec, inputs: Sequence[TensorSpec]) -> int | None:
    """The first dimension where that is open, else the only one that is, unless its name is that of
    something else, such as the length of a text."""
    opened = [at for at in range(len(dims(spec))) if _open_at(spec, at)]
    if opened[:1] == [0]:
        return 0
    if len(opened) != 1:
        return None
    name = dims(spec)[opened[0]]
    others = [dim for other in inputs if other is not spec for dim in dims(other)]
    return None if name is not None and name in others else opened[0]


def _counts_rows(symbol: str, inputs: Sequence[TensorSpec]) -> bool:
    return "batch" in symbol.lower() or any(dims(spec)[:1] == (symbol,) for spec in inputs)


def _along(symbol: str, inputs: Sequence[TensorSpec]) -> Axes | None:
    if any(dims(spec).count(symbol) > 1 for spec in inputs):
        return None
    return tuple(dims(spec).index(symbol) if symbol in dims(spec) else None for spec in inputs)


# --- stack and split ---------------------------------------------------------------------------


def run_key(feeds: Feeds, plan: Plan) -> tuple[object, ...] | None:
    """Jobs of one model share a run only where this is equal; None: it runs alone.

    Datatypes, sizes beside the rows, which inputs are given, and what is not stacked, whole.
    """
    key: list[object] = []
    rows = 0
    for name, array in feeds.items():
        axis = plan.inputs[name]
        shape = array.shape
        if 0 in shape:  # what a model makes of nothing says nothing of what it makes beside rows
            return None
        if axis is None:
            key.append((name, array.dtype, shape, _content(array)))
            continue
        if rows not in (0, shape[axis]):
            return None
        rows = shape[axis]
        if plan.pad:
            free = plan.pad[name]
            shape = tuple(-1 if free[at] else size for at, size in enumerate(shape))
        key.append((name, array.dtype, shape[:axis], shape[axis + 1 :]))
    return tuple(key) if rows else None


def _content(array: Array) -> object:
    return tuple(array.ravel().tolist()) if array.dtype == object else array.tobytes()


def rows_of(feeds: Feeds, plan: Plan | None) -> int:
    """How many rows a job has, 0 where its inputs disagree; what never shares a run has one."""
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


def bytes_of(feeds: Feeds) -> int:
    size = 0
    for array in feeds.values():
        size += array.nbytes
    return size


def stack(jobs: Sequence[Feeds], plan: Plan | None) -> Feeds:
    """The rows of all jobs in one array per input, in order; the jobs have one `run_key`."""
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
    longest = np.max([array.shape for array in arrays], axis=0)
    padded = []
    for array in arrays:
        widths = [(0, int(most) - size) for most, size in zip(longest, array.shape, strict=True)]
        widths[axis] = (0, 0)
        filling = "" if array.dtype == object else np.zeros((), array.dtype)
        padded.append(np.pad(array, widths, constant_values=filling))
    return padded


def split(outputs: Sequence[Array], jobs: Sequence[Feeds], plan: Plan | None) -> list[list[Array]]:
    """Per job its own rows of every output: the reverse of `stack`.

    Raises ModelFailed where an output has not a row for each row of the inputs.
    """
    if len(jobs) == 1 or plan is None:
        return [list(outputs)]
    counts = [rows_of(feeds, plan) for feeds in jobs]
    check_rows(outputs, sum(counts), plan.outputs)
    pieces = [
        [
            output if axis is None else output[(slice(None),) * axis + (slice(start, end),)]
            for output, axis in zip(outputs, plan.outputs, strict=True)
        ]
        for start, end in spans(counts)
    ]
    if not any(any(names) for names in plan.unpad):
        return pieces
    return [_unpadded(piece, feeds, jobs, plan) for piece, feeds in zip(pieces, jobs, strict=True)]


def _unpadded(
    piece: Sequence[Array], feeds: Feeds, jobs: Sequence[Feeds], plan: Plan
) -> list[Array]:
    own = _sizes(feeds, plan)
    sizes = [_sizes(one, plan) for one in jobs]
    longest = {name: max(one[name] for one in sizes) for name in own}
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


def _sizes(feeds: Feeds, plan: Plan) -> dict[str, int]:
    return {
        symbol: size
        for name, array in feeds.items()
        for symbol, size in zip(plan.pad[name], array.shape, strict=True)
        if symbol is not None
    }


def check_rows(outputs: Sequence[Array], rows: int, axes: Axes) -> None:
    for output, axis in zip(outputs, axes, strict=True):
        if axis is not None and (output.ndim <= axis or output.shape[axis] != rows):
            raise ModelFailed(f"an output of shape {list(output.shape)} for {rows} rows of input")


def spans(row_counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where each job's rows begin and end."""
    return itertools.pairwise(itertools.accumulate(row_counts, initial=0))
