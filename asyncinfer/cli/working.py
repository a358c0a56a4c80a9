"""`asyncinfer work`: a worker, alone."""

import os

from asyncinfer import settings
from asyncinfer.cli import parts
from asyncinfer.cli.lean import lean_start
from asyncinfer.cli.telling import set_up_logging
from asyncinfer.settings import Settings


def work_as_set() -> int:
    """With the settings of the environment alone."""
    return work(settings.read(os.environ, {}))


def work(chosen: Settings) -> int:
    set_up_logging()
    lean_start()
    from asyncinfer.worker.process import run

    return run(parts.worker_process(chosen, parts.reachable_redis_url(chosen)))
