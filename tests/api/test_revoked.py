"""Removing a key from its file ends the streams, waits and uploads that it began."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx2
import msgspec
import pytest
import redis

from asyncinfer.api.config import ApiConfig
from asyncinfer.api_keys import entry_of
from asyncinfer.repository.store import Store
from tests.faults.harness import eventually

from .bulk_client import bulk_client
from .harness import (
    QUEUE,
    ManualWorker,
    announce,
    assert_problem,
    client_of,
    hosted,
    running,
    submit,
)
from .sse import open_event_stream

WITHIN_SECONDS = 5.0
ROW = {"data": [[5.1, 3.5, 1.4, 0.2]]}


class WrittenKeyFile:
    """A key file that the test rewrites."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines = {
            "alice": entry_of("alice", "alice", "submit,read").line(),
            "bob": entry_of("bob", "bob", "submit,read").line(),
        }
        self.write()

    def write(self) -> None:
        self._path.write_text("\n".join(self._lines.values()))

    def revoke(self, key: str = "alice") -> float:
        """Removes a key; returns the time of the change."""
        del self._lines[key]
        self.write()
        return time.monotonic()

    def give(self, key: str, tenant: str, scopes: str) -> None:
        self._lines[key] = entry_of(key, tenant, scopes).line()
        self.write()


@pytest.fixture
def keys(tmp_path: Path) -> WrittenKeyFile:
    return WrittenKeyFile(tmp_path / "keys")


@pytest.fixture
def stable_seconds() -> float:
    """Shorter than the default, since the tests wait for many changes."""
    return 0.2


@pytest.fixture
async def port(
    config: ApiConfig, store: Store, keys: WrittenKeyFile, tmp_path: Path, stable_seconds: float
) -> AsyncIterator[int]:
    await announce(store, "iris", default="iris")
    locked = msgspec.structs.replace(
        config, api_keys=tmp_path / "keys", api_keys_stable_seconds=stable_seconds
    )
    async with hosted(running(locked)) as it:
        yield it


@pytest.fixture
async def alice(port: int) -> AsyncIterator[httpx2.AsyncClient]:
    async with client_of(port, **{"x-api-key": "alice"}) as client:
        yield client


@pytest.fixture
async def bob(port: int) -> AsyncIterator[httpx2.AsyncClient]:
    async with client_of(port, **{"x-api-key": "bob"}) as client:
        yield client


async def is_unauthorized(client: httpx2.AsyncClient) -> bool:
    return (await client.get("/jobs")).status_code == 401


@pytest.mark.parametrize("stable_seconds", [ApiConfig(redis_url="").api_keys_stable_seconds])
async def test_a_revoked_key_is_refused_within_five_seconds(
    keys: WrittenKeyFile, alice: httpx2.AsyncClient, bob: httpx2.AsyncClient
) -> None:
    assert not await is_unauthorized(alice)
    revoked_at = keys.revoke()
    await eventually(lambda: is_unauthorized(alice), "the key is refused")
    assert time.monotonic() - revoked_at < WITHIN_SECONDS
    assert not await is_unauthorized(bob)


@pytest.mark.parametrize("path", ["/events", "/events?group=g", "/job/{id}/events"])
async def test_a_revoked_key_ends_its_streams_and_no_others(
    keys: WrittenKeyFile, alice: httpx2.AsyncClient, bob: httpx2.AsyncClient, path: str
) -> None:
    paths = [path.replace("{id}", await submit(client)) for client in (alice, bob)]
    async with open_event_stream(alice, paths[0]) as hers, open_event_stream(bob, paths[1]) as his:
        await hers.wait_for_event("snapshot")
        await his.wait_for_event("snapshot")
        revoked_at = keys.revoke()
        assert await hers.remaining_events() == []
        assert time.monotonic() - revoked_at < WITHIN_SECONDS
        await submit(bob)
        if path == "/events":
            assert (await his.wait_for_event()).name == "pending"
    assert_problem(await alice.get(paths[0]), 401, "unauthorized")


