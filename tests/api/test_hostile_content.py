"""Answers when anyone may have written anything into Redis: never a 5xx."""

import asyncio
import base64
import re
from collections.abc import Iterator
from typing import Any

import httpx2
import msgspec
import pytest
import redis

from asyncinfer import jobs
from asyncinfer.jobs import encode_record
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.store import Store
from asyncinfer.schemas.operations import public_worker_name
from tests.faults.harness import eventually
from tests.sampling import soak_except

from .harness import COLUMNS, QUEUE, ROW, ManualWorker, assert_problem, signature, submit
from .sse import open_event_stream

OTHER = f"{QUEUE}:digits"
LATE_ID = "fffffffffffe7abc8def0123456789ab"
"""Random hex digits that read as a UUIDv7 of the year 10889."""

DEEP = b"[" * 500_000 + b"]" * 500_000
"""Deeper than any Python lets a decoder go; Python 3.14 allows tens of thousands."""
NOT_UTF8 = b"\xff\xfe"


async def ok(api: httpx2.AsyncClient, path: str) -> Any:
    reply = await api.get(path)
    assert reply.status_code == 200, f"{path}: {reply.text}"
    return reply.json()


async def digits(api: httpx2.AsyncClient) -> str:
    reply = await api.post("/predict/digits", json={"data": [[0.0] * COLUMNS["digits"]]})
    assert reply.status_code == 202, reply.text
    return str(reply.json()["job_id"])


@pytest.fixture
def damaged(server: redis.Redis) -> Iterator[redis.Redis]:
    """A Redis client for tests that damage keys, which are then not checked for leaks."""
    yield server
    server.flushall()


# --- ids, records, results -------------------------------------------------------------------


async def test_an_external_id_that_reads_as_a_year_beyond_9999_is_shown_without_a_time(
    api: httpx2.AsyncClient, manual_worker: ManualWorker, damaged: redis.Redis
) -> None:
    damaged.mset({keys.data(LATE_ID): "[[1.0]]", keys.status(LATE_ID): "pending"})
    damaged.lpush(QUEUE, LATE_ID)
    await manual_worker.complete()
    job = await ok(api, f"/job/{LATE_ID}")
    assert (job["status"], "created_at" in job) == ("completed", False)
    assert [entry["job_id"] for entry in (await ok(api, "/jobs"))["jobs"]] == [LATE_ID]
    deleted = await api.delete(f"/job/{LATE_ID}?purge=true")
    assert deleted.status_code == 200
    assert_problem(await api.get(f"/job/{LATE_ID}"), 404, "job_not_found")


@pytest.mark.parametrize("time_ms", [253_402_300_800_000, -62_135_596_800_001, (1 << 63) - 1])
async def test_a_time_that_no_answer_can_show_is_left_out(
    api: httpx2.AsyncClient, manual_worker: ManualWorker, damaged: redis.Redis, time_ms: int
) -> None:
    job_id = await submit(api, params={"group": "g"})
    await manual_worker.complete()
    record = jobs.decode_record(bytes(damaged.get(keys.meta(job_id)) or b""))  # type: ignore[arg-type]
    times = {"created_ms": time_ms, "started_ms": time_ms, "finished_ms": time_ms}
    damaged.set(
        keys.meta(job_id), encode_record(msgspec.structs.replace(record, **times), b"12345678")
    )
    for path in ("/queues", "/scale/iris", "/group/g", f"/job/{job_id}/result"):
        await ok(api, path)
    (listed,) = (await ok(api, "/jobs"))["jobs"]
    for job in (await ok(api, f"/job/{job_id}"), listed):
        assert job["status"] == "completed"
        assert not {"created_at", "started_at", "finished_at"} & job.keys()
    async with open_event_stream(api, f"/job/{job_id}/events") as stream:
        assert (await stream.wait_for_event("snapshot")).data["status"] == "completed"
    assert (await api.delete(f"/job/{job_id}?purge=true")).status_code == 200


