"""The page on webhooks: its receiver handles each kind of event, and its bodies are real ones."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import httpx2
import pytest
import redis
from msgspec.structs import replace

from asyncinfer.api.config import ApiConfig
from asyncinfer.repository import keys
from asyncinfer.repository.store import Store
from asyncinfer.webhooks.bodies import MAX_RESULT_BYTES
from asyncinfer.webhooks.config import WebhookConfig
from tests.docs.markdown import is_alike, page
from tests.faults.harness import eventually, eventually_sync
from tests.ports import free_port
from tests.webhooks.receiver import Received, receiver
from tests.webhooks.sending import SECRETS, secrets_file

from .harness import QUEUE, ROW, ManualWorker, announce, client_of, running

PAGE: Final = page("webhooks.md").section("Receive one")
LARGE: Final = ["x" * MAX_RESULT_BYTES]


class Ends:
    """Jobs and a group with webhooks, all of which have ended, while nobody sends."""

    def __init__(self, url: str, api: httpx2.AsyncClient, worker: ManualWorker) -> None:
        self._url = url
        self._api = api
        self._worker = worker
        self.ids: dict[str, str] = {}

    async def make(self, server: redis.Redis) -> None:
        await self._submit("completed")
        await self._worker.complete()
        await self._submit("large")
        await self._worker.complete(body=LARGE)
        await self._submit("failed", group="night")
        await self._worker.fail()
        for name in ("cancelled", "gone"):
            reply = await self._api.delete(f"/job/{await self._submit(name)}")
            assert reply.status_code == 200, reply.text
        server.delete(*server.scan_iter(f"job:{self.ids['gone']}:*"))
        close = {"webhook": {"url": self._url, "metadata": {"name": "group"}}}
        reply = await self._api.post("/group/night/close", json=close)
        assert reply.status_code == 200, reply.text
        await eventually(lambda: server.zcard(keys.outbox(QUEUE)) == 6, "all ends are to be told")

    async def _submit(self, name: str, **options: Any) -> str:
        webhook = {"url": self._url, "metadata": {"name": name}}
        body = {"data": ROW, "options": {"webhook": webhook, **options}}
        reply = await self._api.post("/predict", json=body)
        assert reply.status_code == 202, reply.text
        self.ids[name] = reply.json()["job_id"]
        return self.ids[name]


@pytest.fixture
def hooks(config: ApiConfig, tmp_path: Path) -> WebhookConfig:
    return WebhookConfig(secrets=secrets_file(tmp_path, f"default * {SECRETS[0]}"))


async def told_of_each_kind(
    config: ApiConfig, hooks: WebhookConfig, worker: ManualWorker, server: redis.Redis, port: int
) -> Ends:
    """Makes an end of each kind, and sends them all to the receiver at the port."""
    allowed = replace(hooks, allow=(f"localhost:{port}",))
    silent = replace(config, webhooks=replace(allowed, sends=False))
    async with running(silent) as api_port, client_of(api_port) as api:
        ends = Ends(f"http://localhost:{port}/", api, worker)
        await ends.make(server)
    async with running(replace(config, webhooks=allowed)):
        await eventually(lambda: server.zcard(keys.outbox(QUEUE)) == 0, "all ends are told")
    return ends


def listens(port: int) -> bool:
    with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@contextmanager
def receiver_of_the_page(port: int) -> Iterator[subprocess.Popen[str]]:
    (program,) = PAGE.texts("python")
    environ = {**os.environ, "PORT": str(port), "WEBHOOK_SECRET": SECRETS[0]}
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        eventually_sync(lambda: listens(port), "the receiver listens")
        yield process
    finally:
        process.kill()
        process.communicate()


async def test_the_receiver_of_the_page_handles_each_kind_of_event(
    config: ApiConfig,
    store: Store,
    server: redis.Redis,
    hooks: WebhookConfig,
    manual_worker: ManualWorker,
) -> None:
    await announce(store, "iris", default="iris")
    port = free_port()
    with receiver_of_the_page(port) as process:
        ends = await told_of_each_kind(config, hooks, manual_worker, server, port)
        process.terminate()
        out, errors = process.communicate()
    assert "Traceback" not in errors, errors
    shown = dict(re.findall(r"^\S+ \{'name': '(\w+)'\} (.*)$", out, re.MULTILINE))
    assert shown.keys() == {*ends.ids, "group"}, out
    assert "'class_name': 'setosa'" in shown["completed"]
    assert shown["large"] == f"/job/{ends.ids['large']}/result"
    assert "'code': 'model_failed'" in shown["failed"]
    assert "'status': 'cancelled'" in shown["cancelled"]
    assert "'expired': True" in shown["gone"]
    assert "'failed': 1" in shown["group"]


async def test_the_bodies_on_the_pages_have_the_members_of_real_ones(
    config: ApiConfig,
    store: Store,
    server: redis.Redis,
    hooks: WebhookConfig,
    manual_worker: ManualWorker,
) -> None:
    await announce(store, "iris", default="iris")
    with receiver() as hook:
        await told_of_each_kind(config, hooks, manual_worker, server, hook.port)
    events = {
        request.event["type"]: request.event for request in hook.requests if is_whole(request)
    }
    assert set(re.findall(r"`([a-z]+\.[a-z]+)`", PAGE.text)) >= events.keys()
    assert len(events) == 4
    (job_body,) = PAGE.texts("json")
    (group_body,) = page("http.md").section("Close a group").texts("json")
    for text in (job_body, group_body):
        shown = json.loads(text)
        real = events[shown["type"]]
        assert list(shown) == list(real)
        assert list(shown["data"]) == list(real["data"])
        assert is_alike(shown, {**real, "metadata": {}})
    assert re.fullmatch("[0-9a-f]{32}", json.loads(job_body)["data"]["job_id"])


def is_whole(request: Received) -> bool:
    """Whether nothing of the job is left out, as a large result is."""
    return "result_url" not in request.event and "expired" not in request.event["data"]
