"""An entry of the zoo: a model, inputs for it, and whether its jobs may share a run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import onnx
from msgspec import Struct

from asyncinfer.tensors.datatypes import DTYPES, FLOATS, Array, Feeds
from tests.zoo.model_builder import place

Rng: TypeAlias = np.random.Generator
Draw: TypeAlias = Callable[[Rng, int], Feeds]
"""Makes random inputs for a job with the given number of rows."""

Tensors: TypeAlias = Mapping[str, tuple[str, tuple[int | str, ...]]]
"""Datatype and shape of each input, by its name."""

ROWS: Final = "rows"
"""The name of the dimension whose size is the job's number of rows."""

_MAX_DYNAMIC_DIM: Final = 4
_WORDS: Final = ("", "a", "naïve", "日本", "two words", "\x00", "x" * 300)


class Entry(Struct, frozen=True):
    name: str
    build: Callable[[], onnx.ModelProto]
    draw: Draw
    batched: bool | None
    """Whether jobs may share a run; None if both are right."""
    toml: str = ""
    has_external_weights: bool = False
    """Whether its weights are in a file of their own."""

    def place(self, folder: Path) -> Path:
        """Writes the model to the model folder; returns its file."""
        path = place(folder, self.name, self.build(), toml=self.toml)
        if self.has_external_weights:
            model = onnx.load_model(path)
            options: Any = {"save_as_external_data": True, "size_threshold": 0}
            onnx.save_model(model, path, location="weights.bin", **options)
        return path


def random_inputs(inputs: Tensors) -> Draw:
    """Makes random inputs of these datatypes and shapes; equal dimension names have equal sizes."""

    def draw(rng: Rng, rows: int) -> Feeds:
        sizes = {ROWS: rows}
        feeds = {}
        for name, (datatype, dims) in inputs.items():
            for dim in dims:
                if isinstance(dim, str) and dim not in sizes:
                    sizes[dim] = int(rng.integers(1, _MAX_DYNAMIC_DIM, endpoint=True))
            shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in dims)
            feeds[name] = _random_array(rng, datatype, shape)
        return feeds

    return draw


def _random_array(rng: Rng, datatype: str, shape: tuple[int, ...]) -> Array:
    """Random values: integers of the whole range, words of a list, floats near zero."""
    dtype = DTYPES[datatype]
    if datatype in FLOATS:
        return rng.normal(scale=3, size=shape).astype(dtype)
    if datatype == "BYTES":
        return rng.choice(np.array(_WORDS, dtype=object), size=shape)
    if datatype == "BOOL":
        return rng.random(shape) < 0.5
    bounds = np.iinfo(dtype)
    return rng.integers(bounds.min, bounds.max, size=shape, dtype=dtype, endpoint=True)
