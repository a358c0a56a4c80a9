"""A user of the test server who may not call everything."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import redis

_NAME = "restricted"


@contextmanager
def restricted_user(server: redis.Redis, url: str, *rules: str) -> Iterator[str]:
    """Makes a user with these rules of ACL SETUSER; yields the server's URL for that user."""
    client: Any = server
    client.execute_command("ACL", "SETUSER", _NAME, "reset", "on", ">pass", *rules)
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    try:
        yield parts._replace(netloc=f"{_NAME}:pass@{host}").geturl()
    finally:
        client.execute_command("ACL", "DELUSER", _NAME)


@contextmanager
def without_commands(server: redis.Redis, url: str, *forbidden: str) -> Iterator[str]:
    """Makes a user who may call all commands but these; yields the URL for that user."""
    rules = (f"-{command}" for command in forbidden)
    with restricted_user(server, url, "~*", "&*", "+@all", *rules) as restricted:
        yield restricted
