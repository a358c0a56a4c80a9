"""Whether jobs may share a run: shown by inputs that run alone and together."""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
from msgspec import Struct

from asyncinfer.engine.probe_inputs import (
    LAST,
    NO_FRACTIONS,
    ONE_ROW,
    SCALES,
    SEVERAL_ROWS,
    UNAIDED,
    Filling,
    Values,
    filled,
)
from asyncinfer.engine.runner import Stop, Stopped
from asyncinfer.errors import JobError, ModelFailed
from asyncinfer.models import batching
from asyncinfer.models.batching import Axes, Plan
from asyncinfer.models.batching_obstacles import Off, Reason
from asyncinfer.tensors.datatypes import FLOATS, Array, Dim, Feeds, TensorSpec, dims

Run = Callable[[Feeds, Stop], list[Array]]

ROW_COUNTS: Final = ((1, 1, 1, 1), (2, 3), (3, 1, 2))
"""Rows of the jobs of each probe; with fewer, a model that mixes rows could agree by chance."""

OPEN_SIZES: Final = (8, 32, 1, 128, 512, 256)
"""What an open dimension is tried at; the first that the model takes is kept. Models of sound take
windows of 256 or 512 samples and no others."""

_TOLERANCES: Final = {"float16": 1e-2, "bfloat16": 5e-2, "float32": 1e-4, "float64": 1e-8}


class Verdict(Struct, frozen=True):
    """Whether jobs may share a run, along which axes, and why in words."""

    batched: bool
    reason: str
    inputs: Axes = ()
    outputs: Axes = ()
    ranks: tuple[int, ...] = ()
    """How many dimensions each output had, where that was seen."""


def off(reason: Reason, outputs: Sequence[TensorSpec]) -> Verdict:
    return Verdict(False, reason.words(len(outputs)))


class _Doubt(Exception):
    """Why jobs may not share a run."""

    def __init__(self, off: Off, **named: object) -> None:
        super().__init__(off)
        self.reason = Reason(off, named)


class Probed(Struct, frozen=True):
    """A model that is probed, and what is known of it."""

    run: Run
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    example: Feeds | None = None
    heights: Mapping[str, int] = {}
    """Of inputs that are row numbers of a table, its number of rows."""


def probe(model: Probed, seconds: float, axes: Sequence[Axes]) -> Verdict:
    """The first of these axes of the inputs along which every probe's answers agree."""
    verdict: Verdict | None = None
    with deadline(seconds) as stop:
        for one in axes:
            try:
                probing = _Probing(model, one, stop)
                found = probing.axes()
            except Stopped:
                return off(Reason(Off.SLOW, {"seconds": seconds}), model.outputs)
            except _Doubt as doubt:
                verdict = verdict or off(doubt.reason, model.outputs)
            else:
                words = "on: probe rows got the same answers alone and together"
                return Verdict(True, words, one, found, probing.ranks)
    assert verdict is not None, "there is a way to try"
    return verdict