@pytest.mark.parametrize(
    "error",
    [DEEP, b'{"x":' + DEEP + b',"code":"x","message":"x"}', NOT_UTF8, b"", b"[]"],
    ids=["deep", "deep inside", "not UTF-8", "empty", "a list"],
)
async def test_an_error_that_cannot_be_read_is_shown_as_unknown(
    api: httpx2.AsyncClient, manual_worker: ManualWorker, damaged: redis.Redis, error: bytes
) -> None:
    job_id = await submit(api)
    await manual_worker.fail()
    damaged.set(keys.error(job_id), error)
    assert (await ok(api, f"/job/{job_id}"))["error"]["code"] == "unknown"
    problem = assert_problem(await api.get(f"/job/{job_id}/result"), 422, "job_failed")
    assert problem["error"]["code"] == "unknown"


async def test_a_result_that_is_no_json_is_shown_as_a_string_though_a_worker_claims_it(
    api: httpx2.AsyncClient,
    manual_worker: ManualWorker,
    damaged: redis.Redis,
    subtests: pytest.Subtests,
) -> None:
    for result in (b"{", b"", b"[NaN]", b'"\xff"', DEEP, b"1 2", b"[1," * 5000):
        with subtests.test(result=result[:9]):
            job_id = await submit(api)
            await manual_worker.complete()
            damaged.set(keys.result(job_id), result)
            shown = result.decode(errors="replace")
            assert (await ok(api, f"/job/{job_id}"))["result"] == shown
            assert await ok(api, f"/job/{job_id}/result") == shown


@pytest.mark.parametrize("query", ["", "output=label"])
@pytest.mark.parametrize("accept", ["application/octet-stream", "application/x-npy", "*/*"])
async def test_a_result_of_tensors_that_is_damaged_is_gone_or_shown_as_a_string(
    api: httpx2.AsyncClient,
    manual_worker: ManualWorker,
    damaged: redis.Redis,
    accept: str,
    query: str,
) -> None:
    job_id = await submit(api)
    await manual_worker.complete()
    deep = b"\x91" * 20_000 + b"\x90"
    for header in (b"", b"\x90", b"\xff", deep, b"\x91\x95\xa0\xa0\x90\x00" + deep):
        damaged.set(
            keys.result(job_id), b"\x01" + len(header).to_bytes(4, "little") + header + b"!"
        )
        reply = await api.get(f"/job/{job_id}/result?{query}", headers={"accept": accept})
        if accept == "*/*" and not query:
            assert (reply.status_code, type(reply.json())) == (200, str)
        else:
            assert_problem(reply, 410, "result_damaged")
        assert isinstance((await ok(api, f"/job/{job_id}"))["result"], str)


async def test_a_job_with_keys_of_other_types_is_shown_as_far_as_it_can_be(
    api: httpx2.AsyncClient, manual_worker: ManualWorker, damaged: redis.Redis
) -> None:
    kept, lost = await submit(api), await submit(api)
    await manual_worker.complete()
    for name in (keys.result(kept), keys.status(lost)):
        damaged.delete(name)
        damaged.rpush(name, "x")
    job = await ok(api, f"/job/{kept}")
    assert (job["status"], job["result"]) == ("completed", None)
    assert_problem(await api.get(f"/job/{lost}"), 404, "job_not_found")
    assert [entry["job_id"] for entry in (await ok(api, "/jobs"))["jobs"]] == [kept]


async def test_an_id_that_is_not_utf8_is_not_found(api: httpx2.AsyncClient) -> None:
    assert_problem(await api.get("/job/%FF"), 404, "job_not_found")


# --- names, announcements --------------------------------------------------------------------


async def test_names_that_are_not_utf8_are_left_out_of_every_listing(
    api: httpx2.AsyncClient, damaged: redis.Redis, store: Store
) -> None:
    await Announcements(store).announce_worker("w", {"models": ["iris"], "state": "ready"}, 60)
    damaged.zadd(keys.workers(QUEUE), {NOT_UTF8: 1e18, b"inf": float("inf")})
    damaged.sadd(keys.models(QUEUE), NOT_UTF8)
    damaged.sadd(keys.queues(QUEUE), NOT_UTF8, QUEUE.encode() + b":" + NOT_UTF8)
    damaged.hset(keys.model(QUEUE, "iris"), NOT_UTF8, "{}")
    damaged.hset(keys.default_versions(QUEUE), NOT_UTF8, NOT_UTF8)
    damaged.set(keys.default_model(QUEUE), NOT_UTF8)
    await api.get("/models/nobody")
    assert (await ok(api, "/health"))["workers"] == 1
    assert {model["model"] for model in (await ok(api, "/models"))["models"]} == {"iris", "digits"}
    assert [worker["worker"] for worker in (await ok(api, "/workers"))["workers"]] == [
        public_worker_name("w")
    ]
    await ok(api, "/queues")
    assert (await ok(api, "/scale/digits"))["workers"] == 0


