"""States of a Redis that answers but takes no jobs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final


@contextmanager
def refusing(server: Any, begin: Sequence[str], end: Sequence[str]) -> Iterator[None]:
    """Runs one command before the block and another one after it."""
    server.execute_command(*begin)
    try:
        yield
    finally:
        server.execute_command(*end)


def configured(name: str, value: str) -> tuple[Sequence[str], Sequence[str]]:
    return ("CONFIG", "SET", name, value), ("CONFIG", "SET", name, "0")


REFUSALS: Final = {
    "storage_full": configured("maxmemory", "1mb"),
    "too_few_replicas": configured("min-replicas-to-write", "1"),
    "redis_read_only": (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
    "redis_permission_denied": (
        ("ACL", "SETUSER", "default", "-fcall", "-eval", "-evalsha"),
        ("ACL", "SETUSER", "default", "+@all"),
    ),
}
"""The commands that begin and end each state, by its code."""
