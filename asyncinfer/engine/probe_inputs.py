"""The values of the inputs of a probe: random numbers, and rows of the example."""

from collections.abc import Mapping, Sequence
from enum import Enum
from math import prod
from typing import Any, Final

import numpy as np
from msgspec import Struct

from asyncinfer.errors import ModelFailed
from asyncinfer.tensors.datatypes import DTYPES, FLOATS, RANGES, Array, TensorSpec

Scale = tuple[float, float, int, int]

SCALES: Final[tuple[tuple[Scale, ...], ...]] = (
    ((0.0, 1.0, 0, 1),),
    ((-10.0, 10.0, 0, 1),),
    ((-0.01, 0.01, 0, 9),),
    ((0.0, 0.1, 0, 1), (0.0, 100.0, 0, 1), (0.0, 10.0, 0, 1), (0.0, 1.0, 0, 1)),
    ((0.0, 1.0, -9, 9),),
    ((0.0, 1.0, 0, 99),),
    ((-0.1, 0.0, 0, 1), (-100.0, 0.0, -99, 99), (-10.0, 0.0, 0, 9), (-1.0, 0.0, -9, 0)),
)
"""Per probe and job, lowest and highest fraction and whole number. Small ones come first, as they
may be indices. In some probes the jobs have different scales, since a model may look for the
largest number of all rows. None is very large: a number may decide how long a run takes, and how
much memory."""

_SMALL: Final = (0.0, 0.1, 0, 1)


class Kind(Enum):
    """Where the values of a probe are from; random unless it says otherwise."""

    MADE_UP = 0
    WORDS = 1
    """Strings are drawn from the example."""
    CATEGORIES = 2
    """Strings and whole numbers are drawn from the example."""
    ROWS = 3
    """All values are drawn from the example."""
    MIXED = 4
    """Small and large fractions side by side."""
    WIDE = 5
    """The same with larger ones: a tree compares ages as well as incomes."""
    NEAR_ROWS = 6
    """Each number is that of a random row of the example; fractions with noise."""


_POWERS_OF_TEN: Final = {Kind.MIXED: (-3.0, 2.0), Kind.WIDE: (-2.0, 4.0)}
"""Lowest and highest magnitude of these kinds of fractions."""


class Filling(Struct, frozen=True):
    """How the inputs of one probe are filled."""

    scales: tuple[Scale | None, ...]
    """Per job, in turn; None: the scale of the example."""
    kind: Kind = Kind.MADE_UP


WITHOUT_EXAMPLE: Final = tuple(Filling(scales) for scales in SCALES)

ONE_ROW: Final = (
    *(Filling(scales, Kind.MADE_UP if at % 2 else Kind.WORDS) for at, scales in enumerate(SCALES)),
    Filling((None,), Kind.WORDS),
    Filling((None, _SMALL), Kind.WORDS),
    Filling((None,), Kind.CATEGORIES),
)
"""For an example with one row: others are random too, or all rows would be the same."""

SEVERAL_ROWS: Final = (
    *(Filling(scales, Kind.CATEGORIES) for scales in SCALES),
    Filling((None,), Kind.WORDS),
    Filling((None, _SMALL), Kind.CATEGORIES),
    *(Filling((None,), Kind.ROWS),) * 2,
)
"""For an example with several rows: its whole numbers may be categories, so that no other number
is valid."""

NO_FRACTIONS: Final = (*SEVERAL_ROWS[:3], *SEVERAL_ROWS[len(SCALES) :])
"""The same for a model without fractions, for which most scales are alike."""

LAST_TRY: Final = (Filling((SCALES[0][0],), Kind.MIXED),) * 3
"""Probes to add if all rows of the others got the same answer."""

_MAX_ELEMENTS: Final = 1 << 26


def input_shape(spec: TensorSpec, example: Array | None, size: int) -> list[int]:
    """The shape of an input, in which the caller sets the rows: open dimensions as in the example,
    else `size`."""
    if spec.shape is None:
        return [] if example is None else list(example.shape)
    sizes = (size,) * len(spec.shape) if example is None else example.shape
    return [
        dim if isinstance(dim, int) else own for dim, own in zip(spec.shape, sizes, strict=True)
    ]


