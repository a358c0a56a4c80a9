"""The field `waiting_for`: why a job is not run now."""

import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx2
import msgspec
import pytest
import redis

from asyncinfer import jobs
from asyncinfer.api.config import ApiConfig
from asyncinfer.api.worker_snapshot import Absence, WorkerSnapshot
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.claims import JobOutcome, QueueConsumer
from asyncinfer.repository.inspect.listing import Inspection
from asyncinfer.repository.operations import Operations
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Store
from tests.faults.harness import eventually
from tests.faults.proxy import proxied
from tests.queue_driver import QueueDriver, new_job

from .harness import (
    QUEUE,
    ROW,
    ManualWorker,
    announce,
    assert_problem,
    running_client,
    signature,
    submit,
)
from .sse import open_event_stream

NDJSON = {"content-type": "application/x-ndjson"}
LINE = b'{"data": [[5.1, 3.5, 1.4, 0.2]]}'


async def worker(store: Store, name: str = "host-1-aaaaaa", **about: Any) -> None:
    """Announces a worker as a real one does."""
    announcement = {"models": ["iris"], "versions": {"iris": {"1": "0" * 64}}, "state": "ready"}
    await Announcements(store).announce_worker(name, announcement | about, ttl_seconds=60)


async def answer_to(client: httpx2.AsyncClient, **options: Any) -> dict[str, Any]:
    """Submits a row; the body of the 202."""
    reply = await client.post("/predict", json={"data": ROW, "options": options})
    assert reply.status_code == 202, reply.text
    body: dict[str, Any] = reply.json()
    return body


async def reason_of(client: httpx2.AsyncClient, job_id: str) -> Any:
    return (await client.get(f"/job/{job_id}")).json()["waiting_for"]


async def has_reason(client: httpx2.AsyncClient, job_id: str, code: str | None) -> bool:
    reason = await reason_of(client, job_id)
    return bool((reason and reason["code"]) == code)


# --- answers with the field ------------------------------------------------------------------


async def test_every_answer_that_shows_an_unfinished_job_says_why_it_waits(
    api: httpx2.AsyncClient,
) -> None:
    key = {"idempotency-key": "a"}
    first = (await api.post("/predict", json={"data": ROW}, headers=key)).json()
    job_id = first["job_id"]
    (line,) = (await api.post("/predict", content=LINE, headers=NDJSON)).text.splitlines()
    waited = {**NDJSON, "prefer": "wait=0"}
    (late,) = (await api.post("/predict", content=LINE, headers=waited)).text.splitlines()
    async with open_event_stream(api, "/events") as stream:
        (streamed, *_) = (await stream.wait_for_event("snapshot")).data["jobs"]
    async with open_event_stream(api, f"/job/{job_id}/events") as stream:
        snapshot = (await stream.wait_for_event("snapshot")).data
    reasons = [
        first,
        (await api.post("/predict", json={"data": ROW}, headers=key)).json(),
        (await api.post("/predict", json={"data": ROW}, headers={"prefer": "wait=0"})).json(),
        (await api.get(f"/job/{job_id}")).json(),
        (await api.get(f"/job/{job_id}?wait=0.01")).json(),
        (await api.get(f"/job/{job_id}?tenant=*")).json(),
        *(await api.get("/jobs")).json()["jobs"],
        msgspec.json.decode(line),
        msgspec.json.decode(late),
        streamed,
        snapshot,
    ]
    assert {job["waiting_for"]["code"] for job in reasons} == {"no_worker"}

    ended = (await api.delete(f"/job/{job_id}")).json()
    assert ended["status"] == "cancelled"
    retried = (await api.post(f"/job/{job_id}/retry")).json()
    assert retried["waiting_for"]["code"] == "no_worker"


