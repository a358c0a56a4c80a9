"""What Redis holds of the course of one job."""

from msgspec import Struct

from asyncinfer.errors import WrongKeyType
from asyncinfer.jobs import decode_facts, id_bytes
from asyncinfer.repository import keys
from asyncinfer.repository.deliveries import delivered_round
from asyncinfer.repository.outbox import Outbox, StoredDelivery
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import StoredJob, parse_summary, queue_of, summary_keys
from asyncinfer.untrusted import decoding


class JobHistory(Struct, frozen=True):
    """A job without its result, and what is kept beside its record. Times are in ms since 1970 by
    the server's clock."""

    stored: StoredJob
    lost_deliveries: tuple[str, ...]
    """As in the facts; of a job that a script ended, too. Those of a job that a worker ended are in
    its record."""
    worker: str | None
    """The id of the worker that has it now."""
    ended_ms: int | None
    """When it ended; None if it has not or that is not known."""
    now_ms: int
    webhook: tuple[StoredDelivery, ...] = ()
    """The deliveries of its webhook in this round; empty for a job without one."""


async def read_history(store: Store, stored: StoredJob) -> JobHistory | None:
    """The history of a job that was read before; None if it is gone. What is in a key of a wrong
    type is left out. Raises RedisUnavailable."""
    queue, member = queue_of(store, stored), id_bytes(stored.job_id)
    # Before the record, which has what a worker found in the facts of a job that it ended.
    packed = await store.read("HGET", keys.facts(queue), member, otherwise=None)
    token = await store.read("HGET", keys.running(queue), member, otherwise=None)
    values, (seconds, micros), expires_ms = await store.transaction(
        ("MGET", *summary_keys(stored.job_id)),
        ("TIME",),
        ("PEXPIRETIME", keys.status(stored.job_id)),
    )
    latest = parse_summary(stored.job_id, values)
    if latest is None:
        return None
    lost = () if latest.has_ended else decode_facts(packed).lost_deliveries
    return JobHistory(
        stored=latest,
        lost_deliveries=lost or latest.end_by_script.lost,
        worker=decoding.text(token).rpartition(":")[0] if token else None,
        ended_ms=latest.ended_ms or _ended_ms(store, latest, expires_ms),
        now_ms=int(seconds) * 1000 + int(micros) // 1000,
        webhook=await _read_webhook(store, latest),
    )


async def _read_webhook(store: Store, stored: StoredJob) -> tuple[StoredDelivery, ...]:
    """What became of the deliveries of a job's webhook in its present round."""
    if not (stored.has_ended and stored.record and stored.record.options.webhook):
        return ()
    try:
        deliveries = (await Outbox(store).state_of(stored)).deliveries
    except WrongKeyType:
        return ()
    number = delivered_round(stored.round)
    return tuple(delivery for delivery in deliveries if delivery.member.round == number)


def _ended_ms(store: Store, stored: StoredJob, expires_ms: int) -> int | None:
    """When an external job ended, from the time when its status expires: that a worker ended it is
    written nowhere else. Wrong if the TTL of ended jobs was changed since."""
    if not stored.has_ended or stored.record or expires_ms <= 0:
        return None
    policy = store.policy
    has_failed = stored.status == "failed"
    ttl_seconds = policy.failed_ttl_seconds if has_failed else policy.job_ttl_seconds
    return expires_ms - ttl_seconds * 1000
