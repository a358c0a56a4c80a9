"""`asyncinfer work`: a worker, alone."""

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

from asyncinfer import settings
from asyncinfer.cli.exit_codes import EXIT_INTERRUPTED
from asyncinfer.cli.serve import configuration
from asyncinfer.cli.serve.log_setup import set_up_logging
from asyncinfer.errors import RedisUnavailable
from asyncinfer.processes.tuning import lean_start
from asyncinfer.settings import Settings

_log = logging.getLogger(__name__)

_HEARING_SECONDS: Final = 5.0
"""A `serve` that was started at the same time has a worker by then."""

_PAUSE_SECONDS: Final = 0.1


def work_as_set() -> int:
    """With the settings of the environment alone."""
    return run_work(settings.read(os.environ, {}))


def run_work(chosen: Settings) -> int:
    set_up_logging()
    lean_start()
    with _ended_at_once():
        from asyncinfer.worker.process import run

    url = configuration.reachable_redis_url(chosen)
    return run(configuration.worker_process(_beside_serve(chosen, url), url))


@contextlib.contextmanager
def _ended_at_once() -> Iterator[None]:
    """A signal ends the process with no exception: the import of a native module turns one into
    an ImportError, which filled the log of a `serve` that was stopped as it started."""
    exits = {signal.SIGTERM: 0, signal.SIGINT: EXIT_INTERRUPTED}
    before = {
        number: signal.signal(number, lambda *_, code=code: os._exit(code))
        for number, code in exits.items()
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _beside_serve(chosen: Settings, url: str) -> Settings:
    """The models of the `serve` whose Valkey this is, where nothing says which to serve: the
    shipped ones would be served beside it, and nobody would notice."""
    is_told = chosen.model_dir or chosen.model or Path("model").is_dir()
    if is_told or configuration.redis_url(chosen) is not None:
        return chosen
    import asyncio

    served = asyncio.run(_served_beside(chosen, url))
    if served is None or not served.exists():
        return chosen
    _log.info("Serves %s, as the running `asyncinfer serve` does; MODEL_DIR is not set.", served)
    setting = "model_dir" if served.is_dir() else "model"
    return msgspec.structs.replace(chosen, **{setting: served})


async def _served_beside(chosen: Settings, url: str) -> Path | None:
    """What the worker on this machine serves that was started first: the one of `serve`."""
    import anyio

    from asyncinfer.repository.leftovers import Leftovers

    async with configuration.store(chosen, url) as store:
        leftovers = Leftovers(store, all_here=True)
        give_up_at = time.monotonic() + _HEARING_SECONDS
        while time.monotonic() < give_up_at:
            try:
                workers = await leftovers.workers()
            except RedisUnavailable:
                workers = []
            heard = [one for one in workers if one.model_dir and one.host == socket.gethostname()]
            if heard:
                first = min(heard, key=lambda one: one.started_ms or 0)
                return Path(first.model_dir or "")
            await anyio.sleep(_PAUSE_SECONDS)
    return None
