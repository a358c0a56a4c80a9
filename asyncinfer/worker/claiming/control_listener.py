"""The reader of control streams: jobs that run and are to be cancelled or have expired."""

import logging
from collections.abc import Callable, Iterable
from typing import Final

from asyncinfer.errors import RedisUnavailable
from asyncinfer.jobs import id_text
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository import keys
from asyncinfer.repository.redis_errors import log_refused
from asyncinfer.repository.store import Store
from asyncinfer.timeouts import pause_before_retry
from asyncinfer.untrusted import decoding

_log = LimitedLog(logging.getLogger(__name__))

_READ_SECONDS: Final = 5.0
_GROWING_SECONDS: Final = 0.1
"""How long a read takes while models are loaded: it does not read the queues that come
meanwhile."""


class ControlListener:
    """Reads the control streams of this worker's queues; one instance per worker."""

    def __init__(self, store: Store, on_message: Callable[[str, str], None]) -> None:
        """`on_message` is called with the kind of message ("cancel", "expire", ...) and the job's
        id, also for jobs of other workers."""
        self._store = store
        self.serve(())
        self._on_message = on_message
        self._blocking = store.blocking_connection()
        self._last_ids: dict[str, bytes] = {}

    def serve(self, queues: Iterable[str], *, is_growing: bool = False) -> None:
        """Reads these queues from the next read on, and always QUEUE_NAME itself; of a queue that
        is new, only entries from then on. `is_growing` limits a read to a tenth of a second, since
        more queues are about to come."""
        self._is_growing = is_growing
        self._streams = [keys.control(queue) for queue in {self._store.queue_name, *queues}]

    async def listen(self) -> None:
        """Passes messages to `on_message` until closed. Retries while Redis is away; a message
        missed meanwhile comes with the next renewal of the lease."""
        while not self._blocking.closed:
            try:
                await self._start_new_streams()
                await self._read()
            except RedisUnavailable as error:
                if not self._blocking.closed:
                    log_refused(_log, "Control", error)
                    await pause_before_retry()

    async def close(self) -> None:
        """Ends `listen`, also during a read."""
        await self._blocking.close()

    async def _start_new_streams(self) -> None:
        """Begins each new stream at its newest entry; older entries are skipped. Raises
        RedisUnavailable."""
        for stream in self._streams:
            if stream not in self._last_ids:
                newest = await self._store.read(
                    *("XREVRANGE", stream, "+", "-", "COUNT", 1), otherwise=()
                )
                self._last_ids[stream] = bytes(newest[0][0]) if newest else b"0"

    async def _read(self) -> None:
        """Waits a few seconds for new entries and passes each to `on_message`. Raises
        RedisUnavailable."""
        seconds = _GROWING_SECONDS if self._is_growing else _READ_SECONDS
        # `serve` may have added streams since `_start_new_streams`.
        last_ids = {name: self._last_ids[name] for name in self._streams if name in self._last_ids}
        for stream, entry_id, fields in await self._blocking.read(last_ids, seconds):
            self._last_ids[stream] = entry_id
            for kind, job_id in fields.items():
                self._on_message(decoding.text(kind), id_text(job_id))
