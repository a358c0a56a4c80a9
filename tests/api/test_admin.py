"""Queues, workers and dead letters; many jobs retried, cancelled and purged at once."""

import asyncio
import re
from collections.abc import Iterable
from typing import Any

import httpx2
import msgspec
import pytest
import redis

from asyncinfer.api.config import ApiConfig
from asyncinfer.jobs import new_id
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from tests.faults.harness import eventually
from tests.process import REPOSITORY
from tests.queue_driver import QueueDriver, ids_of, new_job

from .harness import (
    QUEUE,
    RESULT,
    ManualWorker,
    announce,
    assert_problem,
    client_of,
    running,
    submit,
)

DIGITS = f"{QUEUE}:digits"
NOTHING = {"cancelled": 0, "stopping": 0, "purged": 0, "more": False}


async def ok_body(reply: httpx2.Response) -> dict[str, Any]:
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


async def clear(client: httpx2.AsyncClient, query: str) -> dict[str, Any]:
    return await ok_body(await client.delete(f"/jobs?{query}"))


async def retry(client: httpx2.AsyncClient, query: str = "", *ids: str) -> dict[str, Any]:
    body = {"job_ids": ids} if ids else None
    return await ok_body(await client.post(f"/jobs/retry?{query}", json=body))


async def submit_failed(
    hands: QueueDriver, count: int = 1, outcome: str = "failed", **about: Any
) -> list[str]:
    """Submits jobs and ends them with this outcome; their ids, the first job first."""
    jobs = await hands.submit_many(count, **about)
    await hands.finish(await hands.claim_jobs(queues=(about.get("queue", QUEUE),)), outcome)  # type: ignore[arg-type]
    return jobs


def stored_keys(server: redis.Redis, job_ids: Iterable[str]) -> list[bytes]:
    """All keys of these jobs that are still in Redis."""
    found: Any = server
    return [name for job_id in job_ids for name in found.keys(f"job:{job_id}:*")]


# --- queues and workers ----------------------------------------------------------------------


