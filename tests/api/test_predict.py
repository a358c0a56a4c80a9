"""POST /predict: the stored job, the answers, and idempotency keys."""

import asyncio
import hashlib
import time
from collections.abc import Callable, Coroutine
from typing import Any

import httpx2
import msgspec
import pytest
import redis

from asyncinfer import jobs
from asyncinfer.api.config import ApiConfig
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements
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
    submit,
)

NDJSON = {"content-type": "application/x-ndjson"}


async def test_an_input_becomes_a_pending_job(api: httpx2.AsyncClient) -> None:
    reply = await api.post("/predict", json={"data": ROW})
    body = reply.json()
    job_id = body["job_id"]
    assert reply.status_code == 202
    assert body.pop("waiting_for")["code"] == "no_worker"
    assert body == {"job_id": job_id, "status": "pending", "url": f"/job/{job_id}"}
    assert reply.headers["location"] == f"/job/{job_id}"
    assert jobs.created_ms(job_id)


async def test_the_data_is_stored_as_the_client_wrote_it(
    api: httpx2.AsyncClient, server: redis.Redis
) -> None:
    body = b'{ "options" : {"priority": "low"},\n "data" : [[5.10, 3.5e0, 14e-1, 0.2]] }'
    reply = await api.post("/predict", content=body, headers={"content-type": "application/json"})
    job_id = reply.json()["job_id"]
    assert server.get(keys.data(job_id)) == b"[[5.10, 3.5e0, 14e-1, 0.2]]"
    assert server.lrange(keys.waiting(QUEUE)[2], 0, -1) == [job_id.encode()]


async def test_a_model_in_the_path_has_its_own_queue(
    api: httpx2.AsyncClient, server: redis.Redis
) -> None:
    reply = await api.post("/predict/digits", json={"data": [[0.5] * 64]})
    assert reply.status_code == 202
    assert server.llen(f"{QUEUE}:digits") == 1


async def test_a_job_without_a_content_type_is_taken_for_json(
    api: httpx2.AsyncClient, server: redis.Redis
) -> None:
    reply = await api.post("/predict", content=b'{"data": [[1, 2, 3, 4]]}')
    assert reply.status_code == 202
    assert server.get(keys.data(reply.json()["job_id"])) == b"[[1, 2, 3, 4]]"


# --- waiting ---------------------------------------------------------------------------------


async def test_a_preferred_wait_answers_with_the_finished_job(
    api: httpx2.AsyncClient, manual_worker: ManualWorker, server: redis.Redis
) -> None:
    async with asyncio.TaskGroup() as group:
        post = group.create_task(
            api.post("/predict", json={"data": ROW}, headers={"prefer": "wait=10"})
        )
        await eventually(lambda: bool(server.llen(QUEUE)), "the job waits")
        await manual_worker.complete()
    reply = post.result()
    assert reply.status_code == 200
    assert reply.headers["preference-applied"] == "wait=10"
    body = reply.json()
    assert (body["status"], body["result"]) == ("completed", RESULT)


async def test_a_wait_too_short_answers_with_the_pending_job(api: httpx2.AsyncClient) -> None:
    for wait in ("wait=0", "respond-async, WAIT=0", 'wait="0"; x=1, wait=50'):
        reply = await api.post("/predict", json={"data": ROW}, headers={"prefer": wait})
        assert reply.status_code == 202
        assert reply.headers["preference-applied"] == "wait=0"
        assert reply.json()["status"] == "pending"


async def test_a_wait_that_is_no_number_or_too_long_is_refused(
    api: httpx2.AsyncClient, server: redis.Redis
) -> None:
    for wait in ("wait=61", "wait=-1", "wait=1.5", "wait=abc", "wait", "wait=", "wait=1e1"):
        reply = await api.post("/predict", json={"data": ROW}, headers={"prefer": wait})
        assert "0 to 60" in assert_problem(reply, 400, "invalid_header")["detail"]
    assert server.llen(QUEUE) == 0


# --- idempotency -----------------------------------------------------------------------------


