"""The background task that sweeps and repairs every queue, and tidies the libraries."""

import asyncio
import logging
import random
import time
from typing import Final

import anyio

from asyncinfer.errors import RedisUnavailable, StorageFull
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository.failed_jobs_log import FailedJobsLog
from asyncinfer.repository.libraries import ROUND_SECONDS, Libraries
from asyncinfer.repository.maintenance import Maintenance
from asyncinfer.repository.redis_errors import log_refused
from asyncinfer.repository.store import Store

_log = logging.getLogger(__name__)
_limited_log = LimitedLog(_log)

REPAIR_SECONDS: Final = 600.0


async def reap_forever(store: Store, failed_jobs: FailedJobsLog) -> None:
    """Sweeps every tick, tidies the libraries every minute and repairs every 10 minutes, until it
    is cancelled. However many processes run it, each sweep is done once. Jobs that a sweep ends as
    failed are noted in `failed_jobs`."""
    maintenance, libraries = Maintenance(store), Libraries(store)
    tick_seconds = store.policy.tick_ms / 1000
    repaired_at, tidied_at = time.monotonic(), -ROUND_SECONDS
    while True:
        await asyncio.sleep(tick_seconds * random.uniform(0.5, 1.5))
        try:
            await _sweep(maintenance, failed_jobs)
            if time.monotonic() - tidied_at > ROUND_SECONDS:
                tidied_at = time.monotonic()
                for name in await libraries.tidy():
                    _log.info("No process uses the library %s any more: it was deleted.", name)
            if time.monotonic() - repaired_at > REPAIR_SECONDS:
                repaired_at = time.monotonic()
                if restored := await maintenance.repair(REPAIR_SECONDS):
                    _log.warning("Repair put back %d jobs found out of place.", restored)
        except RedisUnavailable as error:
            log_refused(_limited_log, "Sweep", error)
        except StorageFull:
            continue
        except Exception as error:
            # Redis holds data that anyone may write; no content may end the task that all rely on.
            _limited_log.unexpected("A sweep failed.", error)


async def _sweep(maintenance: Maintenance, failed_jobs: FailedJobsLog) -> None:
    """Sweeps once, and logs what was lost."""
    swept = await maintenance.sweep()
    if swept.put_back or swept.dead:
        _log.warning("Lost workers: %d jobs put back, %d dead letters.", swept.put_back, swept.dead)
    if swept.failed:
        # Nobody else knows of them, if this process ends meanwhile.
        with anyio.CancelScope(shield=True):
            await failed_jobs.note_failed_by_script(swept.failed)
