"""What people do to a whole queue: pause, resume, purge."""

from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Store, encode_args


class Operation:
    """The verbs on a whole queue."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def pause(self, queue: str, *, paused: bool) -> bool:
        """Stops or resumes giving jobs out, while they are still taken in; whether that is new."""
        return bool(
            await self._store.call(script("pause"), [queue], [encode_args({"paused": paused})])
        )

    async def purge(self, queue: str) -> int:
        """Ends all jobs that wait as cancelled, 1,000 a call; returns how many."""
        args = [encode_args(self._store.policy.ending())]
        ended, left = await self._store.call(script("purge"), [queue], args)
        while left:
            more, left = await self._store.call(script("purge"), [queue], args)
            ended += more
        return int(ended)
