"""An entry of the zoo: a model, inputs for it, and whether its jobs may share a run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import onnx
from msgspec import Struct

from asyncinfer.tensors.datatypes import DTYPES, FLOATS, Array, Feeds
from tests.zoo.making import place

Rng: TypeAlias = np.random.Generator
Draw: TypeAlias = Callable[[Rng, int], Feeds]
"""Inputs for one job, of the given number of rows."""

Tensors: TypeAlias = Mapping[str, tuple[str, tuple[int | str, ...]]]
"""Datatype and shape of each input."""

ROWS: Final = "rows"
"""The dimension that a drawn input has the job's number of rows in."""

_MOST_OPEN: Final = 4
_WORDS: Final = ("", "a", "naïve", "日本", "two words", "\x00", "x" * 300)


class Entry(Struct, frozen=True):
    name: str
    build: Callable[[], onnx.ModelProto]
    draw: Draw
    batched: bool | None
    """Whether jobs may share a run; None where either is right."""
    toml: str = ""
    weights_apart: bool = False
    """Whether its weights are in a file of their own."""

    def place(self, folder: Path) -> Path:
        """Puts it into the model folder; returns the model's file."""
        path = place(folder, self.name, self.build(), toml=self.toml)
        if self.weights_apart:
            whole = onnx.load_model(path)
            how: Any = {"save_as_external_data": True, "size_threshold": 0}
            onnx.save_model(whole, path, location="weights.bin", **how)
        return path


def drawn(inputs: Tensors) -> Draw:
    """Random inputs of these datatypes and shapes; a named dimension is one size throughout."""

    def draw(rng: Rng, rows: int) -> Feeds:
        sizes = {ROWS: rows}
        feeds = {}
        for name, (datatype, dims) in inputs.items():
            for dim in dims:
                if isinstance(dim, str) and dim not in sizes:
                    sizes[dim] = int(rng.integers(1, _MOST_OPEN, endpoint=True))
            shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in dims)
            feeds[name] = values(rng, datatype, shape)
        return feeds

    return draw


def values(rng: Rng, datatype: str, shape: tuple[int, ...]) -> Array:
    """Any values of a datatype: all whole numbers, all words, floats near zero."""
    dtype = DTYPES[datatype]
    if datatype in FLOATS:
        return rng.normal(scale=3, size=shape).astype(dtype)
    if datatype == "BYTES":
        return rng.choice(np.array(_WORDS, dtype=object), size=shape)
    if datatype == "BOOL":
        return rng.random(shape) < 0.5
    bounds = np.iinfo(dtype)
    return rng.integers(bounds.min, bounds.max, size=shape, dtype=dtype, endpoint=True)
