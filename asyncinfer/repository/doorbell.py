"""The doorbell: how an idle worker waits for jobs of any of several queues."""

import contextlib
from collections.abc import Sequence

from asyncinfer.errors import StorageFull
from asyncinfer.repository import keys
from asyncinfer.repository.store import BlockingConnection, Store


class Doorbell:
    """Waits for doorbell tokens. A token carries no job: it makes an idle worker look for jobs, so
    that a lost token loses nothing."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._connection: BlockingConnection = store.blocking_connection()

    async def wait(self, queues: Sequence[str], seconds: float) -> str | None:
        """Waits for a token; returns its queue, or None if none came. Raises RedisUnavailable."""
        key = await self._connection.pop([keys.wake(queue) for queue in queues], seconds)
        return key[1:].removesuffix("}:wake") if key else None

    async def ring(self, queue: str) -> None:
        """Returns a token taken by a worker that cannot claim."""
        # With Redis's memory full the token is lost; an idle worker looks by itself a moment later.
        with contextlib.suppress(StorageFull):
            await self._store.command("LPUSH", keys.wake(queue), "1")

    async def close(self) -> None:
        await self._connection.close()
