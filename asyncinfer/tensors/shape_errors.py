"""Errors of named tensors: names, datatypes and shapes that differ from a model's inputs."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import numpy as np
from msgspec import Struct

from asyncinfer.errors import InputError
from asyncinfer.tensors.datatypes import (
    DTYPES,
    MAX_DIMENSIONS,
    Array,
    TensorSpec,
    datatype_of,
    has_dynamic_first_dim,
    shape_text,
)
from asyncinfer.tensors.json_errors import unknown_name_detail

_SHOWN_CHARACTERS: Final = 64
_MAX_EMPTY_ELEMENTS: Final = 4 << 20
"""What the sizes of an empty tensor may multiply to: the FP32 numbers in a body of 16 MiB."""


class TensorDescription(Struct, frozen=True):
    """A tensor as a request describes it. Its index in a list is its index in `inputs`."""

    name: str
    datatype: str
    shape: tuple[int, ...]


def describe_tensors(feeds: Mapping[str, Array]) -> list[TensorDescription]:
    """Descriptions of arrays, as if a request had given them; KeyError for an unknown dtype."""
    return [
        TensorDescription(name, datatype_of(array), array.shape) for name, array in feeds.items()
    ]


def find_errors(
    given: Sequence[TensorDescription], inputs: Sequence[TensorSpec], *, model: str, max_rows: int
) -> Iterator[InputError]:
    """Every difference between the tensors and the model's inputs; pointers start with /inputs.

    `inputs` are those of the model called `model`, which takes at most `max_rows` in one job.
    """
    specs = {spec.name: spec for spec in inputs}
    counts = Counter(tensor.name for tensor in given)
    for spec in inputs:
        if not spec.optional and spec.name not in counts:
            takes = f"{spec.datatype} of shape {shape_text(spec)}"
            yield InputError("/inputs", f"`{spec.name}` is missing: {model} takes it as {takes}")
    sizes: dict[str, tuple[int, str]] = {}
    for index, tensor in enumerate(given):
        pointer = f"/inputs/{index}"
        if tensor.name not in specs:
            yield InputError(f"{pointer}/name", unknown_name_detail(tensor.name, specs))
            if tensor.datatype not in DTYPES:
                detail = unknown_name_detail(tensor.datatype, DTYPES)
                yield InputError(f"{pointer}/datatype", detail)
            continue
        if counts[tensor.name] > 1:
            yield InputError(
                f"{pointer}/name", f"`{tensor.name}` is given {counts[tensor.name]} times"
            )
        yield from _spec_errors(tensor, specs[tensor.name], pointer, model, max_rows)
        yield from _empty_errors(tensor, specs[tensor.name], pointer)
        yield from _symbol_errors(tensor, specs[tensor.name], pointer, sizes)


def invalid_booleans(feeds: Mapping[str, Array]) -> Iterator[InputError]:
    """Errors of BOOL tensors with bytes other than 0 and 1, which ONNX Runtime would accept.

    A pointer has the index of the tensor in `feeds`.
    """
    for index, (name, array) in enumerate(feeds.items()):
        if array.dtype == np.bool_ and array.size and array.view(np.uint8).max() > 1:
            yield InputError(f"/inputs/{index}", f"`{name}` is BOOL, whose bytes are 0 or 1")


def _spec_errors(
    tensor: TensorDescription, spec: TensorSpec, pointer: str, model: str, max_rows: int
) -> Iterator[InputError]:
    """Differences of datatype and shape between a tensor and the input of its name.

    `pointer` is the place of the tensor. Symbols are not compared.
    """
    if tensor.datatype != spec.datatype:
        shown = tensor.datatype[:_SHOWN_CHARACTERS]
        yield InputError(f"{pointer}/datatype", f"{shown}, `{spec.name}` is {spec.datatype}")
    if spec.shape is None:
        if len(tensor.shape) > MAX_DIMENSIONS:
            takes = f"`{spec.name}` has at most {MAX_DIMENSIONS}"
            yield InputError(f"{pointer}/shape", f"{len(tensor.shape)} dimensions, {takes}")
        return
    if len(tensor.shape) != len(spec.shape):
        noun = "dimension" if len(tensor.shape) == 1 else "dimensions"
        takes = f"`{spec.name}` has {len(spec.shape)}: shape {shape_text(spec)}"
        yield InputError(f"{pointer}/shape", f"{len(tensor.shape)} {noun}, {takes}")
        return
    for axis, (size, dim) in enumerate(zip(tensor.shape, spec.shape, strict=True)):
        if isinstance(dim, int) and size != dim:
            takes = f"`{spec.name}` takes {dim}: shape {shape_text(spec)}"
            yield InputError(f"{pointer}/shape/{axis}", f"{size}, {takes}")
    if has_dynamic_first_dim(spec) and tensor.shape[0] > max_rows:
        takes = f"{model} takes at most {max_rows} in one job"
        yield InputError(f"{pointer}/shape/0", f"{tensor.shape[0]} rows, {takes}")


def _empty_errors(
    tensor: TensorDescription, spec: TensorSpec, pointer: str
) -> Iterator[InputError]:
    """An error of a tensor without elements whose other sizes are those of a large one.

    No byte of the request stands behind such a size, though a model may make a tensor of it: of
    positions, for example. Sizes that the model fixes are its own, and do not count.
    """
    if 0 not in tensor.shape:
        return
    declared = spec.shape or ()
    fixed = declared if len(declared) == len(tensor.shape) else [None] * len(tensor.shape)
    free = (size for size, dim in zip(tensor.shape, fixed, strict=True) if not isinstance(dim, int))
    if math.prod(size or 1 for size in free) > _MAX_EMPTY_ELEMENTS:
        limit = f"its sizes but 0 may multiply to {_MAX_EMPTY_ELEMENTS} at most"
        yield InputError(f"{pointer}/shape", f"{list(tensor.shape)} has no elements; {limit}")


def _symbol_errors(
    tensor: TensorDescription, spec: TensorSpec, pointer: str, sizes: dict[str, tuple[int, str]]
) -> Iterator[InputError]:
    """Sizes that differ from the first size of their symbol; adds first sizes to `sizes`.

    `sizes` has by symbol the first size, and the name of the tensor that has it.
    """
    if spec.shape is None or len(tensor.shape) != len(spec.shape):
        return
    for axis, (size, dim) in enumerate(zip(tensor.shape, spec.shape, strict=True)):
        if isinstance(dim, str):
            first, where = sizes.setdefault(dim, (size, spec.name))
            if first != size:
                yield InputError(
                    f"{pointer}/shape/{axis}",
                    f"`{dim}` is {size} here and {first} in `{where}`; they must be equal",
                )
