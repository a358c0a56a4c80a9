"""How many seconds a slot spends on a job of each model, as measured here lately."""

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
