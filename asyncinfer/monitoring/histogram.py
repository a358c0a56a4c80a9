"""Histograms that count while the process works, and are written only when they are requested."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

from msgspec import Struct

SECONDS: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
"""Upper bounds of buckets for the time of a request or a run."""

WAIT_SECONDS: Final = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
    *(30.0, 60.0, 300.0, 900.0, 3600.0),
)
"""Upper bounds of buckets for the time that a job waits."""

ROWS: Final = tuple(float(1 << power) for power in range(13))
"""Upper bounds of buckets for the rows of a run: 1 to 4,096."""


class Histogram(Struct):
    """Counts of observed values by bucket; the last count is of values above all bounds. It is
    changed by one thread at a time, which a lock would make no safer."""

    bounds: Sequence[float]
    counts: list[int]
    total: float = 0.0

    @classmethod
    def of(cls, bounds: Sequence[float]) -> "Histogram":
        """A histogram without values; `bounds` are ascending, and belong to the lower bucket."""
        return cls(bounds, [0] * (len(bounds) + 1))

    def observe(self, value: float) -> None:
        """Adds one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def observe_all(self, values: Sequence[float]) -> None:
        """Adds values, at a third of the cost of adding each."""
        counts, bounds = self.counts, self.bounds
        for value in values:
            counts[bisect_left(bounds, value)] += 1
        self.total += sum(values)

    def add(self, other: "Histogram") -> None:
        """Adds the values of another histogram with the same bounds."""
        self.counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        self.total += other.total
