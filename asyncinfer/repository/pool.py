"""Connections of one process, taken and given back at little cost."""

from typing import Any

from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.sentinel import SentinelConnectionPool


class Pool(ConnectionPool):
    """redis-py's without its telemetry and its lock: they took a third of a call's time. One event
    loop uses a pool, and nothing here pauses between a look and a change."""

    async def get_connection(self, *_: Any, **__: Any) -> AbstractConnection:
        connection: AbstractConnection = self.get_available_connection()  # type: ignore[no-untyped-call]
        try:
            if not connection.is_connected or await connection.can_read():
                # To be connected; or there is a reply nobody took, or the server hung up.
                await self.ensure_connection(connection)
        except BaseException:
            await self.release(connection)
            raise
        return connection

    async def release(self, connection: AbstractConnection) -> None:
        self._in_use_connections.remove(connection)
        if connection.should_reconnect():  # type: ignore[no-untyped-call]
            await connection.disconnect()
        self._available_connections.append(connection)


class SentinelPool(Pool, SentinelConnectionPool):
    """Of whichever server the sentinels call primary."""
