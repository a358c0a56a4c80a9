"""Which jobs may share a run: decided per model, proved by probes; stack and split. Pure."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from msgspec import Struct

from asyncinfer.errors import ModelFailed
from asyncinfer.tensors import DTYPES, FLOATS, RANGES, Array, Feeds, TensorSpec

PROBE_ROWS: Final = 4
"""Rows per probe; with fewer, a model that mixes rows could agree by chance."""

_OPEN_DIM_SIZE: Final = 8
_MAGNITUDES: Final = ((0.0, 1.0), (-10.0, 10.0))
_TOLERANCES: Final = {"float16": 1e-2, "float32": 1e-4, "float64": 1e-8}


class Verdict(Struct, frozen=True):
    """Whether rows of several jobs may be stacked, and why in words."""

    batched: bool
    reason: str


class Probe(Struct, frozen=True):
    """What a model answered to the same rows alone and together."""

    alone: Sequence[Sequence[Array]]
    together: Sequence[Array]


# --- may rows be stacked at all ----------------------------------------------------------------


def obstacle(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> str:
    """Why the graph rules out stacking along the first dimension; "" when it does not."""
    if not inputs:
        return "the model takes no input"
    for spec in (*inputs, *outputs):
        if not spec.shape:
            return f"`{spec.name}` is a scalar"
        if isinstance(spec.shape[0], int):
            return f"the first dimension of `{spec.name}` is fixed at {spec.shape[0]}"
    return ""


def doubt(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> str:
    """Why the first dimensions may not be one batch; "" when they bear one name or none."""
    names = {spec.shape[0] for spec in (*inputs, *outputs)} - {None}
    if len(names) <= 1:
        return ""
    return f"the first dimensions have different names ({', '.join(sorted(map(str, names)))})"


# --- probes ------------------------------------------------------------------------------------


def probe_feeds(inputs: Sequence[TensorSpec], example: Array | None) -> Iterator[Feeds]:
    """Feeds of PROBE_ROWS random rows each, always the same ones.

    Several magnitudes, because a model may refuse or saturate at some of them; `example` adds
    its own, and the sizes of open dimensions.
    """
    rng = np.random.default_rng(0)
    magnitudes = [*_MAGNITUDES]
    if example is not None and example.dtype != object:
        magnitudes.append((float(example.min()), float(example.max())))
    sizes = None if example is None else example.shape
    for low, high in magnitudes:
        yield {spec.name: _probe_rows(spec, sizes, low, high, rng) for spec in inputs}


def _probe_rows(
    spec: TensorSpec,
    sizes: Sequence[int] | None,
    low: float,
    high: float,
    rng: np.random.Generator,
) -> Array:
    open_sizes = sizes or (_OPEN_DIM_SIZE,) * len(spec.shape)
    dims = list(zip(spec.shape, open_sizes, strict=True))[1:]
    shape = [PROBE_ROWS // 2, *(dim if isinstance(dim, int) else size for dim, size in dims)]
    half = rng.uniform(low, high, shape)
    # Mirrored, so that a threshold in the middle has rows on both sides of it.
    values = np.concatenate([half, low + high - half])
    if spec.datatype == "BYTES":
        return np.where(values > (low + high) / 2, "some text", "").astype(object)
    if spec.datatype == "BOOL":
        return values > (low + high) / 2
    if spec.datatype not in FLOATS:
        values = np.rint(values).clip(*RANGES[spec.datatype])
    return values.astype(DTYPES[spec.datatype])


def judge(probes: Sequence[Probe], outputs: Sequence[TensorSpec]) -> Verdict:
    """On only where every row of every probe got the answer that it gets alone."""
    for probe in probes:
        for index, spec in enumerate(outputs):
            alone = [answers[index] for answers in probe.alone]
            problem = _difference(alone, probe.together[index])
            if problem:
                return Verdict(False, f"off: `{spec.name}` {problem}")
    if not any(_varies(probe) for probe in probes):
        return Verdict(False, "off: all probe rows got one answer, which proves nothing")
    return Verdict(True, "on: probe rows got the same answers alone and together")


def _difference(alone: Sequence[Array], together: Array) -> str:
    if any(len(answer) != 1 for answer in alone) or len(together) != len(alone):
        return "has another number of rows than the input"
    if any(answer.shape[1:] != together.shape[1:] for answer in alone):
        return "changes its shape with the number of rows"
    if not _close(np.concatenate(alone), together):
        return "gives a row another answer when other rows are beside it"
    return ""


def _close(expected: Array, actual: Array) -> bool:
    tolerance = _TOLERANCES.get(str(expected.dtype))
    if tolerance is None:
        return np.array_equal(expected, actual)
    finite = np.abs(expected[np.isfinite(expected)])
    scale = float(finite.max()) if finite.size else 1.0
    return np.allclose(actual, expected, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def _varies(probe: Probe) -> bool:
    first, *others = probe.alone
    return any(
        not _close(mine, theirs)
        for answers in others
        for mine, theirs in zip(first, answers, strict=True)
    )


# --- stack and split ---------------------------------------------------------------------------


def run_key(feeds: Feeds) -> tuple[tuple[str, np.dtype[np.generic], tuple[int, ...]], ...]:
    """Jobs of one model share a run only where this is equal: datatypes and shapes of a row."""
    return tuple((name, array.dtype, array.shape[1:]) for name, array in feeds.items())


def rows_of(feeds: Feeds) -> int:
    """How many rows a job has; what cannot be stacked counts as one."""
    first = next(iter(feeds.values()), None)
    return len(first) if first is not None and first.ndim else 1


def stack(jobs: Sequence[Feeds]) -> Feeds:
    """The rows of all jobs in one array per input, in order; the jobs have one `run_key`."""
    if len(jobs) == 1:
        return jobs[0]
    return {name: np.concatenate([feeds[name] for feeds in jobs]) for name in jobs[0]}


def split(outputs: Sequence[Array], row_counts: Sequence[int]) -> list[list[Array]]:
    """Per job its own rows of every output: the reverse of `stack`.

    Raises ModelFailed where an output has not a row for each row of the input.
    """
    if len(row_counts) == 1:
        return [list(outputs)]
    check_rows(outputs, row_counts)
    return [[output[start:end] for output in outputs] for start, end in spans(row_counts)]


def check_rows(outputs: Sequence[Array], row_counts: Sequence[int]) -> None:
    rows = sum(row_counts)
    for output in outputs:
        if output.ndim == 0 or len(output) != rows:
            raise ModelFailed(f"an output of shape {list(output.shape)} for {rows} rows of input")


def spans(row_counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where each job's rows begin and end."""
    return itertools.pairwise(itertools.accumulate(row_counts, initial=0))
