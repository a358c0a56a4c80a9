"""Waiting for a doorbell token of any of several queues."""

import contextlib
from collections.abc import Sequence

from asyncinfer.errors import StorageFull
from asyncinfer.repository import keys
from asyncinfer.repository.store import Blocking, Store


class Doorbell:
    """Where an idle worker waits. A lost token loses nothing: it only says "look"."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._blocking: Blocking = store.blocking()

    async def wait(self, queues: Sequence[str], seconds: float) -> str | None:
        """The queue that rang, or None; raises RedisUnavailable."""
        drawn = await self._blocking.pop([keys.wake(queue) for queue in queues], seconds)
        return drawn[1:].removesuffix("}:wake") if drawn else None

    async def ring(self, queue: str) -> None:
        """Hands a token back that was drawn by a worker that cannot claim."""
        # With memory full it is lost, and an idle worker looks by itself a moment later.
        with contextlib.suppress(StorageFull):
            await self._store.command("LPUSH", keys.wake(queue), "1")

    async def close(self) -> None:
        await self._blocking.close()
