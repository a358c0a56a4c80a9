"""How many seconds jobs and runs of each model take, as measured here."""

from collections.abc import Mapping
from typing import Final

_HALF_LIFE_SECONDS: Final = 60.0


class Paces:
    """A mean per model that weighs jobs, the latest most: by half for each minute gone by.

    By jobs, not by runs: a full batch costs less a job than one job alone, and it is in full
    batches that a long queue is worked off.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float, float]] = {}

    def note(self, model: str, slot_seconds: float, jobs: int, *, at_seconds: float) -> None:
        """A slot took `slot_seconds` for `jobs`, until `at_seconds` of a monotonic clock."""
        seconds, weight, before = self._sums.get(model, (0.0, 0.0, at_seconds))
        kept = 0.5 ** ((at_seconds - before) / _HALF_LIFE_SECONDS)
        self._sums[model] = (seconds * kept + slot_seconds, weight * kept + jobs, at_seconds)

    def seconds_per_job(self) -> dict[str, float]:
        """By model; a model that has not run here yet is left out."""
        return {model: seconds / weight for model, (seconds, weight, _) in self._sums.items()}


class RunTimes:
    """How long runs took here, by model and rows."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[int, tuple[int, float]]] = {}

    def note(self, model: str, rows: int, seconds: float) -> None:
        """Rows are counted as the power of two that they do not exceed."""
        sums = self._sums.setdefault(model, {})
        bucket = 1 << (max(rows, 1) - 1).bit_length()
        count, total = sums.get(bucket, (0, 0.0))
        sums[bucket] = (count + 1, total + seconds)

    def sums(self) -> Mapping[str, Mapping[int, tuple[int, float]]]:
        """How many runs and their seconds together, by model, then by the most rows."""
        return self._sums

    def view(self) -> dict[str, dict[int, float]]:
        """The mean seconds of a run, by model, then by the most rows."""
        return {
            model: {rows: total / count for rows, (count, total) in sorted(sums.items())}
            for model, sums in self._sums.items()
        }
