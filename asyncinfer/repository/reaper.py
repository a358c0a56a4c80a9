"""The background task that sweeps and repairs every queue."""

import asyncio
import logging
import random
import time
from typing import Final

from asyncinfer.errors import RedisUnavailable
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository.maintenance import Maintenance, Swept
from asyncinfer.repository.store import Store

log = logging.getLogger(__name__)
_limited = LimitedLog(log)

REPAIR_SECONDS: Final = 600.0


async def reap_forever(store: Store) -> None:
    """Sweeps about every tick; any number of processes make one sweep. Ends by cancellation."""
    maintenance = Maintenance(store)
    tick_seconds = store.policy.tick_ms / 1000
    repaired_at = time.monotonic()
    away = False
    while True:
        await asyncio.sleep(tick_seconds * random.uniform(0.5, 1.5))
        try:
            _report(await maintenance.sweep())
            if time.monotonic() - repaired_at > REPAIR_SECONDS:
                repaired_at = time.monotonic()
                if back := await maintenance.repair(REPAIR_SECONDS):
                    log.warning("Repair put back %d jobs found out of place.", back)
            away = False
        except RedisUnavailable as error:
            if not away:
                log.warning("Sweep: %s", error.detail)
            away = True
        except Exception as error:
            # Redis holds what anyone may write; no content may end the role that all rely on.
            _limited.unexpected("A sweep failed.", error)


def _report(swept: Swept) -> None:
    if swept.put_back or swept.dead:
        log.warning("Lost workers: %d jobs put back, %d dead letters.", swept.put_back, swept.dead)
