"""Why the server of REDIS_URL does not answer, in words; asked at the start, before it ever did."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import redis.exceptions as redis_errors
from msgspec import Struct

from asyncinfer.repository.endpoint import Endpoint, close
from asyncinfer.repository.redis_errors import (
    CALL_ERRORS,
    login_refusal,
    server_refusal,
    tls_refusal,
)
from asyncinfer.tls_errors import causes, tls_fault

_PROBE_SECONDS: Final = 0.8
_MAX_SENTINELS: Final = 5
_PING: Final = b"PING\r\n"
_TLS_ALERT: Final = b"\x15\x03"
_REPLIES: Final = (b"+", b"-")


class Diagnosis(Struct, frozen=True):
    reason: str
    """What is wrong, and what to do."""
    is_final: bool
    """Whether the same connection will fail until a person changes something."""


class _Place(Struct, frozen=True):
    """A server or a sentinel, and how it is connected to."""

    host: str
    port: int
    has_tls: bool
    tls: dict[str, Any]
    """The `ssl_` options for it."""
    is_sentinel: bool = False

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


async def diagnose(endpoint: Endpoint, error: Exception) -> Diagnosis:
    """Why a connection failed with `error`, which may take a second to find out: it connects to
    the server once more, or to the sentinels."""
    url = endpoint.url
    if url.socket_path:
        return _of_socket(url.socket_path, error)
    if url.sentinels:
        return await _of_sentinels(endpoint, error)
    return await _of_place(_Place(url.host, url.port, url.has_tls, url.tls), error, url.database)


def _of_socket(path: str, error: Exception) -> Diagnosis:
    for cause in causes(error):
        if isinstance(cause, FileNotFoundError):
            return Diagnosis(f"there is no socket {path}", is_final=False)
        if isinstance(cause, PermissionError):
            return Diagnosis(f"this user may not use the socket {path}", is_final=True)
        if isinstance(cause, ConnectionRefusedError):
            return Diagnosis(f"nothing listens at the socket {path}", is_final=False)
    return Diagnosis(f"{path}: {type(error).__name__}", is_final=False)


async def _of_place(place: _Place, error: Exception, database: int = 0) -> Diagnosis:
    if isinstance(error, redis_errors.AuthenticationError) and place.is_sentinel:
        return Diagnosis(login_refusal(error, is_sentinel=True), is_final=True)
    if refusal := server_refusal(error, database):
        return Diagnosis(refusal, is_final=True)
    if fault := tls_fault(error):
        return Diagnosis(f"{place}: {tls_refusal(fault)}", is_final=True)
    for cause in causes(error):
        if isinstance(cause, socket.gaierror):
            return Diagnosis(f"the host name {place.host} is not known", is_final=False)
        if isinstance(cause, ConnectionRefusedError):
            return Diagnosis(f"nothing listens at {place}", is_final=False)
    found = await (_probe_with_tls(place) if place.has_tls else _probe_without_tls(place))
    if found:
        return Diagnosis(f"{place}: {found}", is_final=True)
    if isinstance(error, TimeoutError | redis_errors.TimeoutError):
        return Diagnosis(f"{place} is silent", is_final=False)
    if place.has_tls and "ssl_certfile" not in place.tls:
        hint = " (some do that to clients without a certificate: ssl_certfile and ssl_keyfile)"
    else:
        hint = ""
    return Diagnosis(f"{place} ends the connection{hint}", is_final=False)


# --- probes: what a port speaks --------------------------------------------------------------


async def _probe_with_tls(place: _Place) -> str:
    """Why TLS to a port fails without an error of TLS; empty if that is not found."""
    if (await _reply_to_ping(place)).startswith(_REPLIES):
        instead = "leave out sentinel_ssl" if place.is_sentinel else "use redis://"
        return (
            f"this port speaks no TLS. Where the network is yours {instead}, else give a TLS port"
        )
    try:
        async with _connected(place, _unverified(place.tls)) as (reader, _):
            # A server that wants another client certificate says so after the handshake. Had the
            # probe sent anything, its end of the connection would hide that.
            await reader.read(1)
    except ssl.SSLError as error:
        fault = tls_fault(error)
        return tls_refusal(fault) if fault else ""
    except (OSError, TimeoutError):
        pass
    return ""


async def _probe_without_tls(place: _Place) -> str:
    """Says that a port speaks TLS; empty if it does not, or that is not found."""
    reply = await _reply_to_ping(place)
    if reply.startswith(_REPLIES):
        return ""
    if reply and not reply.startswith(_TLS_ALERT):
        return "another program than Redis answers there. Correct host and port in REDIS_URL"
    if not reply:
        try:
            async with _connected(place, _unverified({})):
                pass
        except (OSError, TimeoutError):
            return ""
    return (
        f"this port speaks TLS. {'Add sentinel_ssl=true' if place.is_sentinel else 'Use rediss://'}"
    )


async def _reply_to_ping(place: _Place) -> bytes:
    """The first bytes of the reply to PING without TLS; empty if none comes."""
    try:
        async with _connected(place, None) as (reader, writer):
            writer.write(_PING)
            return await reader.read(8)
    except (OSError, TimeoutError):
        return b""


@asynccontextmanager
async def _connected(
    place: _Place, context: ssl.SSLContext | None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection for `_PROBE_SECONDS`. Raises OSError and TimeoutError."""
    async with asyncio.timeout(_PROBE_SECONDS):
        reader, writer = await asyncio.open_connection(place.host, place.port, ssl=context)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def _unverified(tls: dict[str, Any]) -> ssl.SSLContext:
    """For a probe, which sends and believes nothing; with the client certificate of the options."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if certificate := tls.get("ssl_certfile"):
        password = tls.get("ssl_password", "")
        context.load_cert_chain(certificate, tls.get("ssl_keyfile"), lambda: password)
    return context


# --- sentinels -------------------------------------------------------------------------------


async def _of_sentinels(endpoint: Endpoint, error: Exception) -> Diagnosis:
    found = []
    url = endpoint.url
    for host, port in url.sentinels[:_MAX_SENTINELS]:
        place = _Place(host, port, url.sentinel_tls, url.tls, is_sentinel=True)
        answer = await _ask_sentinel(endpoint, place)
        if isinstance(answer, _Place):
            return await _of_place(answer, error, url.database)
        found.append(answer)
    reasons = "; ".join(dict.fromkeys(diagnosis.reason for diagnosis in found))
    return Diagnosis(
        f"no sentinel names a server: {reasons}", all(diagnosis.is_final for diagnosis in found)
    )


async def _ask_sentinel(endpoint: Endpoint, place: _Place) -> _Place | Diagnosis:
    """The primary that a sentinel names, or why it names none."""
    service = endpoint.url.service
    client = endpoint.sentinel_client(place.host, place.port)
    try:
        reply: Any = await client.execute_command(  # type: ignore[no-untyped-call]
            "SENTINEL GET-MASTER-ADDR-BY-NAME", service
        )
    except (redis_errors.AuthenticationError, redis_errors.NoPermissionError) as error:
        refusal = login_refusal(error, is_sentinel=True)
        return Diagnosis(f"{place}: {refusal}", is_final=True)
    except redis_errors.ResponseError as error:
        if "unknown command" in str(error):
            found = f"{place} is no sentinel. If it is the server, use redis://"
            return Diagnosis(found, is_final=True)
        return await _of_place(place, error)
    except CALL_ERRORS as error:
        return await _of_place(place, error)
    finally:
        await close(client)
    if not reply:
        return Diagnosis(f"{place} knows no service {service!r}", is_final=False)
    host, port = (part.decode() if isinstance(part, bytes) else str(part) for part in reply)
    return _Place(host, int(port), endpoint.url.has_tls, place.tls)
