"""Sends one webhook over HTTP, to an address that was checked."""

import asyncio
import contextlib
import ssl
import time
from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import unquote, urlsplit, urlunsplit

import httpcore2

from asyncinfer.errors import WebhookRefused
from asyncinfer.tls_errors import causes, tls_fault
from asyncinfer.webhooks.addresses import Address
from asyncinfer.webhooks.answers import TRY_SECONDS, Answer, Failure, retry_after_seconds
from asyncinfer.webhooks.resolver import NameNotResolved, Resolver
from asyncinfer.webhooks.url_rules import Target, UrlRules

# httpcore2 is what httpx2 sends with. It is used by itself, since it follows no redirect, reads no
# proxy from the environment, decompresses nothing, and lets us make the connections.

MAX_ANSWER_BYTES: Final = 64 << 10
_CONNECT_SECONDS: Final = 5.0
"""For one address, so that a second one has its turn."""
_MAX_ADDRESSES: Final = 4
_MAX_CONNECTIONS: Final = 64
"""To all hosts: sockets beside the 900 of the API, within 1,024 open files."""
_MAX_IDLE_CONNECTIONS: Final = 32
_IDLE_SECONDS: Final = 5.0

SocketOptions = Iterable[
    tuple[int, int, int] | tuple[int, int, bytes | bytearray] | tuple[int, int, None, int]
]


class Poster:
    """Sends webhooks, for one event loop; an `async with` closes its connections."""

    def __init__(
        self,
        rules: UrlRules,
        resolver: Resolver,
        *,
        proxy_url: str | None = None,
        try_seconds: float = TRY_SECONDS,
    ) -> None:
        """With a proxy, that resolves names and makes the connections; only literal addresses are
        checked then."""
        self._try_seconds = try_seconds
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=ssl.create_default_context(),
            proxy=_proxy(proxy_url) if proxy_url else None,
            max_connections=_MAX_CONNECTIONS,
            max_keepalive_connections=_MAX_IDLE_CONNECTIONS,
            keepalive_expiry=_IDLE_SECONDS,
            network_backend=None if proxy_url else _CheckedNetwork(rules, resolver),
        )

    async def __aenter__(self) -> "Poster":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pool.aclose()

    async def post(self, target: Target, headers: Mapping[str, str], body: bytes) -> Answer:
        """Posts a body to a URL that was checked; raises nothing. Takes 15 s at most, all
        together."""
        began_at = time.monotonic()
        try:
            async with asyncio.timeout(self._try_seconds):
                status, pause_seconds = await self._exchange(target, headers, body)
                failure: Failure = ""
        except Exception as error:
            status, pause_seconds, failure = 0, 0.0, _failure_of(error)
        duration_ms = round(1000 * (time.monotonic() - began_at))
        return Answer(status, failure, duration_ms, pause_seconds)

    async def _exchange(
        self, target: Target, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, float]:
        """Sends the request; returns status and Retry-After of the answer."""
        url = httpcore2.URL(
            scheme=target.scheme, host=target.host, port=target.port, target=target.path
        )
        fields = [("Host", target.authority), *headers.items()]
        async with self._pool.stream("POST", url, headers=fields, content=body) as answer:
            await _discard(answer)
            by_name = {name.lower(): value for name, value in answer.headers}
            value = by_name.get(b"retry-after", b"").decode("latin-1")
            return answer.status, retry_after_seconds(value, time.time())


def _proxy(url: str) -> httpcore2.Proxy:
    """The proxy at `http://user:password@host:port`."""
    parts = urlsplit(url)
    address = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], "/", "", ""))
    if parts.username is None:
        return httpcore2.Proxy(address)
    return httpcore2.Proxy(address, auth=(unquote(parts.username), unquote(parts.password or "")))


async def _discard(answer: httpcore2.Response) -> None:
    """Reads the answer's body, so that the connection can be used again; one of more than 64 KiB
    is not read to its end."""
    size_bytes = 0
    async for part in answer.aiter_stream():
        size_bytes += len(part)
        if size_bytes > MAX_ANSWER_BYTES:
            return


class _CheckedNetwork(httpcore2.AsyncNetworkBackend):
    """Resolves a host, checks all its addresses, and connects to one of those: what the name means
    a moment later does not matter."""

    def __init__(self, rules: UrlRules, resolver: Resolver) -> None:
        self._rules = rules
        self._resolver = resolver
        self._network = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 the name is httpcore2's
        local_address: str | None = None,
        socket_options: SocketOptions | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Raises WebhookRefused, NameNotResolved, or as httpcore2's own."""
        found = await self._resolver.addresses_of(host)
        for address in found:
            self._rules.check_address(host, port, address)
        *others, last = found[:_MAX_ADDRESSES]
        for address in others:
            with contextlib.suppress(httpcore2.ConnectError, httpcore2.ConnectTimeout):
                return await self._connect(address, port, local_address, socket_options)
        return await self._connect(last, port, local_address, socket_options)

    async def _connect(
        self,
        address: Address,
        port: int,
        local_address: str | None,
        socket_options: SocketOptions | None,
    ) -> httpcore2.AsyncNetworkStream:
        return await self._network.connect_tcp(
            str(address), port, _CONNECT_SECONDS, local_address, socket_options
        )


def _failure_of(error: Exception) -> Failure:
    """The word for an error of a try."""
    for cause in causes(error):
        if isinstance(cause, WebhookRefused):
            return "address_refused"
        if isinstance(cause, NameNotResolved):
            return "name_not_resolved"
    if tls_fault(error):
        return "tls_failed"
    if isinstance(error, TimeoutError | httpcore2.TimeoutException):
        return "timeout"
    if isinstance(error, httpcore2.ProtocolError):
        return "no_valid_answer"
    return "connection_failed"
