"""A worker's metrics, as Prometheus reads them."""

from collections.abc import Iterator
from typing import Final

from asyncinfer import __version__
from asyncinfer.monitoring.counts import Labels
from asyncinfer.monitoring.exposition import (
    Family,
    counter,
    gauge,
    histogram,
    info,
    write_text,
)
from asyncinfer.monitoring.process_families import process_families
from asyncinfer.worker.figures import WorkerMetrics

_VERSION_LABELS: Final = ("model", "version")


_COUNTERS: Final[dict[str, tuple[Labels, str]]] = {
    "asyncinfer_jobs": (
        ("model", "outcome", "code"),
        "Jobs that this worker is done with, and those that its claims and sweeps failed, by "
        "outcome and code of the error. Of these, completed, failed, dead and cancelled ended the "
        "job.",
    ),
    "asyncinfer_model_loads": (
        ("model", "outcome"),
        "Loads of versions, by whether one was loaded or refused.",
    ),
    "asyncinfer_redis_errors": (
        ("code",),
        "Calls that Redis did not answer, or refused, by the code of the error.",
    ),
}
_HISTOGRAMS: Final = {
    "asyncinfer_run_seconds": "How long runs took.",
    "asyncinfer_run_rows": "Rows of runs.",
    "asyncinfer_job_wait_seconds": "From the submit of a job, or from when it was due, to its "
    "claim by this worker.",
    "asyncinfer_model_load_seconds": "How long loads of versions took, with their probes.",
    "asyncinfer_model_probe_seconds": "The part of a load in which the model is examined and run "
    "with made-up inputs.",
}


def metrics_text(values: WorkerMetrics) -> bytes:
    """The metrics of a worker in the text format."""
    return write_text((*_model_families(values), *_work_families(values), *process_families()))


def _model_families(values: WorkerMetrics) -> Iterator[Family]:
    """What each version is, whether it shares runs or was refused, and what is in memory."""
    yield info("asyncinfer_build", "The release.", ("version",), [(__version__,)])
    yield info(
        "asyncinfer_model",
        "A version that is served, and why its jobs share runs, or not.",
        (*_VERSION_LABELS, "sha256", "batching"),
        [(one.model, one.version, one.sha256, one.batching) for one in values.served],
    )
    yield gauge(
        "asyncinfer_model_batched",
        "Whether jobs of this version share runs.",
        _VERSION_LABELS,
        {(one.model, one.version): one.batched for one in values.served},
    )
    yield gauge(
        "asyncinfer_model_refused",
        "1: something is wrong with this version's file.",
        _VERSION_LABELS,
        dict.fromkeys(values.refused, 1),
    )
    yield gauge("asyncinfer_models_loaded", "Versions in memory.", (), {(): values.loaded})
    yield gauge(
        "asyncinfer_models_loaded_bytes",
        "Size of the files of versions in memory.",
        (),
        {(): values.loaded_bytes},
    )


def _work_families(values: WorkerMetrics) -> Iterator[Family]:
    """Slots, runs, jobs, loads and errors of Redis."""
    yield gauge("asyncinfer_slots", "Batches that may run at once.", (), {(): values.slots})
    yield gauge("asyncinfer_slots_busy", "Slots that have a claim.", (), {(): values.busy})
    for name, (labels, text) in _COUNTERS.items():
        yield counter(name, text, labels, values.counts.get(name, {}))
    for name, text in _HISTOGRAMS.items():
        yield histogram(name, text, ("model",), values.histograms.get(name, {}))
