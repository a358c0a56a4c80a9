"""Who is let in: the Host, Origin and API key of a request."""

from collections.abc import Mapping
from ipaddress import ip_address
from typing import Final

from starlette.types import Scope

from asyncinfer.api.admission import ANYBODY, Admission, admission, open_admission
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
    """Without it any page open in a browser could talk to an API on localhost: its name may be
    made to point here (Host), and it may send forms anywhere (Origin)."""

    def __init__(self, config: ApiConfig) -> None:
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
        self, needed: KeyScope | None, scope: Scope, headers: Mapping[bytes, bytes]
    ) -> Admission:
        """Who the caller is; raises when the request may not pass. Whether a key has the scope is
        asked once the query says what is wanted."""
        authority = authority_of(scope, headers)
        self._check_host(authority, scope)
        if scope["method"] not in _SAFE_METHODS and b"origin" in headers:
            self._check_origin(headers[b"origin"].decode("latin-1").lower(), authority)
        if self.keys is None:
            return ANYBODY
        if needed is None:
            return open_admission(self.keys, _key(headers))
        return admission(self.keys, _key(headers))

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


def _key(headers: Mapping[bytes, bytes]) -> str | None:
    """The key that was sent; raises InvalidHeader for two of them: a proxy in front may have
    checked the one and we would act on the other."""
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