@pytest.mark.soak
async def test_a_stream_whose_client_does_not_read_is_sent_nothing_more(
    port: int, keys: WrittenKeyFile, alice: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    head = b"GET /events HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: alice\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head)
    await reader.readuntil(b"retry: 1000")
    keys.revoke()
    await eventually(lambda: is_unauthorized(alice), "the key is refused")
    keys.give("new", "alice", "submit")
    async with client_of(port, **{"x-api-key": "new"}) as client:
        await eventually(_submits(client), "the new key submits")
    async with asyncio.timeout(20):
        rest = await reader.readuntil(b"0\r\n\r\n")
    writer.close()
    assert b"event: pending" not in rest


def _submits(client: httpx2.AsyncClient) -> Callable[[], Awaitable[bool]]:
    async def submits() -> bool:
        return (await client.post("/predict", json=ROW)).status_code == 202

    return submits


async def test_a_waiting_read_of_a_job_is_answered_401(
    keys: WrittenKeyFile, alice: httpx2.AsyncClient
) -> None:
    job_id = await submit(alice)
    waiting = asyncio.create_task(alice.get(f"/job/{job_id}?wait=30"))
    await asyncio.sleep(0)
    revoked_at = keys.revoke()
    reply = await waiting
    assert time.monotonic() - revoked_at < WITHIN_SECONDS
    assert "revoked" in assert_problem(reply, 401, "unauthorized")["detail"]
    assert reply.headers["www-authenticate"] == "Bearer"


async def test_a_submit_that_waits_is_answered_401_with_the_job_it_made(
    keys: WrittenKeyFile, alice: httpx2.AsyncClient, server: redis.Redis
) -> None:
    waiting = asyncio.create_task(alice.post("/predict", json=ROW, headers={"prefer": "wait=30"}))
    await eventually(lambda: server.llen(QUEUE) == 1, "the job is accepted")
    keys.revoke()
    problem = assert_problem(await waiting, 401, "unauthorized")
    assert server.lrange(QUEUE, 0, -1) == [problem["job_id"].encode()]


async def test_lines_are_no_longer_accepted_and_the_last_answer_says_so(
    port: int, keys: WrittenKeyFile, server: redis.Redis
) -> None:
    row = msgspec.json.encode(ROW) + b"\n"
    async with bulk_client(port, b"X-Api-Key: alice\r\n") as bulk:
        await bulk.send(row)
        assert (await bulk.read_first_line())["status"] == "pending"
        revoked_at = keys.revoke()
        last = await bulk.read_first_line()
        assert time.monotonic() - revoked_at < WITHIN_SECONDS
        assert (last["status"], last["code"], last["line"]) == (401, "unauthorized", 2)
        assert await bulk.read_line() is None
    assert server.llen(QUEUE) == 1


async def test_lines_that_wait_for_results_get_none_after_the_revocation(
    keys: WrittenKeyFile,
    alice: httpx2.AsyncClient,
    server: redis.Redis,
    manual_worker: ManualWorker,
) -> None:
    content = (msgspec.json.encode(ROW) + b"\n") * 3
    headers = {"content-type": "application/x-ndjson", "prefer": "wait=30"}
    waiting = asyncio.create_task(alice.post("/predict", content=content, headers=headers))
    await eventually(lambda: server.llen(QUEUE) == 3, "all lines are accepted")
    revoked_at = keys.revoke()
    reply = await waiting
    assert time.monotonic() - revoked_at < WITHIN_SECONDS
    (last,) = [msgspec.json.decode(line) for line in reply.content.splitlines()]
    assert (last["status"], last["line"]) == (401, 4)
    await manual_worker.complete()


async def test_a_body_that_is_still_coming_when_its_key_is_revoked_makes_no_job(
    port: int, keys: WrittenKeyFile, alice: httpx2.AsyncClient, server: redis.Redis
) -> None:
    body = msgspec.json.encode(ROW)
    head = (
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: alice\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head + body[:5])
    # Once another request on another connection is answered, this one's head has been read.
    assert not await is_unauthorized(alice)
    keys.revoke()
    await eventually(lambda: is_unauthorized(alice), "the key is refused")
    writer.write(body[5:])
    async with asyncio.timeout(20):
        reply = await reader.readuntil(b"\r\n\r\n")
    writer.close()
    assert reply.startswith(b"HTTP/1.1 401")
    assert server.llen(QUEUE) == 0


async def test_a_key_that_loses_the_scope_or_changes_its_tenant_ends_what_it_began(
    keys: WrittenKeyFile, alice: httpx2.AsyncClient, bob: httpx2.AsyncClient
) -> None:
    async with (
        open_event_stream(alice, "/events") as hers,
        open_event_stream(bob, "/events") as his,
    ):
        await hers.wait_for_event("snapshot")
        await his.wait_for_event("snapshot")
        keys.give("alice", "alice", "submit")
        keys.give("bob", "alice", "submit,read")
        assert await hers.remaining_events() == []
        assert await his.remaining_events() == []
    assert_problem(await alice.get("/events"), 403, "forbidden")


async def test_a_change_that_is_about_others_ends_nothing(
    port: int,
    keys: WrittenKeyFile,
    alice: httpx2.AsyncClient,
    bob: httpx2.AsyncClient,
    manual_worker: ManualWorker,
) -> None:
    job_id = await submit(alice)
    waiting = asyncio.create_task(alice.get(f"/job/{job_id}?wait=30"))
    async with open_event_stream(alice, "/events") as hers:
        await hers.wait_for_event("snapshot")
        keys.revoke("bob")
        await eventually(lambda: is_unauthorized(bob), "bob's key is refused")
        keys.give("alice", "alice", "submit,read,admin")
        await eventually(_sees_workers(alice), "alice's key has the new scope")
        await manual_worker.complete()
        await hers.wait_for_event("completed")
    assert (await waiting).json()["status"] == "completed"


def _sees_workers(client: httpx2.AsyncClient) -> Callable[[], Awaitable[bool]]:
    async def sees() -> bool:
        return (await client.get("/workers")).status_code == 200

    return sees
