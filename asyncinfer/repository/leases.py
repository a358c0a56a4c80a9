"""Lease renewal, from a thread with a connection of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
import redis.exceptions as redis_errors
from msgspec import Struct

from asyncinfer.jobs import id_text
from asyncinfer.repository.functions import Call
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.redis_errors import CALL_ERRORS, translate
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Store, encode_args, note_failure


class Renewal(Struct, frozen=True):
    """What a renewal found."""

    lost: tuple[str, ...]
    """Tokens of claims that are no longer held: their leases ran out."""
    cancelled: tuple[str, ...]
    """Ids of jobs to stop because they were cancelled."""
    expired: tuple[str, ...]
    """Ids of jobs to stop because their finish deadline has passed."""


class Leases:
    """Renews leases; synchronous, for an OS thread that a stalled event loop cannot stop."""

    def __init__(self, store: Store) -> None:
        seconds = min(1.0, store.policy.lease_seconds / 6)
        self._client: redis.Redis = store.endpoint.sync_client(
            f"{store.name}:renew", reply_seconds=seconds
        )
        self._functions = store.functions
        self._report = store.report
        self._policy: Policy = store.policy

    def renew(self, tokens: dict[str, list[str]]) -> Renewal:
        """Renews the leases of claims, given as {queue: tokens}; raises RedisUnavailable."""
        args = [
            encode_args({"lease_ms": self._policy.lease_ms}),
            *(encode_args(held) for held in tokens.values()),
        ]
        try:
            with self._reconnect_after_failover():
                reply = self._run(self._functions.call(script("renew"), list(tokens), args))
        except CALL_ERRORS as error:
            failure = translate(error)
            note_failure(self._report, failure)
            raise failure from error
        if self._report:
            self._report.outage.answered()
        return Renewal(*(tuple(id_text(raw) for raw in part) for part in reply))

    def _run(self, call: Call) -> Any:
        command = next(call)
        try:
            while True:
                try:
                    reply = self._client.execute_command(*command)  # type: ignore[no-untyped-call]
                except redis_errors.ResponseError as error:
                    command = call.throw(error)
                else:
                    command = call.send(reply)
        except StopIteration as end:
            return end.value

    @contextmanager
    def _reconnect_after_failover(self) -> Iterator[None]:
        try:
            yield
        except (redis_errors.ReadOnlyError, redis_errors.MasterDownError):
            # The address may lead to another server by now.
            self._client.connection_pool.disconnect()
            raise

    def close(self) -> None:
        self._client.close()
