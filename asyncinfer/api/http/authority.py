"""The server that a request names, in its Host field or its target (RFC 9110, 7.2)."""

import re
from collections.abc import Mapping
from functools import lru_cache
from ipaddress import AddressValueError, IPv6Address
from typing import Final

from msgspec import Struct
from starlette.types import Scope

from asyncinfer.errors import InvalidHeader

_MAX_BYTES: Final = 300
"""A domain name has 253 characters; the rest is room for a port."""

_MAX_PORT: Final = 65_535

# `uri-host [":" port]` of RFC 3986, 3.2.2, without IPvFuture, of which no version was ever defined.
_AUTHORITY: Final = re.compile(
    rb"(?P<host>\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+)"
    rb"(?::(?P<port>[0-9]{0,5}))?"
)


class Authority(Struct, frozen=True):
    """A host with an optional port, as a request names its server."""

    host: str
    """In lower case; an IPv6 address in brackets."""
    text: str
    """Host and port as they were sent, in lower case."""


def authority_of(scope: Scope, headers: Mapping[bytes, bytes]) -> Authority | None:
    """The authority in Host, or None for an HTTP/1.0 request without Host. Raises InvalidHeader if
    any other request has no Host, or if its value is not an authority."""
    value = headers.get(b"host")
    if value is not None:
        return parse_authority(value)
    if scope["http_version"] == "1.0":
        return None
    raise InvalidHeader("A request needs a Host header (RFC 9112, 3.2).")


@lru_cache(maxsize=64)
def parse_authority(value: bytes) -> Authority:
    """Returns the host and port in the value of Host or in a target. Raises InvalidHeader if the
    value is not a host with an optional port."""
    match = _AUTHORITY.fullmatch(value) if len(value) <= _MAX_BYTES else None
    if match is None or not _is_valid(match["v6"], match["port"]):
        shown = value[:100].decode("latin-1")
        raise InvalidHeader(f"The Host is {shown!r}; send `Host: NAME` or `Host: NAME:PORT`.")
    return Authority(match["host"].decode().lower(), value.decode().lower())


def _is_valid(v6: bytes | None, port: bytes | None) -> bool:
    """Whether `v6` is an IPv6 address and the port at most 65535; either may be missing (None)."""
    if v6 is not None:
        try:
            IPv6Address(v6.decode())
        except AddressValueError:
            return False
    return not port or int(port) <= _MAX_PORT
