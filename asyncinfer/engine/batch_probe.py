"""The batch probe: runs made-up jobs alone and together, to see whether jobs may share a run."""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
from msgspec import Struct

from asyncinfer.engine.probe_inputs import (
    LAST_TRY,
    NO_FRACTIONS,
    ONE_ROW,
    SCALES,
    SEVERAL_ROWS,
    WITHOUT_EXAMPLE,
    Filling,
    InputValues,
    input_shape,
    random_array,
)
from asyncinfer.engine.runner import Stop, Stopped
from asyncinfer.errors import JobError, ModelFailed
from asyncinfer.models import batching
from asyncinfer.models.batching import Axes, BatchPlan
from asyncinfer.models.batching_obstacles import Obstacle, Reason
from asyncinfer.tensors.datatypes import FLOATS, Array, Dim, Feeds, TensorSpec, dims

RunFunction = Callable[[Feeds, Stop], list[Array]]

ROW_COUNTS: Final = ((1, 1, 1, 1), (2, 3), (3, 1, 2))
"""Rows of the jobs of each probe; with fewer, a model that mixes rows could agree by chance."""

OPEN_SIZES: Final = (8, 32, 1, 128, 512, 256)
"""Sizes to try for an open dimension; the first that the model accepts is kept. Models of sound
accept windows of 256 or 512 samples and no others."""

_ROWS_ARE_KNOWN: Final = frozenset(
    {Obstacle.ONE_ANSWER, Obstacle.ONE_VALUE, Obstacle.MIXES, Obstacle.UNSTEADY_NUMBERS}
)
"""The reasons that are found once outputs had as many rows as the input."""

_TOLERANCES: Final = {"float16": 1e-2, "bfloat16": 5e-2, "float32": 1e-4, "float64": 1e-8}


class BatchingVerdict(Struct, frozen=True):
    """Whether jobs may share a run, why in words, and along which axes of inputs and outputs."""

    batched: bool
    reason: str
    inputs: Axes = ()
    outputs: Axes = ()
    ranks: tuple[int, ...] = ()
    """How many dimensions each output had in the probes; empty if there were none."""


def not_batched(
    reason: Reason, outputs: Sequence[TensorSpec], output_axes: Axes = ()
) -> BatchingVerdict:
    """The verdict that jobs do not share runs; `outputs` are all outputs of the model, as the words
    depend on their number, and `output_axes` the axes of their rows, if they are known."""
    return BatchingVerdict(False, reason.text(len(outputs)), outputs=output_axes)


class _NotBatchable(Exception):
    """A probe has shown, or could not rule out, that jobs must not share a run."""

    def __init__(self, kind: Obstacle, **named: object) -> None:
        super().__init__(kind)
        self.reason = Reason(kind, named)


class ProbedModel(Struct, frozen=True):
    """A model to probe, with what is known of it."""

    run: RunFunction
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    example: Feeds | None = None
    heights: Mapping[str, int] = {}
    """By input that is row numbers of a table, the number of rows of the table."""


def probe_batching(
    model: ProbedModel, seconds: float, candidates: Sequence[Axes]
) -> BatchingVerdict:
    """Probes the candidate axes of the inputs in turn, of which there must be one; the first along
    which all probes agree is the verdict, else the reason of the first. "Too slow" after `seconds`
    for all together. Raises none of the model's errors."""
    verdict: BatchingVerdict | None = None
    with deadline(seconds) as stop:
        for axes in candidates:
            probe = _BatchProbe(model, axes, stop)
            try:
                output_axes = probe.find_output_axes()
            except Stopped:
                return not_batched(Reason(Obstacle.SLOW, {"seconds": seconds}), model.outputs)
            except _NotBatchable as doubt:
                known = probe.leading_axes() if doubt.reason.obstacle in _ROWS_ARE_KNOWN else ()
                verdict = verdict or not_batched(doubt.reason, model.outputs, known)
            else:
                words = "on: probe rows got the same answers alone and together"
                return BatchingVerdict(True, words, axes, output_axes, probe.ranks)
    assert verdict is not None, "there is a way to try"
    return verdict