async def test_a_job_that_only_waits_its_turn_has_no_reason_and_an_ended_one_no_such_field(
    config: ApiConfig, store: Store, manual_worker: ManualWorker
) -> None:
    await announce(store, "iris", default="iris")
    await worker(store)
    async with running_client(config) as client:
        reasons = await answer_to(client)
        assert reasons["waiting_for"] is None
        (line,) = (await client.post("/predict", content=LINE, headers=NDJSON)).text.splitlines()
        assert "waiting_for" not in line
        async with open_event_stream(client, f"/job/{reasons['job_id']}/events") as stream:
            assert (await stream.wait_for_event("snapshot")).data["waiting_for"] is None
            await manual_worker.claim()
            assert (await stream.wait_for_event("processing")).data["waiting_for"] is None
            assert await reason_of(client, reasons["job_id"]) is None
    async with running_client(config) as client:
        job_id = await submit(client)
        await manual_worker.complete()
        for view in (
            (await client.get(f"/job/{job_id}")).json(),
            (await client.get("/jobs")).json()["jobs"][0],
        ):
            assert view["status"] == "completed"
            assert "waiting_for" not in view


# --- no worker -------------------------------------------------------------------------------


async def test_a_submit_without_a_worker_is_answered_with_how_to_start_one(
    config: ApiConfig, store: Store
) -> None:
    await announce(store, "iris", default="iris")
    await worker(store, models=["wine"], versions={}, problems={"iris": {"1": "cut off"}})
    async with running_client(config) as client:
        reason = (await answer_to(client))["waiting_for"]
    assert reason["code"] == "no_worker"
    assert "iris since this API first looked at" in reason["message"]
    assert "Version 1 is not served: cut off." in reason["message"]
    assert "`asyncinfer work`, with iris in its MODEL_DIR" in reason["message"]


@pytest.mark.parametrize("state", ["draining", "hung"])
async def test_a_worker_that_does_not_claim_counts_as_none(
    state: str, config: ApiConfig, store: Store
) -> None:
    await announce(store, "iris", default="iris")
    await worker(store, state=state)
    async with running_client(config) as client:
        assert (await answer_to(client))["waiting_for"]["code"] == "no_worker"


async def test_a_version_that_no_worker_has_is_named(config: ApiConfig, store: Store) -> None:
    await announce(store, "iris", default="iris")
    second = {"2": msgspec.json.encode(signature("iris", "2"))}
    await Announcements(store).announce_models({"iris": second})
    await worker(store)
    async with running_client(config) as client:
        assert (await answer_to(client, version="1"))["waiting_for"] is None
        reason = (await answer_to(client, version="2"))["waiting_for"]
    assert (reason["code"], "version 2 of iris" in reason["message"]) == ("no_worker", True)


async def test_a_worker_of_an_older_release_has_every_version(
    config: ApiConfig, store: Store
) -> None:
    await announce(store, "iris", default="iris")
    await Announcements(store).announce_worker("old", {"models": ["iris"], "state": "ready"}, 60)
    async with running_client(config) as client:
        assert (await answer_to(client, version="1"))["waiting_for"] is None


async def test_a_replaced_worker_leaves_no_gap_and_a_stopped_one_is_reported_with_its_time(
    store: Store,
) -> None:
    workforce = WorkerSnapshot(Inspection(store), store, list, grace_seconds=0.3)
    await worker(store)
    await workforce.refresh()
    began = time.time()
    await Announcements(store).retract_worker("host-1-aaaaaa")
    await workforce.refresh()
    assert workforce.absence("iris", None) is None

    def version_absence() -> Absence | None:
        return workforce.absence("iris", "1")

    await eventually(lambda: version_absence() is not None, "the absence is reported", 2)
    absence = version_absence()
    assert absence
    assert absence.was_seen
    assert began <= absence.since <= time.time()
    await worker(store, "host-2-bbbbbb")
    await workforce.refresh()
    assert workforce.absence("iris", "1") is None