class InputValues(Struct, frozen=True):
    """Makes the values of one input for one probe."""

    spec: TensorSpec
    example: Array | None
    axis: int | None
    """The axis of the rows; None if the input has none."""
    heights: Mapping[str, int]
    """By input that is row numbers of a table, the number of rows of the table."""
    seed: int
    """The number of the probe."""

    def make(
        self, rng: np.random.Generator, kind: Kind, scale: Scale | None, shape: Sequence[int]
    ) -> Array:
        """Values of this shape for one job, taken from `rng`, so that equal calls differ; raises
        ModelFailed if they are too many. `scale` None is that of the example. An input without rows
        is the example itself, if there is one."""
        if self.example is not None and (self.axis is None or self._comes_from_example(kind)):
            return self._draw_rows(self.example, rng, shape, kind)
        if kind in _POWERS_OF_TEN and self.spec.datatype in FLOATS:
            return _mixed_sizes(self.spec, rng, _POWERS_OF_TEN[kind], shape)
        return random_array(self.spec, rng, self._within_table(scale), shape)

    def _comes_from_example(self, kind: Kind) -> bool:
        if kind in (Kind.ROWS, Kind.NEAR_ROWS):
            return True
        if kind == Kind.CATEGORIES and self.seed % 2 and self._has_equal_rows():
            return False
        if self.spec.datatype == "BYTES":
            return kind in (Kind.WORDS, Kind.CATEGORIES)
        # The range of row numbers of a table is known without an example.
        is_row_number = self.spec.name in self.heights and self.seed % 2 == 1
        return self.spec.datatype not in FLOATS and kind == Kind.CATEGORIES and not is_row_number

    def _has_equal_rows(self) -> bool:
        """Whether all rows of the example have the same value; False without an example or without
        rows."""
        if self.example is None or self.axis is None:
            return False
        rows = np.moveaxis(self.example, self.axis, 0)
        return bool((rows == rows[:1]).all())

    def _draw_rows(
        self, example: Array, rng: np.random.Generator, shape: Sequence[int], kind: Kind
    ) -> Array:
        """Random rows of the example, as many as `shape` says; near rows and in every second probe
        each column is from another row. The example itself if the input has no rows."""
        if self.axis is None:
            return example
        rows = np.moveaxis(example, self.axis, 0)
        count = shape[self.axis]
        is_near = kind == Kind.NEAR_ROWS
        columns = rows.shape[1:] if is_near or self.seed % 2 else (1,) * (rows.ndim - 1)
        row_numbers = rng.integers(0, len(rows), (count, *columns))
        drawn = np.take_along_axis(rows, np.broadcast_to(row_numbers, (count, *rows.shape[1:])), 0)
        if is_near and self.spec.datatype in FLOATS:
            drawn = _with_noise(drawn, rows, rng, self.spec)
        return np.moveaxis(drawn, 0, self.axis)

    def _within_table(self, scale: Scale | None) -> Scale:
        """The scale (None: of the example), limited to the rows of the table if the input is row
        numbers. Every second probe uses all rows of the table; for fractions, which may be one
        column among others, only every sixth."""
        low, high, lowest, highest = scale or _scale_of(self.example)
        height = self.heights.get(self.spec.name)
        if height is None:
            return low, high, lowest, highest
        every = 6 if self.spec.datatype in FLOATS else 2
        if self.seed % every == every - 1:
            return 0.0, height - 1.0, 0, height - 1
        return low, high, min(max(lowest, 0), height - 1), min(max(highest, 0), height - 1)


def _with_noise(drawn: Array, rows: Array, rng: np.random.Generator, spec: TensorSpec) -> Array:
    """Fractions that were drawn from the columns of `rows`, with noise as wide as their column,
    within the range of the datatype."""
    known = np.nan_to_num(rows.astype(np.float64), posinf=0.0, neginf=0.0)  # gaps
    spread = np.maximum(known.std(axis=0), np.abs(known).max(axis=0) / 4)
    noisy: Any = drawn.astype(np.float64) + rng.normal(size=drawn.shape) * spread
    return np.asarray(np.clip(noisy, *RANGES[spec.datatype])).astype(DTYPES[spec.datatype])


def _mixed_sizes(
    spec: TensorSpec, rng: np.random.Generator, powers: tuple[float, float], shape: Sequence[int]
) -> Array:
    """Random fractions, each with a sign and a power of ten of its own; raises ModelFailed if they
    are too many."""
    _check_size(spec, shape)
    sizes = rng.choice((-1.0, 1.0), shape) * 10.0 ** rng.uniform(*powers, shape)
    return np.asarray(sizes).astype(DTYPES[spec.datatype])


def _scale_of(example: Array | None) -> Scale:
    """Lowest and highest number of the example, as fractions and as whole numbers; a small scale if
    it has no finite number."""
    if example is None or example.dtype == object or not example.size:
        return SCALES[0][0]
    numbers = example.astype(np.float64) if example.dtype == DTYPES["BF16"] else example
    numbers = numbers[np.isfinite(numbers)]  # an example may show gaps
    if not numbers.size:
        return SCALES[0][0]
    low, high = numbers.min().item(), numbers.max().item()
    return (float(low), float(high), int(low), int(high))


def _check_size(spec: TensorSpec, shape: Sequence[int]) -> None:
    """Raises ModelFailed if an array of this shape would be too large."""
    if prod(shape) > _MAX_ELEMENTS:
        raise ModelFailed(f"`{spec.name}` is too large to make one up: {list(shape)}")


def random_array(
    spec: TensorSpec,
    rng: np.random.Generator,
    scale: Scale,
    shape: Sequence[int],
) -> Array:
    """Random values of this shape within the scale and the range of the datatype, both ends
    included for whole numbers; raises ModelFailed if they are too many."""
    low, high, lowest, highest = scale
    _check_size(spec, shape)
    if spec.datatype == "BYTES":
        words = np.array(["", "some text", "é", "a", "0"], dtype=object)
        return words[rng.integers(0, len(words), shape)].reshape(shape)
    if spec.datatype == "BOOL":
        return rng.integers(0, 2, shape).astype(np.bool_)
    ends = RANGES[spec.datatype]
    if spec.datatype in FLOATS:
        fractions = rng.uniform(max(low, ends[0]), min(high, ends[1]), shape)
        return np.asarray(fractions).astype(DTYPES[spec.datatype])
    first = int(min(max(lowest, ends[0]), ends[1]))
    last = int(max(min(highest, ends[1], 2**62), first))
    return np.asarray(rng.integers(first, last, shape, endpoint=True)).astype(DTYPES[spec.datatype])
