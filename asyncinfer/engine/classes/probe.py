"""Made-up rows, run to see which outputs of a classifier are its scores and its class."""

import re
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, Final

import numpy as np
from msgspec import Struct

from asyncinfer.engine.batch_probe import OPEN_SIZES, RunFunction, deadline
from asyncinfer.engine.probe_inputs import InputValues, Kind, Scale, input_shape
from asyncinfer.engine.runner import Stop, Stopped
from asyncinfer.errors import JobError, ModelFailed
from asyncinfer.models.results import highest_columns
from asyncinfer.models.signature import Signature
from asyncinfer.tensors.datatypes import (
    FLOATS,
    Array,
    Feeds,
    TensorSpec,
    dims,
    has_dynamic_first_dim,
)

LABEL_NAMES: Final = frozenset({"label", "output_label", "class_label", "predicted_label"})
"""Names that converters give to the class output."""

MIN_ROWS: Final = 3
"""Fewer rows with one column as the highest may be chance."""

_MAX_SECONDS: Final = 2.0
_ROWS: Final = 48
_MAX_ELEMENTS: Final = 1 << 18
_ENOUGH_ROWS: Final = 4 * _ROWS

_SCALES: Final[tuple[Scale, ...]] = (
    (-1.0, 1.0, 0, 1),
    (-10.0, 10.0, 0, 9),
    (-1.0, 1.0, -9, 9),
    (0.0, 1.0, 0, 99),
    (0.0, 100.0, 0, 1),
    (-1.0, 1.0, 0, 9),
    (-1.0, 1.0, 0, 99),
    (-1.0, 1.0, -99, 99),
)
"""Per run lowest and highest fraction and whole number. None is large: a number may decide how long
a run takes."""

_NEAR_EXAMPLE: Final = frozenset({0, 2, 5, 7})
"""Runs whose values are near the rows of the example; without one, fractions of all sizes."""


class ProbeAnswers(Struct, frozen=True):
    """The outputs for the made-up rows; empty if the model accepted none."""

    scores: dict[str, Array] = {}
    """By output that may be scores, FP64 of shape (rows, labels)."""
    classes: dict[str, Array] = {}
    """By output that may be the class and has one value for each row, shape (rows,)."""
    is_multilabel: bool = False
    """Whether the model's own label has a 1 for each class of a row, which may be several or
    none."""
    unfit: dict[str, tuple[int, ...]] = {}
    """By output the shape that was seen, if no output had a column for each label."""


def observe(
    signature: Signature,
    class_specs: Sequence[TensorSpec],
    run: RunFunction,
    example: Feeds | None,
    seconds: float,
    scores: Sequence[TensorSpec],
) -> ProbeAnswers:
    """Runs rows like the example and of several scales, until there are enough or `seconds` (two at
    most) are over. Rows that the model does not accept are skipped; never raises.

    `scores` and `class_specs` are the outputs that may be the scores and the class; `scores` must
    not be empty.
    """
    width = len(signature.labels)
    rows = _RowMaker(signature, example)
    outputs: dict[str, list[Array]] = {spec.name: [] for spec in signature.outputs}
    with deadline(min(seconds, _MAX_SECONDS)) as stop:
        for run_outputs in rows.run_all(run, stop):
            for arrays, array in zip(outputs.values(), run_outputs, strict=True):
                arrays.append(array)
            if _is_enough(outputs[scores[0].name], width):
                break
    if not outputs[scores[0].name]:
        return ProbeAnswers()
    matrices = {
        spec.name: outputs[spec.name]
        for spec in scores
        if all(_is_matrix(array, width) for array in outputs[spec.name])
    }
    is_multilabel = any(
        _is_matrix(array, width) and _has_multilabel_values(_without_booleans(array))
        for spec in signature.outputs
        if may_be_multilabel(spec)
        for array in outputs[spec.name]
    )
    if not matrices:
        unfit = {spec.name: outputs[spec.name][0].shape for spec in scores}
        return ProbeAnswers(is_multilabel=is_multilabel, unfit=unfit)
    matrices, counts = _with_rows(matrices, rows.rows_per_run)
    values = {
        spec.name: np.concatenate([array.reshape(-1) for array in outputs[spec.name]])
        for spec in class_specs
        if [array.size for array in outputs[spec.name]] == counts
        and all(array.ndim in (1, 2) for array in outputs[spec.name])
    }
    return ProbeAnswers(
        {name: np.concatenate(arrays).astype(np.float64) for name, arrays in matrices.items()},
        {name: _without_booleans(column) for name, column in values.items()},
        is_multilabel,
    )


def _with_rows(
    matrices: dict[str, list[Array]], rows: int
) -> tuple[dict[str, list[Array]], list[int]]:
    """The outputs that have a row for each row of the input, which a constant has not, and the
    number of rows in each run. `rows` is the number that each run should have; if no output has it,
    the first one decides."""
    changing = {
        name: arrays
        for name, arrays in matrices.items()
        if any(not np.array_equal(array, arrays[0]) for array in arrays)
    }
    counts = {
        name: [len(array) for array in arrays] for name, arrays in (changing or matrices).items()
    }
    first = next(iter(counts.values()))
    wanted = next((lengths for lengths in counts.values() if set(lengths) == {rows}), first)
    return {name: matrices[name] for name, lengths in counts.items() if lengths == wanted}, wanted