@pytest.mark.soak
async def test_an_outage_of_redis_is_no_absence_of_workers(
    redis_url: str, store: Store, server: redis.Redis, policy: Policy
) -> None:
    """No absence is reported while Redis is away, or before workers could announce themselves."""
    async with (
        proxied(redis_url) as proxy,
        Store.open(proxy.url, queue_name=store.queue_name, policy=policy, name="api") as away,
    ):
        workforce = WorkerSnapshot(Inspection(away), away, list, grace_seconds=0.5)
        await worker(store)
        await workforce.refresh()
        proxy.black_hole()
        await workforce.refresh()
        assert workforce.absence("iris", None) is None
        server.flushall()
        proxy.restore()
        await workforce.refresh()
        assert workforce.absence("iris", None) is None

        async def has_reason() -> bool:
            await workforce.refresh()
            return workforce.absence("iris", None) is not None

        await eventually(has_reason, "the absence is reported again", 3)


# --- the other reasons -----------------------------------------------------------------------


async def test_a_job_of_a_paused_model_names_the_command_that_resumes_it(
    api: httpx2.AsyncClient, store: Store
) -> None:
    await worker(store)
    await api.post("/models/iris/pause")
    reasons = await answer_to(api)
    reason = reasons["waiting_for"]
    assert (reason["code"], "`asyncinfer resume iris`" in reason["message"]) == ("paused", True)
    await Operations(store).pause(QUEUE, paused=False)
    await eventually(
        lambda: has_reason(api, reasons["job_id"], None), "another API has resumed the queue", 2
    )


async def test_a_job_whose_model_is_being_loaded_waits_for_that(
    config: ApiConfig, store: Store
) -> None:
    await announce(store, "iris", default="iris")
    await worker(store, state="starting", models=[], versions={}, loading=["iris"])
    async with running_client(config) as client:
        assert (await answer_to(client))["waiting_for"]["code"] == "starting"
        await worker(store)
        await eventually(lambda: is_served(client), "the model is loaded", 2)
        # The same worker was started again.
        await worker(store, state="starting", models=[], versions={}, loading=["iris"])
        await eventually(lambda: is_starting(client), "the model is loaded again", 2)


@pytest.mark.soak
async def test_a_version_that_is_being_loaded_is_waited_for_and_not_unknown(
    config: ApiConfig, store: Store
) -> None:
    await announce(store, "iris", default="iris")
    await worker(store, loading_versions={"iris": ["2"]})
    async with running_client(config) as client:
        asked = {"data": ROW, "options": {"version": "2"}}
        refused = assert_problem(await client.post("/predict", json=asked), 503, "model_loading")
        assert "version 2 of iris" in refused["detail"]
        asked["options"] = {"version": "3"}
        assert_problem(await client.post("/predict", json=asked), 404, "version_not_found")

        # The version was announced before by a worker that was restarted meanwhile.
        second = {"2": msgspec.json.encode(signature("iris", "2"))}
        await Announcements(store).announce_models({"iris": second})
        reasons: list[Any] = []

        async def is_known() -> bool:
            reply = await client.post("/predict", json=asked | {"options": {"version": "2"}})
            reasons.append(reply.json())
            return reply.status_code == 202

        await eventually(is_known, "the API knows of version 2", 5)
    assert reasons[-1]["waiting_for"] == {
        "code": "starting",
        "message": "A worker is loading version 2 of iris.",
    }


async def test_a_model_that_was_removed_is_not_being_loaded(
    config: ApiConfig, store: Store
) -> None:
    await announce(store, "wine", default="wine")
    # The worker still runs the waiting jobs of iris.
    about: dict[str, Any] = {"models": ["iris", "wine"], "versions": {"wine": {"1": "0" * 64}}}
    await worker(store, model_dir="/models", **about)
    async with running_client(config) as client:
        reply = await client.post("/predict/iris", json={"data": ROW})
    assert_problem(reply, 404, "model_not_found")


