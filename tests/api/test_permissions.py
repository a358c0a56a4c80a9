"""What each key may see and do: operators across tenants, names of workers, health."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
import redis

from asyncinfer.api.config import ApiConfig
from asyncinfer.jobs import Record, encode_record
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.store import Store
from asyncinfer.schemas.operations import public_worker_name
from tests.faults.proxy import proxied
from tests.queue_driver import QueueDriver

from .harness import (
    QUEUE,
    ManualWorker,
    assert_problem,
    client_of,
    hosted,
    running,
    submit,
)

PID = 4_711_471_147
"""Long enough not to be found in an id by chance."""
WORKER = f"gpu-host.internal-{PID}-f0fd4a"


@pytest.fixture
def audit(caplog: pytest.LogCaptureFixture) -> "Audit":
    caplog.set_level(logging.INFO, "asyncinfer.audit")
    return Audit(caplog)


class Audit:
    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def line(self) -> str:
        """The only new line of the audit log since the last call."""
        (found,) = [record for record in self._caplog.records if record.name == "asyncinfer.audit"]
        self._caplog.clear()
        assert found.levelno == logging.INFO
        return found.getMessage()

    def lines(self) -> list[str]:
        """All lines of the audit log since the last call of `line`."""
        records = [record for record in self._caplog.records if record.name == "asyncinfer.audit"]
        return [record.getMessage() for record in records]


async def ids(client: httpx2.AsyncClient, query: str) -> set[str]:
    reply = await client.get(f"/jobs?{query}")
    assert reply.status_code == 200, reply.text
    return {job["job_id"] for job in reply.json()["jobs"]}


# --- operators -------------------------------------------------------------------------------


async def test_a_name_in_the_audit_log_neither_commands_a_terminal_nor_reorders_the_line(
    ops: httpx2.AsyncClient, audit: Audit
) -> None:
    await ops.get("/job/%1b%5b2J%c2%9b%e2%80%aeevil%e2%80%a8?tenant=*")
    assert r'job_id="\u001b[2J\u009b\u202eevil\u2028": ' in audit.line()


async def test_an_operator_lists_the_jobs_of_all_tenants_without_their_payloads(
    alice: httpx2.AsyncClient,
    bob: httpx2.AsyncClient,
    ops: httpx2.AsyncClient,
    manual_worker: ManualWorker,
    audit: Audit,
) -> None:
    done = await submit(alice)
    await manual_worker.complete()
    failed = await submit(bob)
    error = {"code": "model_failed", "message": "name: Ada"}
    await manual_worker.finish(await manual_worker.claim(), "failed", error)

    reply = await ops.get("/jobs?tenant=*")
    shown = {job["job_id"]: job for job in reply.json()["jobs"]}
    assert {name: item["tenant"] for name, item in shown.items()} == {done: "alice", failed: "bob"}
    assert shown[failed]["error"]["code"] == "model_failed"
    digest = hashlib.sha256(b"ops").hexdigest()
    assert audit.line() == f'list by tenant=ops key={digest[:8]}: tenant="*": 2 jobs'
    for text in (reply.text, (await ops.get(f"/job/{done}?tenant=*")).text):
        assert "result" not in text
        assert "setosa" not in text
        assert "Ada" not in text
    assert f'job_id="{done}": 1 jobs' in audit.line()
    assert (await ops.get(f"/job/{done}?tenant=alice&wait=5")).json()["status"] == "completed"
    assert_problem(await ops.get(f"/job/{done}?tenant=bob"), 404, "job_not_found")
    assert_problem(await ops.get(f"/job/{done}/result?tenant=*"), 400, "invalid_query")


async def test_an_operators_filters_are_those_of_a_tenant(
    alice: httpx2.AsyncClient, bob: httpx2.AsyncClient, ops: httpx2.AsyncClient
) -> None:
    body = {"data": [[1, 2, 3, 4]], "options": {"group": "g"}}
    grouped = [
        (await client.post("/predict", json=body)).json()["job_id"] for client in (alice, bob)
    ]
    await submit(alice)
    assert await ids(ops, "tenant=*&group=g") == set(grouped)
    assert await ids(ops, "tenant=bob&group=g") == {grouped[1]}
    assert await ids(ops, "tenant=bob") == {grouped[1]}
    assert await ids(ops, "tenant=nobody") == set()
    assert len(await ids(ops, "tenant=*&status=pending&model=iris")) == 3
    page = (await ops.get("/jobs?tenant=*&limit=2")).json()
    rest = await ids(ops, f"tenant=*&limit=2&cursor={page['cursor']}")
    assert len({job["job_id"] for job in page["jobs"]} | rest) == 3


async def test_an_operator_cancels_retries_and_purges_over_tenants_with_a_line_for_each(
    alice: httpx2.AsyncClient,
    bob: httpx2.AsyncClient,
    ops: httpx2.AsyncClient,
    audit: Audit,
) -> None:
    jobs = {await submit(alice), await submit(bob), await submit(bob)}
    key = hashlib.sha256(b"ops").hexdigest()[:8]

    done = (await ops.delete("/jobs?tenant=bob&status=pending")).json()
    assert done["cancelled"] == 2
    assert audit.line() == (
        f'cancel by tenant=ops key={key}: tenant="bob" status="pending": 2 jobs'
    )
    assert (await ops.delete("/jobs?tenant=*&model=iris")).json()["cancelled"] == 1
    assert 'tenant="*" model="iris": 1 jobs' in audit.line()

    done = (await ops.post("/jobs/retry?tenant=*&status=cancelled")).json()
    assert set(done["retried"]) == jobs
    assert audit.line().startswith(f'retry by tenant=ops key={key}: tenant="*"')
    await ops.delete("/jobs?tenant=*&model=iris")
    audit.line()
    done = (await ops.post("/jobs/retry?tenant=bob", json={"job_ids": sorted(jobs)})).json()
    assert (len(done["retried"]), len(done["refused"])) == (2, 1)
    assert "job_ids=3: 2 jobs" in audit.line()
    await ops.delete("/jobs?tenant=*&model=iris")
    audit.line()

    first, *_ = jobs
    assert (await ops.post(f"/job/{first}/retry?tenant=*")).status_code == 202
    assert f'job_id="{first}": 1 jobs' in audit.line()
    view = (await ops.delete(f"/job/{first}?tenant=*")).json()
    assert (view["status"], "result" in view) == ("cancelled", False)
    assert audit.line().startswith("cancel")
    assert_problem(await ops.delete(f"/job/{first}?tenant=*"), 409, "job_finished")
    assert audit.line().endswith(": job_finished")
    assert (await ops.delete(f"/job/{first}?tenant=*&purge=true")).status_code == 200
    assert audit.line().startswith("purge")
    assert (await ops.delete("/jobs?tenant=*&purge=true&status=ended")).json()["purged"] == 2
    assert audit.line().startswith("purge")
    assert await ids(ops, "tenant=*") == set()


async def test_the_waiting_jobs_of_a_model_are_cancelled_by_operators_alone(
    alice: httpx2.AsyncClient, bob: httpx2.AsyncClient, ops: httpx2.AsyncClient, audit: Audit
) -> None:
    await submit(bob)
    problem = assert_problem(await alice.post("/models/iris/cancel"), 403, "forbidden")
    assert "--scopes operator" in problem["detail"]
    assert audit.line().endswith(': tenant="alice" model="iris": forbidden')
    assert (await alice.delete("/jobs?model=iris")).json()["cancelled"] == 0
    assert audit.line().endswith(': tenant="alice" model="iris": 0 jobs')
    assert (await ops.post("/models/iris/cancel")).json()["cancelled"] == 1
    assert 'tenant="*" status="pending" model="iris": 1 jobs' in audit.line()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/jobs?tenant={}"),
        ("DELETE", "/jobs?tenant={}&status=pending"),
        ("POST", "/jobs/retry?tenant={}&status=failed"),
        ("GET", "/job/x?tenant={}"),
        ("DELETE", "/job/x?tenant={}"),
        ("POST", "/job/x/retry?tenant={}"),
    ],
)
async def test_no_other_key_reaches_beyond_its_tenant(
    alice: httpx2.AsyncClient, ops: httpx2.AsyncClient, audit: Audit, method: str, path: str
) -> None:
    for tenant in ("*", "bob"):
        reply = await alice.request(method, path.format(tenant))
        assert "`operator`" in assert_problem(reply, 403, "forbidden")["detail"]
    reply = await alice.request(method, path.format("alice"))
    assert reply.status_code in (200, 404)
    assert_problem(await alice.request(method, path.format("a%0Ab")), 400, "invalid_query")
    # The scope `operator` alone does not include the scopes for the key's own tenant.
    plain = path.format("").replace("tenant=&", "").replace("?tenant=", "")
    assert_problem(await ops.request(method, plain), 403, "forbidden")
    for line in audit.lines():
        assert line.endswith(": forbidden") or 'tenant="alice"' in line


async def test_a_name_with_a_line_break_makes_no_second_line_in_the_log(
    ops: httpx2.AsyncClient, audit: Audit
) -> None:
    await ops.delete("/jobs?tenant=*&model=iris%0Apurge by tenant=x")
    assert "\n" not in audit.line()


async def test_without_keys_everyone_is_an_operator(
    api: httpx2.AsyncClient, hands: QueueDriver, audit: Audit
) -> None:
    theirs = await hands.submit_one(tenant="acme")
    assert await ids(api, "") == set()
    assert await ids(api, "tenant=*") == {theirs}
    assert "key=none" in audit.line()


# --- workers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("worker_id", "shown"),
    [
        (WORKER, "w-f0fd4a"),
        ("a-b-c-1-000000", "w-000000"),
        ("a\n-1-abcdef", "w-abcdef"),
    ],
)
def test_a_worker_is_shown_as_its_random_suffix(worker_id: str, shown: str) -> None:
    assert public_worker_name(worker_id) == shown


@pytest.mark.parametrize(
    "worker_id", ["", "host", "host-1-F0FD4A", "/srv/x", "\udcff", "-1-f0fd4a"]
)
def test_an_id_of_another_form_has_a_stable_short_form(worker_id: str) -> None:
    shown = public_worker_name(worker_id)
    assert shown == public_worker_name(worker_id)
    assert len(shown) == len("w-f0fd4a")
    assert not worker_id or worker_id not in shown


async def test_host_names_and_pids_are_shown_to_admins_only(
    alice: httpx2.AsyncClient, bob: httpx2.AsyncClient, store: Store, server: redis.Redis
) -> None:
    about = {
        **{"models": ["iris"], "state": "ready", "host": "gpu-host.internal", "pid": PID},
        "run_times": {"iris": {"1": 0.001}},
        "problems": {"iris": {"2": "too bad"}},
    }
    await Announcements(store).announce_worker(WORKER, about, 60)
    job_id = await _ended_by(bob, server, store, WORKER)

    assert_problem(await bob.get("/workers"), 403, "forbidden")
    (worker,) = (await alice.get("/workers")).json()["workers"]
    assert (worker["worker"], worker["host"], worker["pid"]) == (
        "w-f0fd4a",
        "gpu-host.internal",
        PID,
    )
    assert (await bob.get(f"/job/{job_id}")).json()["worker"] == "w-f0fd4a"
    paths = ("/models", "/models/iris", "/jobs", f"/job/{job_id}", "/queues", "/scale/iris")
    for path in (*paths, "/health", "/models/wine", f"/job/{job_id}/events"):
        text = (await bob.get(path)).text
        assert "gpu-host" not in text, path
        assert str(PID) not in text, path


async def _ended_by(
    client: httpx2.AsyncClient, server: redis.Redis, store: Store, worker: str
) -> str:
    """Submits a job that `worker` completes."""
    job_id = await submit(client)
    await ManualWorker(store).complete()
    found: Any = server.get(keys.meta(job_id))
    record = msgspec.msgpack.decode(found[8:], type=Record)
    meta = encode_record(msgspec.structs.replace(record, worker=worker), found[:8])
    server.set(keys.meta(job_id), meta, keepttl=True)
    return job_id


# --- health ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "guess", "ops"])
async def test_health_shows_no_names_without_the_read_scope(
    two_tenant_port: int, alice: httpx2.AsyncClient, key: str | None
) -> None:
    await submit(alice)
    headers = {"x-api-key": key} if key else {}
    async with client_of(two_tenant_port, **headers) as client:
        assert (await client.get("/health")).json() == {"status": "ok", "accepting": True}
        for path in ("/health/live", "/health/ready"):
            assert (await client.get(path)).status_code == 200
    assert (await alice.get("/health")).json()["queues"] == {QUEUE: 1}


async def test_health_without_redis_says_why_but_shows_no_names(
    config: ApiConfig, store: Store, key_file: Path
) -> None:
    async with hosted(proxied(config.redis_url)) as proxy:
        away = msgspec.structs.replace(config, redis_url=proxy.url, api_keys=key_file)
        async with running(away) as port, client_of(port) as client:
            await proxy.down()
            replies = [await client.get("/health"), await client.get("/health/ready?for=submit")]
            await proxy.up()
    for reply in replies:
        problem = assert_problem(reply, 503, "redis_unavailable")
        assert problem["detail"] == "Redis does not answer. Retry in a moment."