class _BatchProbe:
    """The probes of one way to stack jobs; one instance per candidate."""

    def __init__(self, model: ProbedModel, axes: Axes, stop: Stop) -> None:
        self._run = model.run
        self._inputs = model.inputs
        self._outputs = model.outputs
        self._axes = dict(zip((spec.name for spec in model.inputs), axes, strict=True))
        self._example: Feeds = model.example or {}
        self._heights = model.heights
        self._stop = stop
        self._sizes: Sequence[int] = OPEN_SIZES if self._has_open_sizes() else OPEN_SIZES[:1]
        self._failure = ""
        self._output_axes: list[int | None] | None = None
        self.ranks: tuple[int, ...] = ()
        """How many dimensions each output has."""
        self._rows_differ = False
        """Whether any probe gave different answers for different rows."""
        self._equal_inputs = {
            name
            for name, example in self._example.items()
            if self._axes[name] is not None and example.dtype.kind in "Oiu"
        }
        """Inputs that may be categories, so that only values of the example are valid, and had one
        value in all rows of all probes so far."""

    def find_output_axes(self) -> Axes:
        """Runs the probes; returns for each output the axis of its rows, None for an output
        without. Raises _NotBatchable, or Stopped at the deadline."""
        has_optional = any(spec.optional for spec in self._inputs)
        # First without optional inputs, then with them.
        choices = [False, True] if has_optional else [False]
        for optional in choices:
            if not self._run_probes(self._fillings(), optional):
                reason_kind = (
                    Obstacle.NONE_RAN_LIKE_EXAMPLE
                    if self._example_rows() > 1
                    else Obstacle.NONE_RAN
                )
                raise _NotBatchable(reason_kind, failure=self._failure)
        if not self._rows_differ:
            for optional in choices:
                self._run_probes(LAST_TRY, optional)
        assert self._output_axes is not None
        if all(axis is None for axis in self._output_axes):
            raise _NotBatchable(Obstacle.NO_ROWS)
        if not self._rows_differ:
            raise _NotBatchable(Obstacle.ONE_ANSWER)
        if self._equal_inputs:
            raise _NotBatchable(Obstacle.ONE_VALUE, name=min(self._equal_inputs))
        return tuple(self._output_axes)

    def leading_axes(self) -> Axes:
        """For each output 0 if its first axis was that of the rows in the probes, None if none was;
        empty if rows have another axis in any input or output, or no probe could be run."""
        axes = (*self._axes.values(), *(self._output_axes or ()))
        has_others = any(axis not in (0, None) for axis in axes)
        return () if has_others else tuple(self._output_axes or ())

    def _run_probes(self, fillings: Sequence[Filling], optional: bool) -> int:
        """Runs probes, with or without optional inputs; returns how many of them the model
        accepted. Raises _NotBatchable where answers alone and together disagree, or Stopped."""
        ran = 0
        for seed, filling in enumerate(fillings):
            probe = self._run_alone(seed, filling, optional)
            if probe is None:
                continue
            jobs, alone = probe
            ran += 1
            axes = self._compare(jobs, alone)
            self._rows_differ = self._rows_differ or _have_different_rows(alone, axes)
            self._equal_inputs -= {
                name for name in self._equal_inputs if self._has_different_rows(name, jobs)
            }
        return ran

    def _fillings(self) -> Sequence[Filling]:
        """How to fill the inputs, by how many rows the example has."""
        if not self._example:
            return WITHOUT_EXAMPLE
        if self._example_rows() < 2:
            return ONE_ROW
        has_fractions = any(spec.datatype in FLOATS for spec in self._inputs)
        return SEVERAL_ROWS if has_fractions else NO_FRACTIONS

    def _has_open_sizes(self) -> bool:
        """Whether an input has an open dimension beside the rows, whose size must be guessed."""
        return any(
            spec.name not in self._example
            and any(
                not isinstance(dim, int) and at != self._axes[spec.name]
                for at, dim in enumerate(dims(spec))
            )
            for spec in self._inputs
        )

    def _example_rows(self) -> int:
        """The rows of the example: of the input that has the fewest; 0 without an example."""
        counts = [
            self._example[name].shape[axis]
            for name, axis in self._axes.items()
            if axis is not None and name in self._example
        ]
        return min(counts, default=0)

    def _has_different_rows(self, name: str, jobs: Sequence[Feeds]) -> bool:
        """Whether an input had different values in the rows of these jobs."""
        axis = self._axes[name]
        values = [job[name] for job in jobs if name in job]
        if axis is None or not values:
            return False
        rows = np.moveaxis(np.concatenate(values, axis=axis), axis, 0)
        return bool((rows != rows[:1]).any())

    def _run_alone(
        self, seed: int, filling: Filling, optional: bool
    ) -> tuple[list[Feeds], list[list[Array]]] | None:
        """Makes jobs and runs each alone; returns the inputs and the outputs of each. None if the
        model accepts no such values at any size of its open dimensions; the first size that it
        accepts is kept for later probes. Raises Stopped."""
        for size in self._sizes:
            rng = np.random.default_rng(seed)
            counts = ROW_COUNTS[seed % len(ROW_COUNTS)]
            try:
                jobs = self._make_jobs(rng, seed, filling, counts, size, optional)
                alone = [self._run(job, self._stop) for job in jobs]
            except JobError as error:
                # Random numbers may be no valid input for this model, which proves nothing.
                self._failure = self._failure or error.detail
                continue
            self._sizes = (size,)
            return jobs, alone
        return None

    def _make_jobs(
        self,
        rng: np.random.Generator,
        seed: int,
        filling: Filling,
        counts: Sequence[int],
        size: int,
        optional: bool,
    ) -> list[Feeds]:
        """The inputs of the jobs of one probe; `counts` are their rows, `seed` is the number of the
        probe, and open dimensions have the `size`. Inputs without rows are the same in all jobs.
        Raises ModelFailed if they are too large."""
        jobs: list[dict[str, Array]] = [{} for _ in counts]
        for spec in self._inputs:
            if spec.optional and not optional:
                continue
            axis = self._axes[spec.name]
            example = self._example.get(spec.name)
            shape = input_shape(spec, example, size)
            of_jobs = itertools.cycle(filling.scales)
            values = InputValues(spec, example, axis, self._heights, seed)
            shared = values.make(rng, filling.kind, next(of_jobs), shape) if axis is None else None
            for job, count in zip(jobs, counts, strict=True):
                if shared is not None:
                    job[spec.name] = shared
                    continue
                assert axis is not None
                shape[axis] = count
                job[spec.name] = values.make(rng, filling.kind, next(of_jobs), shape)
        return list(jobs)

    def _compare(self, jobs: Sequence[Feeds], alone: Sequence[Sequence[Array]]) -> list[int | None]:
        """Runs the jobs together; notes and returns for each output the axis of its rows, None for
        an output without. Raises _NotBatchable unless each job gets what it got `alone`, and the
        axes are those found before, or Stopped."""
        plan = BatchPlan(self._axes, (0,))
        counts = [batching.row_count(job, plan) for job in jobs]
        try:
            together = self._run(batching.stack(jobs, plan), self._stop)
        except JobError as error:
            raise _NotBatchable(Obstacle.FAILED_TOGETHER, failure=error.detail) from error
        axes = [
            _rows_axis(spec, [outputs[at] for outputs in alone], together[at], counts)
            for at, spec in enumerate(self._outputs)
        ]
        for spec, before, now in zip(self._outputs, self._output_axes or axes, axes, strict=True):
            if before != now:
                raise _NotBatchable(Obstacle.UNSTEADY, name=spec.name)
        self._output_axes = axes
        self.ranks = tuple(output.ndim for output in together)
        split = batching.split(together, jobs, BatchPlan(self._axes, tuple(axes)))
        for job, actual, expected in zip(jobs, split, alone, strict=True):
            for at, (output, expected_output) in enumerate(zip(actual, expected, strict=True)):
                if not is_close(expected_output, output):
                    raise self._disagreement_error(job, expected, at)
        return axes

    def _disagreement_error(self, job: Feeds, alone: Sequence[Array], at: int) -> _NotBatchable:
        """Makes the error for an output (`at`, its position) that differs from what the job got
        alone: runs the job alone again, to tell mixed rows from a model that answers differently
        each time. Raises what the run raises."""
        again = self._run(job, self._stop)
        is_steady = is_close(alone[at], again[at])
        kind = Obstacle.MIXES if is_steady else Obstacle.UNSTEADY_NUMBERS
        return _NotBatchable(kind, name=self._outputs[at].name)


