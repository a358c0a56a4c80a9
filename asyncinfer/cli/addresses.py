"""Addresses as people read them: of the API and of Redis, without passwords."""

from typing import Final
from urllib.parse import urlsplit

_EVERY_ADDRESS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def api_url(host: str, port: int) -> str:
    """Where an API that listens on an address is reached from its own machine."""
    host = _EVERY_ADDRESS.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def shown_url(redis_url: str) -> str:
    """A REDIS_URL without its user, password and options."""
    parts = urlsplit(redis_url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