async def test_an_api_whose_own_worker_is_starting_reports_no_missing_worker(
    config: ApiConfig, store: Store
) -> None:
    await announce(store, "iris", default="iris")
    since_ms = time.time_ns() // 1_000_000
    config = msgspec.structs.replace(config, own_worker_since_ms=since_ms)
    before: dict[str, Any] = {"host": socket.gethostname(), "started_ms": since_ms - 1000}
    own: dict[str, Any] = {"host": socket.gethostname(), "started_ms": since_ms + 1000}
    # The announcement of a killed worker.
    await worker(store, models=[], versions={}, **before)
    async with running_client(config) as client:
        reasons = await answer_to(client)
        assert reasons["waiting_for"]["code"] == "starting"
        await worker(store, "host-2-bbbbbb", models=[], versions={}, **own)
        await eventually(
            lambda: has_reason(client, reasons["job_id"], "no_worker"), "the worker lacks iris", 3
        )


async def test_a_full_queue_says_why_nothing_leaves_it(config: ApiConfig, store: Store) -> None:
    await announce(store, "iris", default="iris")
    full = msgspec.structs.replace(config.policy, max_queue=1)
    async with running_client(msgspec.structs.replace(config, policy=full)) as client:
        job_id = (await answer_to(client))["job_id"]
        single = assert_problem(
            await client.post("/predict", json={"data": ROW}), 429, "queue_full"
        )
        lines = await client.post("/predict", content=LINE, headers=NDJSON)
        await client.delete(f"/job/{job_id}")
        await answer_to(client)
        again = assert_problem(await client.post(f"/job/{job_id}/retry"), 429, "queue_full")
    for problem in (single, lines.json(), again):
        assert "is full (1 jobs" in problem["detail"]
        assert "No worker has had iris since" in problem["detail"]


async def is_served(client: httpx2.AsyncClient) -> bool:
    return (await answer_to(client))["waiting_for"] is None


async def is_starting(client: httpx2.AsyncClient) -> bool:
    reason = (await answer_to(client))["waiting_for"]
    return bool(reason and reason["code"] == "starting")


async def test_a_job_with_a_delay_says_until_when_and_what_else_is_missing(
    config: ApiConfig, store: Store
) -> None:
    await announce(store, "iris", default="iris")
    async with running_client(config) as client:
        reasons = await answer_to(client, delay_seconds=7200)
        short = await answer_to(client, delay_seconds=0.01)
        reason = await reason_of(client, reasons["job_id"])
        await eventually(
            lambda: has_reason(client, short["job_id"], "no_worker"), "its start time has come", 2
        )
    assert (reason["code"], reasons["waiting_for"]["code"]) == ("delayed", "delayed")
    assert "in 120 min" in reasons["waiting_for"]["message"]
    assert "No worker has had iris" in reason["message"]


async def test_a_job_whose_try_failed_says_which_one_is_next(
    config: ApiConfig, store: Store
) -> None:
    await announce(store, "iris", default="iris")
    await worker(store)
    runs, manual_worker = QueueConsumer(store, "hand"), ManualWorker(store)
    async with running_client(config) as client:
        job_id = await submit(client)
        claim = await manual_worker.claim()
        (job,) = claim.jobs
        assert job.record
        failed = msgspec.structs.replace(job.record, errors=1)
        meta = jobs.encode_record(failed, jobs.record_seq(job.meta))
        await runs.finish(claim, [JobOutcome(job_id, "retry", b"", meta, 60_000)], last=True)
        reason = await reason_of(client, job_id)
    assert (reason["code"], "Try 1 of 3 failed" in reason["message"]) == ("retry", True)


async def test_with_memory_full_the_jobs_that_wait_say_so_and_blame_no_worker(
    config: ApiConfig, store: Store, hands: QueueDriver, server: redis.Redis
) -> None:
    await announce(store, "iris", default="iris")
    job = new_job()
    await hands.submissions.submit_many(QUEUE, [job])
    server.config_set("maxmemory", "1mb")
    try:
        async with running_client(config) as client:
            reason = await reason_of(client, job.job_id)
    finally:
        server.config_set("maxmemory", "0")
    assert (reason["code"], "maxmemory" in reason["message"]) == ("storage_full", True)


