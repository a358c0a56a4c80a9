"""Webhooks of groups over HTTP: what is refused, and what their receivers are told."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from msgspec.structs import replace

from asyncinfer.api.config import ApiConfig
from asyncinfer.client import verify_webhook
from asyncinfer.repository import keys
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from asyncinfer.webhooks.config import WebhookConfig
from tests.faults.harness import eventually
from tests.queue_driver import QueueDriver
from tests.webhooks.receiver import Received, Receiver, Reply, receiver
from tests.webhooks.sending import SECRETS, secrets_file

from .harness import QUEUE, ROW, ManualWorker, announce, assert_problem, client_of, hosted, running

PUBLIC = "https://hooks.example.com/done"


@pytest.fixture
async def quiet_api(config: ApiConfig, store: Store) -> AsyncIterator[httpx2.AsyncClient]:
    """An API that leaves sending to others, with room for one webhook."""
    await announce(store, "iris", "digits", default="iris")
    policy = Policy(max_webhooks=1)
    changed = replace(config, policy=policy, webhooks=WebhookConfig(sends=False))
    async with hosted(running(changed)) as port, client_of(port) as client:
        yield client


async def submit_to(client: httpx2.AsyncClient, group: str = "g", model: str = "iris") -> None:
    data = ROW if model == "iris" else [[1.0] * 64]
    reply = await client.post(f"/predict/{model}?group={group}", json={"data": data})
    assert reply.status_code == 202, reply.text


async def close(
    client: httpx2.AsyncClient, url: str = PUBLIC, group: str = "g", **more: Any
) -> httpx2.Response:
    return await client.post(f"/group/{group}/close", json={"webhook": {"url": url, **more}})


async def close_by(client: httpx2.AsyncClient, content: bytes) -> httpx2.Response:
    headers = {"content-type": "application/json"}
    return await client.post("/group/g/close", content=content, headers=headers)


@pytest.mark.soak
async def test_a_webhook_that_cannot_be_taken_leaves_the_group_open(
    quiet_api: httpx2.AsyncClient,
) -> None:
    await submit_to(quiet_api)
    large = {"x": "x" * 4096}
    deep: dict[str, Any] = {}
    for _ in range(16):
        deep = {"x": deep}
    for more, pointer in (
        ({"metadata": large}, "/webhook/metadata"),
        ({"metadata": deep}, "/webhook/metadata"),
        ({"metadata": []}, "/webhook/metadata"),
        ({"metadata": {"x": 2**70}}, "/webhook/metadata"),
        ({"events": ["completed"]}, "/webhook/events"),
        ({"url": ""}, "/webhook/url"),
    ):
        problem = assert_problem(await close(quiet_api, **more), 422, "invalid_input")
        assert problem["errors"][0]["pointer"] == pointer
    assert_problem(await close(quiet_api, "http://10.0.0.1/"), 422, "webhook_refused")
    for content, status, code in (
        (b"{", 400, "invalid_json"),
        (b'{"webhook": {"url": "https://a.example", "url": "b"}}', 422, "invalid_input"),
        (b'{"webhook": {"url": "https://a.example"}, "webhook": null}', 422, "invalid_input"),
        (b'{"webhook": {"url": "%s"}}' % (b"x" * (64 << 10)), 413, "body_too_large"),
    ):
        assert_problem(await close_by(quiet_api, content), status, code)
    for depth in range(930, 980):
        nested = b"[" * depth + b"]" * depth
        webhook = b'{"url": "https://a.example", "metadata": {"a": %s, "a": 1}}' % nested
        content = b'{"webhook": %s}' % webhook
        assert (await close_by(quiet_api, content)).status_code in (400, 422)
    assert not (await quiet_api.get("/group/g")).json()["closed"]


async def test_a_closed_group_keeps_its_webhook(quiet_api: httpx2.AsyncClient) -> None:
    await submit_to(quiet_api)
    for _ in range(2):
        assert (await close(quiet_api, metadata={"order": 7})).status_code == 200
    assert (await quiet_api.post("/group/g/close")).status_code == 200
    others: list[dict[str, Any]] = [{}, {"metadata": {"order": 8}}]
    for more in others:
        assert_problem(await close(quiet_api, **more), 409, "group_closed")


async def test_a_group_that_is_not_followed_names_whose_bound_it_is(
    quiet_api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    await submit_to(quiet_api)
    closing, closers = keys.closing(QUEUE), keys.closers(QUEUE)
    hands.redis.zadd(closing, {f"{number:x}": 2**52 for number in range(5000)})
    hands.redis.hset(closers, ":default", 5000)
    own = assert_problem(await close(quiet_api), 429, "too_many_groups")["detail"]
    assert own.startswith("Your closed groups")
    hands.redis.zadd(closing, {f"{number:x}": 2**52 for number in range(10_000)})
    of_all = assert_problem(await close(quiet_api), 429, "too_many_groups")["detail"]
    assert "of all tenants together" in of_all


async def test_without_room_for_its_webhook_a_group_stays_open(
    quiet_api: httpx2.AsyncClient, store: Store
) -> None:
    for name in "gh":
        await submit_to(quiet_api, name)
    assert (await close(quiet_api)).status_code == 200
    full = await close(quiet_api, group="h")
    assert_problem(full, 429, "webhooks_full")
    assert full.headers["retry-after"]
    await submit_to(quiet_api, "h")
    assert (await quiet_api.post("/group/h/close")).status_code == 200


async def test_the_end_of_a_group_is_told_once_by_two_apis(
    config: ApiConfig, store: Store, manual_worker: ManualWorker, tmp_path: Path
) -> None:
    await announce(store, "iris", "digits", default="iris")
    secrets = secrets_file(tmp_path, f"default localhost {SECRETS[0]}")
    with receiver() as hook:
        webhooks = WebhookConfig(secrets=secrets, allow=(hook.address,))
        changed = replace(config, webhooks=webhooks)
        async with running(changed) as port, running(changed), client_of(port) as api:
            for model in ("iris", "iris", "digits"):
                await submit_to(api, model=model)
            await manual_worker.fail()
            assert (await close(api, hook.url(), metadata={"order": 7})).status_code == 200
            await manual_worker.complete(f"{QUEUE}:digits")
            await eventually(lambda: bool(hook.requests), "the webhook arrives")
            # All of a second group is told later than a repetition of the first would be.
            await submit_to(api, "last")
            await manual_worker.complete()
            await close(api, hook.url(), "last")
            await eventually(lambda: _groups(hook.requests)[-1] == "last", "the next one arrives")
            group = (await api.get("/group/g")).json()
            document = (await api.get("/openapi.json")).json()
        assert _groups(hook.requests) == ["g", "last"]
        request = hook.requests[0]
    event = verify_webhook(SECRETS[0], request.headers, request.body)
    assert request.webhook_id.startswith("msg_group")
    assert "." not in request.webhook_id
    assert (event["type"], event["metadata"]) == ("group.ended", {"order": 7})
    counts = {"completed": 1, "failed": 2, "cancelled": 0, "expired": 0}
    data = event["data"]
    assert (data["group"], data["jobs"], data["counts"]) == ("g", 3, counts)
    assert data["closed_at"] < data["ended_at"] == event["timestamp"]
    assert group["ended_at"] == data["ended_at"]
    described = document["components"]["schemas"]
    assert event.keys() == described["GroupEvent"]["properties"].keys()
    assert data.keys() == described["EndedGroup"]["properties"].keys()
    assert "groupEnded" in document["webhooks"]
    assert not await store.command("EXISTS", keys.closing(QUEUE), keys.outbox(QUEUE))


def _groups(requests: Sequence[Received]) -> list[str]:
    return [request.event["data"]["group"] for request in requests]


# --- a receiver that fails -------------------------------------------------------------------


@asynccontextmanager
async def failing(
    config: ApiConfig, store: Store, worker: ManualWorker
) -> AsyncIterator[tuple[httpx2.AsyncClient, Receiver]]:
    """An API, and a receiver that has refused the webhook of the group `g` once."""
    await announce(store, "iris", default="iris")
    with receiver() as hook:
        hook.behave = lambda _: Reply(503)
        changed = replace(config, webhooks=WebhookConfig(allow=(hook.address,)))
        async with hosted(running(changed)) as port, client_of(port) as api:
            await submit_to(api)
            await worker.complete()
            assert (await close(api, hook.url())).status_code == 200

            async def is_noted() -> bool:
                hosts = (await api.get("/webhooks")).json()["hosts"]
                return any(one["failing"] for one in hosts)

            await eventually(is_noted, "the failure is shown")
            yield api, hook


async def test_a_receiver_that_fails_is_listed_and_sent_the_end_of_a_group_again(
    config: ApiConfig, store: Store, manual_worker: ManualWorker
) -> None:
    async with failing(config, store, manual_worker) as (api, hook):
        (host,) = (await api.get("/webhooks")).json()["hosts"]
        assert (host["host"], host["pending"], host["last_status"]) == (hook.address, 1, 503)
        hook.behave = lambda _: Reply()
        again = await api.post("/webhooks/redeliver", params={"host": hook.address})
        assert again.json() == {"redelivered": 1, "refused": 0, "cursor": None}
        await eventually(lambda: len(hook.requests) == 2, "it is sent again")
        first, second = hook.requests
        assert (first.webhook_id, first.body) == (second.webhook_id, second.body)

        async def is_told() -> bool:
            return not (await api.get("/webhooks")).json()["hosts"]

        await eventually(is_told, "the receiver is told")
        none = await api.post("/webhooks/redeliver", params={"host": hook.address})
        assert none.json()["redelivered"] == 0


async def test_a_group_shows_the_attempts_of_its_webhook_and_sends_it_again(
    config: ApiConfig, store: Store, manual_worker: ManualWorker
) -> None:
    async with failing(config, store, manual_worker) as (api, hook):
        shown = (await api.get("/group/g/webhook")).json()
        (delivery,) = shown["deliveries"]
        assert (shown["group"], shown["url"]) == ("g", hook.url())
        assert delivery["webhook_id"] == hook.requests[0].webhook_id
        assert (delivery["event"], delivery["status"], delivery["tries"]) == ("ended", "pending", 1)
        assert [one["status"] for one in delivery["attempts"]] == [503]
        assert delivery["next_at"] > delivery["attempts"][0]["at"]
        hook.behave = lambda _: Reply()
        again = await api.post("/group/g/webhook/redeliver")
        assert (again.status_code, again.json()["deliveries"][0]["tries"]) == (202, 0)
        await is_over(api, "delivered")
        assert len({(one.webhook_id, one.body) for one in hook.requests}) == 1


@pytest.mark.parametrize(("status", "outcome"), [(204, "delivered"), (410, "gone")])
async def test_the_end_of_a_group_that_is_over_is_sent_again_with_the_same_body(
    config: ApiConfig, store: Store, manual_worker: ManualWorker, status: int, outcome: str
) -> None:
    async with failing(config, store, manual_worker) as (api, hook):
        hook.behave = lambda _: Reply(status)
        for _ in range(2):
            assert (await api.post("/group/g/webhook/redeliver")).status_code == 202
            await is_over(api, outcome)
        assert len(hook.requests) == 3
        assert len({(one.webhook_id, one.body) for one in hook.requests}) == 1


async def is_over(api: httpx2.AsyncClient, outcome: str) -> None:
    """Waits until the delivery of the group `g` is done."""

    async def is_done() -> bool:
        (one,) = (await api.get("/group/g/webhook")).json()["deliveries"]
        return (one["status"], one["next_at"]) == (outcome, None)

    await eventually(is_done, "the delivery is done")


async def test_a_group_that_was_told_of_nothing_has_nothing_to_send_again(
    quiet_api: httpx2.AsyncClient, store: Store
) -> None:
    async def refusals(code: str) -> list[str]:
        replies = (
            await quiet_api.get("/group/g/webhook"),
            await quiet_api.post("/group/g/webhook/redeliver"),
        )
        return [assert_problem(reply, 404, code)["detail"] for reply in replies]

    await refusals("group_not_found")
    await submit_to(quiet_api)
    assert "not closed with a webhook" in (await refusals("webhook_not_found"))[0]
    await quiet_api.post("/group/g/close")
    await refusals("webhook_not_found")
    await close(quiet_api)
    shown = (await quiet_api.get("/group/g/webhook")).json()
    assert shown == {"group": "g", "url": PUBLIC, "deliveries": []}
    early = await quiet_api.post("/group/g/webhook/redeliver")
    assert "have not ended" in assert_problem(early, 404, "webhook_not_found")["detail"]
    await store.command("SET", keys.closed_group(QUEUE, "default", "g"), "x", "EX", 60)
    await refusals("webhook_not_found")