def may_be_multilabel(spec: TensorSpec) -> bool:
    """Whether an output may have a 0 or 1 for each class in each row, by its name and type: the
    label of a classifier, a matrix of whole numbers or booleans."""
    is_matrix = len(dims(spec)) == 2 and dims(spec)[1] != 1
    return (
        plain_name(spec.name) in LABEL_NAMES
        and is_matrix
        and spec.datatype not in (*FLOATS, "BYTES")
    )


def _has_multilabel_values(matrix: Any) -> bool:
    """Whether all values are 0 or 1, and a row has several 1 or none."""
    is_zero_or_one = (matrix == 0) | (matrix == 1)
    return bool(is_zero_or_one.all() and (matrix.sum(axis=1) != 1).any())


def plain_name(name: str) -> str:
    """An output's name in lower case without its path and numbers: `model/Label:0` is label."""
    words = [word for word in re.split(r"[/:]", name) if word and not word.isdigit()]
    return re.sub(r"[-. ]", "_", words[-1].lower()).rstrip("_0123456789") if words else ""


def _is_matrix(output: Array, width: int) -> bool:
    return output.ndim == 2 and output.shape[1] == width


def _without_booleans(values: Array) -> Array:
    """The values, booleans as the numbers 0 and 1."""
    return values.astype(np.int64) if values.dtype == np.bool_ else values


def _is_enough(scores: Sequence[Array], width: int) -> bool:
    """Whether there are many rows of scores (an array for each run), and several in which each
    column is the highest."""
    if sum(len(array) for array in scores) < _ENOUGH_ROWS:
        return False
    if not all(_is_matrix(array, width) for array in scores):
        return False
    highest = highest_columns(np.concatenate(scores).astype(np.float64))
    return bool((np.bincount(highest, minlength=width) >= MIN_ROWS).all())


class _RowMaker:
    """Makes rows for one model and runs them; use an instance once."""

    def __init__(self, signature: Signature, example: Feeds | None) -> None:
        self._needed = [spec for spec in signature.inputs if not spec.optional]
        self._example = example or {}
        self.rows_per_run = self._count_rows_per_run(signature.max_rows)
        """How many rows a run has; 1 if the model does not declare that it accepts more."""
        self._sizes: Sequence[int] = OPEN_SIZES

    def run_all(self, run: RunFunction, stop: Stop) -> Iterator[list[Array]]:
        """Yields all outputs of each run that succeeds, in the order of the signature; ends early
        once `stop` is set. For each run the first size of open dimensions that the model accepts is
        kept."""
        rounds = 1 if self.rows_per_run > 1 else _ROWS // len(_SCALES)
        for seed in range(rounds * len(_SCALES)):
            for size in self._sizes:
                try:
                    outputs = run(self._make_inputs(seed, size), stop)
                except JobError:
                    continue
                except Stopped:
                    return
                yield outputs
                self._sizes = (size,)
                break

    def _count_rows_per_run(self, max_rows: int) -> int:
        """As many rows as inputs of a bounded size can have, up to `max_rows`."""
        specs = self._needed
        if not specs or any(not has_dynamic_first_dim(spec) for spec in specs):
            return 1
        elements = sum(prod(self._shape(spec, max(OPEN_SIZES))[1:]) for spec in specs)
        return max(1, min(_ROWS, max_rows, _MAX_ELEMENTS // max(elements, 1)))

    def _shape(self, spec: TensorSpec, size: int) -> list[int]:
        return input_shape(spec, self._example.get(spec.name), size)

    def _make_inputs(self, run_number: int, open_size: int) -> Feeds:
        """Values for all needed inputs of run number `run_number`, which picks their kind and seeds
        them.

        `open_size` is for open dimensions but the first (that one has `rows_per_run`), where the
        example does not say. Raises ModelFailed if an input would be too large.
        """
        rng = np.random.default_rng(run_number)
        at = run_number % len(_SCALES)
        feeds: dict[str, Array] = {}
        for spec in self._needed:
            example = self._example.get(spec.name)
            shape = self._shape(spec, open_size)
            if has_dynamic_first_dim(spec):
                shape[0] = self.rows_per_run
            if prod(shape) > 16 * _MAX_ELEMENTS:
                raise ModelFailed(f"`{spec.name}` is too large to make one up: {shape}")
            kind = Kind.WORDS
            if at in _NEAR_EXAMPLE:
                kind = Kind.WIDE if example is None else Kind.NEAR_ROWS
            values = InputValues(spec, example, 0 if spec.shape else None, {}, run_number)
            feeds[spec.name] = values.make(rng, kind, _SCALES[at], shape)
        return feeds