class _Probing:
    """The probes of one way to stack."""

    def __init__(self, model: Probed, axes: Axes, stop: Stop) -> None:
        self._run = model.run
        self._inputs = model.inputs
        self._outputs = model.outputs
        self._axes = dict(zip((spec.name for spec in model.inputs), axes, strict=True))
        self._example: Feeds = model.example or {}
        self._heights = model.heights
        self._stop = stop
        self._sizes: Sequence[int] = OPEN_SIZES if self._has_open_sizes() else OPEN_SIZES[:1]
        self._failure = ""
        self._found: list[int | None] | None = None
        self.ranks: tuple[int, ...] = ()
        """How many dimensions each output has."""
        self._varied = False
        self._equal = {name for name in self._example if self._is_drawn(name)}
        """Inputs of which every probe so far had the same in all rows, as the example has."""

    def axes(self) -> Axes:
        """The outputs' axes; raises _Doubt."""
        for optional in self._optional_ways():
            if not self._probe(self._fillings(), optional):
                aided = Off.NONE_RAN_LIKE_EXAMPLE if self._example_rows() > 1 else Off.NONE_RAN
                raise _Doubt(aided, failure=self._failure)
        if not self._varied:
            for optional in self._optional_ways():
                self._probe(LAST, optional)
        assert self._found is not None
        if all(axis is None for axis in self._found):
            raise _Doubt(Off.NO_ROWS)
        if not self._varied:
            raise _Doubt(Off.ONE_ANSWER)
        if self._equal:
            raise _Doubt(Off.ONE_VALUE, name=min(self._equal))
        return tuple(self._found)

    def _probe(self, fillings: Sequence[Filling], optional: bool) -> int:
        """How many of these probes the model took; raises _Doubt."""
        ran = 0
        for seed, filling in enumerate(fillings):
            probe = self._alone(seed, filling, optional)
            if probe is None:
                continue
            jobs, alone = probe
            ran += 1
            self._found = self._compare(jobs, alone, self._found)
            self._varied = self._varied or _varies(alone, self._found)
            self._equal -= {name for name in self._equal if self._differs(name, jobs)}
        return ran

    def _fillings(self) -> Sequence[Filling]:
        if not self._example:
            return UNAIDED
        if self._example_rows() < 2:
            return ONE_ROW
        has_fractions = any(spec.datatype in FLOATS for spec in self._inputs)
        return SEVERAL_ROWS if has_fractions else NO_FRACTIONS

    def _optional_ways(self) -> list[bool]:
        return [False, True] if any(spec.optional for spec in self._inputs) else [False]

    def _has_open_sizes(self) -> bool:
        """Whether any size beside the rows is to be guessed."""
        return any(
            spec.name not in self._example
            and any(
                not isinstance(dim, int) and at != self._axes[spec.name]
                for at, dim in enumerate(dims(spec))
            )
            for spec in self._inputs
        )

    def _example_rows(self) -> int:
        """Of the input that has the fewest."""
        counts = [
            self._example[name].shape[axis]
            for name, axis in self._axes.items()
            if axis is not None and name in self._example
        ]
        return min(counts, default=0)

    def _is_drawn(self, name: str) -> bool:
        """Whether it may be such that only values of the example are an input for the model."""
        return self._axes[name] is not None and self._example[name].dtype.kind in "Oiu"

    def _differs(self, name: str, jobs: Sequence[Feeds]) -> bool:
        axis = self._axes[name]
        given = [job[name] for job in jobs if name in job]
        if axis is None or not given:
            return False
        rows = np.moveaxis(np.concatenate(given, axis=axis), axis, 0)
        return bool((rows != rows[:1]).any())

    def _alone(
        self, seed: int, filling: Filling, optional: bool
    ) -> tuple[list[Feeds], list[list[Array]]] | None:
        """Jobs and what each gets alone; None where the model takes none of such numbers."""
        for size in self._sizes:
            rng = np.random.default_rng(seed)
            counts = ROW_COUNTS[seed % len(ROW_COUNTS)]
            try:
                jobs = self._jobs(rng, seed, filling, counts, size, optional)
                alone = [self._run(job, self._stop) for job in jobs]
            except JobError as error:
                # Random numbers may be no input for this model; that proves nothing.
                self._failure = self._failure or error.detail
                continue
            self._sizes = (size,)
            return jobs, alone
        return None

    def _jobs(
        self,
        rng: np.random.Generator,
        seed: int,
        filling: Filling,
        counts: Sequence[int],
        size: int,
        optional: bool,
    ) -> list[Feeds]:
        jobs: list[dict[str, Array]] = [{} for _ in counts]
        for spec in self._inputs:
            if spec.optional and not optional:
                continue
            axis = self._axes[spec.name]
            shape = self._shape(spec, size)
            of_jobs = itertools.cycle(filling.scales)
            values = Values(spec, self._example.get(spec.name), axis, self._heights, seed)
            shared = values.made(rng, filling.kind, next(of_jobs), shape) if axis is None else None
            for job, count in zip(jobs, counts, strict=True):
                if shared is not None:
                    job[spec.name] = shared
                    continue
                assert axis is not None
                shape[axis] = count
                job[spec.name] = values.made(rng, filling.kind, next(of_jobs), shape)
        return list(jobs)

    def _shape(self, spec: TensorSpec, size: int) -> list[int]:
        like = self._example.get(spec.name)
        if spec.shape is None and like is not None:
            return list(like.shape)
        sizes = (size,) * len(dims(spec)) if like is None else like.shape
        return [
            dim if isinstance(dim, int) else own for dim, own in zip(dims(spec), sizes, strict=True)
        ]

    def _compare(
        self,
        jobs: Sequence[Feeds],
        alone: Sequence[Sequence[Array]],
        found: list[int | None] | None,
    ) -> list[int | None]:
        """Raises _Doubt unless each job gets together what it got alone."""
        plan = Plan(self._axes, (0,))
        counts = [batching.rows_of(job, plan) for job in jobs]
        try:
            together = self._run(batching.stack(jobs, plan), self._stop)
        except JobError as error:
            raise _Doubt(Off.FAILED_TOGETHER, failure=error.detail) from error
        seen = [
            _axis_of(spec, [one[at] for one in alone], together[at], counts)
            for at, spec in enumerate(self._outputs)
        ]
        for spec, before, now in zip(self._outputs, found or seen, seen, strict=True):
            if before != now:
                raise _Doubt(Off.UNSTEADY, name=spec.name)
        self.ranks = tuple(output.ndim for output in together)
        split = batching.split(together, jobs, Plan(self._axes, tuple(seen)))
        for job, mine, expected in zip(jobs, split, alone, strict=True):
            for at, (one, other) in enumerate(zip(mine, expected, strict=True)):
                if not close(other, one):
                    raise self._disagreement(job, expected, at)
        return seen

    def _disagreement(self, job: Feeds, alone: Sequence[Array], at: int) -> _Doubt:
        """Whether the rows beside a job's change its answer, or it has another each time."""
        again = self._run(job, self._stop)
        is_steady = close(alone[at], again[at])
        what = Off.MIXES if is_steady else Off.UNSTEADY_NUMBERS
        return _Doubt(what, name=self._outputs[at].name)


