"""How many bytes of results rows and jobs gave lately, which bounds runs and claims."""

import math
from typing import Final, TypeVar

from asyncinfer.models.signature import Signature
from asyncinfer.tensors.datatypes import dims

K = TypeVar("K")

_BYTES_PER_NUMBER: Final = 20
"""Of a float32 in JSON, nearly the longest."""

_MAX_KNOWN: Final = 1000
"""Sizes of rows, and of jobs, that are known; beyond it all are learned anew."""


class OutputSizes:
    """The results of rows and jobs, in bytes as they are stored; there is one instance per worker.

    The results of one run are in memory at once: 128 results of 12 MB took 1.5 GB. A result that is
    smaller than earlier ones lowers an estimate by at most a tenth, since the next may be large
    again.
    """

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes` is what the results of a run, or of a claim, may have together."""
        self.max_bytes = max_bytes
        self._row_bytes: dict[tuple[str, str, int], float] = {}
        """By model, version and size of the input of a row, in steps of powers of two."""
        self._job_bytes: dict[str, float] = {}
        """By queue."""

    def fitting_rows(self, signature: Signature, input_bytes: int) -> int:
        """How many rows, at least 1, probably give results that fit into a run of this version; the
        input of a row has `input_bytes`.

        Before a run with inputs of about this size that follows from the shapes of the outputs; it
        is 1 where the graph leaves a size open, so that the first such run has one job.
        """
        learned = self._row_bytes.get(_kind(signature, input_bytes))
        return self._fitting(learned or _declared_row_bytes(signature))

    def fitting_jobs(self, queue: str) -> int | None:
        """How many jobs, at least 1, probably give results that fit into a claim of this queue;
        None before any of its jobs has run."""
        learned = self._job_bytes.get(queue)
        return self._fitting(learned) if learned else None

    def note_run(
        self,
        queue: str,
        signature: Signature,
        input_bytes: int,
        *,
        jobs: int,
        rows: int,
        size_bytes: int,
    ) -> None:
        """Records that these jobs of a queue, at least one, gave results of `size_bytes`; the input
        of a row had `input_bytes`."""
        _note(self._row_bytes, _kind(signature, input_bytes), size_bytes / max(rows, 1))
        _note(self._job_bytes, queue, size_bytes / jobs)

    def _fitting(self, each_bytes: float) -> int:
        return max(1, int(self.max_bytes / each_bytes))


def _kind(signature: Signature, input_bytes: int) -> tuple[str, str, int]:
    return signature.model, signature.version, input_bytes.bit_length()


def _note(known: dict[K, float], key: K, size_bytes: float) -> None:
    if len(known) >= _MAX_KNOWN:
        known.clear()
    known[key] = max(size_bytes, 0.9 * known.get(key, 0.0), 1.0)


def _declared_row_bytes(signature: Signature) -> float:
    """About what a row gives by the shapes of the outputs; infinite where one leaves a size open
    besides the rows."""
    axes = signature.output_axes or (0,) * len(signature.outputs)
    numbers = 0
    for spec, rows_axis in zip(signature.outputs, axes, strict=True):
        sizes = [size for axis, size in enumerate(dims(spec)) if axis != rows_axis]
        fixed = [size for size in sizes if isinstance(size, int)]
        if spec.shape is None or len(fixed) < len(sizes):
            return math.inf
        numbers += math.prod(fixed)
    return max(numbers, 1) * _BYTES_PER_NUMBER
