"""The endpoint: REDIS_URL, parsed, and the clients for it."""

import functools
import inspect
from typing import Any, Final

import redis
from msgspec import Struct
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.connection import ConnectionPool, SSLConnection
from redis.asyncio.retry import Retry as AsyncRetry
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel

from asyncinfer import redis_url
from asyncinfer.errors import InvalidSetting
from asyncinfer.redis_url import RedisUrl
from asyncinfer.repository.wire import TlsConnection, TlsSentinelConnection

_CONNECT_SECONDS: Final = 0.5
_TLS_CONNECT_SECONDS: Final = 2.0
"""Three round trips instead of one, and the time to load the certificates that are trusted."""


class Endpoint(Struct, frozen=True):
    """The server of a parsed REDIS_URL, or the sentinels that name it."""

    url: RedisUrl

    @classmethod
    def parse(cls, url: str) -> "Endpoint":
        """Raises InvalidSetting for a URL of no known form."""
        parsed = redis_url.parse(url)
        for option in sorted(parsed.tls.keys() - inspect.signature(SSLConnection).parameters):
            raise InvalidSetting(
                f"REDIS_URL has the option {option}, which redis-py {redis.__version__} does not "
                "have. Install a newer redis-py, or leave the option out."
            )
        return cls(parsed)

    def client(self, name: str) -> AsyncRedis:
        """An asyncio client whose pool makes connections that repeat no command by themselves."""
        options = {**self._options(name), "socket_timeout": None, **_no_retry()}
        if not self.url.sentinels:
            return _client(options)
        sentinel = AsyncSentinel([])  # type: ignore[no-untyped-call]
        sentinel.sentinels = [self.sentinel_client(*address) for address in self.url.sentinels]
        if options.pop("ssl", False):
            options["connection_class"] = TlsSentinelConnection
        client: AsyncRedis = sentinel.master_for(self.url.service, **options)
        return client

    def sentinel_client(self, host: str, port: int) -> AsyncRedis:
        """An asyncio client for one sentinel."""
        return _client({"host": host, "port": port, **self._sentinel_options(), **_no_retry()})

    def sync_client(self, name: str, *, reply_seconds: float) -> redis.Redis:
        """A blocking client, for the thread that renews leases."""
        options = {**self._options(name), "socket_timeout": reply_seconds}
        if not self.url.sentinels:
            return redis.Redis(**options, retry=Retry(NoBackoff(), 1))
        sentinel = Sentinel(
            list(self.url.sentinels),
            sentinel_kwargs={**self._sentinel_options(), "retry": Retry(NoBackoff(), 0)},
        )  # type: ignore[no-untyped-call]
        options["retry"] = Retry(NoBackoff(), 0)
        client: redis.Redis = sentinel.master_for(self.url.service, **options)  # type: ignore[no-untyped-call]
        return client

    def _options(self, name: str) -> dict[str, Any]:
        """What redis-py must know of connections to the server."""
        url = self.url
        place: dict[str, Any] = {}
        if url.socket_path:
            place = {"unix_socket_path": url.socket_path}
        elif url.host:
            place = {"host": url.host, "port": url.port}
        if url.keepalive is not None:
            place["socket_keepalive"] = url.keepalive
        return {
            **place,
            **self._tls_options(url.has_tls),
            "db": url.database,
            "username": url.username,
            "password": url.password,
            "protocol": 2,
            "client_name": name,
            "socket_connect_timeout": _TLS_CONNECT_SECONDS if url.has_tls else _CONNECT_SECONDS,
            **driver_options(),
        }

    def _sentinel_options(self) -> dict[str, Any]:
        """What redis-py must know of connections to sentinels."""
        return {
            **self._tls_options(self.url.sentinel_tls),
            "username": self.url.sentinel_username,
            "password": self.url.sentinel_password,
            "protocol": 2,
            "socket_timeout": _SENTINEL_SECONDS,
            "socket_connect_timeout": (
                _TLS_SENTINEL_SECONDS if self.url.sentinel_tls else _SENTINEL_SECONDS
            ),
            **driver_options(),
        }

    def _tls_options(self, has_tls: bool) -> dict[str, Any]:
        if not has_tls:
            return {}
        # Before its release 6 redis-py compared no host names unless it was told to, and failed if
        # it was told to without verification.
        options = {"ssl": True, "ssl_check_hostname": True, **self.url.tls}
        if options.get("ssl_cert_reqs") == "none":
            options["ssl_check_hostname"] = False
        return options


def _no_retry() -> dict[str, Any]:
    return {"retry": AsyncRetry(NoBackoff(), 0)}


def _client(options: dict[str, Any]) -> AsyncRedis:
    if not options.pop("ssl", False):
        return AsyncRedis(**options)
    return AsyncRedis.from_pool(ConnectionPool(connection_class=TlsConnection, **options))


@functools.cache
def driver_options() -> dict[str, Any]:
    """The option of a connection that says what redis-py is, where redis-py has one. Without it
    each new connection reads the version from the files of the package, which takes 0.6 ms."""
    return {"driver_info": redis.DriverInfo()} if hasattr(redis, "DriverInfo") else {}


_SENTINEL_SECONDS: Final = 0.2
_TLS_SENTINEL_SECONDS: Final = 1.0
"""A sentinel that is down must not use up the time of a call, so that the next can be asked."""


async def close(client: AsyncRedis) -> None:
    """Closes a client and its connections to sentinels, if any."""
    pool = client.connection_pool
    await client.aclose()
    if isinstance(pool, SentinelConnectionPool):
        for sentinel in pool.sentinel_manager.sentinels:
            await sentinel.aclose()