async def test_a_worker_with_an_impossible_announcement_is_shown_as_one_without(
    api: httpx2.AsyncClient, damaged: redis.Redis, store: Store
) -> None:
    announcements = Announcements(store)
    await announcements.announce_worker("pid", {"pid": 10**30, "models": ["iris"]}, 60)
    await announcements.announce_worker("pace", {"seconds_per_job": {"iris": 1e300}}, 60)
    await announcements.announce_worker("slots", {"concurrency": 10**400, "models": ["iris"]}, 60)
    await announcements.announce_worker("start", {"started_ms": 10**300, "host": "h"}, 60)
    damaged.set(keys.worker(QUEUE, "deep"), b'{"x":' + DEEP + b"}")
    damaged.zadd(keys.workers(QUEUE), {"deep": 1})
    workers = {entry["worker"]: entry for entry in (await ok(api, "/workers"))["workers"]}
    assert {name: worker["host"] for name, worker in workers.items()} == {
        **dict.fromkeys(map(public_worker_name, ("pid", "pace", "slots", "deep"))),
        public_worker_name("start"): "h",
    }
    for path in ("/models", "/queues", "/scale/iris", "/health"):
        await ok(api, path)


@pytest.mark.parametrize(
    "announced",
    soak_except(
        [
            {"inputs": [{"name": "x", "datatype": "FP31", "shape": [1]}]},
            {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1]}]},
            {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1 << 70]}]},
            {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1] * 100}]},
            {"max_rows": 0},
            {"max_rows": 10**30},
            {"version": "2"},
            {"model": "digits"},
            {"example": msgspec.Raw(b"[" * 500 + b"]" * 500)},
            {"example": msgspec.Raw(DEEP)},
        ],
        3,
    ),
)
async def test_a_model_that_no_worker_can_have_announced_is_not_served(
    api: httpx2.AsyncClient, damaged: redis.Redis, announced: dict[str, Any]
) -> None:
    body = msgspec.json.encode(msgspec.to_builtins(signature("iris")) | announced)
    damaged.hset(keys.model(QUEUE, "iris"), "1", body)
    await api.get("/models/nobody")
    assert [model["model"] for model in (await ok(api, "/models"))["models"]] == ["digits"]
    assert_problem(await api.get("/models/iris"), 503, "no_model_announced")


async def test_an_example_that_does_not_fit_its_input_is_not_shown(
    api: httpx2.AsyncClient, damaged: redis.Redis
) -> None:
    wrong = {"example": None, "example_inputs": {"input": {"no": "tensor"}}}
    body = msgspec.json.encode(msgspec.to_builtins(signature("iris")) | wrong)
    damaged.hset(keys.model(QUEUE, "iris"), "1", body)
    await api.get("/models/nobody")
    (shown,) = (await ok(api, "/models/iris"))["example"]["inputs"]
    assert shown["data"] == [0.0] * COLUMNS["iris"]


# --- keys of another type --------------------------------------------------------------------


