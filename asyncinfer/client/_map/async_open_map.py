"""A map under way in tasks of an event loop: whatever ends it early cancels its jobs, once."""

import asyncio
import contextlib

from asyncinfer.client._drivers import AsyncDriver
from asyncinfer.client._errors import (
    ClientClosed,
    ConnectionFailed,
    WaitTimeout,
    raise_client_closed,
)
from asyncinfer.client._map import jobs
from asyncinfer.client._map.open_map import CANCEL_PAUSES
from asyncinfer.client._map.tasks import FlowTasks
from asyncinfer.client._requests import RemoteServer


class AsyncOpenMap:
    """The same as OpenMap for the tasks of a map in an event loop."""

    def __init__(self, server: RemoteServer, driver: AsyncDriver, group: str, size: int) -> None:
        self._server = server
        self._driver = driver
        self._group = group
        self.tasks = FlowTasks(driver, size)
        self._lock = asyncio.Lock()
        self._has_ended = False

    async def __aenter__(self) -> "AsyncOpenMap":
        self._driver.open_maps.add(self)
        return self

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            if error is not None:
                await self._end(error)
        finally:
            self._driver.open_maps.discard(self)
            self.tasks.stop()
            await self.tasks.join()

    def raise_if_ended(self) -> None:
        """Raises ClientClosed if the close of the client has ended the map."""
        if self._has_ended:
            raise_client_closed()

    async def end(self) -> None:
        """Cancels the jobs that have not ended, as `OpenMap.end`; waits if that is under way."""
        await self._end(None)

    async def _end(self, error: BaseException | None) -> None:
        """As `end`; after an error by which the server is away or the time is over it cancels
        nothing."""
        async with self._lock:
            if self._has_ended:
                return
            self._has_ended = True
            self.tasks.stop()
            if not isinstance(error, ConnectionFailed | ClientClosed | WaitTimeout):
                with contextlib.suppress(ClientClosed):
                    await self._cancel()

    async def _cancel(self) -> None:
        """Cancels the jobs, waits for the requests in flight, and cancels again; gives up if the
        server does not answer."""
        for seconds in CANCEL_PAUSES:
            if not await self._driver.run(jobs.cancel(self._server, self._group)):
                return
            if await self.tasks.have_ended_within(seconds):
                break
        await self.tasks.join(0)
        await self._driver.run(jobs.cancel(self._server, self._group))
