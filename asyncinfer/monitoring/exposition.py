"""The text format of Prometheus, version 0.0.4.

Nothing is counted here: counters are kept where the work is done, and read when the metrics are
requested. The format is written without prometheus_client, which takes four times as long for it:
20 ms with 200 models, in which the API answers nobody else.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Literal

from msgspec import Struct

from asyncinfer.monitoring.counts import Labels
from asyncinfer.monitoring.histogram import Histogram

Kind = Literal["counter", "gauge", "histogram"]


class Family(Struct, frozen=True):
    """All series of one metric, each as a line."""

    name: str
    kind: Kind
    help_text: str
    lines: list[str]


def write_text(families: Iterable[Family]) -> bytes:
    """The families in the text format, in their order."""
    return "".join(_parts(families)).encode()


def _parts(families: Iterable[Family]) -> Iterator[str]:
    for family in families:
        help_text = family.help_text.replace("\\", r"\\").replace("\n", r"\n")
        yield f"# HELP {family.name} {help_text}\n# TYPE {family.name} {family.kind}\n"
        yield from family.lines


def counter(name: str, help_text: str, labels: Labels, values: Mapping[Labels, float]) -> Family:
    """A counter by the values of its labels; `name` is without `_total`."""
    return _numbers(f"{name}_total", "counter", help_text, labels, values)


def gauge(name: str, help_text: str, labels: Labels, values: Mapping[Labels, float]) -> Family:
    """A gauge by the values of its labels."""
    return _numbers(name, "gauge", help_text, labels, values)


def info(name: str, help_text: str, labels: Labels, values: Iterable[Labels]) -> Family:
    """A gauge that is always 1, whose labels say something; `name` is without `_info`."""
    return gauge(f"{name}_info", help_text, labels, dict.fromkeys(values, 1))


def histogram(
    name: str, help_text: str, labels: Labels, values: Mapping[Labels, Histogram]
) -> Family:
    """A histogram by the values of its labels."""
    lines: list[str] = []
    for label_values, histogram in sorted(values.items()):
        # Copied at once: a thread may count meanwhile, and the sums must fit each other.
        counts = list(histogram.counts)
        own = _pairs(labels, label_values)
        bucket = f"{name}_bucket{{{own}{',' if own else ''}le="
        bounds = (*(f"{bound:g}" for bound in histogram.bounds), "+Inf")
        lines += [
            f'{bucket}"{bound}"}} {below}\n'
            for bound, below in zip(bounds, accumulate(counts), strict=True)
        ]
        braces = f"{{{own}}}" if own else ""
        lines.append(f"{name}_sum{braces} {histogram.total}\n{name}_count{braces} {sum(counts)}\n")
    return Family(name, "histogram", help_text, lines)


def _numbers(
    name: str, kind: Kind, help_text: str, labels: Labels, values: Mapping[Labels, float]
) -> Family:
    """A family with one number for each combination of label values, in their order."""
    lines = [
        f"{name}{{{_pairs(labels, label_values)}}} {float(value)}\n"
        if labels
        else f"{name} {float(value)}\n"
        for label_values, value in sorted(values.items())
    ]
    return Family(name, kind, help_text, lines)


def _pairs(labels: Labels, values: Labels) -> str:
    """The labels with their values, as they stand between braces."""
    return ",".join(
        f'{name}="{_escaped(value)}"' for name, value in zip(labels, values, strict=True)
    )


def _escaped(value: str) -> str:
    """A label's value as it stands between quotes; what no UTF-8 has is replaced."""
    if value.isalnum():
        return value
    escaped = value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return escaped.encode("utf-8", "replace").decode()
