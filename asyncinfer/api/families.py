"""The metrics of the API, as Prometheus reads them."""

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from asyncinfer import __version__
from asyncinfer.api.figures import REQUEST_LABELS
from asyncinfer.api.routes import EVERYWHERE, ROUTES
from asyncinfer.errors import (
    DiskFull,
    PermissionDenied,
    ReadOnlyReplica,
    RedisRefused,
    RedisUnavailable,
    RequestError,
    StorageFull,
    TooFewReplicas,
)
from asyncinfer.monitoring.counts import MAX_SERIES, OTHER, Labels
from asyncinfer.monitoring.exposition import (
    Family,
    counter,
    gauge,
    histogram,
    info,
    write_text,
)
from asyncinfer.monitoring.figures import Figures
from asyncinfer.monitoring.process_families import process_families
from asyncinfer.repository.inspect.overview import Loads, Memory, Overview
from asyncinfer.repository.inspect.queue_load import QueueLoad
from asyncinfer.webhooks.figures import TRY_LABELS

WORKER_STATES: Final = ("starting", "ready", "draining", "hung")

_EVERYWHERE: Final = " Equal on every replica: use max, not sum."

_HISTOGRAMS: Final[dict[str, tuple[Labels, str]]] = {
    "asyncinfer_request_seconds": (
        REQUEST_LABELS,
        "Time until the answer to a request was made, without the time to send it; of a stream, "
        'until its beginning. wait="yes": it asked to wait for a job. 499: the client had gone.',
    ),
    "asyncinfer_webhook_seconds": (("outcome",), "How long tries to send a webhook took."),
}
_COUNTERS: Final[dict[str, tuple[Labels, str]]] = {
    "asyncinfer_submits": (("model",), "Jobs that were accepted and stored."),
    "asyncinfer_refusals": (
        ("code",),
        "Requests, and lines of bulk requests, that were answered with an error, by its code.",
    ),
    "asyncinfer_webhook_tries": (
        TRY_LABELS,
        "Tries to send a webhook by what follows (delivered, retry, gone, given_up), with the "
        "status of the answer, or why there was none.",
    ),
    "asyncinfer_jobs": (
        ("model", "outcome", "code"),
        "Jobs that sweeps of this process failed, by outcome and code of the error.",
    ),
    "asyncinfer_redis_errors": (
        ("code",),
        "Calls that Redis did not answer, or refused, by the code of the error.",
    ),
    "asyncinfer_api_cpu_seconds": ((), "CPU time of the processes that answer requests."),
}
_REDIS_ERRORS: Final[tuple[type[RequestError], ...]] = (
    RedisUnavailable,
    RedisRefused,
    PermissionDenied,
    StorageFull,
    DiskFull,
    ReadOnlyReplica,
    TooFewReplicas,
)
_ZEROS: Final[dict[str, dict[Labels, float]]] = {
    "asyncinfer_refusals": dict.fromkeys(
        ((error.code,) for route in ROUTES for error in (*route.errors, *EVERYWHERE)), 0
    ),
    "asyncinfer_redis_errors": dict.fromkeys(((error.code,) for error in _REDIS_ERRORS), 0),
}
"""Counts of what has not occurred yet: Prometheus sees no increase in a series that begins with
1."""

_GAUGES: Final = {
    "asyncinfer_api_processes": "Processes that answer requests.",
    "asyncinfer_api_resident_memory_bytes": "Memory in RAM of the processes that answer requests.",
    "asyncinfer_streams_open": "Event streams that are open.",
    "asyncinfer_waits_open": "Requests that wait for a job.",
}
_QUEUE_GAUGES: Final[dict[str, tuple[str, Callable[[QueueLoad], float | None]]]] = {
    "asyncinfer_queue_delayed_jobs": (
        "Jobs that are not due yet: with a delay, or before another try.",
        lambda load: load.depth.delayed,
    ),
    "asyncinfer_queue_running_jobs": (
        "Jobs that workers have claimed.",
        lambda load: load.depth.running,
    ),
    "asyncinfer_queue_dead_jobs": ("Dead letters that are kept.", lambda load: load.depth.dead),
    "asyncinfer_queue_webhooks_reserved": (
        "Unfinished jobs with a webhook, and deliveries to come; at most MAX_WEBHOOKS.",
        lambda load: load.depth.webhooks.reserved,
    ),
    "asyncinfer_queue_webhooks_open": (
        "Deliveries of webhooks that are to come.",
        lambda load: load.depth.webhooks.open,
    ),
    "asyncinfer_queue_webhooks_due": (
        "Those of them that are due.",
        lambda load: load.depth.webhooks.due,
    ),
    "asyncinfer_queue_webhooks_given_up": (
        "Deliveries of webhooks that were given up within FAILED_TTL; at most 10,000.",
        lambda load: load.depth.webhooks.given_up,
    ),
    "asyncinfer_queue_webhooks_oldest_due_seconds": (
        "How long the delivery has been due that has been so for longest; 0 if none is.",
        lambda load: load.depth.webhooks.oldest_due_seconds or 0.0,
    ),
    "asyncinfer_queue_oldest_age_seconds": (
        "How long the job has waited that waits longest; 0 if none does.",
        lambda load: load.depth.oldest_age_seconds or 0.0,
    ),
    "asyncinfer_queue_backlog_seconds": (
        "Slot time of the jobs that are due; absent before the first run of the model.",
        lambda load: load.backlog_seconds,
    ),
    "asyncinfer_queue_paused": ("1: the model is paused.", lambda load: load.depth.paused),
    "asyncinfer_queue_workers": (
        "Living workers that claim jobs of the model.",
        lambda load: load.workers,
    ),
    "asyncinfer_queue_slots": ("Slots of those workers.", lambda load: load.slots),
    "asyncinfer_queue_starved": (
        "1: jobs are due, and no living worker has the model or loads it.",
        lambda load: load.is_starved,
    ),
}
"""By name the help, and the value of a queue; None: it is not known."""