async def test_the_same_key_and_request_give_the_same_job(
    api: httpx2.AsyncClient, manual_worker: ManualWorker, server: redis.Redis
) -> None:
    once = {"idempotency-key": "order-1"}
    job_id = await submit(api, headers=once)
    again = await api.post("/predict", json={"data": ROW}, headers=once)
    assert (again.status_code, again.json()["job_id"]) == (202, job_id)
    assert server.llen(QUEUE) == 1
    await manual_worker.complete()
    later = await api.post("/predict", json={"data": ROW}, headers=once)
    assert (later.status_code, later.json()["status"]) == (202, "completed")
    waited = await api.post("/predict", json={"data": ROW}, headers={**once, "prefer": "wait=5"})
    assert (waited.status_code, waited.json()["result"]) == (200, RESULT)
    assert waited.json()["job_id"] == job_id


@pytest.mark.parametrize("as_line", [False, True])
async def test_the_key_of_a_deleted_job_makes_a_new_job(
    api: httpx2.AsyncClient, manual_worker: ManualWorker, server: redis.Redis, as_line: bool
) -> None:
    def send() -> Coroutine[Any, Any, httpx2.Response]:
        if as_line:
            line = msgspec.json.encode({"data": ROW, "idempotency_key": "order-1"})
            return api.post("/predict", content=line, headers=NDJSON)
        return api.post("/predict", json={"data": ROW}, headers={"idempotency-key": "order-1"})

    first = (await send()).json()["job_id"]
    await manual_worker.complete()
    name = keys.idempotency(QUEUE, hashlib.sha256(b"default\0order-1").hexdigest())
    assert server.pexpiretime(name) == server.pexpiretime(keys.status(first))
    assert (await send()).json()["job_id"] == first
    assert (await api.delete(f"/job/{first}?purge=true")).status_code == 200
    assert not server.exists(name)
    assert (await send()).json()["job_id"] != first
    assert server.llen(QUEUE) == 1


