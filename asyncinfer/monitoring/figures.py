"""The figures of one process at one moment, which can be sent to another one and added up."""

from collections.abc import Collection, Mapping

import msgspec
from msgspec import Struct

from asyncinfer.monitoring.counts import MAX_SERIES, OTHER, Labels
from asyncinfer.monitoring.histogram import Histogram


class Figures(Struct, array_like=True):
    """By the name of a metric, and then by the values of its labels."""

    counts: dict[str, dict[Labels, float]] = {}
    """Counters without their `_total`; they only grow."""
    histograms: dict[str, dict[Labels, Histogram]] = {}
    gauges: dict[str, dict[Labels, float]] = {}
    """What is open or held now, and ends with the process."""

    def add(self, other: "Figures") -> None:
        """Adds the figures of another process; those of equal name and labels are summed."""
        _add_numbers(self.counts, other.counts)
        _add_numbers(self.gauges, other.gauges)
        for name, series in other.histograms.items():
            own = self.histograms.setdefault(name, {})
            for labels, histogram in series.items():
                bounded = _bounded(labels, own)
                own.setdefault(bounded, Histogram.of(histogram.bounds)).add(histogram)


def _add_numbers(
    own: dict[str, dict[Labels, float]], others: Mapping[str, Mapping[Labels, float]]
) -> None:
    """Adds each number of `others` to that of the same name and labels in `own`."""
    for name, series in others.items():
        sums = own.setdefault(name, {})
        for labels, value in series.items():
            bounded = _bounded(labels, sums)
            sums[bounded] = sums.get(bounded, 0.0) + value


def _bounded(labels: Labels, own: Collection[Labels]) -> Labels:
    """These label values, or those that all share that come when `own` is full: processes that are
    restarted may each have seen other models."""
    return labels if labels in own or len(own) < MAX_SERIES else (OTHER,) * len(labels)


encode_figures = msgspec.msgpack.Encoder().encode
"""Figures as bytes for another process of the same release."""

decode_figures = msgspec.msgpack.Decoder(Figures).decode
"""The figures in bytes; raises msgspec.ValidationError or DecodeError for damaged ones."""