_SUMMED: Final = ("_jobs", "_backlog_seconds", "_reserved", "_open", "_due", "_given_up")
"""The ends of the names of gauges that are added where queues share a label."""


def metrics_text(figures: Figures, overview: Overview | None) -> bytes:
    """The metrics of an API in the text format; `overview` is None if Redis did not answer."""
    return write_text(
        (*_process_families(figures), *_redis_families(overview), *process_families())
    )


def _process_families(figures: Figures) -> Iterator[Family]:
    """What API processes count and hold."""
    yield info("asyncinfer_build", "The release.", ("version",), [(__version__,)])
    for name, (labels, text) in _HISTOGRAMS.items():
        yield histogram(name, text, labels, figures.histograms.get(name, {}))
    for name, (labels, text) in _COUNTERS.items():
        values = {**_ZEROS.get(name, {}), **figures.counts.get(name, {})}
        yield counter(name, text, labels, values)
    for name, text in _GAUGES.items():
        yield gauge(name, text, (), figures.gauges.get(name, {(): 0}))


def _redis_families(overview: Overview | None) -> Iterator[Family]:
    """What Redis holds, and whether it takes jobs; if it does not answer, only that."""
    reachable = float(overview is not None)
    yield gauge("asyncinfer_redis_up", "1: Redis answered this request.", (), {(): reachable})
    if overview is None:
        return
    yield gauge(
        "asyncinfer_accepting",
        "1: Redis takes new jobs; 0: submits are refused.",
        (),
        {(): overview.is_accepting},
    )
    if overview.memory:
        yield from _memory_families(overview.memory)
    if overview.loads:
        yield _worker_family(overview.loads)
        yield from _queue_families(list(_loads_by_model(overview.loads)))


def _memory_families(memory: Memory) -> Iterator[Family]:
    """How much memory Redis uses, and may use."""
    figures = (
        ("asyncinfer_redis_memory_bytes", "Memory that Redis uses.", memory.used_bytes),
        ("asyncinfer_redis_max_memory_bytes", "Its maxmemory; 0: no limit.", memory.max_bytes),
    )
    for name, text, value in figures:
        yield gauge(name, text + _EVERYWHERE, (), {(): value})


def _worker_family(loads: Loads) -> Family:
    """How many workers live, by state."""
    workers: dict[Labels, float] = {(state,): 0.0 for state in WORKER_STATES}
    for worker in loads.workers:
        if (worker.state,) in workers:
            workers[worker.state,] += 1
    return gauge(
        "asyncinfer_workers", f"Living workers by state.{_EVERYWHERE}", ("state",), workers
    )


def _loads_by_model(loads: Loads) -> Iterator[tuple[str, QueueLoad]]:
    """The queues of announced models under the model's name, and all others under one label."""
    announced = 0
    for found in loads.queues:
        is_own = found.is_announced and found.model is not None and announced < MAX_SERIES
        announced += is_own
        yield (found.model or OTHER) if is_own else OTHER, found.load


def _queue_families(loads: Iterable[tuple[str, QueueLoad]]) -> Iterator[Family]:
    """The gauges of all queues. Those under one label are added, or the largest counts of those
    that have no sum."""
    waiting: dict[Labels, float] = {}
    for model, load in loads:
        for priority, jobs in zip(("high", "normal", "low"), load.depth.waiting, strict=True):
            waiting[model, priority] = waiting.get((model, priority), 0) + jobs
    yield gauge(
        "asyncinfer_queue_waiting_jobs",
        f"Jobs that wait and are due, by priority.{_EVERYWHERE}",
        ("model", "priority"),
        waiting,
    )
    for name, (text, read) in _QUEUE_GAUGES.items():
        combine = sum if name.endswith(_SUMMED) else max
        values: dict[Labels, float] = {}
        for model, load in loads:
            if (value := read(load)) is not None:
                known = values.get((model,), 0.0)
                values[model,] = combine((known, float(value)))
        yield gauge(name, text + _EVERYWHERE, ("model",), values)