def _axis_of(
    spec: TensorSpec, alone: Sequence[Array], together: Array, counts: Sequence[int]
) -> int | None:
    """The one axis on which an output has a row for each row of the input; None: it has none."""
    if any(one.ndim != together.ndim for one in alone):
        raise _Doubt(Off.RANK, name=spec.name)
    if all(one.shape == together.shape for one in alone):
        return None
    grown = [
        axis
        for axis in range(together.ndim)
        if any(one.shape[axis] != together.shape[axis] for one in alone)
    ]
    (axis, *others) = grown
    if others:
        raise _Doubt(Off.SHAPE, name=spec.name)
    sizes = [one.shape[axis] for one in alone]
    if sizes != list(counts) or together.shape[axis] != sum(counts):
        raise _Doubt(Off.COUNT, name=spec.name)
    return axis


def close(expected: Array, actual: Array) -> bool:
    tolerance = _TOLERANCES.get(str(expected.dtype))
    if tolerance is None:
        return np.array_equal(expected, actual)
    if expected.shape != actual.shape:
        return False
    wide: Any = np.float64
    mine, theirs = expected.astype(wide), actual.astype(wide)
    finite = np.abs(mine[np.isfinite(mine)])
    scale = float(finite.max()) if finite.size else 1.0
    return np.allclose(theirs, mine, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def _varies(alone: Sequence[Sequence[Array]], axes: Sequence[int | None]) -> bool:
    for at, axis in enumerate(axes):
        if axis is None:
            continue
        rows = np.concatenate([one[at] for one in alone], axis=axis)
        first = np.take(rows, [0], axis=axis)
        if any(not close(first, np.take(rows, [n], axis=axis)) for n in range(rows.shape[axis])):
            return True
    return False


def some_answer(
    run: Callable[[Feeds, Stop], list[Any]],
    inputs: Sequence[TensorSpec],
    example: Feeds | None,
    seconds: float,
) -> list[Any]:
    """What the model gives for any input that it takes; raises ModelFailed."""
    failure = "it took too long"
    with deadline(seconds) as stop:
        for size in (1, *OPEN_SIZES):
            try:
                feeds = example or {
                    spec.name: filled(
                        spec,
                        np.random.default_rng(0),
                        SCALES[0][0],
                        [dim if isinstance(dim, int) else size for dim in guessed(spec)],
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


def guessed(spec: TensorSpec) -> tuple[Dim, ...]:
    """The dimensions of an input to be made up; rows of numbers where any number may be."""
    return (None, None) if spec.shape is None else spec.shape


@contextmanager
def deadline(seconds: float) -> Iterator[Stop]:
    stop = Stop()
    timer = threading.Timer(seconds, stop.stop)
    timer.start()
    try:
        yield stop
    finally:
        timer.cancel()
