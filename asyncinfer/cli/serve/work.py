"""`asyncinfer work`: a worker process."""

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from asyncinfer.cli.exit_codes import EXIT_INTERRUPTED
from asyncinfer.cli.serve import configuration
from asyncinfer.cli.serve.log_setup import set_up_logging
from asyncinfer.errors import RedisUnavailable
from asyncinfer.processes.tuning import tune_for_start
from asyncinfer.settings import Settings
from asyncinfer.settings import read as read_settings

_log = logging.getLogger(__name__)

_ANNOUNCE_SECONDS: Final = 5.0
"""By then the worker of a `serve` that started at the same time has announced itself."""

_PAUSE_SECONDS: Final = 0.1


def work_from_environment() -> int:
    """Runs a worker with the settings of the environment alone, and returns its exit code.

    Raises StartError, also for a setting that cannot be used.
    """
    return run_work(read_settings(os.environ, {}))


def run_work(settings: Settings) -> int:
    """Works until SIGINT or SIGTERM, finishes the running jobs, and returns the exit code.

    Raises StartError if there is no Redis, or the settings can give no model. A second signal ends
    the process at once.
    """
    configuration.check_traces(settings)
    set_up_logging("worker", settings.log_level, settings.log_format)
    tune_for_start()
    with _exiting_at_once():
        from asyncinfer.worker.process import run

    url = configuration.reachable_redis_url(settings)
    return run(configuration.worker_process(_with_models_of_serve(settings, url), url))


@contextlib.contextmanager
def _exiting_at_once() -> Iterator[None]:
    """Signals end the process without an exception inside this block.

    The import of a native module turns an exception into an ImportError, which filled the log of a
    `serve` that was stopped as it started.
    """
    exits = {signal.SIGTERM: 0, signal.SIGINT: EXIT_INTERRUPTED}
    previous_handlers = {
        number: signal.signal(number, lambda *_, code=code: os._exit(code))
        for number, code in exits.items()
    }
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def _with_models_of_serve(settings: Settings, url: str) -> Settings:
    """Settings with the models of the `serve` whose embedded Valkey is used, if none are set.

    Else this worker would serve the shipped models beside that `serve`, and nobody would notice.
    Returns the settings unchanged with a Redis of the user's, or if no worker is found within 5 s.
    """
    has_models = settings.model_dir or settings.model or Path("model").is_dir()
    if has_models or configuration.redis_url(settings) is not None:
        return settings
    import asyncio

    served = asyncio.run(_path_served_here(settings, url))
    if served is None or not served.exists():
        return settings
    _log.info("Serves %s, as the running `asyncinfer serve` does; MODEL_DIR is not set.", served)
    setting = "model_dir" if served.is_dir() else "model"
    return msgspec.structs.replace(settings, **{setting: served})


async def _path_served_here(settings: Settings, url: str) -> Path | None:
    """The folder or file of the worker that was started first on this machine: that of `serve`.

    None if no worker announces itself in time.
    """
    import anyio

    from asyncinfer.repository.unserved_models import UnservedModels

    async with configuration.store(settings, url) as store:
        leftovers = UnservedModels(store, all_here=True)
        give_up_at = time.monotonic() + _ANNOUNCE_SECONDS
        while time.monotonic() < give_up_at:
            try:
                workers = await leftovers.workers()
            except RedisUnavailable:
                workers = []
            host = socket.gethostname()
            local = [worker for worker in workers if worker.model_dir and worker.host == host]
            if local:
                first = min(local, key=lambda worker: worker.started_ms or 0)
                return Path(first.model_dir or "")
            await anyio.sleep(_PAUSE_SECONDS)
    return None
