"""Whether jobs may share a run: shown by inputs that run alone and together."""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from math import prod
from typing import Any, Final

import numpy as np
from msgspec import Struct

from asyncinfer import batching
from asyncinfer.batching import Axes, Plan
from asyncinfer.engine.running import Stop, Stopped
from asyncinfer.errors import JobError, ModelFailed
from asyncinfer.tensors import DTYPES, FLOATS, RANGES, Array, Dim, Feeds, TensorSpec, dims
from asyncinfer.unbatched import Off, Reason

Run = Callable[[Feeds, Stop], list[Array]]

ROW_COUNTS: Final = ((1, 1, 1, 1), (2, 3), (3, 1, 2))
"""Rows of the jobs of each probe; with fewer, a model that mixes rows could agree by chance."""

OPEN_SIZES: Final = (8, 32, 1, 128, 512, 256)
"""What an open dimension is tried at; the first that the model takes is kept. Models of sound take
windows of 256 or 512 samples and no others."""

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

_SMALL: Final = (0.0, 0.1, 0, 1)

_MIXED: Final = 100.0
"""Where no probe before got two answers, each number is of a size of its own up to this."""


class _Kind(Enum):
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


class _Filling(Struct, frozen=True):
    """How one probe is filled."""

    scales: tuple[Scale | None, ...]
    """Per job; None is as large as the example."""
    kind: _Kind = _Kind.MADE_UP


_UNAIDED: Final = tuple(_Filling(scales) for scales in _SCALES)

_ONE_ROW: Final = (
    *(
        _Filling(scales, _Kind.MADE_UP if at % 2 else _Kind.WORDS)
        for at, scales in enumerate(_SCALES)
    ),
    _Filling((None,), _Kind.WORDS),
    _Filling((None, _SMALL), _Kind.WORDS),
    _Filling((None,), _Kind.CATEGORIES),
)
"""Where the example has one row: others are made up too, else all were the same."""

_SEVERAL_ROWS: Final = (
    *(_Filling(scales, _Kind.CATEGORIES) for scales in _SCALES),
    _Filling((None,), _Kind.WORDS),
    _Filling((None, _SMALL), _Kind.CATEGORIES),
    *(_Filling((None,), _Kind.ROWS),) * 2,
)
"""Where it has several: whole numbers may be categories, of which no other is an input."""

_LAST: Final = (_Filling((_SCALES[0][0],), _Kind.MIXED),) * 3
"""Where all probes got one answer."""

_MOST_ELEMENTS: Final = 1 << 26

_TOLERANCES: Final = {"float16": 1e-2, "bfloat16": 5e-2, "float32": 1e-4, "float64": 1e-8}


class Verdict(Struct, frozen=True):
    """Whether jobs may share a run, along which axes, and why in words."""

    batched: bool
    reason: str
    inputs: Axes = ()
    outputs: Axes = ()


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
                found = _Probing(model, one, stop).axes()
            except Stopped:
                return off(Reason(Off.SLOW, {"seconds": seconds}), model.outputs)
            except _Doubt as doubt:
                verdict = verdict or off(doubt.reason, model.outputs)
            else:
                words = "on: probe rows got the same answers alone and together"
                return Verdict(True, words, one, found)
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
                self._probe(_LAST, optional)
        assert self._found is not None
        if all(axis is None for axis in self._found):
            raise _Doubt(Off.NO_ROWS)
        if not self._varied:
            raise _Doubt(Off.ONE_ANSWER)
        if self._equal:
            raise _Doubt(Off.ONE_VALUE, name=min(self._equal))
        return tuple(self._found)

    def _probe(self, fillings: Sequence[_Filling], optional: bool) -> int:
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

    def _fillings(self) -> Sequence[_Filling]:
        if not self._example:
            return _UNAIDED
        return _SEVERAL_ROWS if self._example_rows() > 1 else _ONE_ROW

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
        self, seed: int, filling: _Filling, optional: bool
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
        filling: _Filling,
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
            values = _Values(spec, self._example.get(spec.name), axis, self._heights, seed)
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
        split = batching.split(together, jobs, Plan(self._axes, tuple(seen)))
        for mine, expected in zip(split, alone, strict=True):
            for spec, one, other in zip(self._outputs, mine, expected, strict=True):
                if not close(other, one):
                    raise _Doubt(Off.MIXES, name=spec.name)
        return seen


class _Values(Struct, frozen=True):
    """What one input is filled with in one probe."""

    spec: TensorSpec
    example: Array | None
    axis: int | None
    heights: Mapping[str, int]
    seed: int

    def made(
        self, rng: np.random.Generator, kind: _Kind, scale: Scale | None, shape: Sequence[int]
    ) -> Array:
        if self.example is not None and (self.axis is None or self._is_drawn(kind)):
            return self._drawn(self.example, rng, shape)
        if kind == _Kind.MIXED and self.spec.datatype in FLOATS:
            return _of_mixed_sizes(self.spec, rng, shape)
        return _random(self.spec, rng, self._scaled(scale), shape)

    def _is_drawn(self, kind: _Kind) -> bool:
        if kind == _Kind.ROWS:
            return True
        is_text = self.spec.datatype == "BYTES"
        is_whole = not is_text and self.spec.datatype not in FLOATS
        if is_text:
            return kind in (_Kind.WORDS, _Kind.CATEGORIES)
        # Row numbers of a table are known without an example.
        is_known = self.spec.name in self.heights and self.seed % 2 == 1
        return is_whole and kind == _Kind.CATEGORIES and not is_known

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
        """Row numbers of a table are all of them in every second probe, else small ones."""
        low, high, least, most = scale or _scale_of(self.example)
        height = self.heights.get(self.spec.name)
        if height is None:
            return low, high, least, most
        if self.seed % 2:
            return 0.0, height - 1.0, 0, height - 1
        return low, high, min(max(least, 0), height - 1), min(max(most, 0), height - 1)


def _of_mixed_sizes(spec: TensorSpec, rng: np.random.Generator, shape: Sequence[int]) -> Array:
    """Numbers each of which has a sign and a size of its own."""
    _check_size(spec, shape)
    sizes = 10.0 ** rng.uniform(-3.0, np.log10(_MIXED), shape)
    return np.asarray(sizes * rng.choice((-1.0, 1.0), shape)).astype(DTYPES[spec.datatype])


def _scale_of(example: Array | None) -> Scale:
    if example is None or example.dtype == object or not example.size:
        return _SCALES[0][0]
    numbers = example.astype(np.float64) if example.dtype == DTYPES["BF16"] else example
    low, high = numbers.min().item(), numbers.max().item()
    return (float(low), float(high), int(low), int(high))


def _check_size(spec: TensorSpec, shape: Sequence[int]) -> None:
    if prod(shape) > _MOST_ELEMENTS:
        raise ModelFailed(f"`{spec.name}` is too large to make one up: {list(shape)}")


def _random(
    spec: TensorSpec,
    rng: np.random.Generator,
    scale: Scale,
    shape: Sequence[int],
) -> Array:
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
                    spec.name: _random(
                        spec,
                        np.random.default_rng(0),
                        _SCALES[0][0],
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
