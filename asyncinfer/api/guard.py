"""Who is let in: the Host, Origin and API key of a request."""

import logging
import os
import time
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from starlette.types import Scope

from asyncinfer.access import Keyring
from asyncinfer.api.authority import Authority, authority_of
from asyncinfer.api.config import ApiConfig
from asyncinfer.api.probes import HEALTH_PATHS
from asyncinfer.api.routes import KeyScope
from asyncinfer.errors import (
    Forbidden,
    HostRefused,
    InvalidHeader,
    KeyFileRefused,
    OriginRefused,
    Unauthorized,
)
from asyncinfer.jobs import DEFAULT_TENANT

_LOCAL_HOSTS: Final = ("localhost", "127.0.0.1", "[::1]")
_EVERY_ADDRESS: Final = ("0.0.0.0", "::", "")
_SAFE_METHODS: Final = frozenset({"GET", "HEAD"})
_STAT_SECONDS: Final = 1.0

_log = logging.getLogger(__name__)


class Guard:
    """Without it any page open in a browser could talk to an API on localhost: its name may be
    made to point here (Host), and it may send forms anywhere (Origin)."""

    def __init__(self, config: ApiConfig) -> None:
        self._hosts = frozenset(
            name.lower() for name in (*_LOCAL_HOSTS, _bracketed(config.host), *config.allowed_hosts)
        )
        self._any_host = "*" in self._hosts
        self._any_address = config.host in _EVERY_ADDRESS
        self._origins = frozenset(origin.lower().rstrip("/") for origin in config.allowed_origins)
        self._keys = KeyFile(config.api_keys) if config.api_keys else None

    def admit(self, needed: KeyScope | None, scope: Scope, headers: Mapping[bytes, bytes]) -> str:
        """The tenant that the caller is; raises when the request may not pass."""
        authority = authority_of(scope, headers)
        self._check_host(authority, scope)
        if scope["method"] not in _SAFE_METHODS and b"origin" in headers:
            self._check_origin(headers[b"origin"].decode("latin-1").lower(), authority)
        if self._keys is None or needed is None:
            return DEFAULT_TENANT
        return _tenant(self._keys.current(), needed, headers)

    def _check_host(self, authority: Authority | None, scope: Scope) -> None:
        if authority is None:
            _check_probe(scope)
            return
        name = authority.host
        if self._any_host or name in self._hosts:
            return
        # A page elsewhere can make a name point here, but not an address.
        if self._any_address and _is_address(name):
            return
        raise HostRefused(
            f"This server does not answer as {name[:100]!r}. Use its address, or add the name to "
            "ALLOWED_HOSTS."
        )

    def _check_origin(self, origin: str, authority: Authority | None) -> None:
        if origin in self._origins:
            return
        if authority and origin in (f"http://{authority.text}", f"https://{authority.text}"):
            return
        raise OriginRefused(
            f"Pages from {origin[:100]!r} may not change anything here; add the origin to "
            "ALLOWED_ORIGINS if they should."
        )


class KeyFile:
    """The keys in a file, read again when it changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = _stamp(path)
        self._keyring = Keyring.load(path)
        self._looked_at = time.monotonic()

    def current(self) -> Keyring:
        """A file that cannot be read keeps the keys it had: a slip must not lock all out."""
        now = time.monotonic()
        if now - self._looked_at >= _STAT_SECONDS:
            self._looked_at = now
            if (stamp := _stamp(self._path)) != self._stamp:
                self._stamp = stamp
                self._reload()
        return self._keyring

    def _reload(self) -> None:
        try:
            self._keyring = Keyring.load(self._path)
        except KeyFileRefused as error:
            _log.error("API keys stay as they were: %s", error.detail)
        else:
            _log.info("API keys read again from %s", self._path)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _tenant(keyring: Keyring, needed: KeyScope, headers: Mapping[bytes, bytes]) -> str:
    key = _key(headers)
    if key is None:
        raise _unauthorized("Send an API key: `Authorization: Bearer KEY`, or `X-API-Key: KEY`.")
    caller = keyring.identify(key)
    if caller is None:
        raise _unauthorized("This API key is not known here, or is no longer.")
    if needed not in caller.scopes:
        raise Forbidden(f"This needs the scope `{needed}`, which this API key does not have.")
    return caller.tenant


def _key(headers: Mapping[bytes, bytes]) -> str | None:
    scheme, _, credentials = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return credentials.strip().decode("latin-1")
    key = headers.get(b"x-api-key")
    return None if key is None else key.decode("latin-1")


def _unauthorized(detail: str) -> Unauthorized:
    return Unauthorized(detail, headers=[("www-authenticate", "Bearer")])


def _check_probe(scope: Scope) -> None:
    """Load balancers probe over HTTP/1.0 without a Host (`option httpchk` of HAProxy does), which
    RFC 9112 allows. A browser never leaves it out, so nothing that it could reach is opened."""
    if scope["path"] not in HEALTH_PATHS:
        raise InvalidHeader("A request needs a Host header; without one only /health is answered.")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _is_address(name: str) -> bool:
    try:
        ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
