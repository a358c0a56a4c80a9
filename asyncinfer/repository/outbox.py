"""The outbox: deliveries of webhooks are taken by lease, tried, noted, and started anew."""

from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from asyncinfer.jobs import TERMINAL, id_bytes
from asyncinfer.repository import keys
from asyncinfer.repository.deliveries import (
    MAX_BODY_BYTES,
    MAX_DONE_BODY_BYTES,
    Attempt,
    DeliveryState,
    Member,
    Outcome,
    Target,
    after_attempt,
    pack_state,
    parse_member,
    read_state,
    read_target,
    restarted,
)
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Store, encode_args
from asyncinfer.repository.stored_jobs import StoredJob, parse_job, queue_of

_QUEUES_PER_CALL: Final = 32
_MAX_DELIVERIES_PER_CALL: Final = 200
MAX_UNDELIVERED: Final = 10_000
"""Deliveries that were given up, and are kept to be sent again, in a queue."""
_MAX_TRIES: Final = 5
"""Of a note or a restart, whose delivery may change between reading and writing it."""

RedeliverVerdict = Literal["ok", "absent", "webhooks_full", "changed"]


class Delivery(Struct, frozen=True):
    """A delivery that this process has leased."""

    queue: str
    member: Member
    target: Target
    state: DeliveryState
    body: bytes | None
    """The body that its first try kept; None before that."""
    job: StoredJob | None
    """The job as it ended, without a result that is too large. None if it is gone, or is not in
    this round and status any more; not read if there is a body."""
    until_ms: int
    """When the lease ends, by the server's clock."""
    packed_state: bytes
    is_retried: bool = False
    """Whether the job is kept in a later round; False if there is a body."""

    @property
    def job_id(self) -> str:
        return self.member.job_id

    @property
    def round(self) -> int:
        return self.member.round

    @property
    def event(self) -> str:
        return self.member.event

    @property
    def webhook_id(self) -> str:
        return self.member.webhook_id


class StoredDelivery(Struct, frozen=True):
    """A delivery of a job as it is shown."""

    member: Member
    state: DeliveryState
    packed_state: bytes
    due_ms: int | None
    """When it is due, or its lease ends; None once it is done."""


class Restart(Struct, frozen=True):
    """A delivery to start anew, as it was read."""

    member: Member
    target: Target
    packed_state: bytes


class JobWebhook(Struct, frozen=True):
    """What Redis has of a job's webhook."""

    target: Target | None
    deliveries: tuple[StoredDelivery, ...]
    """In the order of their rounds."""


