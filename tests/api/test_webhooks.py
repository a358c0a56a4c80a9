"""Webhooks over HTTP: what a submit may ask for, what became of it, and sending it again."""

import base64
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import numpy as np
import pytest

from asyncinfer.api.config import ApiConfig
from asyncinfer.client import AsyncClient
from asyncinfer.repository import keys
from asyncinfer.repository.deliveries import (
    Attempt,
    DeliveryState,
    Outcome,
    Target,
    pack_state,
)
from asyncinfer.repository.outbox import Outbox
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from asyncinfer.webhooks.config import WebhookConfig
from tests.queue_driver import Q, QueueDriver

from .harness import ROW, ManualWorker, announce, assert_problem, client_of, hosted, running

URL = "https://hooks.example.com/in?token=abc"
HOST = "hooks.example.com"
SECRET = "whsec_" + base64.b64encode(b"s" * 32).decode()
POLICY = Policy(max_webhooks=3)


@pytest.fixture
def silent(config: ApiConfig) -> ApiConfig:
    """An API that sends nothing itself."""
    return msgspec.structs.replace(config, policy=POLICY, webhooks=WebhookConfig(sends=False))


@pytest.fixture
async def api(silent: ApiConfig, store: Store) -> AsyncIterator[httpx2.AsyncClient]:
    store.policy = POLICY
    await announce(store, "iris", "digits", default="iris")
    async with hosted(running(silent)) as port, client_of(port) as client:
        yield client


@pytest.fixture
async def port(
    silent: ApiConfig, store: Store, key_file: Path, tmp_path: Path
) -> AsyncIterator[int]:
    """The port of an API with keys, where `alice` and `bob` have a secret for one host."""
    await announce(store, "iris", default="iris")
    secrets = tmp_path / "secrets"
    secrets.write_text(f"alice {HOST} {SECRET}\nbob {HOST} {SECRET}\n")
    secrets.chmod(0o600)
    webhooks = WebhookConfig(sends=False, secrets=secrets)
    keyed = msgspec.structs.replace(silent, api_keys=key_file, webhooks=webhooks)
    async with hosted(running(keyed)) as port:
        yield port


def body(url: str = URL, **webhook: Any) -> dict[str, Any]:
    return {"data": ROW, "options": {"webhook": {"url": url, **webhook}}}


async def submit(client: httpx2.AsyncClient, **webhook: Any) -> str:
    reply = await client.post("/predict", json=body(**webhook))
    assert reply.status_code == 202, reply.text
    return str(reply.json()["job_id"])


async def try_all(store: Store, status: int = 500, outcome: Outcome | None = None) -> None:
    """A sender tries all that is due; the next try of each is due in a minute."""
    outbox = Outbox(store)
    for delivery in await outbox.take(await store.queues(), 100, 1000):
        now_ms = await store.time_ms()
        await outbox.note(delivery, Attempt(now_ms, status, "", 15), now_ms + 60_000, outcome)


# --- the option ------------------------------------------------------------------------------


async def test_the_end_of_a_job_with_a_webhook_is_put_into_the_outbox(
    api: httpx2.AsyncClient, hands: QueueDriver, manual_worker: ManualWorker
) -> None:
    job_id = await submit(api, events=["completed"], metadata={"order": [1, {"n": None}]})
    stored = await hands.read(job_id)
    assert stored.webhook
    assert stored.webhook.metadata == {"order": [1, {"n": None}]}
    await manual_worker.complete()
    assert hands.redis.zrange(keys.outbox(Q), 0, -1) == [f"{job_id}_1_completed".encode()]


