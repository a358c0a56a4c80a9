"""What is refused of a webhook at a submit, and that the API itself delivers it."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from msgspec.structs import replace

from asyncinfer.api.config import ApiConfig
from asyncinfer.client import verify_webhook
from asyncinfer.errors import InvalidSetting, SecretsFileRefused
from asyncinfer.repository import keys
from asyncinfer.repository.store import Store
from asyncinfer.webhooks.config import WebhookConfig
from tests.api.harness import QUEUE, ROW, announce, assert_problem, client_of, running
from tests.faults.harness import eventually
from tests.queue_driver import QueueDriver
from tests.webhooks.receiver import Receiver, receiver
from tests.webhooks.sending import SECRETS, secrets_file

PUBLIC = "https://hooks.example.com/a"


def body(url: str, **options: Any) -> dict[str, Any]:
    return {"data": ROW, "options": {"webhook": {"url": url, **options}}}


@asynccontextmanager
async def api_with(
    config: ApiConfig, store: Store, *, api_keys: Path | None = None, **webhooks: Any
) -> AsyncIterator[httpx2.AsyncClient]:
    await announce(store, "iris", default="iris")
    changed = replace(config, webhooks=WebhookConfig(**webhooks), api_keys=api_keys)
    async with running(changed) as port, client_of(port) as client:
        yield client


async def test_a_url_that_may_lead_inside_is_refused_and_nothing_is_stored(
    config: ApiConfig, store: Store, hands: QueueDriver
) -> None:
    async with api_with(config, store) as api:
        for url in ("http://hooks.example.com/", "https://127.0.0.1/", "https://localhost/"):
            problem = assert_problem(
                await api.post("/predict", json=body(url)), 422, "webhook_refused"
            )
            assert "The webhook's URL is refused" in problem["detail"]
        lines = [body(PUBLIC), body("https://10.0.0.1/")]
        reply = await api.post(
            "/predict",
            content="\n".join(json.dumps(line) for line in lines),
            headers={"content-type": "application/x-ndjson"},
        )
        first, second = [json.loads(line) for line in reply.text.splitlines()]
        assert first["status"] == "pending"
        assert second["code"] == "webhook_refused"
        assert (await api.post("/predict", json=body(PUBLIC))).status_code == 202
    assert hands.redis.hlen(keys.webhooks(QUEUE)) == 2


async def test_with_api_keys_a_webhook_needs_a_secret_of_its_tenant(
    config: ApiConfig, store: Store, key_file: Path, tmp_path: Path
) -> None:
    secrets = secrets_file(tmp_path, f"alice hooks.example.com {SECRETS[0]}")
    async with api_with(config, store, api_keys=key_file, secrets=secrets) as api:
        for key, url, status in (
            ("alice", PUBLIC, 202),
            ("alice", "https://other.example.com/", 422),
            ("bob", PUBLIC, 422),
        ):
            reply = await api.post("/predict", json=body(url), headers={"x-api-key": key})
            assert reply.status_code == status, reply.text
        assert "whsec" not in reply.text


async def test_the_api_sends_the_webhook_of_a_job_soon_after_its_end(
    config: ApiConfig, store: Store, hands: QueueDriver, tmp_path: Path
) -> None:
    secrets = secrets_file(tmp_path, f"default localhost {SECRETS[0]}")
    with receiver() as hook:
        async with api_with(config, store, secrets=secrets, allow=(hook.address,)) as api:
            submitted = body(hook.url(), metadata={"order": 7})
            job_id = (await api.post("/predict", json=submitted)).json()["job_id"]
            await hands.run_all()
            await eventually(lambda: bool(hook.requests), "the webhook arrives", seconds=5)
            shown = (await api.get(f"/job/{job_id}")).json()
            document = (await api.get("/openapi.json")).json()
    (request,) = hook.requests
    event = verify_webhook(SECRETS[0], request.headers, request.body)
    assert event["type"] == "job.completed"
    assert event["data"] == shown
    assert event["metadata"] == {"order": 7}
    described = document["components"]["schemas"]["WebhookEvent"]
    assert set(event) == set(described["required"])
    assert document["webhooks"]["jobEnded"]["post"]["responses"].keys() == {"2XX", "410"}


async def test_an_api_with_webhooks_off_leaves_them_to_others(
    config: ApiConfig, store: Store, hands: QueueDriver
) -> None:
    with receiver() as hook:
        await _leaves_them(config, store, hands, hook)


async def _leaves_them(config: ApiConfig, store: Store, hands: QueueDriver, hook: Receiver) -> None:
    async with api_with(config, store, sends=False, allow=(hook.address,)) as api:
        assert (await api.post("/predict", json=body(hook.url()))).status_code == 202
        await hands.run_all()
        async with api_with(config, store, allow=(hook.address,)):
            await eventually(lambda: bool(hook.requests), "the webhook arrives")
    assert hands.redis.zcard(keys.outbox(QUEUE)) == 0


async def test_an_api_does_not_start_with_secrets_that_others_may_read(
    config: ApiConfig, store: Store, tmp_path: Path
) -> None:
    secrets = secrets_file(tmp_path, f"default * {SECRETS[0]}")
    secrets.chmod(0o644)
    with pytest.raises(SecretsFileRefused, match="chmod 600"):
        async with api_with(config, store, secrets=secrets):
            pass
    with pytest.raises(InvalidSetting, match="WEBHOOK_ALLOW"):
        async with api_with(config, store, allow=("localhost",)):
            pass
