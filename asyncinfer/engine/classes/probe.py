"""Rows that are made up, to see whether an output follows the scores of a classifier."""

import re
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, Final

import numpy as np
from msgspec import Struct

from asyncinfer.engine.batch_probe import OPEN_SIZES, Run, deadline
from asyncinfer.engine.runner import Stop, Stopped
from asyncinfer.errors import JobError, ModelFailed
from asyncinfer.models.results import highest_columns
from asyncinfer.models.signature import Signature
from asyncinfer.tensors.datatypes import DTYPES, FLOATS, RANGES, Array, Feeds, TensorSpec, dims

LABEL: Final = frozenset({"label", "output_label", "class_label", "predicted_label"})
"""What converters call the class."""

LEAST_ROWS: Final = 3
"""That have one column, for this to be no chance."""

_MOST_SECONDS: Final = 2.0
_ROWS: Final = 48
_MOST_ELEMENTS: Final = 1 << 18
_ENOUGH_ROWS: Final = 4 * _ROWS

_FRACTIONS: Final = (None, (-10.0, 10.0), None, (0.0, 1.0), (0.0, 100.0), None, (-1.0, 1.0), None)
"""Per run from and to of fractions; None: like the `[example]`, else of all sizes."""

_WHOLE: Final = ((0, 1), (0, 9), (-9, 9), (0, 99), (0, 1), (0, 9), (0, 99), (-99, 99))
"""Per run from and to of whole numbers. None is large: they may say how long a run takes."""

_POWERS_OF_TEN: Final = (-2.0, 4.0)
"""Of fractions of all sizes: a tree asks for ages and for incomes."""

_WORDS: Final = np.array(["", "some text", "é", "a", "0"], dtype=object)


class Seen(Struct, frozen=True):
    """What rows gave that were made up; empty where none could be run."""

    scores: dict[str, Array] = {}
    """By output [rows, columns], in FP64."""
    given: dict[str, Array] = {}
    """By output [rows], where it has one value for each."""
    several: bool = False
    """Whether the model's own label has a 1 for each class that a row has, of several or none."""
    unfit: dict[str, tuple[int, ...]] = {}
    """The shapes that were given where none had a column for each label."""


def observed(
    signature: Signature,
    scores: Sequence[TensorSpec],
    given: Sequence[TensorSpec],
    run: Run,
    example: Feeds | None,
    seconds: float,
) -> Seen:
    """What the model answers to rows of its own example and of several scales.

    Bounded in time; what the model does not take is passed over.
    """
    names = [spec.name for spec in signature.outputs]
    width = len(signature.labels)
    rows = _Rows(signature, example)
    runs: list[dict[str, Array]] = []
    with deadline(min(seconds, _MOST_SECONDS)) as stop:
        for outputs in rows.answers(run, stop):
            runs.append(dict(zip(names, outputs, strict=True)))
            if _is_enough([one[scores[0].name] for one in runs], width):
                break
    if not runs:
        return Seen()
    matrices = {
        spec.name: [one[spec.name] for one in runs]
        for spec in scores
        if all(_is_matrix(one[spec.name], width) for one in runs)
    }
    several = any(
        _is_matrix(one[spec.name], width) and _has_several(_plain(one[spec.name]))
        for spec in signature.outputs
        if _is_label_of_several(spec)
        for one in runs
    )
    if not matrices:
        unfit = {spec.name: runs[0][spec.name].shape for spec in scores}
        return Seen(several=several, unfit=unfit)
    matrices, counts = _of_rows(matrices, rows.at_once)
    values = {
        spec.name: [one[spec.name].reshape(-1) for one in runs]
        for spec in given
        if [one[spec.name].size for one in runs] == counts
        and all(one[spec.name].ndim in (1, 2) for one in runs)
    }
    return Seen(
        {name: np.concatenate(some).astype(np.float64) for name, some in matrices.items()},
        {name: _plain(np.concatenate(some)) for name, some in values.items()},
        several,
    )


def _of_rows(
    matrices: dict[str, list[Array]], rows: int
) -> tuple[dict[str, list[Array]], list[int]]:
    """Those that have the rows of the input, as a constant has not, and how many in each run."""
    answering = {
        name: some
        for name, some in matrices.items()
        if any(not np.array_equal(one, some[0]) for one in some)
    }
    counts = {name: [len(one) for one in some] for name, some in (answering or matrices).items()}
    first = next(iter(counts.values()))
    mine = next((one for one in counts.values() if set(one) == {rows}), first)
    return {name: matrices[name] for name, its in counts.items() if its == mine}, mine


def may_have_several(signature: Signature) -> bool:
    """Whether an output may have, for a row, a 0 or 1 for each class."""
    return any(map(_is_label_of_several, signature.outputs))


def _is_label_of_several(spec: TensorSpec) -> bool:
    is_matrix = len(dims(spec)) == 2 and dims(spec)[1] != 1
    return plain_name(spec.name) in LABEL and is_matrix and spec.datatype not in (*FLOATS, "BYTES")


def _has_several(matrix: Any) -> bool:
    is_zero_or_one = (matrix == 0) | (matrix == 1)
    return bool(is_zero_or_one.all() and (matrix.sum(axis=1) != 1).any())


def plain_name(name: str) -> str:
    """`model/Label:0` as label."""
    words = [word for word in re.split(r"[/:]", name) if word and not word.isdigit()]
    return re.sub(r"[-. ]", "_", words[-1].lower()).rstrip("_0123456789") if words else ""


def _is_matrix(output: Array, width: int) -> bool:
    return output.ndim == 2 and output.shape[1] == width


def _plain(values: Array) -> Array:
    """Booleans as the numbers 0 and 1."""
    return values.astype(np.int64) if values.dtype == np.bool_ else values


def _is_enough(scores: Sequence[Array], width: int) -> bool:
    """Whether there were many rows, and several in which each column was the highest."""
    if sum(len(one) for one in scores) < _ENOUGH_ROWS:
        return False
    if not all(_is_matrix(one, width) for one in scores):
        return False
    highest = highest_columns(np.concatenate(scores).astype(np.float64))
    return bool((np.bincount(highest, minlength=width) >= LEAST_ROWS).all())


class _Rows:
    """Rows for one model."""

    def __init__(self, signature: Signature, example: Feeds | None) -> None:
        self._needed = [spec for spec in signature.inputs if not spec.optional]
        self._example = example or {}
        self.at_once = self._most(signature.max_rows)
        """How many rows a run has; 1 where the model does not say that it takes more."""
        self._sizes: Sequence[int] = OPEN_SIZES

    def answers(self, run: Run, stop: Stop) -> Iterator[list[Array]]:
        """All outputs of each run that succeeds."""
        rounds = 1 if self.at_once > 1 else _ROWS // len(_WHOLE)
        for seed in range(rounds * len(_WHOLE)):
            for size in self._sizes:
                try:
                    outputs = run(self._made_up(seed, size), stop)
                except JobError:
                    continue
                except Stopped:
                    return
                yield outputs
                self._sizes = (size,)
                break

    def _most(self, most: int) -> int:
        specs = self._needed
        if not specs or any(not spec.shape or isinstance(spec.shape[0], int) for spec in specs):
            return 1
        elements = sum(prod(self._beside_rows(spec, max(OPEN_SIZES))) for spec in specs)
        return max(1, min(_ROWS, most, _MOST_ELEMENTS // max(elements, 1)))

    def _beside_rows(self, spec: TensorSpec, size: int) -> list[int]:
        like = self._example.get(spec.name)
        declared = dims(spec)
        sizes = (size,) * len(declared) if like is None else like.shape
        return [
            dim if isinstance(dim, int) else own
            for dim, own in zip(declared[1:], sizes[1:], strict=False)
        ]

    def _made_up(self, seed: int, size: int) -> Feeds:
        rng = np.random.default_rng(seed)
        return {spec.name: self._values(spec, rng, seed, size) for spec in self._needed}

    def _values(self, spec: TensorSpec, rng: np.random.Generator, seed: int, size: int) -> Array:
        example = self._example.get(spec.name)
        if example is not None and spec.shape is None:
            return example
        between = _FRACTIONS[seed % len(_FRACTIONS)]
        first = [dim if isinstance(dim, int) else self.at_once for dim in dims(spec)[:1]]
        shape = [*first, *self._beside_rows(spec, size)]
        if prod(shape) > 16 * _MOST_ELEMENTS:
            raise ModelFailed(f"`{spec.name}` is too large to make one up: {shape}")
        if example is not None and example.size and (between is None or spec.datatype == "BYTES"):
            return _like(example, rng, shape, spec)
        if spec.datatype == "BYTES":
            return np.asarray(_WORDS[rng.integers(0, len(_WORDS), shape)], object)
        if spec.datatype == "BOOL":
            return rng.integers(0, 2, shape).astype(np.bool_)
        if spec.datatype in FLOATS:
            return _cast(_fractions(rng, between, shape), spec)
        low, high = _WHOLE[seed % len(_WHOLE)]
        least = max(low, int(RANGES[spec.datatype][0]))
        whole: Array = rng.integers(least, high, shape, endpoint=True).astype(DTYPES[spec.datatype])
        return whole


def _fractions(
    rng: np.random.Generator, between: tuple[float, float] | None, shape: Sequence[int]
) -> Any:
    if between is not None:
        return rng.uniform(*between, shape)
    return rng.choice([-1.0, 1.0], shape) * 10.0 ** rng.uniform(*_POWERS_OF_TEN, shape)


def _like(
    example: Array, rng: np.random.Generator, shape: Sequence[int], spec: TensorSpec
) -> Array:
    """Each element that of some row of the example; a fraction a little off."""
    if not shape:
        return example
    flat = example.reshape(len(example), -1)
    places = rng.integers(0, len(flat), (shape[0], flat.shape[1]))
    picked = np.take_along_axis(flat, places, axis=0)
    if spec.datatype in FLOATS:
        known = np.nan_to_num(flat.astype(np.float64), posinf=0.0, neginf=0.0)  # gaps
        spread = np.maximum(known.std(axis=0), np.abs(known).max(axis=0) / 4)
        picked = picked.astype(np.float64) + rng.normal(size=picked.shape) * spread
        return _cast(picked.reshape(shape), spec)
    rows: Array = picked.reshape(shape)
    return rows


def _cast(fractions: Any, spec: TensorSpec) -> Array:
    array: Array = np.clip(fractions, *RANGES[spec.datatype]).astype(DTYPES[spec.datatype])
    return array
