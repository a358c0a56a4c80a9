"""A worker's metrics for Prometheus (the only door to prometheus_client).

Nothing is counted here: what the worker counts in any case is read when the metrics are requested.
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

_VERSION_LABELS: Final = ("model", "version")


class MetricValues(Struct, frozen=True):
    """The figures of one worker at one moment."""

    served: Sequence[Signature]
    refused: Sequence[tuple[str, str]]
    """(model, version) of each problem; the version is OF_ALL_VERSIONS if it is one of a whole
    model."""
    loaded: int
    """How many engines are in memory."""
    runs: Mapping[str, Mapping[int, tuple[int, float]]]
    """By model and highest number of rows: how many runs, and their total seconds."""
    ended: Mapping[str, int]
    """By verdict, how many outcomes were stored: also those of jobs that were released or
    retried."""


class Metrics:
    """The metrics of one worker, as the text that Prometheus reads."""

    media_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self, read_values: Callable[[], MetricValues]) -> None:
        """`read_values` is called for each request of the metrics."""
        self._read_values = read_values
        # The global registry would also have what libraries register.
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """The present metrics in the text format of Prometheus, as `media_type` says."""
        return generate_latest(self._registry)

    def describe(self) -> Sequence[Metric]:
        """Called by the registry when this is registered; empty, so that it does not collect."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Called by the registry for each request of the metrics."""
        values = self._read_values()
        yield from _model_metrics(values)
        yield from _work_metrics(values)


def _model_metrics(values: MetricValues) -> Iterator[Metric]:
    """What each version is, whether it shares runs or was refused, and how many are in memory."""
    about = InfoMetricFamily(
        "asyncinfer_model",
        "A version that is served, and why its jobs share runs, or not.",
        labels=(*_VERSION_LABELS, "sha256", "batching"),
    )
    batched = GaugeMetricFamily(
        "asyncinfer_model_batched",
        "Whether jobs of this version share runs.",
        labels=_VERSION_LABELS,
    )
    for signature in values.served:
        names = (signature.model, signature.version)
        about.add_metric((*names, signature.sha256, signature.batching), {})
        batched.add_metric(names, signature.batched)
    refused = GaugeMetricFamily(
        "asyncinfer_model_refused",
        "1: something is wrong with this version's file.",
        labels=_VERSION_LABELS,
    )
    for label in values.refused:
        refused.add_metric(label, 1)
    loaded = GaugeMetricFamily("asyncinfer_models_loaded", "Versions in memory.", values.loaded)
    yield from (about, batched, refused, loaded)


def _work_metrics(values: MetricValues) -> Iterator[Metric]:
    """How long runs took, and how many jobs ended, by outcome."""
    runs = SummaryMetricFamily(
        "asyncinfer_run_seconds",
        "How long runs took, by the power of two that their rows do not exceed.",
        labels=("model", "rows"),
    )
    for model, buckets in values.runs.items():
        for rows, (count, seconds) in sorted(buckets.items()):
            runs.add_metric((model, str(rows)), count, seconds)
    jobs = CounterMetricFamily(
        "asyncinfer_jobs", "Jobs that this worker is done with, by outcome.", labels=("outcome",)
    )
    for outcome, count in sorted(values.ended.items()):
        jobs.add_metric((outcome,), count)
    yield from (runs, jobs)
