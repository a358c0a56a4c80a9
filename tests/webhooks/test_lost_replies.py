"""Calls of a sender may lose their replies: a webhook is told all the same, with one id."""

import asyncio

import pytest

from asyncinfer.repository import keys
from asyncinfer.repository.outbox import Outbox
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Store
from tests.faults.harness import eventually
from tests.faults.proxy import proxied
from tests.queue_driver import Q, QueueDriver
from tests.webhooks.receiver import Received, Receiver, Reply
from tests.webhooks.sending import running_sender, webhook


@pytest.mark.soak
async def test_a_lost_reply_loses_no_webhook_and_changes_no_body(
    redis_url: str, hands: QueueDriver, hook: Receiver
) -> None:
    async with (
        proxied(redis_url) as proxy,
        Store.open(proxy.url, queue_name=Q, policy=hands.store.policy, name="cut") as store,
        running_sender(store, hook, lease_seconds=1.0),
    ):
        for name in ("take", "keep", "note"):
            before = len(hook.requests)
            proxy.cut_reply_to(script(name).function.encode())
            job_id = await hands.submit_one(webhook=webhook(hook.url()))
            await hands.run_all()
            await eventually(lambda: not hands.redis.zcard(keys.outbox(Q)), "it is delivered")
            assert proxy.replies_cut > 0
            received = hook.requests[before:]
            assert {each.webhook_id for each in received} == {f"msg_{job_id}_1_completed"}
            assert len({each.body for each in received}) == 1
            (delivery,) = (await Outbox(hands.store).state_in(Q, job_id)).deliveries
            assert delivery.state.outcome == "delivered"


async def test_an_outcome_is_noted_once_redis_is_back(
    redis_url: str, hands: QueueDriver, hook: Receiver
) -> None:
    """The receiver is not called again, since the lease is longer than the outage."""
    loop = asyncio.get_running_loop()
    async with (
        proxied(redis_url) as proxy,
        Store.open(proxy.url, queue_name=Q, policy=hands.store.policy, name="cut") as store,
    ):

        def cut(_: Received) -> Reply:
            asyncio.run_coroutine_threadsafe(proxy.down(), loop).result()
            return Reply()

        hook.behave = cut
        job_id = await hands.submit_one(webhook=webhook(hook.url()))
        await hands.run_all()
        async with running_sender(store, hook) as running:
            await eventually(lambda: bool(running.tries()), "it is sent")
            await eventually(lambda: sum(store.errors.values()) >= 3, "notes have failed")
            await proxy.up()
            await eventually(lambda: not hands.redis.zcard(keys.outbox(Q)), "it is noted")
    (delivery,) = (await Outbox(hands.store).state_in(Q, job_id)).deliveries
    assert delivery.state.outcome == "delivered"
    assert len(hook.requests) == 1
