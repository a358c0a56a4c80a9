"""Which libraries of scripts are in use, and the end of those that are not."""

import logging
import re
from itertools import islice
from typing import Final

from asyncinfer.errors import RedisRefused, StorageFull
from asyncinfer.jobs import now_ms
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository import keys
from asyncinfer.repository.scripts import LIBRARY_PREFIX, library
from asyncinfer.repository.store import Store

ROUND_SECONDS: Final = 60.0
"""How often a process names its library."""

UNUSED_ROUNDS: Final = 10
"""In so many rounds, one after the other, no process has named a library that is deleted."""

_MAX_WATCHED: Final = 1000
_NAME: Final = re.compile(rf"{LIBRARY_PREFIX}[0-9a-f]+".encode())

_logger = logging.getLogger(__name__)
_log = LimitedLog(_logger)


class Libraries:
    """Names the library of this process, and deletes libraries that no process names any more: each
    release has its own, and Redis keeps them through restarts. One object for each process.

    Rounds are counted instead of time, so that an outage or a jump of a clock, in which no process
    could name its library, deletes none. A process whose library was deleted nevertheless, as one
    of another QUEUE_NAME on the same server may find, loads it again with its next call.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._key = keys.libraries(store.queue_name)
        self._silent: dict[bytes, tuple[bytes, int]] = {}
        """{library of others: (its last value, for how many rounds it has been the same)}."""

    async def tidy(self) -> list[str]:
        """Makes one round; returns the libraries that it deleted. Raises RedisUnavailable."""
        if self._store.functions.are_refused:
            return []
        try:
            await self._store.command("HSET", self._key, library().name, now_ms())
            named: dict[bytes, bytes] = await self._store.command("HGETALL", self._key)
        except StorageFull:
            return []
        except RedisRefused as error:
            _log.warning(f"The libraries of older releases stay in Redis: {error.detail}")
            return []
        named.pop(library().name.encode(), None)
        others = (item for item in named.items() if _NAME.fullmatch(item[0]))
        self._silent = {
            name: (value, self._rounds_without_change(name, value))
            for name, value in islice(others, _MAX_WATCHED)
        }
        unused = [name for name, (_, rounds) in self._silent.items() if rounds >= UNUSED_ROUNDS]
        return [name.decode() for name in unused if await self._delete(name)]

    def _rounds_without_change(self, name: bytes, value: bytes) -> int:
        before, rounds = self._silent.get(name, (b"", 0))
        return rounds + 1 if before == value else 0

    async def _delete(self, name: bytes) -> bool:
        """Deletes a library; returns whether this process did it."""
        # First the name: of several processes that find it unused, one deletes the library.
        if not await self._store.command("HDEL", self._key, name):
            return False
        try:
            await self._store.command("FUNCTION", "DELETE", name)
        except RedisRefused as error:
            if "Library not found" not in error.detail:
                _logger.warning("The library %s stays in Redis: %s", name.decode(), error.detail)
            return False
        return True
