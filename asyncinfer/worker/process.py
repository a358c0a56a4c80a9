"""A worker process: connects, loads models, works until a signal, and returns the exit code."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from asyncinfer.engine import Engine
from asyncinfer.errors import RedisUnavailable, StartError, StorageFull
from asyncinfer.models.folder import default_model
from asyncinfer.monitoring.page import MetricsPage, WriteText
from asyncinfer.monitoring.port import open_listener
from asyncinfer.processes import tuning
from asyncinfer.processes.outage import report_of
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.rights import check_start
from asyncinfer.repository.store import Store
from asyncinfer.repository.unserved_models import UnservedModels
from asyncinfer.timeouts import set_within
from asyncinfer.worker.families import metrics_text
from asyncinfer.worker.figures import WorkerFigures, WorkerMetrics
from asyncinfer.worker.held_claim import Step
from asyncinfer.worker.models.crash_guard import CrashGuard
from asyncinfer.worker.models.engine_cache import CacheBounds, EngineCache
from asyncinfer.worker.models.library import Library
from asyncinfer.worker.models.source import ModelSource
from asyncinfer.worker.monitor import serve_monitor
from asyncinfer.worker.worker import Worker, WorkerConfig

if TYPE_CHECKING:
    from asyncinfer.telemetry.tracing import Tracing

_log = logging.getLogger(__name__)

_CALL_SECONDS: Final = 10.0
_CONNECT_PAUSE_SECONDS: Final = 0.05
_SECOND_SIGNAL_EXIT: Final = 130
_FAILED_EXIT: Final = 1


class WorkerProcessConfig(Struct, frozen=True, kw_only=True):
    """The configuration of a worker process: its Redis, its models, and how it works."""

    redis_url: str
    queue_name: str
    policy: Policy
    source: ModelSource
    bounds: CacheBounds = CacheBounds()
    default_model: str | None = None
    """As configured; None: the one that Redis names, else by what is in the folder."""
    intra_op_threads: int = 1
    allow_custom_ops: bool = False
    monitor_port: int | None = None
    """The port for probes and metrics; None: there is none."""
    monitor_host: str = "127.0.0.1"
    worker: WorkerConfig
    tracing: "Tracing | None" = None
    """Records the spans of jobs; None: there are none. `run` closes it at its end."""


def run(config: WorkerProcessConfig, on_step: Callable[[Step], None] = lambda _: None) -> int:
    """Works until SIGTERM or SIGINT, then drains; a second signal ends the process at once.

    Returns 0. Ends the process itself if the exit code is another one (1 after an unexpected error,
    EXIT_HUNG), or if a model is still being loaded: such a thread cannot be stopped. Raises
    StartError when the server or the monitor port cannot be used, or the settings can give no
    model.
    """
    # The monitor port is opened first, so that a port in use ends the start.
    with _opened_listener(config) as listener:
        guard = CrashGuard(
            partial(
                Engine.load,
                intra_op_threads=config.intra_op_threads,
                allow_custom_ops=config.allow_custom_ops,
            ),
            allow_custom_ops=config.allow_custom_ops,
        )
        figures = WorkerFigures()
        cache = EngineCache(figures.measured(guard), config.bounds)
        library = Library(config.source, cache, allow_custom_ops=config.allow_custom_ops)
        library.open()
        tuning.switch_threads_sooner()
        code = _exit_code(_work(config, library, figures, listener, on_step))
    if config.tracing:
        config.tracing.close()
    if code or cache.is_loading:
        # A thread that does not stop cannot be joined, and the interpreter would wait for it.
        guard.prepare_exit()
        logging.shutdown()
        os._exit(code)
    return code


def _opened_listener(config: WorkerProcessConfig) -> AbstractContextManager[socket.socket | None]:
    """The socket of the monitor port as a block, None without one; raises StartError if it cannot
    be opened."""
    if config.monitor_port is None:
        return contextlib.nullcontext()
    return contextlib.closing(open_listener(config.monitor_host, config.monitor_port, "MONITOR"))


def _exit_code(work: Coroutine[Any, Any, int]) -> int:
    """Returns what `work` returns, run in a new event loop; logs an unexpected error and returns 1
    for it. Raises StartError."""
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(work)
    except (StartError, KeyboardInterrupt):
        raise
    except Exception:
        _log.exception("The worker failed.")
        return _FAILED_EXIT


async def _work(
    config: WorkerProcessConfig,
    library: Library,
    figures: WorkerFigures,
    listener: socket.socket | None,
    on_step: Callable[[Step], None],
) -> int:
    """Connects and works until a signal; returns the exit code of `Worker.run`, or 0 if the signal
    came before that. Raises StartError when the server cannot be used."""
    stopping = asyncio.Event()
    _on_signals(stopping)
    opened = Store.open(
        config.redis_url,
        queue_name=config.queue_name,
        policy=config.policy,
        name="asyncinfer-worker",
        call_seconds=_CALL_SECONDS,
        report=report_of(config.redis_url),
    )
    async with serve_monitor(listener) as monitor, opened as store:
        default = await _connect(store, config, library, stopping)
        if stopping.is_set():
            return 0
        worker = Worker(
            store,
            library,
            default,
            config.worker,
            on_step,
            default_is_set=config.default_model is not None,
            tracing=config.tracing,
            figures=figures,
        )
        monitor.why_not_ready = worker.why_not_ready
        monitor.metrics = MetricsPage(partial(_read_metrics, worker, library, store, config))
        async with asyncio.TaskGroup() as group:
            drain_task = group.create_task(_drain_when(stopping, worker))
            code = await worker.run()
            drain_task.cancel()
        _log.info("Stopped.")
        return code


async def _connect(
    store: Store, config: WorkerProcessConfig, library: Library, stopping: asyncio.Event
) -> str | None:
    """Waits for the server, or a signal to stop. Returns the default model, None if it is not known
    yet or the worker is to stop. Raises StartError if the server cannot be used, or the default
    model cannot be changed.

    Has the library load the default model first, and then the models that Redis knows.
    """
    while not stopping.is_set():
        try:
            server = await check_start(store)
            default = await agree_on_default_model(store, config.default_model)
            known = await Announcements(store).read_model_names()
        except (RedisUnavailable, StorageFull):
            await set_within(stopping, _CONNECT_PAUSE_SECONDS)
        else:
            _log.info("Connected to %s. Models to load: %d.", server, len(library.table.names))
            # Jobs may wait for models that were announced before.
            first = default or default_model(None, library.table.names)
            library.table.load_first([first, *known] if first else known)
            return default
    return None


async def agree_on_default_model(store: Store, configured: str | None) -> str | None:
    """The default model: the `configured` one, which is written to Redis, else the one that Redis
    names; None if neither is there, so that the folder decides.

    Raises DefaultModelChanged when another one is configured than jobs or live workers use, and
    RedisUnavailable or StorageFull.
    """
    if configured is None:
        return await store.default_model()
    await UnservedModels(store).claim_default_model(configured)
    return configured


async def _read_metrics(
    worker: Worker, library: Library, store: Store, config: WorkerProcessConfig
) -> WriteText:
    """Reads the present figures of this worker; returns what writes them, in a thread."""
    values = WorkerMetrics(
        served=list(library.table.uncontested_signatures().values()),
        refused=sorted(library.table.problems()),
        loaded=len(library.cache.labels),
        loaded_bytes=library.cache.size_bytes,
        slots=config.worker.concurrency,
        busy=worker.busy_slots,
        counts={**worker.figures.counts(), "asyncinfer_redis_errors": dict(store.errors)},
        histograms=worker.figures.histograms(),
    )
    return partial(metrics_text, values)


async def _drain_when(stopping: asyncio.Event, worker: Worker) -> None:
    """Waits for the signal to stop, then begins to drain the worker."""
    await stopping.wait()
    worker.begin_drain()


def _on_signals(stopping: asyncio.Event) -> None:
    """Makes SIGTERM and SIGINT set `stopping`, and a second one end the process at once with exit
    code 130. Call it in the event loop."""

    def on_signal() -> None:
        if stopping.is_set():
            os._exit(_SECOND_SIGNAL_EXIT)
        _log.info("Draining: jobs under way are finished, and no more are claimed.")
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's event loop, which Windows does not have; None stands for asyncio's own."""
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop
