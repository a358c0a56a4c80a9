"""The endpoint: REDIS_URL, parsed, and the clients for it."""

import functools
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

import redis
from msgspec import Struct
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel

from asyncinfer.errors import InvalidSetting

_SENTINEL_PORT: Final = 26379
_CONNECT_SECONDS: Final = 0.5


class Endpoint(Struct, frozen=True):
    """A parsed REDIS_URL.

    It accepts `redis://`, `rediss://` and `unix://` as redis-py does, and
    `sentinel://[user:password@]host[:26379],host2/service[/db]`.
    """

    url: str
    sentinels: tuple[tuple[str, int], ...] = ()
    service: str = ""
    options: dict[str, Any] = {}

    @classmethod
    def parse(cls, url: str) -> "Endpoint":
        """Raises InvalidSetting for a URL of no known form."""
        scheme = url.partition("://")[0]
        if scheme in ("redis", "rediss", "unix"):
            return cls(url)
        if scheme == "sentinel":
            return _sentinel(url)
        raise InvalidSetting(
            f"REDIS_URL starts with {scheme!r}://; it must be redis://, rediss://, unix:// or "
            "sentinel://host:26379,host2:26379/service."
        )

    def client(self, name: str) -> AsyncRedis:
        """An asyncio client whose pool makes connections that repeat no command by themselves."""
        options = {
            **self._common(name),
            "socket_timeout": None,
            "retry": AsyncRetry(NoBackoff(), 0),
        }
        if not self.sentinels:
            return AsyncRedis.from_url(self.url, **options)
        sentinel_options = {
            **_SENTINEL_OPTIONS,
            **driver_options(),
            "retry": AsyncRetry(NoBackoff(), 0),
        }
        sentinel = AsyncSentinel(list(self.sentinels), sentinel_kwargs=sentinel_options)  # type: ignore[no-untyped-call]
        client: AsyncRedis = sentinel.master_for(self.service, **{**self.options, **options})
        return client

    def sync_client(self, name: str, *, reply_seconds: float) -> redis.Redis:
        """A blocking client, for the thread that renews leases."""
        options = {
            **self._common(name),
            "socket_timeout": reply_seconds,
            "retry": Retry(NoBackoff(), 0 if self.sentinels else 1),
        }
        if not self.sentinels:
            return redis.Redis.from_url(self.url, **options)
        sentinel_options = {**_SENTINEL_OPTIONS, **driver_options(), "retry": Retry(NoBackoff(), 0)}
        sentinel = Sentinel(list(self.sentinels), sentinel_kwargs=sentinel_options)  # type: ignore[no-untyped-call]
        client: redis.Redis = sentinel.master_for(self.service, **{**self.options, **options})  # type: ignore[no-untyped-call]
        return client

    @staticmethod
    def _common(name: str) -> dict[str, Any]:
        return {
            "protocol": 2,
            "client_name": name,
            "socket_connect_timeout": _CONNECT_SECONDS,
            **driver_options(),
        }


@functools.cache
def driver_options() -> dict[str, Any]:
    """The option of a connection that says what redis-py is, where redis-py has one. Without it
    each new connection reads the version from the files of the package, which takes 0.6 ms."""
    return {"driver_info": redis.DriverInfo()} if hasattr(redis, "DriverInfo") else {}


# A sentinel that is down must not use up the time of a call, so that the next one can be asked.
_SENTINEL_OPTIONS: Final = {"socket_timeout": 0.2, "socket_connect_timeout": 0.2}


async def close(client: AsyncRedis) -> None:
    """Closes a client and its connections to sentinels, if any."""
    pool = client.connection_pool
    await client.aclose()
    if isinstance(pool, SentinelConnectionPool):
        for sentinel in pool.sentinel_manager.sentinels:
            await sentinel.aclose()


def _sentinel(url: str) -> Endpoint:
    # urlsplit of Python 3.13 refuses a list of hosts in which an IPv6 address is not the first.
    authority, _, rest = url.partition("://")[2].partition("/")
    parts = urlsplit("/" + rest.lstrip("/"))
    service, _, database = parts.path.strip("/").partition("/")
    userinfo, _, hosts = authority.rpartition("@")
    user, _, password = userinfo.partition(":")
    try:
        sentinels = tuple(_parse_sentinel(host) for host in hosts.split(","))
        options: dict[str, Any] = {"db": int(database or 0)}
    except ValueError as error:
        raise InvalidSetting(_SENTINEL_FORM) from error
    if not service:
        raise InvalidSetting(_SENTINEL_FORM)
    if password:
        options |= {"username": unquote(user) or None, "password": unquote(password)}
    if parse_qs(parts.query).get("ssl") == ["true"]:
        options["ssl"] = True
    return Endpoint(url, sentinels, service, options)


_SENTINEL_FORM: Final = (
    "REDIS_URL with sentinel:// must name sentinels and a service: "
    "sentinel://host:26379,host2:26379/service."
)


def _parse_sentinel(text: str) -> tuple[str, int]:
    """Host and port of a sentinel written `host[:port]`; the port is 26379 if there is none. Raises
    ValueError if there is no host or the port is no number."""
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError("a sentinel without a host")
    return parts.hostname, parts.port or _SENTINEL_PORT
