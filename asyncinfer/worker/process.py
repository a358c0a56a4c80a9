"""A worker process, from where its models and its Redis are to its exit code."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any, Final

from msgspec import Struct

from asyncinfer.engine import Engine
from asyncinfer.errors import RedisUnavailable, StartError, StorageFull
from asyncinfer.models.folder import default_model
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.leftovers import Leftovers
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from asyncinfer.worker.held_claim import Step
from asyncinfer.worker.models.crash_guard import Careful
from asyncinfer.worker.models.engine_cache import Bounds, Shelf
from asyncinfer.worker.models.library import Library
from asyncinfer.worker.models.source import Source
from asyncinfer.worker.monitor import Metrics, Monitor, listen, monitored
from asyncinfer.worker.worker import Worker, WorkerConfig

log = logging.getLogger(__name__)

_CALL_SECONDS: Final = 10.0
_CONNECT_PAUSE_SECONDS: Final = 0.05
_SECOND_SIGNAL_EXIT: Final = 130
_FAILED_EXIT: Final = 1
_SWITCH_SECONDS: Final = 0.0005


class WorkerProcess(Struct, frozen=True, kw_only=True):
    """Where a worker finds its work and its models, and how it works."""

    redis_url: str
    queue_name: str
    policy: Policy
    source: Source
    bounds: Bounds = Bounds()
    default_model: str | None = None
    """As the operator set it; None: as first started, else by what is in the folder."""
    intra_op_threads: int = 1
    allow_custom_ops: bool = False
    monitor_port: int | None = None
    """Where probes ask; None: nowhere."""
    monitor_host: str = "127.0.0.1"
    worker: WorkerConfig


def run(config: WorkerProcess, on_step: Callable[[Step], None] = lambda _: None) -> int:
    """Works until SIGTERM or SIGINT; a second one ends it at once. Returns the exit code.

    Raises StartError when the server cannot be used, or the settings can never give a model.
    """
    with _listener(config) as listener:
        load = Careful(
            partial(
                Engine.load,
                intra_op_threads=config.intra_op_threads,
                allow_custom_ops=config.allow_custom_ops,
            ),
            allow_custom_ops=config.allow_custom_ops,
        )
        shelf = Shelf(load, config.bounds)
        library = Library(config.source, shelf, allow_custom_ops=config.allow_custom_ops)
        library.open()
        # A thread that renders results must not keep the loop from its next call for 5 ms.
        sys.setswitchinterval(_SWITCH_SECONDS)
        code = _exit_code(_work(config, library, listener, on_step))
    if code or library.is_loading:
        # A thread that would not stop cannot be joined, and the interpreter would wait for it.
        load.leave()
        logging.shutdown()
        os._exit(code)
    return code


@contextlib.contextmanager
def _listener(config: WorkerProcess) -> Iterator[socket.socket | None]:
    """Opened first, as a port that is taken ends the start."""
    if config.monitor_port is None:
        yield None
        return
    with contextlib.closing(listen(config.monitor_host, config.monitor_port)) as listener:
        yield listener


def _exit_code(work: Coroutine[Any, Any, int]) -> int:
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(work)
    except (StartError, KeyboardInterrupt):
        raise
    except Exception:
        log.exception("The worker failed.")
        return _FAILED_EXIT


async def _work(
    config: WorkerProcess,
    library: Library,
    listener: socket.socket | None,
    on_step: Callable[[Step], None],
) -> int:
    stopping = asyncio.Event()
    _on_signals(stopping)
    opened = Store.open(
        config.redis_url,
        queue_name=config.queue_name,
        policy=config.policy,
        name="asyncinfer-worker",
        call_seconds=_CALL_SECONDS,
    )
    async with monitored(listener) as monitor, opened as store:
        default = await _connected(store, config, library, stopping)
        if stopping.is_set():
            return 0
        worker = Worker(
            store,
            library,
            default,
            config.worker,
            on_step,
            default_is_set=config.default_model is not None,
        )
        monitor.unready = worker.unready
        async with asyncio.TaskGroup() as group:
            if listener:
                group.create_task(_show_metrics(monitor, worker, library))
            drained = group.create_task(_drain_when(stopping, worker))
            code = await worker.run()
            drained.cancel()
        return code


async def _connected(
    store: Store, config: WorkerProcess, library: Library, stopping: asyncio.Event
) -> str | None:
    """Waits for the server, or to be asked to stop; returns the default model where it is known,
    and has what the server knows loaded first."""
    told = False
    while not stopping.is_set():
        try:
            server = await store.check_server()
            default = await agreed_default(store, config.default_model)
            known = await Announcements(store).model_names()
        except (RedisUnavailable, StorageFull) as error:
            if not told:
                log.info("Waiting for Redis: %s", error.detail)
            told = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CONNECT_PAUSE_SECONDS):
                    await stopping.wait()
        else:
            log.info("Connected to %s. Models to load: %d.", server, len(library.names))
            # Jobs may wait for what was announced before.
            first = default or default_model(None, library.names)
            library.load_first([first, *known] if first else known)
            return default
    return None


async def agreed_default(store: Store, wanted: str | None) -> str | None:
    """The default model: as set, else as first started; None: as the folder will have it.

    Raises DefaultModelChanged when it is set to another one than jobs or living workers go by.
    """
    if wanted is None:
        return await store.default_model()
    await Leftovers(store).claim_default_model(wanted)
    return wanted


async def _show_metrics(monitor: Monitor, worker: Worker, library: Library) -> None:
    monitor.metrics = await asyncio.to_thread(_metrics, worker, library)


def _metrics(worker: Worker, library: Library) -> Metrics:
    # Imported late, and not by the loop: it takes a tenth of a second, and a worker without the
    # port need not have it at all.
    from asyncinfer.worker import metrics

    def counted() -> metrics.Counted:
        runs, ended = worker.counted()
        return metrics.Counted(
            served=list(library.announced().values()),
            refused=sorted(library.problems()),
            loaded=len(library.loaded),
            runs=runs,
            ended=ended,
        )

    return metrics.Metrics(counted)


async def _drain_when(stopping: asyncio.Event, worker: Worker) -> None:
    await stopping.wait()
    worker.drain()


def _on_signals(stopping: asyncio.Event) -> None:
    def asked() -> None:
        if stopping.is_set():
            os._exit(_SECOND_SIGNAL_EXIT)
        log.info("Draining: what runs is finished, nothing more is claimed.")
        stopping.set()

    loop = asyncio.get_running_loop()
    for one in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(one, asked)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop
