"""The sender: each end that a webhook asks for is told, tried again, and noted."""

import asyncio
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from asyncinfer.api.views import job_view
from asyncinfer.repository import keys
from asyncinfer.repository.deliveries import Member, Target
from asyncinfer.repository.outbox import JobWebhook, Outbox
from asyncinfer.webhooks.bodies import MAX_RESULT_BYTES
from asyncinfer.webhooks.hosts import FIRST_LIMIT
from asyncinfer.webhooks.schedule import MAX_TRIES
from tests.faults.harness import eventually
from tests.queue_driver import Q, QueueDriver, new_job, outcome_of
from tests.webhooks.receiver import Received, Receiver, Reply, receiver
from tests.webhooks.sending import (
    SECRETS,
    RunningSender,
    is_signed,
    running_sender,
    secrets_file,
    webhook,
)


async def arrived(hook: Receiver, count: int) -> None:
    await eventually(lambda: len(hook.requests) >= count, f"{count} webhooks arrive")


async def state(hands: QueueDriver, job_id: str) -> JobWebhook:
    return await Outbox(hands.store).state_in(Q, job_id)


async def is_done(hands: QueueDriver, *job_ids: str) -> None:
    """Waits until nothing is left to deliver of these jobs."""

    def left() -> set[str]:
        members = hands.redis.zrange(keys.outbox(Q), 0, -1)
        return {member.decode(errors="replace").split("_")[0] for member in members} & set(job_ids)

    await eventually(lambda: not left(), "all deliveries are done")


async def tried(hands: QueueDriver, job_id: str, count: int) -> None:
    """Waits until `count` tries of a job's only delivery are noted."""

    async def noted() -> bool:
        deliveries = (await state(hands, job_id)).deliveries
        return bool(deliveries) and deliveries[-1].state.tries == count

    await eventually(noted, f"{count} tries are noted")


def make_due(hands: QueueDriver) -> None:
    """Makes all deliveries due, as if the pause before their next try were over."""
    for member in hands.redis.zrange(keys.outbox(Q), 0, -1):
        hands.redis.zadd(keys.outbox(Q), {member: 1}, xx=True)


def due_in_seconds(hands: QueueDriver) -> float:
    ((_, score),) = hands.redis.zrange(keys.outbox(Q), 0, -1, withscores=True)
    return float(score - hands.now_ms()) / 1000


async def test_each_end_is_told_as_get_job_shows_it_and_signed(
    hands: QueueDriver, hook: Receiver, tmp_path: Path
) -> None:
    secrets = secrets_file(tmp_path, *(f"default * {secret}" for secret in SECRETS))
    jobs = {}
    for outcome in ("completed", "failed"):
        option = webhook(hook.url(), metadata={"order": 7, "deep": [None, 1.5, "ü"]})
        jobs[await hands.submit_one(webhook=option)] = outcome
        await hands.finish(await hands.claim_jobs(), outcome)
    cancelled = await hands.submit_one(webhook=webhook(hook.url()))
    assert await hands.cancel(cancelled) == "cancelled"
    jobs[cancelled] = "cancelled"
    async with running_sender(hands.store, hook, secrets=secrets, needs_secret=True) as running:
        await arrived(hook, 3)
        await is_done(hands, *jobs)

    by_id = {request.webhook_id: request for request in hook.requests}
    for job_id, outcome in jobs.items():
        request = by_id[f"msg_{job_id}_1_{outcome}"]
        assert all(is_signed(request, secret) for secret in SECRETS)
        assert request.headers["content-type"] == "application/json"
        event, stored = request.event, await hands.read(job_id)
        assert event["type"] == f"job.{outcome}"
        assert event["data"] == msgspec.to_builtins(
            msgspec.json.decode(msgspec.json.encode(job_view(stored, None)))
        )
        assert abs(datetime.fromisoformat(event["timestamp"]).timestamp() - time.time()) < 60
        expected = {} if outcome == "cancelled" else {"order": 7, "deep": [None, 1.5, "ü"]}
        assert event["metadata"] == expected
        (delivery,) = (await state(hands, job_id)).deliveries
        assert delivery.state.outcome == "delivered"
        assert [each.status for each in delivery.state.attempts] == [204]
    assert running.tries() == {("delivered", "204"): 3}


async def test_a_large_result_is_told_by_its_url(hands: QueueDriver, hook: Receiver) -> None:
    results = [json.dumps(["x" * size]).encode() for size in (MAX_RESULT_BYTES, 15_000)]
    large, small = await hands.submit_many(2, webhook=webhook(hook.url()))
    claim = await hands.claim_jobs()
    await hands.consumer.finish(
        claim,
        [
            outcome_of(job, claim.token, "completed", body=result)
            for job, result in zip(claim.jobs, results, strict=True)
        ],
        last=True,
    )
    async with running_sender(hands.store, hook, public_url="https://api.example.com/v1"):
        await arrived(hook, 2)
    events = {request.webhook_id.split("_")[1]: request.event for request in hook.requests}
    assert "result" not in events[large]["data"]
    assert events[large]["result_url"] == f"https://api.example.com/v1/job/{large}/result"
    assert events[small]["data"]["result"] == ["x" * 15_000]
    assert "result_url" not in events[small]


async def test_a_job_that_is_gone_before_the_first_try_is_told_thin(
    hands: QueueDriver, hook: Receiver
) -> None:
    option = webhook(hook.url(), metadata={"order": 7})
    job_id = await hands.submit_one(webhook=option)
    await hands.run_all()
    for name in hands.redis.keys(f"job:{job_id}:*"):
        hands.redis.pexpire(name, 1)
    await eventually(lambda: hands.status(job_id) is None, "the job has expired")
    async with running_sender(hands.store, hook):
        await arrived(hook, 1)
        await is_done(hands, job_id)
    event = hook.requests[0].event
    assert event["type"] == "job.completed"
    assert event["data"] == {"job_id": job_id, "status": "completed", "expired": True}
    assert event["metadata"] == {"order": 7}


async def test_what_is_not_a_job_is_told_with_the_body_that_it_was_added_with(
    hands: QueueDriver, hook: Receiver
) -> None:
    member = Member("group7", 1, "ended")
    target = Target(hook.url(), "default")
    async with running_sender(hands.store, hook):
        assert await Outbox(hands.store).add(Q, member, target, b'{"type":"group.ended"}', 60)
        await arrived(hook, 1)
        await is_done(hands, "group7")
    (request,) = hook.requests
    assert (request.webhook_id, request.body) == ("msg_group7_1_ended", b'{"type":"group.ended"}')


async def test_each_try_has_the_same_id_and_body(hands: QueueDriver, hook: Receiver) -> None:
    answers = [Reply(500), None, Reply(302, {"location": hook.url("/elsewhere")}), Reply()]
    hook.behave = lambda _: answers[len(hook.requests) - 1]
    job_id = await hands.submit_one(webhook=webhook(hook.url()))
    await hands.run_all()
    async with running_sender(hands.store, hook):
        await tried(hands, job_id, 1)
        assert 4 < due_in_seconds(hands) < 5.6
        hands.redis.set(keys.result(job_id), b'{"changed": true}', keepttl=True)
        for count in (2, 3):
            make_due(hands)
            await tried(hands, job_id, count)
        # Three failures in a row close the host for a while.
        assert hook.requests
    async with running_sender(hands.store, hook):
        make_due(hands)
        await is_done(hands, job_id)
    assert len({(request.webhook_id, request.body) for request in hook.requests}) == 1
    assert {request.path for request in hook.requests} == {"/hook"}
    (delivery,) = (await state(hands, job_id)).deliveries
    attempts = [(each.status, each.error) for each in delivery.state.attempts]
    assert attempts == [(500, ""), (0, "no_valid_answer"), (302, ""), (204, "")]


async def test_410_ends_a_delivery_and_retry_after_puts_it_off(
    hands: QueueDriver, hook: Receiver
) -> None:
    hook.behave = lambda request: (
        Reply(410) if request.path == "/gone" else Reply(429, {"Retry-After": "600"})
    )
    gone = await hands.submit_one(webhook=webhook(hook.url("/gone")))
    later = await hands.submit_one(webhook=webhook(hook.url("/later")))
    await hands.run_all()
    async with running_sender(hands.store, hook) as running:
        await is_done(hands, gone)
        await tried(hands, later, 1)
    assert 590 < due_in_seconds(hands) <= 600
    (delivery,) = (await state(hands, gone)).deliveries
    assert delivery.state.outcome == "gone"
    assert running.tries() == {("gone", "410"): 1, ("retry", "429"): 1}


async def test_a_webhook_is_given_up_in_the_end_and_its_job_is_as_it_was(
    hands: QueueDriver, hook: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    hook.behave = lambda _: Reply(404, {}, b"secret answer")
    option = webhook(hook.url("/path?token=hidden"), metadata={"name": "private"})
    job_id = await hands.submit_one(webhook=option)
    await hands.run_all()
    async with running_sender(hands.store, hook) as running:
        for count in range(1, MAX_TRIES):
            await tried(hands, job_id, count)
            make_due(hands)
        await is_done(hands, job_id)
    assert len(hook.requests) == MAX_TRIES == 8
    (line,) = [each for each in caplog.records if "given up" in each.message]
    assert line.message == (
        f"The webhook msg_{job_id}_1_completed to localhost was given up: the last answer was 404. "
        "`asyncinfer webhooks` lists such hosts, and sends again."
    )
    assert line.__dict__["job_id"] == job_id
    for hidden in ("hidden", "/path", "private", "secret answer"):
        assert hidden not in caplog.text
    assert (await hands.read(job_id)).status == "completed"
    assert running.tries() == {("retry", "404"): 7, ("given_up", "404"): 1}


async def test_a_later_event_is_not_held_back_by_an_earlier_one(
    hands: QueueDriver, hook: Receiver
) -> None:
    hook.behave = lambda request: Reply(500 if "failed" in request.webhook_id else 204)
    job_id = await hands.submit_one(webhook=webhook(hook.url()))
    await hands.run_all("failed")
    async with running_sender(hands.store, hook):
        await tried(hands, job_id, 1)
        assert await hands.retry(job_id) == "ok"
        await hands.run_all()
        await arrived(hook, 2)
    ids = [request.webhook_id for request in hook.requests]
    assert ids == [f"msg_{job_id}_1_failed", f"msg_{job_id}_2_completed"]


async def test_a_job_that_has_not_ended_is_not_told(hands: QueueDriver, hook: Receiver) -> None:
    waiting, unwanted, ended = [
        await hands.submit_one(webhook=webhook(hook.url(), events=events))
        for events in (("completed",), ("failed",), ("completed",))
    ]
    await hands.submit_one()
    await hands.cancel(waiting)
    claim = await hands.claim_jobs()
    async with running_sender(hands.store, hook):
        await hands.finish(claim)
        await arrived(hook, 1)
        await is_done(hands, ended)
    assert [request.webhook_id for request in hook.requests] == [f"msg_{ended}_1_completed"]
    assert unwanted
    assert hands.redis.hlen(keys.webhooks(Q)) == 0


async def test_where_keys_are_in_use_nothing_is_sent_without_a_secret(
    hands: QueueDriver, hook: Receiver, tmp_path: Path
) -> None:
    secrets = secrets_file(tmp_path, f"other * {SECRETS[0]}")
    job_id = await hands.submit_one(webhook=webhook(hook.url()))
    await hands.run_all()
    async with running_sender(hands.store, hook, secrets=secrets, needs_secret=True):
        await tried(hands, job_id, 1)
        assert not hook.requests
    async with running_sender(hands.store, hook, secrets=secrets):
        make_due(hands)
        await arrived(hook, 1)
    assert "webhook-signature" not in hook.requests[0].headers


def has_secrets(running: RunningSender, count: int) -> bool:
    return len(running.checks.keys_of("default", "localhost")) == count


async def test_a_secret_rotates_without_a_gap(
    hands: QueueDriver, hook: Receiver, tmp_path: Path
) -> None:
    old, new = SECRETS
    secrets = secrets_file(tmp_path, f"default localhost {old}")
    async with running_sender(hands.store, hook, secrets=secrets) as running:
        for count in (1, 2):
            secrets_file(tmp_path, *(f"default localhost {each}" for each in SECRETS[:count]))
            await eventually(partial(has_secrets, running, count), "the file is read again")
            await hands.submit_one(webhook=webhook(hook.url()))
            await hands.run_all()
            await arrived(hook, count)
    first, second = hook.requests
    assert is_signed(first, old)
    assert is_signed(second, old)
    assert is_signed(second, new)


async def test_a_url_that_only_redis_has_is_checked_before_it_is_called(
    hands: QueueDriver, hook: Receiver
) -> None:
    """Anyone who may write to Redis could otherwise let the API call the operator's network."""
    refused = [
        await hands.submit_one(webhook=webhook(url))
        for url in (
            f"http://127.0.0.1:{hook.port}/",
            f"https://127.0.0.1:{hook.port}/",
            f"http://localhost:{hook.port + 1}/",
            "file:///etc/passwd",
        )
    ]
    resolved = await hands.submit_one(webhook=webhook(f"https://inner.example:{hook.port}/"))
    await hands.run_all()
    async with running_sender(hands.store, hook, resolve=lambda _: ["127.0.0.1"]):
        for job_id in refused:
            await tried(hands, job_id, 1)
            (delivery,) = (await state(hands, job_id)).deliveries
            assert delivery.state.attempts[0].error == "url_refused"
        await tried(hands, resolved, 1)
        (delivery,) = (await state(hands, resolved)).deliveries
        assert delivery.state.attempts[0].error == "address_refused"
    assert not hook.requests
    assert hook.broken == 0


@pytest.mark.soak
async def test_a_host_that_hangs_delays_no_other(hands: QueueDriver, hook: Receiver) -> None:
    """All others are told while each try to the one that hangs is still under way."""
    release = threading.Event()
    long: dict[str, Any] = {"resolve": lambda _: ["127.0.0.1"], "try_seconds": 300}
    with receiver() as hanging:
        hanging.behave = lambda _: (release.wait(300), Reply())[1]
        hanging.names, hook.names = ["hanging.example"], ["good.example"]
        url = hanging.url(host="hanging.example")
        stuck = await hands.submit_many(100, webhook=webhook(url))
        good = await hands.submit_many(20, webhook=webhook(hook.url(host="good.example")))
        await hands.run_all()
        async with running_sender(hands.store, hanging, hook, lease_seconds=900, **long) as running:
            try:
                await is_done(hands, *good)
                assert running.tries() == {("delivered", "204"): len(good)}
                assert len(hanging.requests) <= FIRST_LIMIT
            finally:
                release.set()
    assert len(hook.requests) == len(good)
    assert stuck


@contextmanager
def hanging_hosts(count: int) -> Iterator[tuple[Receiver, list[str], threading.Event]]:
    """A receiver of so many names, its URLs, and the event after which it answers."""
    release = threading.Event()
    with receiver() as hanging:
        hanging.behave = lambda _: (release.wait(300), Reply())[1]
        hanging.names = [f"{number}.hanging.example" for number in range(count)]
        try:
            yield hanging, [hanging.url(host=name) for name in hanging.names], release
        finally:
            release.set()


async def test_the_hosts_of_a_tenant_that_hang_delay_no_other_tenant(
    hands: QueueDriver, hook: Receiver
) -> None:
    """All are new. The other tenant is told while tries to those that hang are under way."""
    hook.names = ["good.example"]
    url = hook.url(host="good.example")
    with hanging_hosts(100) as (hanging, urls, release):
        await hands.submit(*(new_job(tenant="many", webhook=webhook(each)) for each in urls))
        await hands.run_all()
        async with running_sender(
            hands.store, hanging, hook, resolve=lambda _: ["127.0.0.1"]
        ) as running:
            await arrived(hanging, 12)
            told = await hands.submit_many(20, tenant="few", webhook=webhook(url))
            await hands.run_all()
            await is_done(hands, *told)
            assert running.tries() == {("delivered", "204"): 20}
            release.set()


@pytest.mark.soak
async def test_many_hosts_that_hang_do_not_keep_those_of_the_same_tenant_for_long(
    hands: QueueDriver, hook: Receiver
) -> None:
    hook.names = ["good.example"]
    url = hook.url(host="good.example")
    with hanging_hosts(100) as (hanging, urls, release):
        await hands.submit(*(new_job(webhook=webhook(each)) for each in urls * 3))
        new = await hands.submit_many(3, webhook=webhook(url))
        await hands.run_all()
        async with running_sender(hands.store, hanging, hook, resolve=lambda _: ["127.0.0.1"]):
            await eventually(lambda: len(hook.requests) == 3, "a new host is told", 60)
            await is_done(hands, *new)
            known = await hands.submit_many(100, webhook=webhook(url))
            await hands.run_all()
            # It has places of its own now.
            await eventually(lambda: len(hook.requests) == 103, "a known host is told", 5)
            await is_done(hands, *known)
            release.set()


async def test_a_redelivery_is_sent_at_once_though_its_host_failed_often(
    hands: QueueDriver, hook: Receiver
) -> None:
    hook.behave = lambda _: Reply(503)
    failed = await hands.submit_many(5, webhook=webhook(hook.url()))
    await hands.run_all()
    async with running_sender(hands.store, hook) as running:
        await eventually(lambda: running.tries() == {("retry", "503"): 3}, "its host is closed")
        hook.behave = lambda _: Reply()
        before = len(hook.requests)
        redelivered = await Outbox(hands.store).redeliver(
            await hands.read(failed[0]), now_ms=hands.now_ms()
        )
        assert redelivered == "ok"
        told = f"msg_{failed[0]}_1_completed"
        # The pause of the host is 10 s.
        await eventually(lambda: len(hook.requests) > before, "it is sent again", 5)
        assert hook.requests[before].webhook_id == told
        await is_done(hands, failed[0])


async def test_a_sender_that_is_closed_leaves_what_it_has_not_tried_to_others(
    hands: QueueDriver, hook: Receiver
) -> None:
    release = threading.Event()
    hook.behave = lambda _: (release.wait(30), Reply())[1]
    job_ids = await hands.submit_many(20, webhook=webhook(hook.url()))
    await hands.run_all()
    async with running_sender(hands.store, hook) as running:
        await arrived(hook, 2)
        closing = asyncio.ensure_future(running.sender.close())
        release.set()
        await closing
    due = hands.redis.zcount(keys.outbox(Q), "-inf", hands.now_ms() + 3000)
    assert due == 18
    async with running_sender(hands.store, hook):
        await is_done(hands, *job_ids)
    assert len({request.webhook_id for request in hook.requests}) == len(hook.requests) == 20


async def test_damaged_deliveries_end_and_harm_no_other(hands: QueueDriver, hook: Receiver) -> None:
    damaged: dict[bytes, Any] = {b"\xff_1_completed": 1, b"no member": 1, b"absent_1_failed": 1}
    hands.redis.zadd(keys.outbox(Q), damaged)
    hands.redis.hset(keys.webhook(Q, "x"), mapping={"target": b"\xff", "1_failed": b""})
    hands.redis.hset(
        keys.webhook(Q, "group7"), mapping={"target": Target(hook.url(), "").text, "1_ended": b""}
    )
    hands.redis.zadd(keys.outbox(Q), {b"x_1_failed": 1, b"group7_1_ended": 1})
    job_id = await hands.submit_one(webhook=webhook(hook.url()))
    await hands.run_all()
    hands.redis.zadd(keys.outbox(Q), {f"{job_id}_7_failed": 1})
    async with running_sender(hands.store, hook):
        await is_done(hands, job_id)
        await eventually(lambda: not hands.redis.zcard(keys.outbox(Q)), "the outbox is empty")
    assert [request.webhook_id for request in hook.requests] == [
        Member(job_id, 1, "completed").webhook_id
    ]


async def test_a_delivery_that_waits_too_long_is_left_to_the_next_lease(
    hands: QueueDriver, hook: Receiver
) -> None:
    """Its try could otherwise go on while another process tries it too."""
    lease_seconds = 0.9
    arrived_at: list[float] = []

    def hold(_: Received) -> Reply:
        arrived_at.append(time.monotonic())
        if len(arrived_at) <= FIRST_LIMIT:
            time.sleep(lease_seconds / 2)
        return Reply()

    hook.behave = hold
    job_ids = await hands.submit_many(FIRST_LIMIT + 1, webhook=webhook(hook.url()))
    await hands.run_all()
    async with running_sender(hands.store, hook, lease_seconds=lease_seconds):
        await is_done(hands, *job_ids)
    assert arrived_at[-1] - arrived_at[0] > 0.9 * lease_seconds
