"""Sends commands on redis-py's connections, past its client, which costs too much."""

import functools
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final

import redis.exceptions as redis_errors
from hiredis import pack_command
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.sentinel import SentinelConnectionPool

# This is the only module that uses what redis-py offers without describing it in its documentation:
# the methods in `_EXPECTED`. `unexpected` finds whether the installed version still has them; if
# not, connections come from redis-py's own pool and commands go through its client. That took 23 %
# more CPU time a job in a worker whose jobs come one at a time, and 19 % more while it drains a
# queue; the pool alone is 7 % of the first, and less than can be measured of the second.

_LARGE_BYTES: Final = 64 << 10
_FEW_ARGUMENTS: Final = 32

_EXPECTED: Final[Mapping[type, Mapping[str, tuple[Any, ...]]]] = {
    AbstractConnection: {
        "connect": (),
        "disconnect": (),
        "pack_command": ("PING",),
        "send_packed_command": (b"", False),
        "read_response": (),
    },
    ConnectionPool: {
        "make_connection": (),
        "get_connection": (),
        "release": (None,),
        "disconnect": (False,),
    },
}
"""Methods, and arguments that they must take, in order."""

_CHECKS: Final = ("can_read", "can_read_destructive")
"""Names of the same method: since redis-py 8, and before."""

_has_unread: Final[Any] = next(
    (getattr(AbstractConnection, name) for name in _CHECKS if hasattr(AbstractConnection, name)),
    None,
)

_log = logging.getLogger(__name__)


class Pool(ConnectionPool):
    """A pool without redis-py's telemetry and lock. No lock is needed: one event loop uses the
    pool, and no method awaits between reading and changing its lists."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._ready: list[AbstractConnection] = []
        self._lent: set[AbstractConnection] = set()
        self._is_closed = False

    async def get_connection(self, *_: Any, **__: Any) -> AbstractConnection:
        """Lends a connected connection, which the caller gives back with `release`. Raises
        redis-py's ConnectionError if it cannot be connected, or the pool is closed."""
        connection = self._ready.pop() if self._ready else self._new_connection()
        self._lent.add(connection)
        try:
            if connection.is_connected:
                if not await _is_unusable(connection):
                    return connection
                await connection.disconnect()
            await connection.connect()  # type: ignore[no-untyped-call]
            if self._is_closed:
                raise redis_errors.ConnectionError("the pool is closed")
        except BaseException:
            await self.release(connection)
            raise
        return connection

    async def release(self, connection: AbstractConnection) -> None:
        """Takes a connection back."""
        self._lent.remove(connection)
        self._ready.append(connection)
        if self._is_closed:
            await connection.disconnect()

    async def close(self) -> None:
        """Disconnects all connections for good, also one that is being connected."""
        self._is_closed = True
        await self.disconnect()

    async def disconnect(self, inuse_connections: bool = True) -> None:
        """Disconnects the connections that are not lent, and by default also those that are."""
        for connection in (*self._ready, *(self._lent if inuse_connections else ())):
            await connection.disconnect()

    def _new_connection(self) -> AbstractConnection:
        connection: AbstractConnection = self.make_connection()  # type: ignore[no-untyped-call]
        return connection


class SentinelPool(Pool, SentinelConnectionPool):
    """A pool of connections to the server that the sentinels name as primary."""


def pools(is_direct: bool) -> tuple[type[ConnectionPool], type[SentinelConnectionPool]]:
    """The classes of pools: ours, over which `exchange` sends directly, or redis-py's."""
    return (Pool, SentinelPool) if is_direct else (ConnectionPool, SentinelConnectionPool)


async def _is_unusable(connection: AbstractConnection) -> bool:
    """Whether a reply was left unread on the connection, or the server hung up."""
    try:
        return bool(await _has_unread(connection))
    except (redis_errors.ConnectionError, redis_errors.TimeoutError, OSError):
        return True


async def exchange(client: Redis, command: tuple[Any, ...]) -> Any:
    """Sends a command and returns its reply as Redis sent it. Packs it with hiredis: packing in
    Python took longer than all the rest of a call of many arguments."""
    pool = client.connection_pool
    if not isinstance(pool, Pool):
        return await client.execute_command(*command)  # type: ignore[no-untyped-call]
    connection = await pool.get_connection()
    try:
        large = _is_large(command)
        packed = connection.pack_command(*command) if large else pack_command(command)
        await connection.send_packed_command(packed, False)
        return await connection.read_response()
    finally:
        await pool.release(connection)


def _is_large(command: tuple[Any, ...]) -> bool:
    """Whether an argument is so large that it should be sent without copying it into one buffer
    with the others. The caller of a command of many arguments has bounded their sizes."""
    return len(command) <= _FEW_ARGUMENTS and any(
        type(part) is bytes and len(part) > _LARGE_BYTES for part in command
    )


# --- whether redis-py is as expected ----------------------------------------------------------


@functools.cache
def is_as_expected() -> bool:
    """Whether the installed redis-py has all that this module uses; logs what it has not, once in a
    process."""
    found = list(unexpected(AbstractConnection, ConnectionPool))
    log_unexpected(found)
    return not found


def log_unexpected(found: Sequence[str]) -> None:
    """Logs what is not as expected, and what follows from it; nothing if all is."""
    if found:
        _log.warning(
            "%s So commands go through its client, which takes more CPU time.", " ".join(found)
        )


def unexpected(*classes: type) -> Iterator[str]:
    """What these classes, redis-py's connection and pool, lack of what is expected of them, each as
    a sentence."""
    for offered, methods in zip(classes, _EXPECTED.values(), strict=True):
        for name, args in methods.items():
            if not _takes(getattr(offered, name, None), args):
                yield f"redis-py {version('redis')} has no {_call(offered, name, args)}."
    connection = classes[0]
    if not any(hasattr(connection, name) for name in _CHECKS):
        yield f"redis-py {version('redis')} has no {_call(connection, _CHECKS[0], ())}."
    if not hasattr(connection, "is_connected"):
        yield f"redis-py {version('redis')} has no {connection.__name__}.is_connected."


def _takes(method: Any, args: Iterable[Any]) -> bool:
    """Whether the method can be called with these arguments after `self`."""
    try:
        inspect.signature(method).bind(None, *args)
    except TypeError:
        return False
    return True


def _call(offered: type, name: str, args: Iterable[Any]) -> str:
    return f"{offered.__name__}.{name}({', '.join(map(repr, args))})"


_SENT_AS_THEY_ARE: Final = ("BRPOP", "TYPE", "XREAD")


def keep_replies(client: Redis) -> Redis:
    """Makes a client return replies to the commands that `exchange` is called with as Redis sent
    them; returns the client."""
    for command in _SENT_AS_THEY_ARE:
        client.set_response_callback(command, _unchanged)  # type: ignore[arg-type]
    return client


def _unchanged(reply: Any, **_: Any) -> Any:
    return reply