def _rows_axis(
    spec: TensorSpec, alone: Sequence[Array], together: Array, counts: Sequence[int]
) -> int | None:
    """The axis of an output that has a row for each row of the input, None if there is none; from
    its shape in the run of each job `alone` and in the run of all `together`. `counts` are the rows
    of the jobs. Raises _NotBatchable if the shapes show neither."""
    if any(output.ndim != together.ndim for output in alone):
        raise _NotBatchable(Obstacle.RANK, name=spec.name)
    if all(output.shape == together.shape for output in alone):
        return None
    grown = [
        axis
        for axis in range(together.ndim)
        if any(output.shape[axis] != together.shape[axis] for output in alone)
    ]
    (axis, *others) = grown
    if others:
        raise _NotBatchable(Obstacle.SHAPE, name=spec.name)
    sizes = [output.shape[axis] for output in alone]
    if sizes != list(counts) or together.shape[axis] != sum(counts):
        raise _NotBatchable(Obstacle.COUNT, name=spec.name)
    return axis


def is_close(expected: Array, actual: Array) -> bool:
    """Whether two outputs are equal up to rounding of their datatype, NaN included; values other
    than fractions must be equal. The tolerance is relative to the largest finite number of
    `expected`, so small numbers beside a large one may differ a lot."""
    tolerance = _TOLERANCES.get(str(expected.dtype))
    if tolerance is None:
        return np.array_equal(expected, actual)
    if expected.shape != actual.shape:
        return False
    wide: Any = np.float64
    wanted, given = expected.astype(wide), actual.astype(wide)
    finite = np.abs(wanted[np.isfinite(wanted)])
    scale = float(finite.max()) if finite.size else 1.0
    return np.allclose(given, wanted, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def _have_different_rows(alone: Sequence[Sequence[Array]], axes: Sequence[int | None]) -> bool:
    """Whether any output has different values in different rows of these jobs. `alone` has all
    outputs of each job, `axes` the axis of the rows of each output; outputs without rows (None) are
    left out."""
    for at, axis in enumerate(axes):
        if axis is None:
            continue
        rows = np.concatenate([outputs[at] for outputs in alone], axis=axis)
        first = np.take(rows, [0], axis=axis)
        if any(not is_close(first, np.take(rows, [n], axis=axis)) for n in range(rows.shape[axis])):
            return True
    return False


def run_any_input(
    run: Callable[[Feeds, Stop], list[Any]],
    inputs: Sequence[TensorSpec],
    example: Feeds | None,
    seconds: float,
) -> list[Any]:
    """Runs the model on the example, else on the first made-up input that it accepts; returns the
    outputs as `run` gives them. Raises ModelFailed if it accepts none within `seconds`."""
    failure = "it took too long"
    with deadline(seconds) as stop:
        for size in (1, *OPEN_SIZES):
            try:
                feeds = example or {
                    spec.name: random_array(
                        spec,
                        np.random.default_rng(0),
                        SCALES[0][0],
                        [dim if isinstance(dim, int) else size for dim in dims_or_guess(spec)],
                    )
                    for spec in inputs
                    if not spec.optional
                }
                return run(feeds, stop)
            except JobError as error:
                failure = error.detail
            except Stopped:
                break
    raise ModelFailed(failure)


def dims_or_guess(spec: TensorSpec) -> tuple[Dim, ...]:
    """The dimensions of an input; two open ones if it may have any number of dimensions."""
    return (None, None) if spec.shape is None else spec.shape


@contextmanager
def deadline(seconds: float) -> Iterator[Stop]:
    """Gives a `Stop` that is set after `seconds`, unless the context ends before."""
    stop = Stop()
    timer = threading.Timer(seconds, stop.stop)
    timer.start()
    try:
        yield stop
    finally:
        timer.cancel()
