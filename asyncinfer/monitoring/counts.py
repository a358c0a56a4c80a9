"""Counts and histograms by labels, bounded: labels beyond the bound share one."""

from collections.abc import Sequence
from typing import Final, TypeAlias

from asyncinfer.monitoring.histogram import Histogram

Labels: TypeAlias = tuple[str, ...]

OTHER: Final = "(other)"
"""The value of each label of what has no series of its own; no model can have this name."""

MAX_SERIES: Final = 1000
"""Label values that one count or histogram keeps: those that came first."""


class Counts(dict[Labels, int]):
    """How often each combination of label values occurred."""

    def add(self, labels: Labels, by: int = 1) -> None:
        """Adds `by` to the count of these label values."""
        if labels in self:
            self[labels] += by
        elif len(self) < MAX_SERIES:
            self[labels] = by
        else:
            other = (OTHER,) * len(labels)
            self[other] = self.get(other, 0) + by


class Histograms(dict[Labels, Histogram]):
    """A histogram for each combination of label values, all with the same bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        super().__init__()
        self._bounds = bounds

    def observe(self, labels: Labels, value: float) -> None:
        """Adds a value to the histogram of these label values."""
        self.of(labels).observe(value)

    def of(self, labels: Labels) -> Histogram:
        """The histogram of these label values, made if it is their first use."""
        found = self.get(labels)
        if found is None:
            if len(self) >= MAX_SERIES:
                labels = (OTHER,) * len(labels)
            found = self.setdefault(labels, Histogram.of(self._bounds))
        return found
