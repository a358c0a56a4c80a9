"""What operators, admins and tenants did: an entry for each act, which operators can list."""

import hashlib
import logging
from typing import Any

import httpx2
import msgspec
import pytest
import redis

from asyncinfer.repository import keys
from asyncinfer.repository.store import Store

from .harness import (
    QUEUE,
    ROW,
    ProxiedApi,
    announce,
    assert_problem,
    client_of,
    submit,
)

OPERATORS, TENANTS = keys.audit(QUEUE)


def shown_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:8]


async def page(client: httpx2.AsyncClient, query: str = "") -> dict[str, Any]:
    reply = await client.get(f"/audit?{query}")
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


async def entries(client: httpx2.AsyncClient, query: str = "") -> list[dict[str, Any]]:
    """The entries of a page, without their times."""
    listed = (await page(client, query))["entries"]
    return [{name: value for name, value in entry.items() if name != "at"} for entry in listed]


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines of the audit log."""
    return [record.getMessage() for record in caplog.records if record.name == "asyncinfer.audit"]


class Acts:
    """Sees the entries that are new since the last look."""

    def __init__(self, reader: httpx2.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "asyncinfer.audit")
        self._caplog = caplog
        self._reader = reader
        self._seen = 0

    async def new(self) -> dict[str, Any]:
        """The only new entry, which has a line in the log."""
        listed = await entries(self._reader)
        assert len(listed) == self._seen + 1, listed
        self._seen = len(listed)
        (line,) = lines(self._caplog)
        self._caplog.clear()
        who = f"{listed[0]['action']} by tenant={listed[0]['tenant']} key={listed[0]['key']}: "
        assert line.startswith(who)
        return listed[0]

    async def assert_none(self) -> None:
        assert len(await entries(self._reader)) == self._seen


# --- one entry for each act ------------------------------------------------------------------


async def test_each_act_on_many_jobs_leaves_one_entry_with_its_count(
    alice: httpx2.AsyncClient,
    bob: httpx2.AsyncClient,
    ops: httpx2.AsyncClient,
    caplog: pytest.LogCaptureFixture,
) -> None:
    acts = Acts(ops, caplog)
    in_group = {"data": ROW, "options": {"group": "night"}}
    grouped = [(await alice.post("/predict", json=in_group)).json()["job_id"] for _ in range(3)]
    theirs = await submit(bob)
    by_alice = {"tenant": "alice", "key": shown_key("alice"), "outcome": "done"}
    by_ops = {"tenant": "ops", "key": shown_key("ops"), "outcome": "done"}
    await acts.assert_none()

    await alice.delete("/group/night")
    own = {"tenant": "alice"}
    assert await acts.new() == {
        **by_alice, "action": "cancel", "filter": {**own, "group": "night"}, "jobs": 3
    }  # fmt: skip
    await alice.post("/jobs/retry?group=night&status=cancelled")
    filtered = {**own, "status": "cancelled", "group": "night"}
    assert await acts.new() == {**by_alice, "action": "retry", "filter": filtered, "jobs": 3}
    await alice.delete("/jobs?model=iris")
    assert await acts.new() == {
        **by_alice, "action": "cancel", "filter": {**own, "model": "iris"}, "jobs": 3
    }  # fmt: skip
    await alice.post("/jobs/retry", json={"job_ids": [grouped[0], grouped[1], "nobody"]})
    assert await acts.new() == {
        **by_alice, "action": "retry", "filter": {**own, "job_ids": 3}, "jobs": 2
    }  # fmt: skip
    await alice.delete("/jobs?purge=true&status=ended&group=night")
    filtered = {**own, "status": "ended", "group": "night"}
    assert await acts.new() == {**by_alice, "action": "purge", "filter": filtered, "jobs": 1}

    await alice.post("/models/iris/pause")
    of_model = {"tenant": "*", "model": "iris"}
    assert await acts.new() == {**by_alice, "action": "pause", "filter": of_model, "jobs": None}
    await alice.post("/models/iris/resume")
    assert await acts.new() == {**by_alice, "action": "resume", "filter": of_model, "jobs": None}
    await ops.delete(f"/job/{theirs}?tenant=bob")
    filtered = {"tenant": "bob", "job_id": theirs}
    assert await acts.new() == {**by_ops, "action": "cancel", "filter": filtered, "jobs": 1}
    await ops.post(f"/job/{theirs}/retry?tenant=*")
    filtered = {"tenant": "*", "job_id": theirs}
    assert await acts.new() == {**by_ops, "action": "retry", "filter": filtered, "jobs": 1}
    await ops.post("/models/iris/cancel")
    filtered = {**of_model, "status": "pending"}
    assert await acts.new() == {**by_ops, "action": "cancel_queue", "filter": filtered, "jobs": 3}


async def test_what_only_reads_or_is_done_to_a_job_of_ones_own_leaves_no_entry(
    alice: httpx2.AsyncClient, ops: httpx2.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    acts = Acts(ops, caplog)
    job_id = await submit(alice)
    await ops.get("/jobs?tenant=*")
    await ops.get(f"/job/{job_id}?tenant=*")
    assert [line.partition(" ")[0] for line in lines(caplog)] == ["list", "read"]
    await alice.delete(f"/job/{job_id}")
    await alice.post(f"/job/{job_id}/retry")
    await acts.assert_none()


async def test_an_act_that_fails_or_is_refused_leaves_an_entry_with_its_code(
    alice: httpx2.AsyncClient,
    bob: httpx2.AsyncClient,
    ops: httpx2.AsyncClient,
    caplog: pytest.LogCaptureFixture,
) -> None:
    acts = Acts(ops, caplog)
    await submit(bob)
    by_bob = {"tenant": "bob", "key": shown_key("bob"), "jobs": 0, "outcome": "forbidden"}

    await alice.delete("/group/nobody")
    assert (await acts.new())["outcome"] == "group_not_found"
    await alice.post("/models/nobody/pause")
    entry = await acts.new()
    assert (entry["action"], entry["outcome"]) == ("pause", "model_not_found")
    assert_problem(await bob.post("/models/iris/cancel"), 403, "forbidden")
    filtered = {"tenant": "bob", "model": "iris"}
    assert await acts.new() == {**by_bob, "action": "cancel_queue", "filter": filtered}
    assert_problem(await bob.delete("/jobs?tenant=*&purge=true&status=ended"), 403, "forbidden")
    filtered = {"tenant": "*", "status": "ended"}
    assert await acts.new() == {**by_bob, "action": "purge", "filter": filtered}
    assert_problem(await bob.delete("/job/x?tenant=alice"), 403, "forbidden")
    filtered = {"tenant": "alice", "job_id": "x"}
    assert await acts.new() == {**by_bob, "action": "cancel", "filter": filtered}
    assert_problem(await bob.post("/jobs/retry"), 400, "invalid_query")
    assert_problem(await bob.get("/jobs?tenant=*"), 403, "forbidden")
    assert_problem(await ops.delete("/job/x"), 403, "forbidden")
    assert_problem(await ops.post("/group/g/webhook/redeliver"), 403, "forbidden")
    await acts.assert_none()


async def test_a_long_name_and_a_thousand_ids_make_a_short_entry_and_line(
    alice: httpx2.AsyncClient,
    ops: httpx2.AsyncClient,
    server: redis.Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "asyncinfer.audit")
    await alice.delete(f"/jobs?model={'x' * 5000}")
    await alice.post("/jobs/retry", json={"job_ids": [f"{number:032x}" for number in range(1000)]})
    many, long_name = await entries(ops)
    assert many["filter"] == {"tenant": "alice", "job_ids": 1000}
    assert long_name["filter"]["model"] == "x" * 128
    stored: Any = server.zrange(TENANTS, 0, -1)
    assert max(map(len, stored)) < 500
    assert max(map(len, lines(caplog))) < 500


async def test_no_key_is_in_an_entry(
    alice: httpx2.AsyncClient, ops: httpx2.AsyncClient, server: redis.Redis
) -> None:
    """Of the hash it has no more than 8 digits."""
    await alice.post("/models/iris/pause")
    stored: Any = server.zrange(OPERATORS, 0, -1)
    digest = hashlib.sha256(b"alice").hexdigest()
    assert digest[:8].encode() in stored[0]
    assert digest[:9].encode() not in stored[0]


# --- who may read ----------------------------------------------------------------------------


async def test_only_operators_read_the_audit_log(
    alice: httpx2.AsyncClient, bob: httpx2.AsyncClient, ops: httpx2.AsyncClient
) -> None:
    await alice.delete("/jobs?model=iris")
    for client in (alice, bob):
        for query in ("", "?tenant=alice", "?tenant=*"):
            problem = assert_problem(await client.get(f"/audit{query}"), 403, "forbidden")
            assert "`operator`" in problem["detail"]
    assert len(await entries(ops)) == 1


# --- pages and filters -----------------------------------------------------------------------


async def test_entries_are_listed_newest_first_in_pages(
    alice: httpx2.AsyncClient, ops: httpx2.AsyncClient
) -> None:
    for number in range(5):
        await alice.delete(f"/jobs?model=m{number}")
        await ops.delete(f"/jobs?model=m{number}&tenant=*")
    listed: list[dict[str, Any]] = []
    cursor = ""
    while cursor is not None:
        found = await page(ops, f"limit=3{cursor and '&cursor='}{cursor}")
        assert len(found["entries"]) <= 3
        listed += found["entries"]
        cursor = found["cursor"]
    assert [(entry["filter"]["model"], entry["tenant"]) for entry in listed] == [
        (f"m{number}", tenant) for number in (4, 3, 2, 1, 0) for tenant in ("ops", "alice")
    ]
    assert_problem(await ops.get("/audit?cursor=x"), 400, "invalid_query")


async def test_pages_of_entries_of_one_moment_list_each_once(
    ops: httpx2.AsyncClient, server: redis.Redis
) -> None:
    for name in (OPERATORS, TENANTS):
        for number in range(7):
            entry = {"id": f"{number:032x}", "action": "pause", "tenant": f"{name}-{number}"}
            server.zadd(name, {msgspec.json.encode(entry): 1_700_000_000_000})
    seen: list[str] = []
    cursor = ""
    while cursor is not None:
        found = await page(ops, f"limit=4{cursor and '&cursor='}{cursor}")
        seen += [entry["tenant"] for entry in found["entries"]]
        cursor = found["cursor"]
    assert len(seen) == 14
    assert len(set(seen)) == 14
    server.delete(OPERATORS, TENANTS)


async def test_entries_are_filtered_by_action_and_tenant(
    alice: httpx2.AsyncClient, bob: httpx2.AsyncClient, ops: httpx2.AsyncClient
) -> None:
    await alice.post("/models/iris/pause")
    await bob.delete("/jobs?model=iris")
    await ops.delete("/jobs?model=iris&tenant=bob")
    await ops.delete("/jobs?status=ended&purge=true&tenant=*")

    async def actions(query: str) -> list[tuple[str, str]]:
        return [(entry["tenant"], entry["action"]) for entry in await entries(ops, query)]

    assert await actions("action=cancel") == [("ops", "cancel"), ("bob", "cancel")]
    assert await actions("tenant=bob") == [("ops", "cancel"), ("bob", "cancel")]
    assert await actions("tenant=ops&action=purge") == [("ops", "purge")]
    assert await actions("tenant=nobody") == []
    assert len(await actions("tenant=*")) == 4
    assert_problem(await ops.get("/audit?action=submit"), 400, "invalid_query")


# --- bounds and damage -----------------------------------------------------------------------


def fill(server: redis.Redis, name: str, count: int, newest_ms: int) -> None:
    """Adds entries, a ms apart."""
    for number in range(count):
        entry = {"id": f"{number:032x}", "action": "cancel", "tenant": "old"}
        server.zadd(name, {msgspec.json.encode(entry): newest_ms - count + number})


def now_ms(server: redis.Redis) -> int:
    found: Any = server.time()
    return int(found[0]) * 1000


async def test_the_oldest_of_ten_thousand_entries_goes_with_a_new_one(
    alice: httpx2.AsyncClient, ops: httpx2.AsyncClient, server: redis.Redis
) -> None:
    pipeline = server.pipeline()
    fill(pipeline, TENANTS, 10_100, now_ms(server))
    pipeline.execute()
    await alice.delete("/jobs?model=iris")
    assert server.zcard(TENANTS) == 10_000
    assert (await entries(ops, "limit=1"))[0]["tenant"] == "alice"


async def test_entries_of_more_than_ninety_days_go_with_a_new_one(
    alice: httpx2.AsyncClient, ops: httpx2.AsyncClient, server: redis.Redis
) -> None:
    ninety_days_ms = 90 * 24 * 3600 * 1000
    fill(server, TENANTS, 3, now_ms(server) - ninety_days_ms)
    await alice.delete("/jobs?model=iris")
    assert [entry["tenant"] for entry in await entries(ops)] == ["alice"]


async def test_a_tenant_pushes_out_nothing_that_an_operator_did(
    alice: httpx2.AsyncClient, bob: httpx2.AsyncClient, ops: httpx2.AsyncClient, server: redis.Redis
) -> None:
    await ops.delete("/jobs?model=iris&tenant=bob")
    pipeline = server.pipeline()
    fill(pipeline, TENANTS, 10_000, now_ms(server) + 60_000)
    pipeline.execute()
    await bob.delete("/jobs?model=iris")
    await bob.post("/models/iris/cancel")
    assert server.zcard(OPERATORS) == 1
    assert [entry["tenant"] for entry in await entries(ops, "tenant=ops")] == ["ops"]


CORRUPT = (
    *(b"", b"x", b"\xff\xfe", b"[]", b"{}", b'{"id":7}', b'{"id":"a"}', b"[" * 5000),
    *(b'{"id":"a","action":"\\ud800"}', b'{"id":"a","action":"cancel","jobs":-1}'),
    b'{"id":"a","action":"cancel","jobs":123456789012345678901234567890}',
    b'{"id":"a","action":"cancel","filter":{"x":[1]}}',
    b'{"id":"a","action":"%s"}' % (b"x" * 129),
)


async def test_corrupt_entries_are_left_out_and_counted(
    alice: httpx2.AsyncClient, ops: httpx2.AsyncClient, server: redis.Redis
) -> None:
    await alice.delete("/jobs?model=iris")
    await alice.post("/models/iris/pause")
    for number, member in enumerate(CORRUPT):
        server.zadd((OPERATORS, TENANTS)[number % 2], {member: now_ms(server) - number})
    valid = b'{"id":"b","action":"cancel"}'
    for number, score in enumerate(("inf", "-inf", "1e300", "-1e300")):
        server.zadd((OPERATORS, TENANTS)[number % 2], {valid: score})
    found = await page(ops)
    assert [entry["action"] for entry in found["entries"]] == ["pause", "cancel"]
    assert (found["unreadable"], found["cursor"]) == (len(CORRUPT) + 2, None)


async def test_entries_of_other_releases_are_listed(
    ops: httpx2.AsyncClient, server: redis.Redis
) -> None:
    entry = {"id": "a", "action": "archive", "by": {"address": "::1"}}
    server.zadd(OPERATORS, {msgspec.json.encode(entry): 1_700_000_000_000})
    server.expire(OPERATORS, 60)
    assert await entries(ops) == [
        {"action": "archive", "tenant": None, "key": None, "filter": {}, "jobs": None,
         "outcome": "done"}
    ]  # fmt: skip


async def test_a_key_of_another_type_hides_no_other_entry_and_stops_no_act(
    alice: httpx2.AsyncClient,
    ops: httpx2.AsyncClient,
    server: redis.Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "asyncinfer.audit")
    server.set(TENANTS, "x", ex=60)
    assert (await alice.delete("/jobs?model=iris")).status_code == 200
    assert (await alice.post("/models/iris/pause")).status_code == 200
    assert [entry["action"] for entry in await entries(ops)] == ["pause"]
    cancelled, not_stored, _ = lines(caplog)
    assert cancelled.startswith("cancel by tenant=alice ")
    assert not_stored.startswith("The line before has no entry in the audit log: ")
    assert "another type" in not_stored


async def test_an_emptied_redis_has_an_empty_log_that_goes_on(
    alice: httpx2.AsyncClient, ops: httpx2.AsyncClient, server: redis.Redis, store: Store
) -> None:
    await alice.post("/models/iris/pause")
    server.flushall()
    assert (await page(ops)) == {"entries": [], "unreadable": 0, "cursor": None}
    await announce(store, "iris", default="iris")
    await alice.delete("/jobs?model=iris")
    assert [entry["action"] for entry in await entries(ops)] == ["cancel"]


async def test_a_redis_that_is_away_leaves_the_line_alone(
    proxied_api: ProxiedApi, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "asyncinfer.audit")
    async with client_of(proxied_api.port) as client:
        await proxied_api.proxy.down()
        assert_problem(await client.post("/models/iris/pause"), 503, "redis_unavailable")
        await proxied_api.proxy.up()
        act, not_stored = lines(caplog)
        assert act.endswith(": redis_unavailable")
        assert not_stored.startswith("The line before has no entry in the audit log: ")
        assert await entries(client) == []


async def test_a_full_redis_leaves_the_line_and_the_act(
    alice: httpx2.AsyncClient,
    ops: httpx2.AsyncClient,
    server: redis.Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "asyncinfer.audit")
    server.config_set("maxmemory", "1mb")
    try:
        assert (await alice.post("/models/iris/pause")).status_code == 200
        assert await entries(ops) == []
    finally:
        server.config_set("maxmemory", "0")
    act, not_stored = lines(caplog)
    assert act.endswith(": done")
    assert not_stored.startswith("The line before has no entry in the audit log: ")


async def test_an_entry_whose_reply_is_lost_is_stored_once(proxied_api: ProxiedApi) -> None:
    async with client_of(proxied_api.port) as client:
        proxied_api.proxy.cut_reply_to(b"ZADD")
        assert (await client.post("/models/iris/pause")).status_code == 200
        assert proxied_api.proxy.replies_cut == 1
        assert len(await entries(client)) == 1
