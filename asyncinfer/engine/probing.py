"""Whether jobs may share a run: shown by inputs that run alone and together."""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, Final

import numpy as np
from msgspec import Struct

from asyncinfer import batching
from asyncinfer.batching import Axes, Plan
from asyncinfer.engine.running import Stop, Stopped
from asyncinfer.errors import JobError, ModelFailed
from asyncinfer.tensors import DTYPES, FLOATS, RANGES, Array, Feeds, TensorSpec

Run = Callable[[Feeds, Stop], list[Array]]

ROW_COUNTS: Final = ((1, 1, 1, 1), (2, 3), (3, 1, 2))
"""Rows of the jobs of each probe; with fewer, a model that mixes rows could agree by chance."""

OPEN_SIZES: Final = (8, 32, 1, 128)
"""What an open dimension is tried at; the first that the model takes is kept."""

Scale = tuple[float, float, int, int]

_SCALES: Final[tuple[tuple[Scale, ...], ...]] = (
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

_LIKE_EXAMPLE: Final[tuple[tuple[Scale | None, ...], ...]] = ((None,), (None, (0.0, 0.1, 0, 1)))
"""The same where there is an example: None is as large as that."""

_MOST_ELEMENTS: Final = 1 << 26

_TOLERANCES: Final = {"float16": 1e-2, "bfloat16": 5e-2, "float32": 1e-4, "float64": 1e-8}


class Verdict(Struct, frozen=True):
    """Whether jobs may share a run, along which axes, and why in words."""

    batched: bool
    reason: str
    inputs: Axes = ()
    outputs: Axes = ()


class _Doubt(Exception):
    """Why jobs may not share a run."""


def probe(
    run: Run,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    example: Feeds | None,
    seconds: float,
    axes: Sequence[Axes],
) -> Verdict:
    """The first of these axes of the inputs along which every probe's answers agree."""
    reason = ""
    with deadline(seconds) as stop:
        for one in axes:
            try:
                found = _Probing(run, inputs, outputs, one, example, stop).axes()
            except Stopped:
                return Verdict(False, f"off: probing took longer than {seconds:g} s")
            except _Doubt as doubt:
                reason = reason or f"off: {doubt}"
            else:
                words = "on: probe rows got the same answers alone and together"
                return Verdict(True, words, one, found)
    return Verdict(False, reason)


class _Probing:
    """The probes of one way to stack."""

    def __init__(
        self,
        run: Run,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        axes: Axes,
        example: Feeds | None,
        stop: Stop,
    ) -> None:
        self._run = run
        self._inputs = inputs
        self._outputs = outputs
        self._axes = dict(zip((spec.name for spec in inputs), axes, strict=True))
        self._example = example
        self._stop = stop
        self._sizes: Sequence[int] = OPEN_SIZES
        self._failure = ""

    def axes(self) -> Axes:
        """The outputs' axes; raises _Doubt."""
        found: list[int | None] | None = None
        varied = False
        for optional in self._optional_ways():
            ran = 0
            for seed, scales in enumerate(self._scales()):
                probe = self._alone(seed, scales, optional)
                if probe is None:
                    continue
                jobs, alone = probe
                ran += 1
                found = self._compare(jobs, alone, found)
                varied = varied or _varies(alone, found)
            if not ran:
                raise _Doubt(f"no probe row could be run: {self._failure}")
        assert found is not None
        if all(axis is None for axis in found):
            raise _Doubt("no output has a row for each row of the input")
        if not varied:
            raise _Doubt("all probe rows got one answer, which proves nothing")
        return tuple(found)

    def _optional_ways(self) -> list[bool]:
        return [False, True] if any(spec.optional for spec in self._inputs) else [False]

    def _scales(self) -> list[tuple[Scale | None, ...]]:
        return [*_SCALES, *_LIKE_EXAMPLE] if self._example else [*_SCALES]

    def _alone(
        self, seed: int, scales: tuple[Scale | None, ...], optional: bool
    ) -> tuple[list[Feeds], list[list[Array]]] | None:
        """Jobs and what each gets alone; None where the model takes none of such numbers."""
        for size in self._sizes:
            rng = np.random.default_rng(seed)
            counts = ROW_COUNTS[seed % len(ROW_COUNTS)]
            try:
                jobs = self._jobs(rng, scales, counts, size, optional)
                alone = [self._run(job, self._stop) for job in jobs]
            except JobError as error:
                # Random numbers may be no input for this model; that proves nothing.
                self._failure = error.detail
                continue
            self._sizes = (size,)
            return jobs, alone
        return None

    def _jobs(
        self,
        rng: np.random.Generator,
        scales: tuple[Scale | None, ...],
        counts: Sequence[int],
        size: int,
        optional: bool,
    ) -> list[Feeds]:
        jobs: list[dict[str, Array]] = [{} for _ in counts]
        for spec in self._inputs:
            if spec.optional and not optional:
                continue
            axis = self._axes[spec.name]
            shared = axis is None
            shape = self._shape(spec, size)
            of_jobs = itertools.cycle(scales)
            made = self._values(spec, rng, next(of_jobs), shape) if shared else None
            for job, count in zip(jobs, counts, strict=True):
                if axis is not None:
                    shape[axis] = count
                    job[spec.name] = self._values(spec, rng, next(of_jobs), shape)
                elif made is not None:
                    job[spec.name] = made
        return list(jobs)

    def _shape(self, spec: TensorSpec, size: int) -> list[int]:
        like = (self._example or {}).get(spec.name)
        sizes = (size,) * len(spec.shape) if like is None else like.shape
        return [
            dim if isinstance(dim, int) else own for dim, own in zip(spec.shape, sizes, strict=True)
        ]

    def _values(
        self,
        spec: TensorSpec,
        rng: np.random.Generator,
        scale: Scale | None,
        shape: Sequence[int],
    ) -> Array:
        example = (self._example or {}).get(spec.name)
        if self._axes[spec.name] is None and example is not None:
            return example
        return _random(spec, rng, scale or _scale_of(example), shape)

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
            raise _Doubt(f"rows that ran alone failed together: {error.detail}") from error
        seen = [
            _axis_of(spec, [one[at] for one in alone], together[at], counts)
            for at, spec in enumerate(self._outputs)
        ]
        if found is not None and seen != found:
            raise _Doubt("an output has its rows now here, now there")
        split = batching.split(together, jobs, Plan(self._axes, tuple(seen)))
        for mine, expected in zip(split, alone, strict=True):
            for spec, one, other in zip(self._outputs, mine, expected, strict=True):
                if not close(other, one):
                    raise _Doubt(
                        f"`{spec.name}` gives a row another answer when other rows are beside it"
                    )
        return seen


def _scale_of(example: Array | None) -> Scale:
    if example is None or example.dtype == object or not example.size:
        return _SCALES[0][0]
    numbers = example.astype(np.float64) if example.dtype == DTYPES["BF16"] else example
    low, high = numbers.min().item(), numbers.max().item()
    return (float(low), float(high), int(low), int(high))


def _random(
    spec: TensorSpec,
    rng: np.random.Generator,
    scale: Scale,
    shape: Sequence[int],
) -> Array:
    low, high, least, most = scale
    if prod(shape) > _MOST_ELEMENTS:
        raise ModelFailed(f"`{spec.name}` is too large to make one up: {list(shape)}")
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


def _axis_of(
    spec: TensorSpec, alone: Sequence[Array], together: Array, counts: Sequence[int]
) -> int | None:
    """The one axis on which an output has a row for each row of the input; None: it has none."""
    if any(one.ndim != together.ndim for one in alone):
        raise _Doubt(f"`{spec.name}` changes its rank with the number of rows")
    if all(one.shape == together.shape for one in alone):
        return None
    grown = [
        axis
        for axis in range(together.ndim)
        if any(one.shape[axis] != together.shape[axis] for one in alone)
    ]
    (axis, *others) = grown
    if others:
        raise _Doubt(f"`{spec.name}` changes its shape with the number of rows")
    sizes = [one.shape[axis] for one in alone]
    if sizes != list(counts) or together.shape[axis] != sum(counts):
        raise _Doubt(f"`{spec.name}` has another number of rows than the input")
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
                    spec.name: _random(
                        spec,
                        np.random.default_rng(0),
                        _SCALES[0][0],
                        [dim if isinstance(dim, int) else size for dim in spec.shape],
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


@contextmanager
def deadline(seconds: float) -> Iterator[Stop]:
    stop = Stop()
    timer = threading.Timer(seconds, stop.stop)
    timer.start()
    try:
        yield stop
    finally:
        timer.cancel()
