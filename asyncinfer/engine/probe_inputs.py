"""What the inputs of a probe are filled with: made-up numbers, and rows of the example."""

from collections.abc import Mapping, Sequence
from enum import Enum
from math import prod
from typing import Final

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
"""Per probe and job, from and to of fractions and of whole numbers: small ones first, which may
be indices; among them jobs of different sizes, since a model may look for the largest of all. None
is very large: what a number decides may be how long a run takes, and how much memory."""

_SMALL: Final = (0.0, 0.1, 0, 1)

_MIXED: Final = 100.0
"""Where no probe before got two answers, each number is of a size of its own up to this."""


class Kind(Enum):
    """Where the values of a probe are from; numbers are made up unless it says otherwise."""

    MADE_UP = 0
    WORDS = 1
    """Strings are drawn from the example."""
    CATEGORIES = 2
    """Strings and whole numbers are drawn from the example."""
    ROWS = 3
    """All is drawn from the example."""
    MIXED = 4
    """Fractions are small and large ones side by side."""


class Filling(Struct, frozen=True):
    """How one probe is filled."""

    scales: tuple[Scale | None, ...]
    """Per job; None is as large as the example."""
    kind: Kind = Kind.MADE_UP


UNAIDED: Final = tuple(Filling(scales) for scales in SCALES)

ONE_ROW: Final = (
    *(Filling(scales, Kind.MADE_UP if at % 2 else Kind.WORDS) for at, scales in enumerate(SCALES)),
    Filling((None,), Kind.WORDS),
    Filling((None, _SMALL), Kind.WORDS),
    Filling((None,), Kind.CATEGORIES),
)
"""Where the example has one row: others are made up too, else all were the same."""

SEVERAL_ROWS: Final = (
    *(Filling(scales, Kind.CATEGORIES) for scales in SCALES),
    Filling((None,), Kind.WORDS),
    Filling((None, _SMALL), Kind.CATEGORIES),
    *(Filling((None,), Kind.ROWS),) * 2,
)
"""Where it has several: whole numbers may be categories, of which no other is an input."""

NO_FRACTIONS: Final = (*SEVERAL_ROWS[:3], *SEVERAL_ROWS[len(SCALES) :])
"""The same for a model that takes no fractions, to which most scales are alike."""

LAST: Final = (Filling((SCALES[0][0],), Kind.MIXED),) * 3
"""Where all probes got one answer."""

_MOST_ELEMENTS: Final = 1 << 26


class Values(Struct, frozen=True):
    """What one input is filled with in one probe."""

    spec: TensorSpec
    example: Array | None
    axis: int | None
    heights: Mapping[str, int]
    seed: int

    def made(
        self, rng: np.random.Generator, kind: Kind, scale: Scale | None, shape: Sequence[int]
    ) -> Array:
        if self.example is not None and (self.axis is None or self._is_drawn(kind)):
            return self._drawn(self.example, rng, shape)
        if kind == Kind.MIXED and self.spec.datatype in FLOATS:
            return _of_mixed_sizes(self.spec, rng, shape)
        return filled(self.spec, rng, self._scaled(scale), shape)

    def _is_drawn(self, kind: Kind) -> bool:
        if kind == Kind.ROWS:
            return True
        if kind == Kind.CATEGORIES and self.seed % 2 and self._is_of_one_value():
            return False
        if self.spec.datatype == "BYTES":
            return kind in (Kind.WORDS, Kind.CATEGORIES)
        # Row numbers of a table are known without an example.
        is_known = self.spec.name in self.heights and self.seed % 2 == 1
        return self.spec.datatype not in FLOATS and kind == Kind.CATEGORIES and not is_known

    def _is_of_one_value(self) -> bool:
        """Whether rows that are drawn from the example would all be the same."""
        if self.example is None or self.axis is None:
            return False
        rows = np.moveaxis(self.example, self.axis, 0)
        return bool((rows == rows[:1]).all())

    def _drawn(self, example: Array, rng: np.random.Generator, shape: Sequence[int]) -> Array:
        """Rows of the example, in every second probe each column from a row of its own."""
        if self.axis is None:
            return example
        rows = np.moveaxis(example, self.axis, 0)
        count = shape[self.axis]
        columns = rows.shape[1:] if self.seed % 2 else (1,) * (rows.ndim - 1)
        taken = rng.integers(0, len(rows), (count, *columns))
        drawn = np.take_along_axis(rows, np.broadcast_to(taken, (count, *rows.shape[1:])), 0)
        return np.moveaxis(drawn, 0, self.axis)

    def _scaled(self, scale: Scale | None) -> Scale:
        """Row numbers of a table are all of them in every second probe, else small ones. As
        fractions they may be one column among others, so that most probes leave them."""
        low, high, least, most = scale or _scale_of(self.example)
        height = self.heights.get(self.spec.name)
        if height is None:
            return low, high, least, most
        every = 6 if self.spec.datatype in FLOATS else 2
        if self.seed % every == every - 1:
            return 0.0, height - 1.0, 0, height - 1
        return low, high, min(max(least, 0), height - 1), min(max(most, 0), height - 1)


def _of_mixed_sizes(spec: TensorSpec, rng: np.random.Generator, shape: Sequence[int]) -> Array:
    """Numbers each of which has a sign and a size of its own."""
    _check_size(spec, shape)
    sizes = 10.0 ** rng.uniform(-3.0, np.log10(_MIXED), shape)
    return np.asarray(sizes * rng.choice((-1.0, 1.0), shape)).astype(DTYPES[spec.datatype])


def _scale_of(example: Array | None) -> Scale:
    if example is None or example.dtype == object or not example.size:
        return SCALES[0][0]
    numbers = example.astype(np.float64) if example.dtype == DTYPES["BF16"] else example
    numbers = numbers[np.isfinite(numbers)]  # an example may show gaps
    if not numbers.size:
        return SCALES[0][0]
    low, high = numbers.min().item(), numbers.max().item()
    return (float(low), float(high), int(low), int(high))


def _check_size(spec: TensorSpec, shape: Sequence[int]) -> None:
    if prod(shape) > _MOST_ELEMENTS:
        raise ModelFailed(f"`{spec.name}` is too large to make one up: {list(shape)}")


def filled(
    spec: TensorSpec,
    rng: np.random.Generator,
    scale: Scale,
    shape: Sequence[int],
) -> Array:
    """Made-up values between the ends of the scale; raises ModelFailed where they are too many."""
    low, high, least, most = scale
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
    first = int(min(max(least, ends[0]), ends[1]))
    last = int(max(min(most, ends[1], 2**62), first))
    return np.asarray(rng.integers(first, last, shape, endpoint=True)).astype(DTYPES[spec.datatype])