class Outbox:
    """The deliveries of all queues."""

    def __init__(self, store: Store, *, max_undelivered: int = MAX_UNDELIVERED) -> None:
        self._store = store
        self._max_undelivered = max_undelivered

    # --- what a sender does ------------------------------------------------------------------

    async def take(
        self, queues: Sequence[str], limit: int, lease_ms: int, *, max_result_bytes: int = 20 << 10
    ) -> list[Delivery]:
        """Leases at most `limit` due deliveries (200 a call are the most), those of the first
        queues first: no other process takes them for `lease_ms`. A result above `max_result_bytes`
        is not read. Raises RedisUnavailable."""
        taken: list[Delivery] = []
        limit = min(limit, _MAX_DELIVERIES_PER_CALL)
        for start in range(0, len(queues), _QUEUES_PER_CALL):
            if len(taken) < limit:
                part = queues[start : start + _QUEUES_PER_CALL]
                taken += await self._take(part, limit - len(taken), lease_ms)
        return await self._with_jobs(taken, max_result_bytes)

    async def is_empty(self, queues: Sequence[str]) -> bool:
        """Whether no queue has a delivery to come: one call, which costs less than a `take` of
        many queues. Raises RedisUnavailable."""
        names = [keys.outbox(queue) for queue in queues]
        return not names or not await self._store.command("EXISTS", *names)

    async def _take(self, queues: Sequence[str], limit: int, lease_ms: int) -> list[Delivery]:
        args = {
            "lease_ms": lease_ms,
            "max_deliveries": limit,
            "failed_ttl_seconds": self._store.policy.failed_ttl_seconds,
        }
        until_ms, *flat = await self._store.call(script("take"), queues, [encode_args(args)])
        parts = iter(flat)
        taken = []
        for queue, member, target, state, body in zip(*([parts] * 5), strict=True):
            delivery = _parse_delivery(until_ms, queue, member, target, state, body)
            if delivery:
                taken.append(delivery)
            else:
                await self._drop(queue.decode(), member, state)
        return taken

    async def _drop(self, queue: str, member: bytes, state: bytes) -> None:
        """Ends a delivery that another program has damaged, so that nobody can send it."""
        await self._call_note(queue, [member, 0, state, state, "", "gone"])

    async def _with_jobs(self, taken: list[Delivery], max_result_bytes: int) -> list[Delivery]:
        """The deliveries with their jobs, where there is no body."""
        ids = list({delivery.job_id for delivery in taken if delivery.body is None})
        jobs = await _read_ended(self._store, ids, max_result_bytes)
        return [_with_job(delivery, jobs.get(delivery.job_id)) for delivery in taken]

    async def keep_body(
        self, delivery: Delivery, body: bytes, shorter: bytes = b""
    ) -> bytes | None:
        """Keeps the body that each try of a delivery sends, before the first: an earlier body of
        another process wins, and `shorter`, if given, is kept where there is no room for `body`.
        Returns the one that is kept; None if the delivery is gone. Raises RedisUnavailable."""
        args = {"max_webhook_bytes": self._store.policy.max_webhook_bytes}
        kept = await self._store.call(
            script("keep"),
            [delivery.queue],
            [encode_args(args), id_bytes(delivery.member.name), body, shorter],
        )
        return None if kept is None else bytes(kept)

    async def note(
        self,
        delivery: Delivery,
        attempt: Attempt,
        next_ms: int | None,
        outcome: Outcome | None = None,
    ) -> None:
        """Notes an attempt: the delivery is due again at `next_ms`, by the server's clock, or done
        with `outcome`. The same attempt may be noted again. Raises RedisUnavailable."""
        packed = delivery.packed_state
        for _ in range(_MAX_TRIES):
            state = after_attempt(read_state(packed), attempt, outcome)
            entry = _Note(delivery, packed, pack_state(state), next_ms, state.outcome)
            (reply,) = await self._note(delivery.queue, [entry])
            if not isinstance(reply, list):
                return
            packed = bytes(reply[1])

    async def postpone(self, deliveries: Sequence[Delivery], due_ms: int) -> None:
        """Gives leased deliveries back, without an attempt: they are due at `due_ms`, by the
        server's clock. Raises RedisUnavailable."""
        by_queue: dict[str, list[_Note]] = {}
        for delivery in deliveries:
            packed = delivery.packed_state
            entry = _Note(delivery, packed, packed, due_ms, None)
            by_queue.setdefault(delivery.queue, []).append(entry)
        for queue, entries in by_queue.items():
            for start in range(0, len(entries), _MAX_DELIVERIES_PER_CALL):
                await self._note(queue, entries[start : start + _MAX_DELIVERIES_PER_CALL])

    async def _note(self, queue: str, entries: "Sequence[_Note]") -> list[Any]:
        args: list[Any] = []
        for entry in entries:
            due = "" if entry.outcome else entry.due_ms or entry.delivery.until_ms
            args += (
                id_bytes(entry.delivery.member.name),
                entry.delivery.until_ms,
                entry.expected,
                entry.state,
                due,
                entry.outcome or "",
            )
        return await self._call_note(queue, args)

    async def _call_note(self, queue: str, args: Sequence[Any]) -> list[Any]:
        header = {
            "failed_ttl_seconds": self._store.policy.failed_ttl_seconds,
            "max_undelivered": self._max_undelivered,
            "max_body_bytes": MAX_DONE_BODY_BYTES,
        }
        return list(await self._store.call(script("note"), [queue], [encode_args(header), *args]))

    async def add(
        self,
        queue: str,
        member: Member,
        target: Target,
        body: bytes,
        keep_seconds: int,
    ) -> bool:
        """Puts a delivery with its body into the outbox of a queue, for what is not a job; its
        state is kept for `keep_seconds` once it is done. Returns whether it is new. Raises
        RedisUnavailable."""
        header = {
            "name": member.job_id,
            "round": member.round,
            "event": member.event,
            "bytes": target.reserved_bytes + len(body),
            "ttl_seconds": keep_seconds,
        }
        args = [encode_args(header), target.text, body]
        return bool(await self._store.call(script("add"), [queue], args) == b"ok")

    # --- what people see and do --------------------------------------------------------------

    async def state_of(self, job: StoredJob) -> JobWebhook:
        """What became of a job's webhook so far. Raises RedisUnavailable."""
        return await self.state_in(queue_of(self._store, job), job.job_id)

    async def state_in(self, queue: str, job_id: str) -> JobWebhook:
        """As `state_of`, of a job whose queue is known."""
        pairs = await self._store.command("HGETALL", id_bytes(keys.webhook(queue, job_id)))
        members = [
            (member, value)
            for name, value in pairs.items()
            if (member := parse_member(id_bytes(job_id) + b"_" + name))
            and not name.startswith(b"body:")
        ]
        members.sort(key=lambda pair: (pair[0].round, pair[0].event))
        names = [id_bytes(member.name) for member, _ in members]
        scores = await self._store.command("ZMSCORE", keys.outbox(queue), *names) if names else ()
        return JobWebhook(
            read_target(pairs.get(b"target")),
            tuple(
                StoredDelivery(member, read_state(packed), packed, _whole(score))
                for (member, packed), score in zip(members, scores, strict=True)
            ),
        )

    async def redeliver(
        self, job: StoredJob, event: str | None = None, *, now_ms: int
    ) -> RedeliverVerdict:
        """Starts the tries of a job's last delivery anew, or of the last one of this event; it is
        due at once. `now_ms` is when that was asked for: the same call may be made again. Raises
        RedisUnavailable."""
        return await self.redeliver_in(queue_of(self._store, job), job.job_id, event, now_ms=now_ms)

    async def redeliver_in(
        self, queue: str, job_id: str, event: str | None = None, *, now_ms: int
    ) -> RedeliverVerdict:
        """As `redeliver`, of a job whose queue is known."""
        for _ in range(_MAX_TRIES):
            webhook = await self.state_in(queue, job_id)
            wanted = [one for one in webhook.deliveries if event in (None, one.member.event)]
            if not wanted or webhook.target is None:
                return "absent"
            last = wanted[-1]
            if last.state.restarted_ms == now_ms:
                return "ok"
            restart = Restart(last.member, webhook.target, last.packed_state)
            (verdict,) = await self.redeliver_all(queue, [restart], now_ms=now_ms)
            if verdict != "changed":
                return verdict
        return "changed"

    async def redeliver_all(
        self, queue: str, deliveries: Sequence[Restart], *, now_ms: int
    ) -> list[RedeliverVerdict]:
        """Starts the tries of deliveries of a queue anew, 200 a call, with a verdict for each;
        `changed` for one that was tried since it was read. Raises RedisUnavailable."""
        verdicts: list[RedeliverVerdict] = []
        for start in range(0, len(deliveries), _MAX_DELIVERIES_PER_CALL):
            args: list[Any] = [encode_args(self._store.policy.webhook_arguments())]
            for one in deliveries[start : start + _MAX_DELIVERIES_PER_CALL]:
                state = pack_state(restarted(read_state(one.packed_state), now_ms))
                reserved = one.target.reserved_bytes
                args += (id_bytes(one.member.name), reserved, one.packed_state, state)
            reply = await self._store.call(script("redeliver"), [queue], args)
            verdicts += map(_parse_redeliver, reply)
        return verdicts