async def test_with_the_disk_full_the_jobs_that_wait_or_run_say_so(
    config: ApiConfig, store: Store, hands: QueueDriver, manual_worker: ManualWorker, disk_full: Any
) -> None:
    await announce(store, "iris", default="iris")
    runs, waits = new_job(), new_job()
    await hands.submissions.submit_many(QUEUE, [runs])
    await manual_worker.claim()
    await hands.submissions.submit_many(QUEUE, [waits])
    await disk_full()
    async with running_client(config) as client:
        for job in (runs, waits):
            reason = await reason_of(client, job.job_id)
            assert (reason["code"], "DATA_DIR" in reason["message"]) == ("disk_full", True)


async def test_with_too_few_replicas_the_jobs_that_wait_or_run_say_so(
    config: ApiConfig,
    store: Store,
    hands: QueueDriver,
    manual_worker: ManualWorker,
    server: redis.Redis,
) -> None:
    await announce(store, "iris", default="iris")
    runs, waits = new_job(), new_job()
    await hands.submissions.submit_many(QUEUE, [runs])
    await manual_worker.claim()
    await hands.submissions.submit_many(QUEUE, [waits])
    server.config_set("min-replicas-to-write", "1")
    try:
        async with running_client(config) as client:
            reasons = [await reason_of(client, job.job_id) for job in (runs, waits)]
    finally:
        server.config_set("min-replicas-to-write", "0")
    for reason in reasons:
        assert reason["code"] == "too_few_replicas"
        assert "fewer replicas than its min-replicas-to-write" in reason["message"]


async def test_foreign_data_in_redis_breaks_no_reason(
    config: ApiConfig, store: Store, server: redis.Redis
) -> None:
    await announce(store, "iris", default="iris")
    for name, body in {b"\xff": b"{", b"odd": b"\xff", b"list": b'{"models": 1}'}.items():
        server.zadd(keys.workers(store.queue_name), {name: time.time()})
        server.set(b"{predict_queue}:worker:" + name, body)
    server.set(keys.data("stranger"), "[[1, 2, 3, 4]]")
    server.set(keys.status("stranger"), "pending")
    server.lpush(QUEUE, "stranger")
    async with running_client(config) as client:
        assert (await answer_to(client))["waiting_for"]["code"] == "no_worker"
        assert (await reason_of(client, "stranger"))["code"] == "no_worker"


# --- what it costs ---------------------------------------------------------------------------


async def test_neither_a_submit_nor_a_read_costs_another_call_to_redis(
    config: ApiConfig, store: Store, server: redis.Redis
) -> None:
    await announce(store, "iris", default="iris")
    quiet = msgspec.structs.replace(config, policy=Policy(lease_seconds=600, reap_seconds=100))
    count = 100
    async with running_client(quiet) as client:
        await submit(client)
        with server.monitor() as monitor:  # type: ignore[no-untyped-call]
            for _ in range(count):
                await client.get(f"/job/{await submit(client)}")
            server.echo("end")
            commands = commands_until(monitor.next_command, "end")
    # The probe of a background task is a submit to a queue without room.
    submits = [
        command
        for command in commands
        if script("submit").function in command and f" {QUEUE}:- " not in command
    ]
    reads = [command for command in commands if command.startswith("MGET job:")]
    assert (len(submits), len(reads)) == (count, count)
    # Those of background tasks depend on the time that this takes, not on the number of requests.
    others = Counter(
        " ".join(command.split()[: 2 if command.startswith("FCALL") else 1])
        for command in commands
        if command not in submits and command not in reads
    )
    assert max(others.values(), default=0) < count, others


def commands_until(next_command: Callable[[], dict[str, Any]], last: str) -> list[str]:
    """The commands that clients sent, without those inside scripts."""
    commands: list[str] = []
    while (command := next_command())["command"] != f"ECHO {last}":
        if command["client_type"] != "lua":
            commands.append(command["command"])
    return commands
