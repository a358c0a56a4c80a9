"""Made-up rows, run to see which outputs of a classifier are its scores and its class."""

import re
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, Final

import numpy as np
from msgspec import Struct

from asyncinfer.engine.batch_probe import OPEN_SIZES, RunFunction, deadline
from asyncinfer.engine.runner import Stop, Stopped
from asyncinfer.errors import JobError, ModelFailed
from asyncinfer.models.results import highest_columns
from asyncinfer.models.signature import Signature
from asyncinfer.tensors.datatypes import DTYPES, FLOATS, RANGES, Array, Feeds, TensorSpec, dims

LABEL_NAMES: Final = frozenset({"label", "output_label", "class_label", "predicted_label"})
"""Names that converters give to the class output."""

MIN_ROWS: Final = 3
"""Fewer rows with one column as the highest may be chance."""

_MAX_SECONDS: Final = 2.0
_ROWS: Final = 48
_MAX_ELEMENTS: Final = 1 << 18
_ENOUGH_ROWS: Final = 4 * _ROWS

_FRACTIONS: Final = (None, (-10.0, 10.0), None, (0.0, 1.0), (0.0, 100.0), None, (-1.0, 1.0), None)
"""Per run lowest and highest fraction; None: like the `[example]`, without one of all sizes."""

_WHOLE_NUMBERS: Final = ((0, 1), (0, 9), (-9, 9), (0, 99), (0, 1), (0, 9), (0, 99), (-99, 99))
"""Per run lowest and highest whole number. None is large: a number may decide how long a run
takes."""

_POWERS_OF_TEN: Final = (-2.0, 4.0)
"""Lowest and highest power of ten of "all sizes": a tree compares ages as well as incomes."""