async def test_queues_are_shown_with_their_models(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    await hands.submit_many(3)
    await hands.submit_many(2, queue=DIGITS, priority="high")
    queues = (await ok_body(await api.get("/queues")))["queues"]
    assert [(queue["model"], queue["queue"]) for queue in queues] == [
        ("iris", QUEUE),
        ("digits", DIGITS),
    ]
    assert [queue["waiting"] for queue in queues] == [
        {"high": 0, "normal": 3, "low": 0},
        {"high": 2, "normal": 0, "low": 0},
    ]
    assert queues[0]["submitted_per_second"] * queues[0]["window_seconds"] == pytest.approx(3)
    assert queues[0]["wait_seconds"] is None


async def test_workers_are_shown_as_they_announce_themselves(
    api: httpx2.AsyncClient, store: Store, hands: QueueDriver
) -> None:
    about = {"host": "h", "concurrency": 2, "busy": 1, "started_ms": hands.now_ms() - 1000}
    await Announcements(store).announce_worker("h-17-f0fd4a", {**about, "state": "ready"}, 60)
    (worker,) = (await ok_body(await api.get("/workers")))["workers"]
    assert (worker["worker"], worker["host"]) == ("w-f0fd4a", "h")
    assert (worker["slots"], worker["busy"]) == (2, 1)
    assert worker["started_at"].endswith("Z")
    assert worker["uptime_seconds"] >= 1
    assert worker["pid"] is None


# --- dead letters ----------------------------------------------------------------------------


async def test_dead_letters_are_listed_newest_first_with_their_error(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    first = await submit_failed(hands, outcome="dead")
    failed_ms = hands.now_ms()
    await eventually(lambda: hands.now_ms() > failed_ms, "the next one fails in a later ms")
    await submit_failed(hands)
    second = await submit_failed(hands, outcome="dead", queue=DIGITS)
    dead = (await ok_body(await api.get("/jobs?dead=true")))["jobs"]
    assert [job["job_id"] for job in dead] == [*second, *first]
    assert dead[0]["error"] == {"code": "model_failed", "message": "no"}
    assert "result" not in dead[0]
    iris = (await ok_body(await api.get("/jobs?dead=true&model=iris")))["jobs"]
    assert [job["job_id"] for job in iris] == first
    assert (await ok_body(await api.get("/jobs?dead=true&status=completed")))["jobs"] == []


@pytest.mark.parametrize("limit", [1, 3, 100])
async def test_pages_of_dead_letters_have_neither_gaps_nor_repeats(
    api: httpx2.AsyncClient, hands: QueueDriver, limit: int
) -> None:
    letters = await submit_failed(hands, 5, "dead") + await submit_failed(
        hands, 4, "dead", queue=DIGITS
    )
    now_ms = hands.now_ms()
    for place, letter in enumerate(letters):
        queue = QUEUE if place < 5 else DIGITS
        hands.redis.zadd(keys.dead(queue), {letter: now_ms + place // 2})
    found: list[str] = []
    cursor = ""
    while True:
        page = await ok_body(await api.get(f"/jobs?dead=true&limit={limit}{cursor}"))
        found += [job["job_id"] for job in page["jobs"]]
        if page["cursor"] is None:
            break
        cursor = f"&cursor={page['cursor']}"
    assert sorted(found) == sorted(letters)
    died = [letters.index(dead) // 2 for dead in found]
    assert died == sorted(died, reverse=True)


@pytest.mark.parametrize("cursor", ["", "x", "é", "AAAA", "kw"])
async def test_a_forged_cursor_of_dead_letters_is_refused(
    api: httpx2.AsyncClient, cursor: str
) -> None:
    reply = await api.get("/jobs", params={"dead": "true", "cursor": cursor})
    assert "cursor" in assert_problem(reply, 400, "invalid_query")["detail"]


async def test_a_dead_letter_that_is_retried_leaves_the_list(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    letters = await submit_failed(hands, 3, "dead")
    others = await submit_failed(hands, 2)
    answer = await retry(api, "dead=true")
    assert sorted(answer["retried"]) == sorted(letters)
    assert (answer["refused"], answer["more"]) == ([], False)
    assert (await ok_body(await api.get("/jobs?dead=true")))["jobs"] == []
    assert hands.statuses(letters) == {"pending"}
    assert hands.statuses(others) == {"failed"}


async def test_dead_letters_are_deleted(
    api: httpx2.AsyncClient, hands: QueueDriver, server: redis.Redis
) -> None:
    letters = await submit_failed(hands, 3, "dead")
    others = await submit_failed(hands, 2)
    assert await clear(api, "dead=true&purge=true") == NOTHING | {"purged": 3}
    assert stored_keys(server, letters) == []
    assert server.exists(keys.dead(QUEUE)) == 0
    assert hands.statuses(others) == {"failed"}


# --- retrying many ---------------------------------------------------------------------------


async def test_jobs_are_retried_by_name_and_each_refusal_says_why(
    api: httpx2.AsyncClient, hands: QueueDriver, server: redis.Redis
) -> None:
    again, without_input = await submit_failed(hands, 2)
    server.delete(keys.data(without_input))
    (done,) = await submit_failed(hands, outcome="completed")
    waiting = await hands.submit_one()
    absent = new_id(hands.now_ms())
    answer = await retry(api, "", again, again, without_input, done, waiting, absent, "\x01")
    assert (answer["retried"], answer["more"]) == ([again], False)
    assert {refusal["job_id"]: refusal["code"] for refusal in answer["refused"]} == {
        **dict.fromkeys((without_input, done, waiting), "job_not_retryable"),
        **dict.fromkeys((absent, "\x01"), "job_not_found"),
    }
    assert all(refusal["detail"] for refusal in answer["refused"])
    assert hands.status(again) == "pending"


async def test_a_retried_job_is_run_in_a_new_round(
    api: httpx2.AsyncClient, hands: QueueDriver, manual_worker: ManualWorker
) -> None:
    (job_id,) = await submit_failed(hands)
    await retry(api, "status=failed")
    await manual_worker.complete()
    body = (await api.get(f"/job/{job_id}")).json()
    assert (body["round"], body["status"], body["result"]) == (2, "completed", RESULT)


async def test_a_filter_chooses_what_is_retried(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    iris = await submit_failed(hands, 2)
    digits = await submit_failed(hands, 2, queue=DIGITS)
    grouped = await submit_failed(hands, 2, group="g")
    (cancelled,) = await hands.submit_many(1)
    await hands.cancel(cancelled)
    assert set((await retry(api, "model=digits"))["retried"]) == set(digits)
    assert set((await retry(api, "group=g&status=failed"))["retried"]) == set(grouped)
    assert (await retry(api, "group=none"))["retried"] == []
    assert (await retry(api, "status=cancelled"))["retried"] == [cancelled]
    assert hands.statuses(iris) == {"failed"}


async def test_more_than_a_thousand_are_retried_in_several_calls(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    jobs = [job_id for _ in range(5) for job_id in await hands.submit_many(230)]
    await hands.operations.cancel_queue(QUEUE)
    first = await retry(api, "status=cancelled")
    assert (len(first["retried"]), first["more"]) == (1000, True)
    second = await retry(api, "status=cancelled")
    assert (len(second["retried"]), second["more"]) == (150, False)
    assert {*first["retried"], *second["retried"]} == set(jobs)


async def test_a_retry_without_room_in_the_queue_is_refused_and_changes_nothing(
    config: ApiConfig, store: Store, hands: QueueDriver
) -> None:
    await announce(store, "iris", default="iris")
    jobs = await submit_failed(hands, 3)
    tight = msgspec.structs.replace(config, policy=Policy(max_queue=2))
    async with running(tight) as port, client_of(port) as client:
        answer = await retry(client, "status=failed")
    assert len(answer["retried"]) == 2
    (refused,) = answer["refused"]
    assert (refused["code"], hands.status(refused["job_id"])) == ("queue_full", "failed")
    assert {refused["job_id"], *answer["retried"]} == set(jobs)


async def test_a_retry_without_criteria_is_told_how_to_name_jobs(api: httpx2.AsyncClient) -> None:
    for query in ("", "dead=false"):
        problem = assert_problem(await api.post(f"/jobs/retry?{query}"), 400, "invalid_query")
        for word in ("job_ids", "status=failed", "model=", "group=", "dead=true"):
            assert word in problem["detail"]
    for query in ("status=completed", "status=x", "dead=x", "limit=1"):
        assert_problem(await api.post(f"/jobs/retry?{query}"), 400, "invalid_query")
    both = await api.post("/jobs/retry?status=failed", json={"job_ids": ["x"]})
    assert "either" in assert_problem(both, 400, "invalid_query")["detail"]


NAMES_NO_JOBS: list[tuple[Any, int, str]] = [
    ({"job_ids": []}, 422, "invalid_input"),
    ({"job_ids": ["x"] * 1001}, 422, "invalid_input"),
    ({"job_ids": [1]}, 422, "invalid_input"),
    ({"ids": ["x"]}, 422, "invalid_input"),
    (b'{"job_ids": ["x"], "job_ids": ["y"]}', 422, "invalid_input"),
    (["x"], 422, "invalid_input"),
    (b'{"job_ids": [', 400, "invalid_json"),
    (b'{"job_ids": ["\\ud800"]}', 400, "invalid_json"),
    (b'{"job_ids": ["\xff"]}', 400, "invalid_json"),
    (b"[" * 5000, 422, "invalid_input"),
]


async def test_a_body_that_names_no_jobs_is_refused(
    api: httpx2.AsyncClient, subtests: pytest.Subtests
) -> None:
    for body, status, code in NAMES_NO_JOBS:
        content = body if isinstance(body, bytes) else msgspec.json.encode(body)
        with subtests.test(content=content[:40]):
            assert_problem(await api.post("/jobs/retry", content=content), status, code)


# --- cancelling many -------------------------------------------------------------------------


async def test_waiting_and_running_jobs_are_cancelled_and_counted_apart(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    running = await hands.submit_many(3)
    claim = await hands.claim_jobs()
    waiting = [
        *await hands.submit_many(4),
        *await hands.submit_many(2, priority="low"),
        *await hands.submit_many(2, delay_seconds=60),
    ]
    digits = await hands.submit_many(2, queue=DIGITS)
    assert await clear(api, "model=iris") == NOTHING | {"cancelled": 8, "stopping": 3}
    assert hands.statuses(waiting) == {"cancelled"}
    await hands.finish(claim)
    assert hands.statuses(running) == {"cancelled"}
    assert hands.statuses(digits) == {"pending"}


async def test_a_filter_chooses_what_is_cancelled(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    running = await hands.submit_many(2)
    claim = await hands.claim_jobs()
    waiting = await hands.submit_many(2)
    grouped = await hands.submit_many(2, group="g")
    assert await clear(api, "status=processing") == NOTHING | {"stopping": 2}
    assert await clear(api, "group=g") == NOTHING | {"cancelled": 2}
    assert hands.statuses(grouped) == {"cancelled"}
    assert await clear(api, "status=pending") == NOTHING | {"cancelled": 2}
    assert await clear(api, "status=pending") == NOTHING
    await hands.finish(claim)
    assert hands.statuses([*running, *waiting]) == {"cancelled"}


@pytest.mark.soak
async def test_thousands_are_cancelled_by_calls_until_nothing_is_left(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    for _ in range(20):
        await hands.submit_many(250)
    others = [new_job(tenant="other") for _ in range(50)]
    await hands.submit(*others)
    cancelled = 0
    more = True
    while more:
        answer = await clear(api, "status=pending")
        assert answer["cancelled"] <= 1000
        cancelled, more = cancelled + answer["cancelled"], answer["more"]
    assert cancelled == 5000
    queue = (await ok_body(await api.get("/queues")))["queues"][0]
    assert queue["waiting"]["normal"] == 50
    served: list[str] = []
    while hands.waiting_ids():
        served += await hands.run_all()
    assert (served, hands.count_stale_entries()) == (ids_of(others), 0)


async def test_an_external_job_is_cancelled_as_one_of_the_default_tenant(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    hands.add_external_job("theirs")
    hands.add_external_job(b"\xff\xfe")
    assert (await clear(api, "status=pending"))["cancelled"] == 1
    assert hands.status("theirs") == "cancelled"
    await hands.run_all()


MISTAKEN = [
    ("", "status="),
    ("purge=true", "status="),
    ("dead=false", "status="),
    ("status=completed", "purge=true"),
    ("status=ended&model=iris", "purge=true"),
    ("dead=true", "purge=true"),
    ("status=processing&purge=true", "cannot be purged"),
    ("status=pending&purge=true", "cannot be purged"),
    ("status=done", "status"),
    ("status=", "status"),
    ("all=true", "all"),
    ("model=iris&purge=maybe", "purge"),
]


async def test_no_job_is_ended_or_deleted_by_a_mistaken_query(
    api: httpx2.AsyncClient, hands: QueueDriver, subtests: pytest.Subtests
) -> None:
    done = await submit_failed(hands)
    waiting = await hands.submit_many(2)
    for query, detail in MISTAKEN:
        with subtests.test(query):
            reply = await api.delete(f"/jobs?{query}")
            assert detail in assert_problem(reply, 400, "invalid_query")["detail"]
            assert hands.statuses(waiting) == {"pending"}
            assert hands.statuses(done) == {"failed"}


# --- purging many ----------------------------------------------------------------------------


async def test_ended_jobs_are_deleted_by_state(
    api: httpx2.AsyncClient, hands: QueueDriver, server: redis.Redis
) -> None:
    done = await submit_failed(hands, 2, "completed")
    broken = await submit_failed(hands, 3)
    (cancelled,) = await hands.submit_many(1)
    await hands.cancel(cancelled)
    waiting = await hands.submit_many(2)
    assert await clear(api, "status=completed&purge=true") == NOTHING | {"purged": 2}
    assert stored_keys(server, done) == []
    assert hands.statuses(broken) == {"failed"}
    assert await clear(api, "status=ended&purge=true") == NOTHING | {"purged": 4}
    assert stored_keys(server, [*broken, cancelled]) == []
    assert (await ok_body(await api.get("/jobs")))["jobs"][0]["job_id"] == waiting[-1]
    assert await hands.run_all() == waiting


async def test_without_a_state_all_that_ended_of_a_model_is_deleted(
    api: httpx2.AsyncClient, hands: QueueDriver, server: redis.Redis
) -> None:
    gone = await submit_failed(hands, 2) + await submit_failed(hands, 2, "completed", group="g")
    other = await submit_failed(hands, 2, queue=DIGITS)
    assert (await clear(api, "group=g&purge=true"))["purged"] == 2
    assert (await clear(api, "model=iris&purge=true"))["purged"] == 2
    assert stored_keys(server, gone) == []
    assert hands.statuses(other) == {"failed"}


async def test_more_than_a_thousand_are_deleted_in_several_calls(
    api: httpx2.AsyncClient, hands: QueueDriver, server: redis.Redis
) -> None:
    jobs = [job_id for _ in range(5) for job_id in await hands.submit_many(230)]
    await hands.operations.cancel_queue(QUEUE)
    assert await clear(api, "model=iris&purge=true") == NOTHING | {"purged": 1000, "more": True}
    assert await clear(api, "model=iris&purge=true") == NOTHING | {"purged": 150}
    assert stored_keys(server, jobs[:10]) == []


# --- purging one -----------------------------------------------------------------------------


async def test_an_ended_job_is_deleted_with_all_its_data(
    api: httpx2.AsyncClient, manual_worker: ManualWorker, server: redis.Redis
) -> None:
    job_id = await submit(api)
    await manual_worker.complete()
    reply = await api.delete(f"/job/{job_id}?purge=true")
    assert (reply.status_code, reply.json()["status"]) == (200, "completed")
    assert stored_keys(server, [job_id]) == []
    assert_problem(await api.get(f"/job/{job_id}"), 404, "job_not_found")
    assert_problem(await api.delete(f"/job/{job_id}?purge=true"), 404, "job_not_found")


async def test_an_unfinished_job_is_not_deleted(
    api: httpx2.AsyncClient, manual_worker: ManualWorker, hands: QueueDriver
) -> None:
    job_id = await submit(api)
    reply = await api.delete(f"/job/{job_id}?purge=true")
    assert "cancel" in assert_problem(reply, 409, "job_not_finished")["detail"]
    claim = await manual_worker.claim()
    assert_problem(await api.delete(f"/job/{job_id}?purge=true"), 409, "job_not_finished")
    await manual_worker.finish(claim)
    assert hands.status(job_id) == "completed"


async def test_an_idempotency_key_of_a_deleted_job_makes_a_new_one(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    headers = {"idempotency-key": "k"}
    job_id = await submit(api, headers=headers)
    await manual_worker.complete()
    await api.delete(f"/job/{job_id}?purge=true")
    assert await submit(api, headers=headers) != job_id


async def test_a_job_deleted_while_its_id_is_still_in_a_list_is_not_run(
    api: httpx2.AsyncClient, hands: QueueDriver, server: redis.Redis
) -> None:
    jobs = await hands.submit_many(30)
    await hands.cancel_in_one_call(*jobs[:20])
    assert (await clear(api, "status=cancelled&purge=true"))["purged"] == 20
    assert stored_keys(server, jobs[:20]) == []
    assert await hands.run_all() == jobs[20:]
    assert hands.count_stale_entries() == 0


@pytest.mark.parametrize("many", [True, False])
async def test_a_retry_and_a_purge_at_once_leave_a_job_complete_or_deleted(
    api: httpx2.AsyncClient, hands: QueueDriver, server: redis.Redis, many: bool
) -> None:
    for turn in range(20):
        (job_id,) = await submit_failed(hands, outcome="dead")
        purge = "/jobs?status=failed&purge=true" if many else f"/job/{job_id}?purge=true"
        calls = [api.post(f"/job/{job_id}/retry"), api.delete(purge)]
        async with asyncio.TaskGroup() as group:
            for call in calls if turn % 2 else calls[::-1]:
                group.create_task(call)
        assert server.zscore(keys.dead(QUEUE), job_id) is None
        if hands.status(job_id) is None:
            assert stored_keys(server, [job_id]) == []
            assert await hands.run_all() == []
        else:
            assert set(hands.ttls(job_id).values()) == {-1}
            assert await hands.run_all() == [job_id]
            assert hands.status(job_id) == "completed"


async def test_a_job_retried_since_it_was_chosen_keeps_its_data(hands: QueueDriver) -> None:
    (job_id,) = await submit_failed(hands)
    chosen = await hands.read(job_id)
    await hands.retry(job_id)
    assert await hands.operations.forget(chosen) == "unfinished"
    assert await hands.operations.forget_all([chosen]) == 0
    assert await hands.run_all() == [job_id]
    assert await hands.operations.forget(chosen) == "forgotten"
    assert await hands.operations.forget(chosen) == "absent"
    assert await hands.operations.retry(chosen, 1) == "absent"


# --- purging a model -------------------------------------------------------------------------


async def test_a_models_cancel_ends_its_waiting_jobs_of_all_tenants(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    theirs = [new_job(tenant="other") for _ in range(600)]
    for start in (0, 200, 400):
        await hands.submit(*theirs[start : start + 200])
    delayed = await hands.submit_one(delay_seconds=60)
    digits = await hands.submit_one(queue=DIGITS)
    answer = await ok_body(await api.post("/models/iris/cancel"))
    assert answer == {"model": "iris", "cancelled": 601}
    assert hands.statuses([*ids_of(theirs), delayed]) == {"cancelled"}
    assert hands.status(digits) == "pending"
    assert_problem(await api.post("/models/wine/cancel"), 404, "model_not_found")
    assert_problem(await api.post("/models/%7B/cancel"), 404, "model_not_found")


async def test_the_jobs_of_a_model_that_no_worker_serves_any_more_can_be_cancelled(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    job_id = await hands.submit_one(queue=f"{QUEUE}:wine")
    assert (await ok_body(await api.post("/models/wine/cancel")))["cancelled"] == 1
    assert hands.status(job_id) == "cancelled"


# --- examples of the manual ------------------------------------------------------------------

_MANUAL = (REPOSITORY / "asyncinfer/docs/operations.md").read_text()
_COMMANDS = [
    line.replace("\\\n", "")
    for block in re.findall(r"^```sh\n(.*?)^```$", _MANUAL, re.DOTALL | re.MULTILINE)
    for line in re.findall(r"^curl (?:.*\\\n)*.*$", block, re.MULTILINE)
]


def test_the_manual_shows_how_to_clean_up() -> None:
    assert len(_COMMANDS) >= 10


@pytest.mark.system("curl")
async def test_the_manuals_commands_do_something(
    config: ApiConfig, store: Store, hands: QueueDriver
) -> None:
    await announce(store, "iris", default="iris")
    async with running(config) as port:
        for command in _COMMANDS:
            (job_id,) = await submit_failed(hands)
            await submit_failed(hands, outcome="dead")
            await submit_failed(hands, outcome="completed")
            await hands.submit_many(1, group="nightly")
            line = command.replace("JOB_ID", job_id).replace(":8000", f":{port}")
            ran = await asyncio.create_subprocess_shell(
                line.replace("curl", "curl -sf", 1), stdout=asyncio.subprocess.PIPE
            )
            answer, _ = await ran.communicate()
            assert ran.returncode == 0, (command, answer)
            ok_body = msgspec.json.decode(answer)
            assert any(ok_body[name] for name in ok_body if name not in ("model", "more")), (
                command,
                ok_body,
            )


# --- tenants ---------------------------------------------------------------------------------


async def test_jobs_of_another_tenant_are_neither_shown_nor_changed(
    two_tenant_port: int, hands: QueueDriver, server: redis.Redis
) -> None:
    waiting = [new_job(tenant="alice", group="g") for _ in range(3)]
    broken = [new_job(tenant="alice", group="g") for _ in range(3)]
    await hands.submit(*broken)
    await hands.finish(await hands.claim_jobs(), "dead")
    await hands.submit(*waiting)
    everything = ids_of([*broken, *waiting])
    before = [hands.status(job_id) for job_id in everything]
    async with client_of(two_tenant_port, authorization="Bearer bob") as bob:
        for query in ("status=pending", "status=processing", "model=iris", "group=g"):
            assert await clear(bob, query) == NOTHING
        for query in ("status=failed", "status=ended", "model=iris", "group=g", "dead=true"):
            assert await clear(bob, f"{query}&purge=true") == NOTHING
        for query in ("status=failed", "model=iris", "group=g", "dead=true"):
            assert await retry(bob, query) == {"retried": [], "refused": [], "more": False}
        named = await retry(bob, "", *everything)
        assert [refusal["code"] for refusal in named["refused"]] == ["job_not_found"] * 6
        assert (await ok_body(await bob.get("/jobs?dead=true")))["jobs"] == []
        theirs = await bob.delete(f"/job/{everything[0]}?purge=true")
        assert_problem(theirs, 404, "job_not_found")
        assert_problem(await bob.post("/models/iris/cancel"), 403, "forbidden")
    assert [hands.status(job_id) for job_id in everything] == before
    assert server.zcard(keys.dead(QUEUE)) == 3
    async with client_of(two_tenant_port, authorization="Bearer alice") as alice:
        assert len((await ok_body(await alice.get("/jobs?dead=true")))["jobs"]) == 3
        assert len((await retry(alice, "dead=true"))["retried"]) == 3
        assert await clear(alice, "group=g") == NOTHING | {"cancelled": 6}
        assert await clear(alice, "group=g&purge=true") == NOTHING | {"purged": 6}
    assert stored_keys(server, everything) == []
