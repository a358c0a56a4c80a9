"""Reading, waiting for, cancelling, retrying and listing jobs."""

import asyncio
import time

import httpx2
import msgspec
import pytest
import redis

from asyncinfer import jobs
from asyncinfer.api.config import ApiConfig
from asyncinfer.repository import keys
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from tests.faults.harness import eventually

from .harness import (
    QUEUE,
    RESULT,
    ROW,
    ManualWorker,
    ProxiedApi,
    announce,
    assert_problem,
    client_of,
    count_waiters,
    running,
    running_until_signal,
    submit,
)
from .refusals import REFUSALS, refusing

# --- reading ---------------------------------------------------------------------------------


async def test_an_unfinished_job_has_no_result_and_says_when_to_ask_again(
    api: httpx2.AsyncClient,
) -> None:
    job_id = await submit(api)
    reply = await api.get(f"/job/{job_id}")
    body = reply.json()
    assert (reply.status_code, body["status"], body["result"]) == (200, "pending", None)
    assert (body["model"], body["round"]) == ("iris", 1)
    assert "error" not in body
    assert int(reply.headers["retry-after"]) > 0


async def test_a_completed_job_has_the_result_as_the_worker_wrote_it(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    job_id = await submit(api)
    await manual_worker.complete()
    reply = await api.get(f"/job/{job_id}")
    body = reply.json()
    assert (body["status"], body["result"], body["version"]) == ("completed", RESULT, "1")
    assert "retry-after" not in reply.headers
    assert body["created_at"].endswith("Z")
    assert body["finished_at"] == "1970-01-01T00:00:00.002000Z"


async def test_a_failed_job_says_why(api: httpx2.AsyncClient, manual_worker: ManualWorker) -> None:
    job_id = await submit(api)
    await manual_worker.fail()
    body = (await api.get(f"/job/{job_id}")).json()
    assert (body["status"], body["result"]) == ("failed", None)
    assert body["error"] == {"code": "model_failed", "message": "no"}


async def test_a_job_of_a_later_release_is_shown_and_cancelled_and_not_retried(
    api: httpx2.AsyncClient, server: redis.Redis
) -> None:
    job_id = await submit(api)
    record = jobs.decode_record(bytes(server.get(keys.meta(job_id)) or b""))  # type: ignore[arg-type]
    head = [jobs.SCHEMA + 1, record.queue, record.model, record.tenant, record.created_ms, 3]
    meta = b"12345678" + msgspec.msgpack.encode([*head, {"version": 7}, ["another", "payload"]])
    server.set(keys.meta(job_id), meta)
    shown = (await api.get(f"/job/{job_id}")).json()
    assert (shown["status"], shown["model"], shown["round"]) == ("pending", "iris", 3)
    listed = (await api.get("/jobs")).json()["jobs"]
    assert [job["job_id"] for job in listed] == [job_id]
    assert (await api.delete(f"/job/{job_id}")).status_code == 200
    refused = assert_problem(await api.post(f"/job/{job_id}/retry"), 409, "job_not_retryable")
    assert "a later release" in refused["detail"]
    many = (await api.post("/jobs/retry?status=cancelled")).json()
    assert (many["retried"], [refusal["job_id"] for refusal in many["refused"]]) == ([], [job_id])
    assert server.get(keys.meta(job_id)) == meta


async def test_a_job_that_never_existed_is_not_found_and_an_old_one_is_expired(
    api: httpx2.AsyncClient,
) -> None:
    now_ms = time.time_ns() // 1_000_000
    for absent in (jobs.new_id(now_ms), "x", "a" * 200, "%00", "%FF", "a%0Ab"):
        assert_problem(await api.get(f"/job/{absent}"), 404, "job_not_found")
    old = jobs.new_id(now_ms - 601_000)
    assert_problem(await api.get(f"/job/{old}"), 410, "job_expired")
    assert_problem(await api.delete(f"/job/{old}"), 410, "job_expired")
    assert_problem(await api.post(f"/job/{old}/retry"), 410, "job_expired")


async def test_an_external_job_belongs_to_the_default_model(
    api: httpx2.AsyncClient, server: redis.Redis
) -> None:
    server.set("job:стр/1:data", "[[1]]")
    server.set("job:стр/1:status", "pending")
    body = (await api.get("/job/x")).json()
    assert body["code"] == "job_not_found"
    server.set("job:x:status", "completed", ex=60)
    server.set("job:x:result", '{"prediction": 1}', ex=60)
    body = (await api.get("/job/x")).json()
    assert (body["model"], body["result"]) == ("iris", {"prediction": 1})
    assert "round" not in body


async def test_an_external_result_that_is_not_json_is_shown_as_text(
    api: httpx2.AsyncClient, server: redis.Redis, subtests: pytest.Subtests
) -> None:
    for number, text in enumerate((b"setosa", b"[1,", b"\xff", b"", b"NaN", b'"\xff"')):
        with subtests.test(text=text):
            server.set(f"job:{number}:status", "completed", ex=60)
            server.set(f"job:{number}:result", text, ex=60)
            reply = await api.get(f"/job/{number}")
            assert reply.json()["result"] == text.decode(errors="replace")


async def test_an_external_error_may_be_any_text(
    api: httpx2.AsyncClient, server: redis.Redis
) -> None:
    server.set("job:x:status", "failed", ex=60)
    server.set("job:x:error", b"boom \xff", ex=60)
    body = (await api.get("/job/x")).json()
    assert body["error"] == {"code": "unknown", "message": "boom \ufffd"}


# --- waiting ---------------------------------------------------------------------------------


async def test_a_wait_ends_with_the_job(
    api: httpx2.AsyncClient, manual_worker: ManualWorker, server: redis.Redis
) -> None:
    job_id = await submit(api)
    async with asyncio.TaskGroup() as group:
        get = group.create_task(api.get(f"/job/{job_id}?wait=60"))
        await eventually(lambda: server.hlen(keys.facts(QUEUE)) > 0, "the API waits for it")
        assert not get.done()
        await manual_worker.complete()
        # The check that finds ends whose notice was lost comes later.
        async with asyncio.timeout(2.5):
            reply = await get
    assert reply.json()["result"] == RESULT


async def test_a_wait_ends_with_its_time(api: httpx2.AsyncClient) -> None:
    job_id = await submit(api)
    began = time.monotonic()
    reply = await api.get(f"/job/{job_id}?wait=0.1")
    assert 0.1 <= time.monotonic() - began < 4
    assert reply.json()["status"] == "pending"


async def test_a_wait_without_redis_says_so(proxied_api: ProxiedApi) -> None:
    async with client_of(proxied_api.port) as client, asyncio.TaskGroup() as group:
        job_id = await submit(client)
        get = group.create_task(client.get(f"/job/{job_id}?wait=1"))
        await eventually(lambda: count_waiters() == 1, "the API waits for it")
        proxied_api.proxy.black_hole()
    assert_problem(get.result(), 503, "redis_unavailable")


@pytest.mark.parametrize("code", ["storage_full", "too_few_replicas", "redis_permission_denied"])
async def test_a_job_is_read_with_a_wait_while_redis_takes_no_jobs(
    code: str, api: httpx2.AsyncClient, server: redis.Redis
) -> None:
    job_id = await submit(api)
    with refusing(server, *REFUSALS[code]):
        reply = await api.get(f"/job/{job_id}?wait=0.1")
    assert (reply.status_code, reply.json()["status"]) == (200, "pending")


@pytest.mark.soak
async def test_a_wait_that_began_while_redis_took_no_writes_sees_the_end(
    api: httpx2.AsyncClient, server: redis.Redis, manual_worker: ManualWorker
) -> None:
    job_id = await submit(api)
    async with asyncio.TaskGroup() as group:
        with refusing(server, *REFUSALS["too_few_replicas"]):
            get = group.create_task(api.get(f"/job/{job_id}?wait=60"))
            await eventually(lambda: count_waiters() == 1, "it waits")
        await manual_worker.complete()
    assert get.result().json()["status"] == "completed"


async def test_nothing_waits_for_a_client_that_disconnected(
    api: httpx2.AsyncClient, server: redis.Redis
) -> None:
    job_id = await submit(api)
    get = asyncio.create_task(api.get(f"/job/{job_id}?wait=60"))
    await eventually(lambda: server.hlen(keys.facts(QUEUE)) > 0, "the API waits for it")
    assert count_waiters() == 1
    get.cancel()
    await eventually(lambda: not count_waiters(), "the API waits for no job", 10)


async def test_a_refused_query_names_the_wrong_parameter(api: httpx2.AsyncClient) -> None:
    job_id = await submit(api)
    wrong = {
        "wait=61": "wait",
        "wait=-1": "wait",
        "wait=nan": "wait",
        "wait=": "wait",
        "wait=1&wait=2": "wait",
        "wiat=1": "wiat",
        "wait=%FF": "UTF-8",
    }
    for query, named in wrong.items():
        reply = await api.get(f"/job/{job_id}?{query}")
        assert named in assert_problem(reply, 400, "invalid_query")["detail"]
    reply = await api.post("/predict?model=iris", json={"data": ROW})
    assert "model" in assert_problem(reply, 400, "invalid_query")["detail"]


async def test_a_stopping_api_answers_waiting_clients(config: ApiConfig, store: Store) -> None:
    await announce(store, "iris", default="iris")
    async with asyncio.TaskGroup() as group, client_of(0) as client:
        async with running_until_signal(config) as port:
            client.base_url = httpx2.URL(f"http://127.0.0.1:{port}")
            job_id = await submit(client)
            get = group.create_task(client.get(f"/job/{job_id}?wait=60"))
            post = group.create_task(
                client.post("/predict", json={"data": ROW}, headers={"prefer": "wait=60"})
            )
            await eventually(lambda: count_waiters() == 2, "both wait")
            began = time.monotonic()
        took = time.monotonic() - began
        assert ((await get).status_code, (await post).status_code) == (200, 202)
    assert took < 10


# --- cancelling ------------------------------------------------------------------------------


async def test_a_waiting_job_is_cancelled_at_once(
    api: httpx2.AsyncClient, server: redis.Redis
) -> None:
    job_id = await submit(api)
    reply = await api.delete(f"/job/{job_id}")
    assert (reply.status_code, reply.json()["status"]) == (200, "cancelled")
    assert server.llen(QUEUE) == 0
    again = assert_problem(await api.delete(f"/job/{job_id}"), 409, "job_finished")
    assert again["job_id"] == job_id


async def test_a_running_job_is_cancelled_once_its_worker_is_notified(
    api: httpx2.AsyncClient, manual_worker: ManualWorker, server: redis.Redis
) -> None:
    job_id = await submit(api)
    claim = await manual_worker.claim()
    async with asyncio.TaskGroup() as group:
        delete = group.create_task(api.delete(f"/job/{job_id}"))
        await eventually(lambda: server.exists(keys.control(QUEUE)) == 1, "its worker is notified")
        await manual_worker.finish(claim)
    assert (delete.result().status_code, delete.result().json()["status"]) == (200, "cancelled")


async def test_a_running_job_that_does_not_stop_at_once_is_cancelled_later(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    job_id = await submit(api)
    claim = await manual_worker.claim()
    reply = await api.delete(f"/job/{job_id}")
    assert (reply.status_code, reply.json()["status"]) == (202, "processing")
    await manual_worker.finish(claim)
    assert (await api.get(f"/job/{job_id}")).json()["status"] == "cancelled"


# --- retrying --------------------------------------------------------------------------------


async def test_a_failed_job_runs_again_in_a_new_round(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    job_id = await submit(api)
    await manual_worker.fail()
    reply = await api.post(f"/job/{job_id}/retry")
    assert (reply.status_code, reply.json()["job_id"]) == (202, job_id)
    assert reply.headers["location"] == f"/job/{job_id}"
    await manual_worker.complete()
    body = (await api.get(f"/job/{job_id}")).json()
    assert (body["round"], body["status"], body["result"]) == (2, "completed", RESULT)


async def test_a_job_that_did_not_fail_is_not_retried(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    job_id = await submit(api)
    reply = await api.post(f"/job/{job_id}/retry")
    assert "pending" in assert_problem(reply, 409, "job_not_retryable")["detail"]
    await manual_worker.complete()
    assert_problem(await api.post(f"/job/{job_id}/retry"), 409, "job_not_retryable")


async def test_a_job_whose_input_is_gone_is_not_retried(
    api: httpx2.AsyncClient, manual_worker: ManualWorker, server: redis.Redis
) -> None:
    job_id = await submit(api)
    await manual_worker.fail()
    server.delete(keys.data(job_id))
    reply = await api.post(f"/job/{job_id}/retry")
    assert "input" in assert_problem(reply, 409, "job_not_retryable")["detail"]


async def test_a_retry_finds_no_room_in_a_full_queue(
    config: ApiConfig, store: Store, manual_worker: ManualWorker
) -> None:
    await announce(store, "iris", default="iris")
    full = msgspec.structs.replace(config, policy=Policy(max_queue=1))
    async with running(full) as port, client_of(port) as client:
        job_id = await submit(client)
        await manual_worker.fail()
        await submit(client)
        reply = await client.post(f"/job/{job_id}/retry")
    assert_problem(reply, 429, "queue_full")
    assert "retry-after" in reply.headers


# --- listing ---------------------------------------------------------------------------------


async def test_the_list_is_newest_first_in_pages(api: httpx2.AsyncClient) -> None:
    made = [await submit(api) for _ in range(5)]
    seen: list[str] = []
    cursor = ""
    while True:
        page = (await api.get(f"/jobs?limit=2{cursor}")).json()
        seen += [job["job_id"] for job in page["jobs"]]
        if page["cursor"] is None:
            break
        cursor = f"&cursor={page['cursor']}"
    assert seen == made[::-1]


async def test_the_list_is_narrowed_by_status_and_model(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    done = await submit(api)
    await manual_worker.complete()
    await submit(api)
    other = (await api.post("/predict/digits", json={"data": [[0] * 64]})).json()["job_id"]
    completed = (await api.get("/jobs?status=completed")).json()["jobs"]
    assert [job["job_id"] for job in completed] == [done]
    assert "result" not in completed[0]
    digits = (await api.get("/jobs?model=digits")).json()["jobs"]
    assert [(job["job_id"], job["model"]) for job in digits] == [(other, "digits")]


async def test_an_invalid_list_query_is_refused(api: httpx2.AsyncClient) -> None:
    for query in ("limit=0", "limit=1001", "limit=x", "status=done", "cursor=%21", "sort=up"):
        assert_problem(await api.get(f"/jobs?{query}"), 400, "invalid_query")


async def test_a_cancel_and_a_purge_at_once_are_answered_with_what_they_did(
    api: httpx2.AsyncClient,
) -> None:
    for _ in range(40):
        job_id = await submit(api)
        cancelled, purged = await asyncio.gather(
            api.delete(f"/job/{job_id}"), api.delete(f"/job/{job_id}?purge=true")
        )
        assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
        if purged.status_code == 200:
            assert purged.json()["status"] == "cancelled"
        else:
            assert_problem(purged, 409, "job_not_finished")
