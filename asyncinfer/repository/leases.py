"""Renewing leases, from a thread with a connection of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
import redis.exceptions as redis_errors
from msgspec import Struct

from asyncinfer.jobs import (
    id_text,
)
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.redis_errors import translated
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Store, encode_args


class Renewal(Struct, frozen=True):
    """What a renewal found: claims no longer ours, jobs to stop."""

    lost: tuple[str, ...]
    cancelled: tuple[str, ...]
    expired: tuple[str, ...]


class Renewals:
    """Renews leases; synchronous, for an OS thread that a stalled event loop cannot stop."""

    def __init__(self, store: Store) -> None:
        seconds = min(1.0, store.policy.lease_seconds / 6)
        self._client: redis.Redis = store.endpoint.sync_client(
            f"{store.name}:renew", reply_seconds=seconds
        )
        self._policy: Policy = store.policy

    def renew(self, tokens: dict[str, list[str]]) -> Renewal:
        """`tokens` by queue; raises RedisUnavailable."""
        args = [
            encode_args({"lease_ms": self._policy.lease_ms}),
            *(encode_args(held) for held in tokens.values()),
        ]
        renew = script("renew")
        with translated(), self._fresh():
            try:
                reply: Any = self._client.evalsha(renew.sha, len(tokens), *tokens, *args)
            except redis_errors.NoScriptError:
                reply = self._client.eval(renew.text, len(tokens), *tokens, *args)
        return Renewal(*(tuple(id_text(one) for one in part) for part in reply))

    @contextmanager
    def _fresh(self) -> Iterator[None]:
        try:
            yield
        except (redis_errors.ReadOnlyError, redis_errors.MasterDownError):
            # Behind one name may be another server by now.
            self._client.connection_pool.disconnect()
            raise

    def close(self) -> None:
        self._client.close()
