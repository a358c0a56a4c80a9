"""Where named tensors differ from a model's inputs, all of it."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import numpy as np
from msgspec import Struct

from asyncinfer.errors import Fault
from asyncinfer.tensors.datatypes import (
    DTYPES,
    MOST_DIMENSIONS,
    Array,
    TensorSpec,
    datatype_of,
    is_open,
    shape_words,
)
from asyncinfer.tensors.json_errors import unknown_name

_SHOWN_CHARACTERS: Final = 64


class Given(Struct, frozen=True):
    """A tensor as a request describes it; its place in the list is its place in `inputs`."""

    name: str
    datatype: str
    shape: tuple[int, ...]


def described(feeds: Mapping[str, Array]) -> list[Given]:
    """Arrays as a request would have described them."""
    return [Given(name, datatype_of(array), array.shape) for name, array in feeds.items()]


def find(
    given: Sequence[Given], inputs: Sequence[TensorSpec], *, model: str, max_rows: int
) -> Iterator[Fault]:
    """Every fault, each with a JSON pointer that starts with /inputs."""
    specs = {spec.name: spec for spec in inputs}
    counts = Counter(one.name for one in given)
    for spec in inputs:
        if not spec.optional and spec.name not in counts:
            takes = f"{spec.datatype} of shape {shape_words(spec)}"
            yield Fault("/inputs", f"`{spec.name}` is missing: {model} takes it as {takes}")
    sizes: dict[str, tuple[int, str]] = {}
    for index, one in enumerate(given):
        pointer = f"/inputs/{index}"
        if one.name not in specs:
            yield Fault(f"{pointer}/name", unknown_name(one.name, specs))
            yield from _no_such_datatype(one, pointer)
            continue
        if counts[one.name] > 1:
            yield Fault(f"{pointer}/name", f"`{one.name}` is given {counts[one.name]} times")
        yield from _differences(one, specs[one.name], pointer, model, max_rows)
        yield from _unequal(one, specs[one.name], pointer, sizes)


def broken_booleans(feeds: Mapping[str, Array]) -> Iterator[Fault]:
    """Bytes that claim to be BOOL and are neither 0 nor 1; ONNX Runtime would take them."""
    for index, (name, array) in enumerate(feeds.items()):
        if array.dtype == np.bool_ and array.size and array.view(np.uint8).max() > 1:
            yield Fault(f"/inputs/{index}", f"`{name}` is BOOL, whose bytes are 0 or 1")


def _no_such_datatype(one: Given, pointer: str) -> Iterator[Fault]:
    if one.datatype not in DTYPES:
        yield Fault(f"{pointer}/datatype", unknown_name(one.datatype, DTYPES))


def _differences(
    one: Given, spec: TensorSpec, pointer: str, model: str, max_rows: int
) -> Iterator[Fault]:
    if one.datatype != spec.datatype:
        shown = one.datatype[:_SHOWN_CHARACTERS]
        yield Fault(f"{pointer}/datatype", f"{shown}, `{spec.name}` is {spec.datatype}")
    if spec.shape is None:
        if len(one.shape) > MOST_DIMENSIONS:
            takes = f"`{spec.name}` has at most {MOST_DIMENSIONS}"
            yield Fault(f"{pointer}/shape", f"{len(one.shape)} dimensions, {takes}")
        return
    if len(one.shape) != len(spec.shape):
        noun = "dimension" if len(one.shape) == 1 else "dimensions"
        takes = f"`{spec.name}` has {len(spec.shape)}: shape {shape_words(spec)}"
        yield Fault(f"{pointer}/shape", f"{len(one.shape)} {noun}, {takes}")
        return
    for axis, (size, dim) in enumerate(zip(one.shape, spec.shape, strict=True)):
        if isinstance(dim, int) and size != dim:
            takes = f"`{spec.name}` takes {dim}: shape {shape_words(spec)}"
            yield Fault(f"{pointer}/shape/{axis}", f"{size}, {takes}")
    if is_open(spec) and one.shape[0] > max_rows:
        takes = f"{model} takes at most {max_rows} in one job"
        yield Fault(f"{pointer}/shape/0", f"{one.shape[0]} rows, {takes}")


def _unequal(
    one: Given, spec: TensorSpec, pointer: str, sizes: dict[str, tuple[int, str]]
) -> Iterator[Fault]:
    """Sizes that differ from the first one of their symbol, which `sizes` remembers."""
    if spec.shape is None or len(one.shape) != len(spec.shape):
        return
    for axis, (size, dim) in enumerate(zip(one.shape, spec.shape, strict=True)):
        if isinstance(dim, str):
            first, where = sizes.setdefault(dim, (size, spec.name))
            if first != size:
                yield Fault(
                    f"{pointer}/shape/{axis}",
                    f"`{dim}` is {size} here and {first} in `{where}`; they must be equal",
                )
