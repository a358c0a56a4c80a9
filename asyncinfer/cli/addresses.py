"""Addresses of the API and of Redis as users see them, without passwords."""

import ipaddress
from typing import Final

_LOOPBACK_OF_WILDCARD: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def api_url(host: str, port: int) -> str:
    """The URL of an API that listens on `host`, as its own machine reaches it.

    A wildcard address becomes the loopback address. The URL has no slash at its end.
    """
    host = _LOOPBACK_OF_WILDCARD.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether a host is a loopback address, or `localhost`; other names are not looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def shown_url(redis_url: str) -> str:
    """A URL of Redis or of an API without its user, password and options, to be shown and
    logged."""
    # Not urlsplit, which of Python 3.13 refuses a list of sentinels with an IPv6 address.
    scheme, _, rest = redis_url.strip().partition("://")
    authority, slash, path = rest.partition("?")[0].partition("/")
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"
