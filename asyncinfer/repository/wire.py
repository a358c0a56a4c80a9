"""What `Link` needs of redis-py that redis-py does not document, and what to do without it."""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, Final

import redis.exceptions as redis_errors
from redis.asyncio import Redis
from redis.asyncio.connection import Connection, ConnectionPool, SSLConnection
from redis.asyncio.sentinel import SentinelManagedSSLConnection

# This is the only module that uses names of redis-py that its documentation does not have: those
# below, and `ssl_context`, without which nothing is shared. `unexpected` finds whether the
# installed version has the others; if not, all commands go through redis-py's client and pool,
# where each call has a connection of its own and time-outs count the whole call. That took 23 %
# more CPU time a job in a worker whose jobs come one at a time, and 19 % more while it drains a
# queue.

_SHARED_SECONDS: Final = 10.0
"""To load all certificates that are trusted takes 70 ms and more, in which the event loop stands
still; a store opens five connections at once."""

_tls_contexts: Final[dict[tuple[tuple[str, Any], ...], tuple[float, Any]]] = {}
"""By the TLS options of a pool, when the last TLS context with them was made, and that context. A
process has one REDIS_URL, so there is one entry."""

_STREAMS: Final = ("_reader", "_writer")
_log = logging.getLogger(__name__)


async def connect(client: Redis) -> asyncio.StreamWriter:
    """A connection that redis-py has made and logged in, and which is the caller's now. Raises
    redis-py's exceptions and OSError."""
    connection: Any = client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    try:
        await connection.connect()
    except BaseException as error:
        await connection.disconnect()
        # At a Unix socket redis-py hides the refusal of a login in another error.
        if isinstance(error.__cause__, redis_errors.AuthenticationError):
            raise error.__cause__ from None
        raise
    writer: asyncio.StreamWriter = connection._writer
    connection._reader = connection._writer = None
    return writer


class TlsConnection(SSLConnection):
    """A connection with TLS that shares its context with those made just before."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        _share_context(self, options)


class TlsSentinelConnection(SentinelManagedSSLConnection):
    """As `TlsConnection`, to the server that the sentinels name."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        _share_context(self, options)


def _share_context(connection: Any, options: dict[str, Any]) -> None:
    """Shares a context for a short time only, so that certificates which were renewed are read.

    A new one is loaded here, before a time-out begins to count.
    """
    if not hasattr(connection, "ssl_context"):
        return
    key = tuple(sorted(item for item in options.items() if item[0].startswith("ssl_")))
    now = time.monotonic()
    made_at, context = _tls_contexts.get(key, (0.0, None))
    if context is not None and now - made_at < _SHARED_SECONDS:
        connection.ssl_context = context
        return
    # A file that has become unusable is reported by the connection.
    with contextlib.suppress(OSError):
        connection.ssl_context.get()
    _tls_contexts.clear()
    _tls_contexts[key] = now, connection.ssl_context


class ClientLink:
    """Calls through redis-py's client; the methods are those of `Link`."""

    moved_at = 0.0

    def __init__(self, client: Redis) -> None:
        self._client = client
        client.response_callbacks.clear()

    async def ask(
        self,
        command: tuple[Any, ...],
        silence_seconds: float,
        before_send: Callable[[], None] = lambda: None,
    ) -> Any:
        # Whether the client will have a connection is not known here.
        before_send()
        async with asyncio.timeout(silence_seconds):
            return await self._client.execute_command(*command)  # type: ignore[no-untyped-call]

    async def ask_together(
        self, commands: Sequence[tuple[Any, ...]], silence_seconds: float
    ) -> list[Any]:
        pipeline = self._client.pipeline(transaction=True)
        for command in commands:
            pipeline.execute_command(*command)
        async with asyncio.timeout(silence_seconds):
            return await pipeline.execute()

    def open_ahead(self) -> None:
        """Does nothing: the pool connects when a call needs it."""

    async def disconnect(self) -> None:
        await self._client.connection_pool.disconnect()

    async def close(self) -> None:
        await self.disconnect()


@functools.cache
def is_as_expected() -> bool:
    """Whether the installed redis-py has all that `connect` uses; logs what it has not, once in a
    process."""
    found = unexpected(Connection(), ConnectionPool)
    if found:
        _log.warning(
            "redis-py %s has no %s. So commands go through its client, which takes more CPU time.",
            *(version("redis"), ", ".join(found)),
        )
    return not found


def unexpected(connection: Any, pool: type) -> list[str]:
    """The names that `connect` uses and this connection, or this class of pools, lacks."""
    wanted = {connection: (*_STREAMS, "connect", "disconnect"), pool: ("make_connection",)}
    return [name for owner, names in wanted.items() for name in names if not hasattr(owner, name)]
