"""Measured seconds per job and per run of each model."""

from typing import Final

_HALF_LIFE_SECONDS: Final = 60.0


class JobTimes:
    """The mean seconds per job of each model, in which the weight of a job halves every minute.

    The mean is over jobs, not over runs: a full batch costs less per job than a job alone, and a
    long queue is worked off in full batches.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float, float]] = {}

    def add(self, model: str, slot_seconds: float, jobs: int, *, at_seconds: float) -> None:
        """Adds that a slot took `slot_seconds` for `jobs` jobs together, up to `at_seconds` of a
        monotonic clock, which must not go back."""
        seconds, weight, last_at = self._sums.get(model, (0.0, 0.0, at_seconds))
        decay = 0.5 ** ((at_seconds - last_at) / _HALF_LIFE_SECONDS)
        self._sums[model] = (seconds * decay + slot_seconds, weight * decay + jobs, at_seconds)

    def seconds_per_job(self) -> dict[str, float]:
        """By model the mean seconds of a slot for one job; a model that has not run here yet is
        left out."""
        return {model: seconds / weight for model, (seconds, weight, _) in self._sums.items()}


class RunTimes:
    """How long runs took in this worker, by model and number of rows."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[int, tuple[int, float]]] = {}
        """By model and highest number of rows: how many runs, and their total seconds."""

    def add(self, model: str, rows: int, seconds: float) -> None:
        """Adds a run, under its number of rows rounded up to a power of two."""
        sums = self._sums.setdefault(model, {})
        bucket = 1 << (max(rows, 1) - 1).bit_length()
        count, total = sums.get(bucket, (0, 0.0))
        sums[bucket] = (count + 1, total + seconds)

    def view(self) -> dict[str, dict[int, float]]:
        """By model and highest number of rows (a power of two): the mean seconds of a run."""
        return {
            model: {rows: total / count for rows, (count, total) in sorted(sums.items())}
            for model, sums in self._sums.items()
        }
