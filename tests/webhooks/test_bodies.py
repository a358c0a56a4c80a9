"""The bodies of webhooks: what a redelivery tells, and what is told of a job that was retried."""

from datetime import datetime
from typing import Any, Final

import msgspec

from asyncinfer.api.views import job_view
from asyncinfer.jobs import Webhook
from asyncinfer.repository import keys
from asyncinfer.repository.deliveries import MAX_DONE_BODY_BYTES, Attempt, Outcome
from asyncinfer.repository.outbox import Outbox
from asyncinfer.webhooks.bodies import Bodies
from tests.faults.harness import eventually
from tests.queue_driver import Q, QueueDriver

HOOK: Final = Webhook(url="https://example.com/hook", metadata={"order": 7})
LARGE: Final = msgspec.json.encode(["x" * MAX_DONE_BODY_BYTES])


async def tell(hands: QueueDriver, outcome: Outcome = "delivered") -> dict[str, bytes]:
    """Makes one try of all that is due, as a sender does, which ends it with `outcome`; returns
    the bodies by their ids."""
    outbox = Outbox(hands.store)
    bodies = Bodies(lambda stored: job_view(stored, None), None)
    sent: dict[str, bytes] = {}
    for delivery in await outbox.take([Q], 100, 60_000):
        body = delivery.body
        if body is None:
            body = await outbox.keep_body(delivery, *bodies.of(delivery, hands.now_ms()))
        assert body is not None
        sent[delivery.webhook_id] = body
        await outbox.note(delivery, Attempt(hands.now_ms(), 500), None, outcome)
    return sent


async def redeliver(hands: QueueDriver, job_id: str, event: str | None = None) -> bytes:
    """Sends the last delivery again, or the last one of an event; returns its body."""
    verdict = await Outbox(hands.store).redeliver_in(Q, job_id, event, now_ms=hands.now_ms())
    assert verdict == "ok"
    (body,) = (await tell(hands)).values()
    return body


def expire(hands: QueueDriver, job_id: str) -> None:
    """The TTL of an ended job passes."""
    hands.redis.delete(*hands.redis.keys(f"job:{job_id}:*"))


def data_of(body: bytes) -> dict[str, Any]:
    return dict(msgspec.json.decode(body)["data"])


async def test_what_was_given_up_is_sent_again_with_its_result_though_its_job_is_gone(
    hands: QueueDriver,
) -> None:
    job_id = await hands.submit_one(webhook=HOOK)
    await hands.run_all()
    (body,) = (await tell(hands, "given_up")).values()
    expire(hands, job_id)
    assert "result" in data_of(body)
    assert await redeliver(hands, job_id) == body


async def test_a_large_body_that_was_given_up_is_not_kept(hands: QueueDriver) -> None:
    job_id = await hands.submit_one(webhook=HOOK)
    await hands.finish(await hands.claim_jobs(), body=LARGE)
    (body,) = (await tell(hands, "given_up")).values()
    assert len(body) > MAX_DONE_BODY_BYTES
    expire(hands, job_id)
    again = await redeliver(hands, job_id)
    assert data_of(again) == {"job_id": job_id, "status": "completed", "expired": True}
    assert not [name for name in hands.redis.hkeys(keys.webhook(Q, job_id)) if b"body" in name]


async def test_a_delivery_that_is_not_listed_as_given_up_any_more_keeps_no_body(
    hands: QueueDriver,
) -> None:
    job_ids = await hands.submit_many(3, webhook=HOOK)
    for job_id in job_ids:
        await hands.finish(await hands.claim_jobs(1))
        await tell(hands, "given_up")
        expire(hands, job_id)
    assert hands.redis.zcard(keys.undelivered(Q)) == 3
    other = await hands.submit_one(webhook=HOOK)
    await hands.run_all()
    outbox = Outbox(hands.store, max_undelivered=2)
    (delivery,) = await outbox.take([Q], 1, 60_000)
    await outbox.note(delivery, Attempt(1, 500), None, "given_up")
    listed = hands.redis.zrange(keys.undelivered(Q), 0, -1)
    assert listed == [f"{one}_1_completed".encode() for one in (job_ids[2], other)]
    kept = [hands.redis.exists(keys.webhook(Q, one)) for one in job_ids]
    assert kept == [0, 0, 1]


async def test_a_completed_job_that_was_told_keeps_no_body_and_is_told_the_same_again(
    hands: QueueDriver,
) -> None:
    job_id = await hands.submit_one(webhook=HOOK)
    await hands.run_all()
    (body,) = (await tell(hands)).values()
    assert not [name for name in hands.redis.hkeys(keys.webhook(Q, job_id)) if b"body" in name]
    assert await redeliver(hands, job_id) == body


async def test_a_cancelled_job_is_told_the_same_again_also_after_its_retry(
    hands: QueueDriver,
) -> None:
    job_id = await hands.submit_one(webhook=HOOK)
    await hands.cancel(job_id)
    (body,) = (await tell(hands)).values()
    assert await redeliver(hands, job_id) == body
    assert await hands.retry(job_id) == "ok"
    await hands.run_all()
    assert list(await tell(hands)) == [f"msg_{job_id}_2_completed"]
    assert await redeliver(hands, job_id, "cancelled") == body


async def test_the_time_of_an_end_is_that_of_the_end_however_late_its_body_is_made(
    hands: QueueDriver,
) -> None:
    job_id = await hands.submit_one(webhook=HOOK)
    gone = await hands.submit_one(webhook=HOOK)
    for one in (job_id, gone):
        await hands.cancel(one)
    until_ms = hands.now_ms()
    expire(hands, gone)
    await eventually(lambda: hands.now_ms() > until_ms + 20, "a later time")
    for body in (await tell(hands)).values():
        timestamp = datetime.fromisoformat(msgspec.json.decode(body)["timestamp"]).timestamp()
        assert until_ms / 1000 - 1 < timestamp <= until_ms / 1000


async def test_a_job_that_was_retried_before_the_first_try_is_told_as_retried(
    hands: QueueDriver,
) -> None:
    job_id = await hands.submit_one(webhook=HOOK)
    await hands.cancel(job_id)
    assert await hands.retry(job_id) == "ok"
    (body,) = (await tell(hands)).values()
    assert data_of(body) == {"job_id": job_id, "status": "cancelled", "round": 1, "retried": True}
    assert await redeliver(hands, job_id) == body


async def test_few_bodies_of_a_job_are_kept_however_often_it_is_retried(
    hands: QueueDriver,
) -> None:
    job_id = await hands.submit_one(webhook=HOOK)
    for _ in range(10):
        await hands.run_all("failed")
        await tell(hands)
        assert await hands.retry(job_id) == "ok"
    names = hands.redis.hkeys(keys.webhook(Q, job_id))
    kept = [f"body:{number}_failed".encode() for number in range(7, 11)]
    assert sorted(name for name in names if b"body" in name) == sorted(kept)


async def test_a_kept_body_is_reserved_while_it_is_sent_again(hands: QueueDriver) -> None:
    hook = msgspec.structs.replace(HOOK, metadata={})
    job_id = await hands.submit_one(webhook=hook)
    await hands.finish(await hands.claim_jobs(), body=msgspec.json.encode(["x" * 6000]))
    (body,) = (await tell(hands, "given_up")).values()
    assert await Outbox(hands.store).redeliver_in(Q, job_id, now_ms=hands.now_ms()) == "ok"
    assert hands.counter(keys.webhook_bytes(Q)) > len(body)
