"""Sends one webhook over HTTP, to an address that was checked."""

import asyncio
import contextlib
import math
import ssl
import time
from collections.abc import Mapping
from typing import Final
from urllib.parse import unquote, urlsplit, urlunsplit

import httpcore2

from asyncinfer.errors import WebhookRefused
from asyncinfer.tls_errors import causes, tls_fault
from asyncinfer.webhooks.addresses import Address
from asyncinfer.webhooks.answers import TRY_SECONDS, Answer, Failure, retry_after_seconds
from asyncinfer.webhooks.network import MeteredNetwork, SocketOptions
from asyncinfer.webhooks.resolver import NameNotResolved, Resolver
from asyncinfer.webhooks.url_rules import Target, UrlRules

# httpcore2 is what httpx2 sends with. It is used by itself, since it follows no redirect, reads no
# proxy from the environment, decompresses nothing, and lets us make the connections.

_BODY_SECONDS: Final = 0.25
"""For the body of an answer, which is read so that the connection can be used again: the webhook is
delivered, or not, once the status has come."""
_CONNECT_SECONDS: Final = 5.0
"""For one address, so that a second one has its turn."""
_MAX_ADDRESSES: Final = 4
_MAX_CONNECTIONS: Final = 64
"""To all hosts: sockets beside the 900 of the API, within 1,024 open files."""
_MAX_IDLE_CONNECTIONS: Final = 32
_IDLE_SECONDS: Final = 5.0


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
            network_backend=MeteredNetwork() if proxy_url else _CheckedNetwork(rules, resolver),
        )

    async def __aenter__(self) -> "Poster":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pool.aclose()

    async def post(
        self,
        target: Target,
        headers: Mapping[str, str],
        body: bytes,
        *,
        most_seconds: float = math.inf,
    ) -> Answer:
        """Posts a body to a URL that was checked; raises nothing. An answer comes within
        15 s, or `most_seconds`, all together, and its status counts, whatever becomes of its
        body."""
        request = _request(target, headers, body)
        began_at = time.monotonic()
        try:
            async with asyncio.timeout(min(self._try_seconds, most_seconds)):
                reply = await self._pool.handle_async_request(request)
        except Exception as error:
            return Answer(0, _failure_of(error), _ms_since(began_at))
        duration_ms = _ms_since(began_at)
        await _finish(reply)
        return Answer(reply.status, "", duration_ms, _pause_seconds(reply))


def _request(target: Target, headers: Mapping[str, str], body: bytes) -> httpcore2.Request:
    url = httpcore2.URL(
        scheme=target.scheme, host=target.host, port=target.port, target=target.path
    )
    size = ("Content-Length", str(len(body)))
    fields = [("Host", target.authority), size, *headers.items()]
    return httpcore2.Request("POST", url, headers=fields, content=body)


async def _finish(reply: httpcore2.Response) -> None:
    """Reads the body if it comes at once, so that the connection can be used again; else the
    connection is closed."""
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for _ in reply.aiter_stream():
                pass
    except (TimeoutError, OSError, httpcore2.NetworkError, httpcore2.ProtocolError):
        pass
    finally:
        await reply.aclose()


def _pause_seconds(reply: httpcore2.Response) -> float:
    """The Retry-After of an answer."""
    by_name = {name.lower(): value for name, value in reply.headers}
    value = by_name.get(b"retry-after", b"").decode("latin-1")
    return retry_after_seconds(value, time.time())


def _ms_since(began_at: float) -> int:
    return round(1000 * (time.monotonic() - began_at))


def _proxy(url: str) -> httpcore2.Proxy:
    """The proxy at `http://user:password@host:port`."""
    parts = urlsplit(url)
    address = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], "/", "", ""))
    if parts.username is None:
        return httpcore2.Proxy(address)
    return httpcore2.Proxy(address, auth=(unquote(parts.username), unquote(parts.password or "")))


class _CheckedNetwork(httpcore2.AsyncNetworkBackend):
    """Resolves a host, checks all its addresses, and connects to one of those: what the name means
    a moment later does not matter."""

    def __init__(self, rules: UrlRules, resolver: Resolver) -> None:
        self._rules = rules
        self._resolver = resolver
        self._network = MeteredNetwork()

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