async def test_a_query_names_the_url_of_a_webhook_alone(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    saved = io.BytesIO()
    np.save(saved, np.array(ROW, np.float32))
    headers = {"content-type": "application/x-npy"}
    reply = await api.post(
        "/predict", params={"webhook": URL}, content=saved.getvalue(), headers=headers
    )
    stored = await hands.read(reply.json()["job_id"])
    assert stored.webhook
    assert (stored.webhook.url, len(stored.webhook.events)) == (URL, 3)
    refused = await api.post("/predict", params={"webhook": ""}, json={"data": ROW})
    assert "`webhook`" in assert_problem(refused, 400, "invalid_query")["detail"]


async def test_lines_have_webhooks_of_their_own_and_are_refused_alone(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    lines = [body(), {"data": ROW}, body("http://hooks.example.com"), body(), body(), body()]
    content = "\n".join(map(json.dumps, lines))
    headers = {"content-type": "application/x-ndjson"}
    reply = await api.post("/predict", content=content, headers=headers)
    answers = [json.loads(line) for line in reply.text.splitlines()]
    codes = [answer.get("code", answer["status"]) for answer in answers]
    assert codes == ["pending", "pending", "webhook_refused", "pending", "pending", "webhooks_full"]
    assert [bool((await hands.read(one["job_id"])).webhook) for one in answers[:2]] == [True, False]


DEEP: Any = {}
for _ in range(17):
    DEEP = {"a": DEEP}


UNFIT_WEBHOOKS: list[tuple[Any, str]] = [
    ({}, "/options/webhook/url"),
    ({"url": ""}, "/options/webhook/url"),
    ({"url": "https://e.example/" + "x" * 2048}, "/options/webhook/url"),
    ({"url": URL, "events": []}, "/options/webhook/events"),
    ({"url": URL, "events": ["started"]}, "/options/webhook/events/0"),
    ({"url": URL, "secret": "x"}, "/options/webhook/secret"),
    ({"url": URL, "metadata": "x"}, "/options/webhook/metadata"),
    ({"url": URL, "metadata": {"x": "y" * 4096}}, "/options/webhook/metadata"),
    ({"url": URL, "metadata": {"n": 1 << 64}}, "/options/webhook/metadata"),
    ({"url": URL, "metadata": DEEP}, "/options/webhook/metadata"),
    ("https://e.example", "/options/webhook"),
]


async def test_what_a_webhook_may_not_be_is_named(
    api: httpx2.AsyncClient, subtests: pytest.Subtests
) -> None:
    for webhook, pointer in UNFIT_WEBHOOKS:
        with subtests.test(pointer, webhook=webhook):
            refused = await api.post(
                "/predict", json={"data": ROW, "options": {"webhook": webhook}}
            )
            problem = assert_problem(refused, 422, "invalid_input")
            assert problem["errors"][0]["pointer"].startswith(pointer.removesuffix("/0"))


async def test_metadata_of_many_members_is_taken_and_a_repeated_one_refused(
    api: httpx2.AsyncClient,
) -> None:
    metadata = {f"{number}": number for number in range(350)}
    await submit(api, metadata=metadata)
    repeated = json.dumps(body(metadata={"a": 1})).replace('"a": 1', '"a": 1, "a": 2')
    headers = {"content-type": "application/json"}
    refused = await api.post("/predict", content=repeated, headers=headers)
    problem = assert_problem(refused, 422, "invalid_input")
    assert problem["errors"][0]["pointer"] == "/options/webhook/metadata/a"


async def test_a_url_that_may_not_be_called_is_refused_before_the_job_is_stored(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    for path in ("/predict", "/models/iris/validate"):
        refused = await api.post(path, json=body("https://169.254.169.254/latest"))
        assert_problem(refused, 422, "webhook_refused")
    assert hands.waiting_ids() == []


async def test_where_keys_are_in_use_a_webhook_needs_a_secret(port: int) -> None:
    async with client_of(port, **{"x-api-key": "alice"}) as alice:
        await submit(alice)
        refused = await alice.post("/predict", json=body("https://other.example.com/"))
    assert "WEBHOOK_SECRETS" in assert_problem(refused, 422, "webhook_refused")["detail"]


async def test_too_many_webhooks_refuse_a_submit_and_a_retry_with_one(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    job_ids = [await submit(api) for _ in range(3)]
    refused = await api.post("/predict", json=body())
    assert "MAX_WEBHOOKS" in assert_problem(refused, 429, "webhooks_full")["detail"]
    assert int(refused.headers["retry-after"]) > 0
    assert (await api.post("/predict", json={"data": ROW})).status_code == 202
    await manual_worker.fail()
    assert_problem(await api.post(f"/job/{job_ids[0]}/retry"), 429, "webhooks_full")


async def test_a_key_with_another_webhook_is_another_request(api: httpx2.AsyncClient) -> None:
    headers = {"idempotency-key": "k"}
    first = await api.post("/predict", json=body(), headers=headers)
    again = await api.post("/predict", json=body(), headers=headers)
    other = await api.post("/predict", json=body("https://b.example/"), headers=headers)
    assert first.json()["job_id"] == again.json()["job_id"]
    assert_problem(other, 422, "idempotency_conflict")


# --- what became of it -----------------------------------------------------------------------


async def test_a_job_shows_the_attempts_of_its_webhook_and_sends_it_again(
    api: httpx2.AsyncClient, store: Store, hands: QueueDriver, manual_worker: ManualWorker
) -> None:
    job_id = await submit(api, events=["completed", "failed"])
    before = (await api.get(f"/job/{job_id}/webhook")).json()
    assert before == {
        **{"job_id": job_id, "url": URL, "events": ["completed", "failed"], "deliveries": []},
    }
    nothing = await api.post(f"/job/{job_id}/webhook/redeliver")
    assert_problem(nothing, 404, "webhook_not_found")
    await manual_worker.complete()
    await try_all(store)
    (delivery,) = (await api.get(f"/job/{job_id}/webhook")).json()["deliveries"]
    assert delivery["webhook_id"] == f"msg_{job_id}_1_completed"
    assert (delivery["status"], delivery["tries"]) == ("pending", 1)
    assert delivery["next_at"] > delivery["attempts"][0]["at"]
    shown = {name: delivery["attempts"][0][name] for name in ("status", "error", "seconds")}
    assert shown == {"status": 500, "error": None, "seconds": 0.015}
    again = await api.post(f"/job/{job_id}/webhook/redeliver", params={"event": "completed"})
    assert again.status_code == 202
    assert again.json()["deliveries"][0]["tries"] == 0
    await try_all(store, 204, "delivered")
    (delivery,) = (await api.get(f"/job/{job_id}/webhook")).json()["deliveries"]
    assert (delivery["status"], delivery["next_at"]) == ("delivered", None)
    assert [one["status"] for one in delivery["attempts"]] == [500, 204]
    assert (await api.get(f"/job/{job_id}")).json()["status"] == "completed"


async def test_a_job_without_a_webhook_has_none(api: httpx2.AsyncClient) -> None:
    job_id = (await api.post("/predict", json={"data": ROW})).json()["job_id"]
    for reply in (
        await api.get(f"/job/{job_id}/webhook"),
        await api.post(f"/job/{job_id}/webhook/redeliver"),
    ):
        assert "without a webhook" in assert_problem(reply, 404, "webhook_not_found")["detail"]


async def test_a_tenant_sees_its_own_webhooks_and_an_operator_no_part_of_a_url_that_is_secret(
    port: int, store: Store, manual_worker: ManualWorker
) -> None:
    async with (
        client_of(port, **{"x-api-key": "alice"}) as alice,
        client_of(port, **{"x-api-key": "bob"}) as bob,
        client_of(port, **{"x-api-key": "ops"}) as ops,
    ):
        job_id = await submit(alice)
        await submit(bob)
        await manual_worker.complete()
        await try_all(store)
        assert_problem(await bob.get(f"/job/{job_id}/webhook"), 404, "job_not_found")
        redeliver = f"/job/{job_id}/webhook/redeliver"
        assert_problem(await bob.post(redeliver), 404, "job_not_found")
        seen = await ops.get(f"/job/{job_id}/webhook", params={"tenant": "alice"})
        assert seen.json()["url"] == f"https://{HOST}"
        of_all = (await ops.get("/webhooks", params={"tenant": "*"})).json()["hosts"]
        assert [(one["host"], one["pending"]) for one in of_all] == [(HOST, 2)]
        of_bob = (await bob.get("/webhooks")).json()["hosts"]
        assert [(one["host"], one["pending"]) for one in of_bob] == [(HOST, 1)]
        assert_problem(await bob.get("/webhooks", params={"tenant": "*"}), 403, "forbidden")
        sent = await bob.post("/webhooks/redeliver", params={"host": HOST})
        assert sent.json() == {"redelivered": 1, "refused": 0, "cursor": None}
        (entry,) = (await ops.get("/audit", params={"action": "redeliver"})).json()["entries"]
        assert (entry["tenant"], entry["jobs"], entry["outcome"]) == ("bob", 1, "done")
        assert entry["filter"] == {"tenant": "bob", "host": HOST}


# --- many ------------------------------------------------------------------------------------


async def test_hosts_that_fail_come_first_and_what_was_given_up_is_sent_again(
    api: httpx2.AsyncClient, store: Store, hands: QueueDriver, manual_worker: ManualWorker
) -> None:
    lost = await submit(api, url="https://dead.example:8443/x")
    await manual_worker.complete()
    await try_all(store, 503, "given_up")
    await submit(api)
    await manual_worker.complete()
    dead, waiting = (await api.get("/webhooks")).json()["hosts"]
    assert (dead["host"], dead["given_up"], dead["last_status"]) == ("dead.example:8443", 1, 503)
    assert (waiting["host"], waiting["pending"], waiting["failing"]) == (HOST, 1, 0)
    assert_problem(await api.post("/webhooks/redeliver"), 400, "invalid_query")
    other = await api.post("/webhooks/redeliver", params={"given_up": "true", "model": "digits"})
    assert other.json()["redelivered"] == 0
    hands.redis.delete(*hands.redis.keys(f"job:{lost}:*"))
    sent = await api.post("/webhooks/redeliver", params={"given_up": "true"})
    assert sent.json() == {"redelivered": 1, "refused": 0, "cursor": None}
    assert f"{lost}_1_completed".encode() in hands.redis.zrange(keys.outbox(Q), 0, -1)
    assert hands.redis.zcard(keys.undelivered(Q)) == 0


async def test_a_job_that_is_deleted_is_told_of_no_more(
    api: httpx2.AsyncClient, store: Store, manual_worker: ManualWorker
) -> None:
    to_come, given_up = await submit(api), await submit(api)
    await manual_worker.complete()
    await try_all(store, 503, "given_up")
    assert (await api.post(f"/job/{to_come}/webhook/redeliver")).status_code == 202
    (host,) = (await api.get("/webhooks")).json()["hosts"]
    assert (host["pending"], host["given_up"]) == (1, 1)
    for job_id in (to_come, given_up):
        await api.delete(f"/job/{job_id}", params={"purge": "true"})
    assert (await api.get("/webhooks")).json()["hosts"] == []
    assert await Outbox(store).take(await store.queues(), 100, 1000) == []


async def test_a_tenant_finds_its_webhooks_behind_those_of_others(
    port: int, hands: QueueDriver
) -> None:
    """One page is of 10,000 deliveries, whoever has them."""
    add_failing(hands, "https://dead.example/", "alice", 10_500)
    add_failing(hands, f"https://{HOST}/", "bob", 3)
    async with AsyncClient(f"http://127.0.0.1:{port}", api_key="bob") as bob:
        (host,) = await bob.webhooks()
        assert (host.host, host.pending, host.failing) == (HOST, 3, 3)
        assert (await bob.redeliver_webhooks(host=HOST)).redelivered == 3
    async with client_of(port, **{"x-api-key": "bob"}) as bob_of_http:
        first = (await bob_of_http.get("/webhooks")).json()
        assert first["cursor"]
        for cursor in ("x", "a" * 5000):
            refused = await bob_of_http.get("/webhooks", params={"cursor": cursor})
            assert_problem(refused, 400, "invalid_query")


ADD_FAILING = """
for number = 1, tonumber(ARGV[4]) do
  local id = ARGV[2] .. '-' .. number
  redis.call('HSET', KEYS[1] .. id, 'target', ARGV[1], '1_failed', ARGV[3])
  redis.call('ZADD', KEYS[2], ARGV[5], id .. '_1_failed')
  redis.call('HSET', KEYS[3], id .. '_1', 1)
end
"""


def add_failing(hands: QueueDriver, url: str, tenant: str, count: int) -> None:
    """Adds deliveries whose first try has failed; the next one is due in an hour."""
    target, state = Target(url, tenant).text, pack_state(DeliveryState(tries=1))
    names = keys.webhook(Q, ""), keys.outbox(Q), keys.webhooks(Q)
    due_ms = hands.now_ms() + 3_600_000
    hands.redis.eval(ADD_FAILING, 3, *names, target, tenant, state, count, due_ms)


async def test_what_cannot_be_read_is_left_out_of_the_hosts(
    api: httpx2.AsyncClient, hands: QueueDriver, manual_worker: ManualWorker
) -> None:
    job_id = await submit(api)
    await manual_worker.complete()
    hands.redis.zadd(keys.outbox(Q), {b"\xff": 1, "x_1_completed": 2, "y": float("inf")})
    hands.redis.hset(keys.webhook(Q, "x"), mapping={"target": b"\xff", "1_completed": ""})
    assert [one["host"] for one in (await api.get("/webhooks")).json()["hosts"]] == [HOST]
    hands.redis.delete(keys.outbox(Q))
    hands.redis.set(keys.outbox(Q), "text")
    assert (await api.get("/webhooks")).json()["hosts"] == []
    assert_problem(await api.get(f"/job/{job_id}/webhook"), 503, "redis_refused")


async def test_queues_show_how_many_webhooks_are_to_be_told(
    api: httpx2.AsyncClient, store: Store, manual_worker: ManualWorker
) -> None:
    await submit(api)
    await manual_worker.complete()
    await submit(api)
    queues = {one["model"]: one["webhooks"] for one in (await api.get("/queues")).json()["queues"]}
    counts = {name: queues["iris"][name] for name in ("reserved", "pending", "due", "given_up")}
    assert counts == {"reserved": 2, "pending": 1, "due": 1, "given_up": 0}
    assert queues["iris"]["reserved_bytes"] > 4096
    assert queues["iris"]["oldest_due_seconds"] is not None
