"""What a worker counts, as Prometheus reads it (the only door to prometheus_client).

Nothing is counted here: what a worker notes anyway is collected when somebody asks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from msgspec import Struct
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
    SummaryMetricFamily,
)

from asyncinfer.models.signature import Signature

_ONE: Final = ("model", "version")


class Counted(Struct, frozen=True):
    """One worker, at one moment."""

    served: Sequence[Signature]
    refused: Sequence[tuple[str, str]]
    """Models and versions with a problem."""
    loaded: int
    runs: Mapping[str, Mapping[int, tuple[int, float]]]
    """By model and most rows: how many runs, and their seconds together."""
    ended: Mapping[str, int]
    """Jobs by outcome."""


class Metrics:
    """The text of one worker's metrics."""

    media_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self, count: Callable[[], Counted]) -> None:
        self._count = count
        # The global one would show what libraries register.
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def describe(self) -> Sequence[Metric]:
        """Asked for when registered, so that nothing is collected then."""
        return ()

    def collect(self) -> Iterator[Metric]:
        counted = self._count()
        yield from _models(counted)
        yield from _work(counted)


def _models(counted: Counted) -> Iterator[Metric]:
    about = InfoMetricFamily(
        "asyncinfer_model",
        "A version that is served, and why its jobs share runs, or not.",
        labels=(*_ONE, "sha256", "batching"),
    )
    batched = GaugeMetricFamily(
        "asyncinfer_model_batched", "Whether jobs of this version share runs.", labels=_ONE
    )
    for one in counted.served:
        about.add_metric((one.model, one.version, one.sha256, one.batching), {})
        batched.add_metric((one.model, one.version), one.batched)
    refused = GaugeMetricFamily(
        "asyncinfer_model_refused", "1: something is wrong with this version's file.", labels=_ONE
    )
    for label in counted.refused:
        refused.add_metric(label, 1)
    loaded = GaugeMetricFamily("asyncinfer_models_loaded", "Versions in memory.", counted.loaded)
    yield from (about, batched, refused, loaded)


def _work(counted: Counted) -> Iterator[Metric]:
    runs = SummaryMetricFamily(
        "asyncinfer_run_seconds",
        "How long runs took, by the power of two that their rows do not exceed.",
        labels=("model", "rows"),
    )
    for model, buckets in counted.runs.items():
        for rows, (count, seconds) in sorted(buckets.items()):
            runs.add_metric((model, str(rows)), count, seconds)
    jobs = CounterMetricFamily(
        "asyncinfer_jobs", "Jobs that this worker is done with, by outcome.", labels=("outcome",)
    )
    for outcome, count in sorted(counted.ended.items()):
        jobs.add_metric((outcome,), count)
    yield from (runs, jobs)