async def test_a_second_request_with_the_key_waits_for_the_first_ones_job(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    once = {"idempotency-key": "order-1"}
    job_id = await submit(api, headers=once)
    async with asyncio.TaskGroup() as group:
        headers = {**once, "prefer": "wait=10"}
        post = group.create_task(api.post("/predict", json={"data": ROW}, headers=headers))
        # It was ready to wait for a job of its own, and waits for the first one's now.
        await eventually(lambda: count_waiters() == 2, "it waits")
        await manual_worker.complete()
    assert (post.result().status_code, post.result().json()["job_id"]) == (200, job_id)


async def test_the_same_key_with_another_request_is_a_conflict(
    api: httpx2.AsyncClient, server: redis.Redis
) -> None:
    once = {"idempotency-key": "order-1"}
    job_id = await submit(api, headers=once)
    others = (
        {"data": [[1, 2, 3, 4]]},
        {"data": ROW, "options": {"priority": "high"}},
    )
    for other in others:
        reply = await api.post("/predict", json=other, headers=once)
        body = assert_problem(reply, 422, "idempotency_conflict")
        assert body["job_id"] == job_id
    assert server.llen(QUEUE) == 1


async def test_the_same_key_for_another_model_is_another_key(api: httpx2.AsyncClient) -> None:
    once = {"idempotency-key": "order-1"}
    job_id = await submit(api, headers=once)
    other = await api.post("/predict/digits", json={"data": [[1] * 64]}, headers=once)
    assert (other.status_code, other.json()["job_id"] == job_id) == (202, False)


async def test_a_key_is_neither_readable_in_redis_nor_of_any_form(
    api: httpx2.AsyncClient, server: redis.Redis
) -> None:
    await submit(api, headers={"idempotency-key": "~" * 255})
    digest = hashlib.sha256(b"default\0" + b"~" * 255).hexdigest()
    assert server.exists(keys.idempotency(QUEUE, digest))
    for wrong in (b"", b"a" * 256, b"two words", "ключ".encode()):
        headers = [(b"idempotency-key", wrong)]
        reply = await api.post("/predict", json={"data": ROW}, headers=headers)
        assert_problem(reply, 400, "invalid_header")
    assert server.llen(QUEUE) == 1


@pytest.mark.soak
async def test_200_requests_with_one_key_over_two_apis_make_one_job(
    config: ApiConfig, store: Store, server: redis.Redis
) -> None:
    await announce(store, "iris", default="iris")
    async with (
        running(config) as first_port,
        running(config) as second_port,
        client_of(first_port) as first,
        client_of(second_port) as second,
        asyncio.TaskGroup() as group,
    ):
        headers = {"idempotency-key": "once"}
        posts = [
            group.create_task(client.post("/predict", json={"data": ROW}, headers=headers))
            for client in (first, second) * 100
        ]
    replies = [post.result() for post in posts]
    assert {reply.status_code for reply in replies} == {202}
    assert len({reply.json()["job_id"] for reply in replies}) == 1
    assert server.llen(QUEUE) == 1


# --- no room, no model, no Redis -------------------------------------------------------------


async def test_a_full_queue_refuses_exactly_above_its_cap(
    config: ApiConfig, store: Store, server: redis.Redis
) -> None:
    await announce(store, "iris", default="iris")
    full = msgspec.structs.replace(config, policy=Policy(max_queue=3))
    async with running(full) as port, client_of(port) as client:
        for _ in range(3):
            await submit(client)
        reply = await client.post("/predict", json={"data": ROW})
    assert_problem(reply, 429, "queue_full")
    assert int(reply.headers["retry-after"]) > 0
    assert server.llen(QUEUE) == 3


async def test_before_any_worker_is_announced_a_submit_is_a_503(
    config: ApiConfig, store: Store
) -> None:
    async with running(config) as port, client_of(port) as client:
        reply = await client.post("/predict", json={"data": ROW})
        assert_problem(reply, 503, "no_model_announced")
        assert int(reply.headers["retry-after"]) > 0
        await announce(store, "iris", default="iris")
        await submit(client)


async def test_with_several_models_and_no_default_one_must_be_named(
    config: ApiConfig, store: Store
) -> None:
    await announce(store, "cats", "dogs")
    await Announcements(store).announce_worker("w", {"default_model": None}, ttl_seconds=60)
    async with running(config) as port, client_of(port) as client:
        reply = await client.post("/predict", json={"data": ROW})
        assert "cats, dogs" in assert_problem(reply, 422, "invalid_input")["detail"]
        assert (await client.post("/predict/cats", json={"data": ROW})).status_code == 202


async def test_while_the_default_model_is_unknown_a_client_is_asked_to_retry(
    config: ApiConfig, store: Store
) -> None:
    await announce(store, "cats")
    async with running(config) as port, client_of(port) as client:
        reply = await client.post("/predict", json={"data": ROW})
        assert_problem(reply, 503, "no_model_announced")
        assert int(reply.headers["retry-after"]) > 0
        await Announcements(store).announce_worker("w", {"default_model": None}, ttl_seconds=60)
        await submit(client)
    assert await store.command("LLEN", keys.queue(store.queue_name, "cats", None)) == 1


@pytest.mark.soak
async def test_while_redis_has_lost_the_default_model_only_its_clients_wait(
    config: ApiConfig, store: Store, server: redis.Redis
) -> None:
    await announce(store, "iris", "digits", default="iris")
    async with running(config) as port, client_of(port) as client:
        await submit(client)
        server.delete(keys.default_model(store.queue_name))

        async def is_refused() -> bool:
            return (await client.post("/predict", json={"data": ROW})).status_code == 503

        await eventually(is_refused, "the API has noticed the loss", 5)
        for path in ("/predict", "/predict/iris"):
            reply = await client.post(path, json={"data": ROW})
            assert_problem(reply, 503, "no_model_announced")
            assert int(reply.headers["retry-after"]) > 0
        body = {"data": [[0.0] * 64]}
        assert (await client.post("/predict/digits", json=body)).status_code == 202
        waits = server.llen(QUEUE)
        await store.claim_default_model("iris")
        await submit(client)
        assert server.llen(QUEUE) == waits + 1
    assert server.llen(keys.queue(store.queue_name, "iris", None)) == 0


async def test_an_api_with_a_configured_default_writes_it_again_when_redis_has_lost_it(
    config: ApiConfig, store: Store, server: redis.Redis
) -> None:
    async with running(msgspec.structs.replace(config, default_model="iris")) as port:
        server.flushall()
        await announce(store, "iris", "digits")
        async with client_of(port) as client:
            await submit(client)
    assert await store.default_model() == "iris"
    assert server.llen(QUEUE) == 1


async def test_an_unknown_model_is_named_with_the_nearest_known(api: httpx2.AsyncClient) -> None:
    for pause_seconds in (0.0, 0.3):
        await asyncio.sleep(pause_seconds)
        reply = await api.post("/predict/iris2", json={"data": ROW})
        detail = assert_problem(reply, 404, "model_not_found")["detail"]
        assert "Did you mean `iris`? Known: `digits`, `iris`." in detail


async def test_an_invalid_model_name_is_answered_with_the_rule_for_names(
    api: httpx2.AsyncClient,
) -> None:
    for name in ("stats", "-x", "a" * 65, "%7Bx%7D", "a%20b", "%00"):
        reply = await api.post(f"/predict/{name}", json={"data": ROW})
        assert_problem(reply, 404, "model_not_found")


async def test_without_redis_a_submit_fails_in_time_and_names_its_job(
    proxied_api: ProxiedApi,
) -> None:
    async with client_of(proxied_api.port) as client:
        await submit(client)
        proxied_api.proxy.black_hole()
        replies: list[httpx2.Response] = []
        seconds: list[float] = []
        while not seconds or (seconds[-1] >= 1.5 and len(seconds) < 3):
            began = time.monotonic()
            replies.append(await client.post("/predict", json={"data": ROW}))
            seconds.append(time.monotonic() - began)  # a busy machine may delay one or two
        live = await client.get("/health/live")
    # The later ones have no connection, so that nothing of them is sent.
    body = assert_problem(replies[0], 503, "redis_unavailable")
    assert seconds[-1] < 1.5
    assert jobs.created_ms(body["job_id"])
    assert f"/job/{body['job_id']}" in body["detail"]
    assert live.status_code == 200


def _as_a_replica(server: redis.Redis, begins: bool) -> None:
    primary = ("127.0.0.1", "1") if begins else ("NO", "ONE")
    server.execute_command("REPLICAOF", *primary)  # type: ignore[no-untyped-call]


def _without_replicas(server: redis.Redis, begins: bool) -> None:
    server.config_set("min-replicas-to-write", "1" if begins else "0")


@pytest.mark.parametrize(
    ("refuse", "code", "reason"),
    [
        (_as_a_replica, "redis_read_only", "it is a replica"),
        (_without_replicas, "too_few_replicas", "min-replicas-to-write"),
    ],
)
async def test_a_redis_that_takes_no_writes_is_answered_with_its_reason_and_no_job_is_accepted(
    api: httpx2.AsyncClient,
    server: redis.Redis,
    refuse: Callable[[redis.Redis, bool], None],
    code: str,
    reason: str,
) -> None:
    refuse(server, True)
    try:
        replies = [
            await api.post("/predict", json={"data": ROW}),
            await api.get("/health/ready?for=submit"),
        ]
        line = await api.post("/predict", content=b'{"data": [[1, 2, 3, 4]]}', headers=NDJSON)
    finally:
        refuse(server, False)
    for reply in replies:
        problem = assert_problem(reply, 503, code)
        assert reason in problem["detail"]
        assert "Nothing was taken in" in problem["detail"]
        assert "job_id" not in problem
    assert line.json()["code"] == code

    await submit(api)
    await eventually(lambda: _is_ready(api), "the API is ready again")
    assert server.llen(QUEUE) == 1


async def _is_ready(api: httpx2.AsyncClient) -> bool:
    return (await api.get("/health/ready?for=submit")).status_code == 200
