"""The entry check of a request: its Host, Origin and API key."""

from collections.abc import Mapping
from ipaddress import ip_address
from typing import Final

from starlette.types import Scope

from asyncinfer.api.admission import ANYBODY, Admission, admit, admit_without_key
from asyncinfer.api.config import ApiConfig
from asyncinfer.api.http.authority import Authority, authority_of
from asyncinfer.api.http.probe_paths import HEALTH_PATHS
from asyncinfer.api.key_file import KeyFile
from asyncinfer.api_keys import KeyScope
from asyncinfer.errors import HostRefused, InvalidHeader, OriginRefused

_LOCAL_HOSTS: Final = ("localhost", "127.0.0.1", "[::1]")
_EVERY_ADDRESS: Final = ("0.0.0.0", "::", "")
_SAFE_METHODS: Final = frozenset({"GET", "HEAD"})


class Guard:
    """Refuses requests by Host, Origin and API key; one for each API process.

    Without it any page open in a browser could talk to an API on localhost: the page's own name may
    be made to point here (Host), and it may send forms anywhere (Origin).
    """

    def __init__(self, config: ApiConfig) -> None:
        """Reads the key file, if one is configured; raises KeyFileRefused if it cannot be read."""
        self._hosts = frozenset(
            name.lower() for name in (*_LOCAL_HOSTS, _bracketed(config.host), *config.allowed_hosts)
        )
        self._any_host = "*" in self._hosts
        self._any_address = config.host in _EVERY_ADDRESS
        self._origins = frozenset(origin.lower().rstrip("/") for origin in config.allowed_origins)
        self.keys: KeyFile | None = None
        if config.api_keys:
            self.keys = KeyFile(config.api_keys, stable_seconds=config.api_keys_stable_seconds)

    def admit(
        self, key_scope: KeyScope | None, scope: Scope, headers: Mapping[bytes, bytes]
    ) -> Admission:
        """Returns the caller. `key_scope` is what the route needs; for None it needs no key either,
        and an unknown key counts as none. Raises InvalidHeader, HostRefused, OriginRefused or
        Unauthorized. Whether the key has the scope is checked later (`reach_of`), since that
        depends on the query."""
        authority = authority_of(scope, headers)
        self._check_host(authority, scope)
        if scope["method"] not in _SAFE_METHODS and b"origin" in headers:
            self._check_origin(headers[b"origin"].decode("latin-1").lower(), authority)
        if self.keys is None:
            return ANYBODY
        if key_scope is None:
            return admit_without_key(self.keys, _key(headers))
        return admit(self.keys, _key(headers))

    def _check_host(self, authority: Authority | None, scope: Scope) -> None:
        """Raises HostRefused for a host that is not this server's, and InvalidHeader if there is
        none (None) and the request is no probe."""
        if authority is None:
            _check_probe(scope)
            return
        name = authority.host
        if self._any_host or name in self._hosts:
            return
        # A page of another site can make a name point here, but not an address.
        if self._any_address and _is_address(name):
            return
        raise HostRefused(
            f"This server does not answer as {name[:100]!r}. Use its address, or add the name to "
            "ALLOWED_HOSTS."
        )

    def _check_origin(self, origin: str, authority: Authority | None) -> None:
        """Raises OriginRefused unless `origin`, in lower case, is an allowed one or the server's
        own: that of the Host, with http or https."""
        if origin in self._origins:
            return
        if authority and origin in (f"http://{authority.text}", f"https://{authority.text}"):
            return
        raise OriginRefused(
            f"Pages from {origin[:100]!r} may not change anything here; add the origin to "
            "ALLOWED_ORIGINS if they should."
        )


def _key(headers: Mapping[bytes, bytes]) -> str | None:
    """Returns the key that was sent; None if there is none, or only credentials of another scheme.
    Raises InvalidHeader for two different keys: a proxy in front may have checked one and this
    server would act on the other."""
    key = headers.get(b"x-api-key")
    scheme, _, credentials = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        bearer = credentials.strip(b" \t")
        if key not in (None, bearer):
            raise InvalidHeader(
                "Authorization and X-API-Key have different keys; send one of the two."
            )
        key = bearer
    return None if key is None else key.decode("latin-1")


def _check_probe(scope: Scope) -> None:
    """Raises InvalidHeader unless the path is that of a probe, which may have no Host. Load
    balancers send probes over HTTP/1.0 (`option httpchk` of HAProxy does), which RFC 9112 allows. A
    browser always sends a Host, so this opens nothing to browsers."""
    if scope["path"] not in HEALTH_PATHS:
        raise InvalidHeader("A request needs a Host header; without one only /health is answered.")


def _bracketed(host: str) -> str:
    """The host as a Host header has it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def _is_address(name: str) -> bool:
    """Whether it is an IP address; IPv6 may be in brackets."""
    try:
        ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