class _Note(Struct, frozen=True):
    """The arguments of the script for one delivery."""

    delivery: Delivery
    expected: bytes
    state: bytes
    due_ms: int | None
    outcome: Outcome | None


def _parse_delivery(
    until_ms: int,
    queue: bytes,
    member: bytes,
    target: bytes,
    packed: bytes,
    body: bytes | None,
) -> Delivery | None:
    """None for a delivery that another program has damaged: also one that has no body, and is of no
    job from which one is made."""
    parsed, where = parse_member(member), read_target(target)
    kept = body if body is not None and len(body) <= MAX_BODY_BYTES else None
    if parsed is None or where is None or (kept is None and parsed.event not in TERMINAL):
        return None
    return Delivery(queue.decode(), parsed, where, read_state(packed), kept, None, until_ms, packed)


def _with_job(delivery: Delivery, job: StoredJob | None) -> Delivery:
    """The delivery with its job, if that is still as it tells."""
    if delivery.body is not None or job is None:
        return delivery
    is_as_told = (job.round, job.status) == (delivery.round, delivery.event)
    return msgspec.structs.replace(
        delivery, job=job if is_as_told else None, is_retried=job.round > delivery.round
    )


async def _read_ended(
    store: Store, job_ids: Sequence[str], max_result_bytes: int
) -> dict[str, StoredJob]:
    """The jobs that are there, each with its result unless that is too large."""
    if not job_ids:
        return {}
    sizes = await store.transaction(*(("STRLEN", id_bytes(keys.result(i))) for i in job_ids))
    names: list[bytes] = []
    for job_id, size in zip(job_ids, sizes, strict=True):
        # A name that no key has, in place of a result that is not wanted.
        result = keys.result(job_id) if size <= max_result_bytes else ""
        key_names = (keys.status(job_id), result, keys.error(job_id), keys.meta(job_id))
        names += map(id_bytes, key_names)
    values = iter(await store.command("MGET", *names))
    found = (
        parse_job(job_id, *fields)
        for job_id, fields in zip(
            job_ids, zip(values, values, values, values, strict=True), strict=True
        )
    )
    return {job.job_id: job for job in found if job}


def _parse_redeliver(reply: Any) -> RedeliverVerdict:
    if isinstance(reply, list):
        return "changed"
    verdicts: dict[bytes, RedeliverVerdict] = {b"ok": "ok", b"webhooks_full": "webhooks_full"}
    return verdicts.get(reply, "absent")


def _whole(score: Any) -> int | None:
    return None if score is None else int(float(score))
