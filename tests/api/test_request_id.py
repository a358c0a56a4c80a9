"""The id of a request: answered, kept with the job, and logged."""

import logging
import re

import httpx2
import msgspec
import pytest
import redis

from asyncinfer.api.config import ApiConfig
from asyncinfer.client import Client
from asyncinfer.errors import InvalidInput
from asyncinfer.jobs import Record
from asyncinfer.repository import keys
from asyncinfer.repository.store import Store

from .harness import QUEUE, ROW, announce, client_of, running, submit


@pytest.mark.parametrize("request_id", ["a", "req-1/2?=~!", "x" * 128])
async def test_an_id_of_the_client_is_answered_and_shown_by_its_job(
    api: httpx2.AsyncClient, request_id: str
) -> None:
    headers = {"x-request-id": request_id}
    reply = await api.post("/predict", json={"data": ROW}, headers=headers)
    assert reply.headers["x-request-id"] == request_id
    job = await api.get(reply.headers["location"])
    assert job.json()["request_id"] == request_id
    assert job.headers["x-request-id"] != request_id


@pytest.mark.parametrize("request_id", [b"", b"two words", b"x" * 129, b"caf\xe9"])
async def test_an_id_that_is_not_1_to_128_visible_characters_is_replaced(
    api: httpx2.AsyncClient, request_id: bytes
) -> None:
    reply = await api.post("/predict", json={"data": ROW}, headers=[(b"x-request-id", request_id)])
    made = reply.headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{16}", made)
    assert (await api.get(reply.headers["location"])).json()["request_id"] == made


async def test_each_answer_has_an_id_of_its_own(api: httpx2.AsyncClient) -> None:
    replies = [
        await api.get("/models"),
        await api.get("/nothing/here"),
        await api.get("/job/none"),
        await api.delete("/"),
        await api.post("/predict", content=b"{", headers={"content-type": "application/json"}),
        await api.head("/"),
    ]
    assert len({reply.headers["x-request-id"] for reply in replies}) == len(replies)


async def test_all_jobs_of_a_request_of_many_lines_have_its_id(api: httpx2.AsyncClient) -> None:
    lines = b'{"data": [[1, 2, 3, 4]]}\n' * 3
    headers = {"content-type": "application/x-ndjson", "x-request-id": "batch-7"}
    reply = await api.post("/predict", content=lines, headers=headers)
    assert reply.headers["x-request-id"] == "batch-7"
    for job in (await api.get("/jobs")).json()["jobs"]:
        assert job["request_id"] == "batch-7"


async def test_the_jobs_of_a_request_are_listed_by_its_id(api: httpx2.AsyncClient) -> None:
    for request_id in ("customer-7", "customer-8"):
        for options in ({}, {"group": "g"}):
            body = {"data": ROW, "options": options}
            await api.post("/predict", json=body, headers={"x-request-id": request_id})
    for query, count in (("", 2), ("&group=g", 1), ("&status=completed", 0), ("&dead=true", 0)):
        listed = (await api.get(f"/jobs?request_id=customer-7{query}")).json()["jobs"]
        assert [job["request_id"] for job in listed] == ["customer-7"] * count
    refused = await api.get("/jobs?request_id=two%20words")
    assert (refused.status_code, refused.json()["code"]) == (400, "invalid_query")
    assert "1 to 128 visible ASCII characters" in refused.json()["detail"]


async def test_a_job_without_an_id_shows_none(api: httpx2.AsyncClient, server: redis.Redis) -> None:
    """It is of an external program, or of an earlier release, whose records end before the id."""
    server.set(keys.data("stranger"), "[[1, 2, 3, 4]]")
    server.set(keys.status("stranger"), "pending")
    server.lpush(QUEUE, "stranger")
    earlier = await submit(api)
    meta = server.get(keys.meta(earlier))
    assert isinstance(meta, bytes)
    fields = msgspec.msgpack.decode(meta[8:])[: Record.__struct_fields__.index("request_id")]
    server.set(keys.meta(earlier), meta[:8] + msgspec.msgpack.encode(fields))
    for job_id in ("stranger", earlier):
        reply = await api.get(f"/job/{job_id}")
        assert reply.status_code == 200
        assert "request_id" not in reply.json()
    assert (await api.delete(f"/job/{earlier}")).json()["status"] == "cancelled"


async def test_the_access_log_has_a_line_for_each_request(
    config: ApiConfig, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    await announce(store, "iris", default="iris")
    caplog.set_level(logging.INFO, "asyncinfer.access")
    logged = msgspec.structs.replace(config, access_log=True)
    async with running(logged) as port, client_of(port) as client:
        await client.get("/models?secret=1", headers={"x-request-id": "r1"})
        await client.get("/nothing/here", headers={"x-request-id": "r2"})
    found = [record for record in caplog.records if record.name == "asyncinfer.access"]
    shown = [
        (line.method, line.path, line.status, line.client, line.request_id)  # type: ignore[attr-defined]
        for line in found
    ]
    assert shown == [
        ("GET", "/models", 400, "127.0.0.1", "r1"),
        ("GET", "/nothing/here", 404, "127.0.0.1", "r2"),
    ]
    assert "secret" not in caplog.text


async def test_the_job_of_a_request_is_found_in_the_access_log_by_the_id_of_the_request(
    config: ApiConfig, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever way a submit takes."""
    await announce(store, "iris", default="iris")
    caplog.set_level(logging.INFO, "asyncinfer.access")
    ids = {}
    async with (
        running(msgspec.structs.replace(config, access_log=True)) as port,
        client_of(port) as client,
    ):
        for request_id, headers in (("r1", {}), ("r2", {"idempotency-key": "k"})):
            named = {**headers, "x-request-id": request_id}
            reply = await client.post("/predict", json={"data": ROW}, headers=named)
            ids[request_id] = reply.json()["job_id"]
    found = {
        record.request_id: record.job_id  # type: ignore[attr-defined]
        for record in caplog.records
        if record.name == "asyncinfer.access"
    }
    assert found == ids
    assert all(job_id in caplog.text for job_id in ids.values())


def test_a_client_refuses_an_id_that_the_server_would_replace() -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(InvalidInput, match="128 visible"):
        client.submit(ROW, request_id="two words")