_WORDS: Final = np.array(["", "some text", "é", "a", "0"], dtype=object)


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
    scores: Sequence[TensorSpec],
    class_specs: Sequence[TensorSpec],
    run: RunFunction,
    example: Feeds | None,
    seconds: float,
) -> ProbeAnswers:
    """Runs rows like the example and of several scales, until there are enough or `seconds` (two at
    most) are over. Rows that the model does not accept are skipped; never raises.

    `scores` and `class_specs` are the outputs that may be the scores and the class; `scores` must
    not be empty.
    """
    names = [spec.name for spec in signature.outputs]
    width = len(signature.labels)
    rows = _RowMaker(signature, example)
    runs: list[dict[str, Array]] = []
    with deadline(min(seconds, _MAX_SECONDS)) as stop:
        for outputs in rows.run_all(run, stop):
            runs.append(dict(zip(names, outputs, strict=True)))
            if _is_enough([run_outputs[scores[0].name] for run_outputs in runs], width):
                break
    if not runs:
        return ProbeAnswers()
    matrices = {
        spec.name: [run_outputs[spec.name] for run_outputs in runs]
        for spec in scores
        if all(_is_matrix(run_outputs[spec.name], width) for run_outputs in runs)
    }
    multilabel_arrays = [
        run_outputs[spec.name]
        for spec in signature.outputs
        if _may_be_multilabel_output(spec)
        for run_outputs in runs
    ]
    is_multilabel = any(
        _is_matrix(array, width) and _has_multilabel_values(_without_booleans(array))
        for array in multilabel_arrays
    )
    if not matrices:
        unfit = {spec.name: runs[0][spec.name].shape for spec in scores}
        return ProbeAnswers(is_multilabel=is_multilabel, unfit=unfit)
    matrices, counts = _with_rows(matrices, rows.rows_per_run)
    values = {
        spec.name: [run_outputs[spec.name].reshape(-1) for run_outputs in runs]
        for spec in class_specs
        if [run_outputs[spec.name].size for run_outputs in runs] == counts
        and all(run_outputs[spec.name].ndim in (1, 2) for run_outputs in runs)
    }
    return ProbeAnswers(
        {name: np.concatenate(arrays).astype(np.float64) for name, arrays in matrices.items()},
        {name: _without_booleans(np.concatenate(arrays)) for name, arrays in values.items()},
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


def may_be_multilabel(signature: Signature) -> bool:
    """Whether an output may have a 0 or 1 for each class in each row, by its name and type."""
    return any(map(_may_be_multilabel_output, signature.outputs))


def _may_be_multilabel_output(spec: TensorSpec) -> bool:
    """By its name and type: the label of a classifier, a matrix of whole numbers or booleans."""
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
    """Whether an output has two dimensions, and `width` columns."""
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
        rounds = 1 if self.rows_per_run > 1 else _ROWS // len(_WHOLE_NUMBERS)
        for seed in range(rounds * len(_WHOLE_NUMBERS)):
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
        if not specs or any(not spec.shape or isinstance(spec.shape[0], int) for spec in specs):
            return 1
        elements = sum(prod(self._sizes_beside_rows(spec, max(OPEN_SIZES))) for spec in specs)
        return max(1, min(_ROWS, max_rows, _MAX_ELEMENTS // max(elements, 1)))

    def _sizes_beside_rows(self, spec: TensorSpec, size: int) -> list[int]:
        """The shape of an input without its first dimension: open dimensions as in the example,
        else `size`."""
        like = self._example.get(spec.name)
        declared = dims(spec)
        sizes = (size,) * len(declared) if like is None else like.shape
        return [
            dim if isinstance(dim, int) else own
            for dim, own in zip(declared[1:], sizes[1:], strict=False)
        ]

    def _make_inputs(self, run_number: int, open_size: int) -> Feeds:
        """Values for all needed inputs of run number `run_number`, which picks their kind and seeds
        them.

        `open_size` is for open dimensions but the first (that one has `rows_per_run`), where the
        example does not say. Raises ModelFailed if an input would be too large.
        """
        rng = np.random.default_rng(run_number)
        return {
            spec.name: self._make_values(spec, rng, run_number, open_size) for spec in self._needed
        }

    def _make_values(
        self, spec: TensorSpec, rng: np.random.Generator, run_number: int, open_size: int
    ) -> Array:
        """Values for one input of run number `run_number`, like the example or random."""
        example = self._example.get(spec.name)
        if example is not None and spec.shape is None:
            return example
        between = _FRACTIONS[run_number % len(_FRACTIONS)]
        first = [dim if isinstance(dim, int) else self.rows_per_run for dim in dims(spec)[:1]]
        shape = [*first, *self._sizes_beside_rows(spec, open_size)]
        if prod(shape) > 16 * _MAX_ELEMENTS:
            raise ModelFailed(f"`{spec.name}` is too large to make one up: {shape}")
        if example is not None and example.size and (between is None or spec.datatype == "BYTES"):
            return _like_example(example, rng, shape, spec)
        if spec.datatype == "BYTES":
            return np.asarray(_WORDS[rng.integers(0, len(_WORDS), shape)], object)
        if spec.datatype == "BOOL":
            return rng.integers(0, 2, shape).astype(np.bool_)
        if spec.datatype in FLOATS:
            return _to_datatype(_fractions(rng, between, shape), spec)
        low, high = _WHOLE_NUMBERS[run_number % len(_WHOLE_NUMBERS)]
        least = max(low, int(RANGES[spec.datatype][0]))
        whole: Array = rng.integers(least, high, shape, endpoint=True).astype(DTYPES[spec.datatype])
        return whole


def _fractions(
    rng: np.random.Generator, between: tuple[float, float] | None, shape: Sequence[int]
) -> Any:
    """Random fractions between two numbers; None: of both signs and of all sizes."""
    if between is not None:
        return rng.uniform(*between, shape)
    return rng.choice([-1.0, 1.0], shape) * 10.0 ** rng.uniform(*_POWERS_OF_TEN, shape)


def _like_example(
    example: Array, rng: np.random.Generator, shape: Sequence[int], spec: TensorSpec
) -> Array:
    """Rows of which each element is from a random row of the example; fractions with noise. `shape`
    is that of all rows; without dimensions the example itself."""
    if not shape:
        return example
    flat = example.reshape(len(example), -1)
    row_numbers = rng.integers(0, len(flat), (shape[0], flat.shape[1]))
    picked = np.take_along_axis(flat, row_numbers, axis=0)
    if spec.datatype in FLOATS:
        known = np.nan_to_num(flat.astype(np.float64), posinf=0.0, neginf=0.0)  # gaps
        spread = np.maximum(known.std(axis=0), np.abs(known).max(axis=0) / 4)
        picked = picked.astype(np.float64) + rng.normal(size=picked.shape) * spread
        return _to_datatype(picked.reshape(shape), spec)
    rows: Array = picked.reshape(shape)
    return rows


def _to_datatype(fractions: Any, spec: TensorSpec) -> Array:
    """The fractions in the datatype of the input, cut off at its range."""
    array: Array = np.clip(fractions, *RANGES[spec.datatype]).astype(DTYPES[spec.datatype])
    return array