async def test_a_log_of_another_type_hides_no_other_queue_and_is_logged_once(
    api: httpx2.AsyncClient, damaged: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    shown, hidden = await submit(api), await digits(api)
    damaged.delete(keys.log(OTHER))
    damaged.set(keys.log(OTHER), "x")
    for _ in range(3):
        assert [job["job_id"] for job in (await ok(api, "/jobs"))["jobs"]] == [shown]
    assert (await ok(api, f"/job/{hidden}"))["status"] == "pending"
    assert {queue["queue"] for queue in (await ok(api, "/queues"))["queues"]} == {QUEUE, OTHER}
    messages = [record.message for record in caplog.records if keys.log(OTHER) in record.message]
    assert len(messages) == 1
    async with open_event_stream(api, "/events") as stream:
        await stream.wait_for_event("snapshot")
        damaged.set(keys.log(OTHER), "x")
        later = await submit(api)
        assert (await stream.wait_for_event("pending")).data["job_id"] == later


@pytest.mark.parametrize("of_queue", [keys.delayed, keys.dead, keys.running, lambda q: q])
async def test_a_queue_that_cannot_be_counted_is_left_out_and_its_scale_says_which_key(
    api: httpx2.AsyncClient, damaged: redis.Redis, of_queue: Any
) -> None:
    await submit(api)
    await digits(api)
    damaged.delete(of_queue(OTHER))
    damaged.setbit(of_queue(OTHER), 1, 1)
    for path in ("/health", "/jobs?dead=true", "/jobs", "/models"):
        await ok(api, path)
    assert [queue["queue"] for queue in (await ok(api, "/queues"))["queues"]] == [QUEUE]
    assert (await ok(api, "/scale/iris"))["waiting_jobs"] == 1
    problem = assert_problem(await api.get("/scale/digits"), 503, "redis_refused")
    assert f"{of_queue(OTHER)!r} is a string" in problem["detail"]


@pytest.mark.parametrize(
    "name",
    soak_except(
        [
            *(
                keys.queues(QUEUE),
                keys.workers(QUEUE),
                keys.models(QUEUE),
                keys.default_model(QUEUE),
            ),
            *(keys.default_versions(QUEUE), keys.model(QUEUE, "digits"), keys.out_of_place(QUEUE)),
            *(keys.pace(QUEUE, "iris"), keys.worker(QUEUE, "w")),
        ],
        3,
    ),
)
async def test_a_shared_key_of_another_type_is_read_as_empty(
    api: httpx2.AsyncClient, damaged: redis.Redis, name: str
) -> None:
    damaged.zadd(keys.workers(QUEUE), {"w": 1})
    await submit(api)
    damaged.delete(name)
    damaged.xadd(name, {"x": "y"})
    await api.get("/models/nobody")
    paths = ("/health", "/models", "/queues", "/workers", "/jobs", "/jobs?dead=true")
    shown = {path: without_ages(await ok(api, path)) for path in paths}
    damaged.delete(name)
    await api.get("/models/nobody")
    assert shown == {path: without_ages(await ok(api, path)) for path in paths}


def without_ages(answer: Any) -> str:
    """An answer as text, without what changes from one moment to the next."""
    return re.sub(r"'\w*seconds': [\d.e-]+|'waiting_for': {.*?}", "", str(answer))


async def test_a_group_key_of_another_type_counts_as_no_group(
    api: httpx2.AsyncClient, damaged: redis.Redis
) -> None:
    await submit(api, params={"group": "g"})
    name = keys.group(QUEUE, "default", "g")
    damaged.rpush(name, NOT_UTF8)
    assert (await ok(api, "/group/g"))["counts"]["expired"] == 1
    assert len((await ok(api, "/jobs?group=g"))["jobs"]) == 1
    damaged.delete(name)
    damaged.set(name, "x")
    assert_problem(await api.get("/group/g"), 404, "group_not_found")
    assert (await ok(api, "/jobs?group=g"))["jobs"] == []


# --- roles -----------------------------------------------------------------------------------


async def test_an_idempotency_key_that_stands_for_garbage_ends_no_role(
    api: httpx2.AsyncClient, damaged: redis.Redis
) -> None:
    headers = {"idempotency-key": "k"}
    await submit(api, headers=headers)
    (name,) = damaged.scan_iter(keys.idempotency(QUEUE, "*"), count=1000)
    damaged.set(b"job:\xff:status", "pending")
    for value, status in ((b"\xff \xff", 422), (b"\xff", 202), (b"", 202)):
        damaged.set(name, value)
        reply = await api.post("/predict", json={"data": ROW}, headers=headers)
        assert reply.status_code == status, (value, reply.text)
    damaged.delete(name)
    await submit(api)


@pytest.mark.soak
async def test_an_inbox_with_nonsense_or_of_another_type_keeps_no_client_waiting(
    api: httpx2.AsyncClient, manual_worker: ManualWorker, damaged: redis.Redis
) -> None:
    async def completed() -> None:
        wait = {"prefer": "wait=20"}
        asked = asyncio.create_task(api.post("/predict", json={"data": ROW}, headers=wait))
        await eventually(lambda: bool(damaged.llen(QUEUE)), "the job waits")
        await manual_worker.complete()
        assert (await asked).json()["status"] == "completed"

    await completed()
    (inbox,) = damaged.scan_iter(keys.inbox(QUEUE, "*"), count=1000)
    for fields in (b"9" * 5000 + b" x", b"\xff", DEEP):
        damaged.xadd(inbox, {b"x": b"completed", b"\1x": fields})
    await completed()
    damaged.delete(inbox)
    damaged.set(inbox, "x")
    pattern = keys.inbox(QUEUE, "*")
    await eventually(
        lambda: any(
            damaged.type(name) == b"stream" for name in damaged.scan_iter(pattern, count=99)
        ),
        "the API has made another inbox",
    )
    await completed()


async def test_counters_that_are_not_numbers_refuse_no_job(
    api: httpx2.AsyncClient, manual_worker: ManualWorker, damaged: redis.Redis
) -> None:
    for name in (keys.bytes_waiting(QUEUE), keys.seq(QUEUE)):
        for content in (b"\xff", b"x", b"1.5"):
            damaged.set(name, content)
            await submit(api)
        damaged.delete(name)
        damaged.rpush(name, "x")
        await submit(api)
    await manual_worker.complete()
    assert all(job["status"] == "completed" for job in (await ok(api, "/jobs"))["jobs"])


@pytest.mark.parametrize("make", [keys.log, keys.wake, keys.control])
async def test_jobs_are_accepted_run_and_read_without_log_and_statistics(
    api: httpx2.AsyncClient, manual_worker: ManualWorker, damaged: redis.Redis, make: Any
) -> None:
    damaged.delete(make(QUEUE))
    damaged.set(make(QUEUE), "x")
    job_id = await submit(api)
    claim = await manual_worker.claim()
    assert (await api.delete(f"/job/{job_id}")).status_code in (200, 202)
    await manual_worker.finish(claim)
    assert (await ok(api, f"/job/{job_id}"))["status"] == "cancelled"
    other = await submit(api)
    await manual_worker.complete()
    assert (await ok(api, f"/job/{other}"))["status"] == "completed"


async def test_a_submit_that_cannot_be_done_says_which_key_is_to_blame(
    api: httpx2.AsyncClient, damaged: redis.Redis
) -> None:
    damaged.hset(QUEUE, "x", "y")
    reply = await api.post("/predict", json={"data": ROW})
    problem = assert_problem(reply, 503, "redis_refused")
    assert f"{QUEUE!r} is a hash and should be a list" in problem["detail"]


# --- cursors ---------------------------------------------------------------------------------


def _base64(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


CURSORS = {
    "nested": _base64(b"\x93\x00\x80" + b"\x91" * 20_000 + b"\x90"),
    "nested place": _base64(b"\x94\x92\x01\x01\xa1q\x00" + b"\x91" * 2_500 + b"\x90"),
    "nested letter": _base64(b"\x94\x00\xa1q\xa1x" + b"\x91" * 2_500 + b"\x90"),
    "nested spot": _base64(b"\x93\x00\xa1x" + b"\x91" * 2_500 + b"\x90"),
    "huge numbers": _base64(msgspec.msgpack.encode([(1 << 64) - 1, {"q": [(1 << 64) - 1] * 3}])),
    "wrong types": _base64(msgspec.msgpack.encode({"x": [1, None]})),
    "not finite": _base64(msgspec.msgpack.encode([float("inf"), QUEUE, "x"])),
    "no entry": _base64(msgspec.msgpack.encode([(1e20, 1), QUEUE, 0])),
    "long": "A" * 30_000,
    "no base64": "\u00fc",
}


async def test_a_forged_cursor_is_a_400(api: httpx2.AsyncClient, subtests: pytest.Subtests) -> None:
    job_id = await submit(api, params={"group": "g"})
    for case, cursor in CURSORS.items():
        with subtests.test(case):
            for path in ("/jobs", "/jobs?dead=true", "/jobs?group=g"):
                asked = httpx2.URL(path).copy_merge_params({"cursor": cursor})
                assert_problem(await api.get(asked), 400, "invalid_query")
            for path in ("/events", "/events?group=g", f"/job/{job_id}/events"):
                headers = {b"last-event-id": cursor.encode("latin-1")}
                assert_problem(await api.get(path, headers=headers), 400, "invalid_query")
                asked = httpx2.URL(path).copy_merge_params({"last_event_id": cursor})
                assert_problem(await api.get(asked), 400, "invalid_query")
