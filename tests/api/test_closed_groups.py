"""Closed groups over HTTP: no more jobs join them; `close=true` closes one with its last job."""

from typing import Any

import httpx2
import msgspec
import pytest
import redis

from asyncinfer.repository import keys

from .harness import QUEUE, ROW, ManualWorker, ProxiedApi, assert_problem, client_of
from .sse import open_event_stream

NDJSON = {"content-type": "application/x-ndjson"}
GOOD = b'{"data": [[5.1, 3.5, 1.4, 0.2]]}'


async def submit_to(
    client: httpx2.AsyncClient, group: str = "g", path: str = "/predict", **more: Any
) -> httpx2.Response:
    body = {"data": ROW, "options": {"group": group}}
    return await client.post(path, json=body, **more)


async def close(client: httpx2.AsyncClient, group: str = "g") -> None:
    reply = await client.post(f"/group/{group}/close")
    assert (reply.status_code, reply.json()) == (200, {"group": group, "closed": True}), reply.text


async def is_closed(client: httpx2.AsyncClient, group: str = "g") -> bool:
    closed: bool = (await client.get(f"/group/{group}")).json()["closed"]
    return closed


async def post_lines(
    client: httpx2.AsyncClient, lines: list[bytes], path: str
) -> list[dict[str, Any]]:
    reply = await client.post(path, content=b"\n".join(lines), headers=NDJSON)
    assert reply.status_code == 200, reply.text
    return [msgspec.json.decode(line) for line in reply.content.splitlines()]


# --- closing ---------------------------------------------------------------------------------


async def test_a_closed_group_refuses_every_form_of_submit(
    api: httpx2.AsyncClient, server: redis.Redis
) -> None:
    await submit_to(api)
    assert not await is_closed(api)
    for _ in range(2):
        await close(api)
    assert await is_closed(api)

    replies = [
        await submit_to(api),
        await submit_to(api, headers={"prefer": "wait=1"}),
        await submit_to(api, headers={"idempotency-key": "k"}),
        await api.post("/predict?group=g", json={"data": ROW}),
        await submit_to(api, path="/predict?close=true"),
    ]
    for reply in replies:
        assert "another group" in assert_problem(reply, 409, "group_closed")["detail"]
    own = GOOD[:-1] + b', "options": {"group": "h"}}'
    answers = await post_lines(api, [GOOD, own, GOOD], "/predict?group=g")
    assert [answer.get("code") for answer in answers] == ["group_closed", None, "group_closed"]
    assert server.llen(QUEUE) == 2


async def test_a_submit_that_was_accepted_may_be_sent_again_to_a_closed_group(
    api: httpx2.AsyncClient,
) -> None:
    key = {"idempotency-key": "k"}
    first = (await submit_to(api, headers=key)).json()["job_id"]
    await close(api)
    again = await submit_to(api, headers=key)
    assert (again.status_code, again.json()["job_id"]) == (202, first)


async def test_a_failed_job_of_a_closed_group_may_be_retried(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    job_id = (await submit_to(api)).json()["job_id"]
    await manual_worker.fail()
    await close(api)
    assert (await api.post(f"/job/{job_id}/retry")).status_code == 202
    await manual_worker.complete()
    assert (await api.get("/group/g")).json()["counts"]["completed"] == 1


async def test_a_group_without_jobs_cannot_be_closed(api: httpx2.AsyncClient) -> None:
    for name in ("none", "a%20b"):
        assert_problem(await api.post(f"/group/{name}/close"), 404, "group_not_found")
    assert (await submit_to(api, "none")).status_code == 202


async def test_a_group_is_closed_for_its_tenant_alone(two_tenant_port: int) -> None:
    alice, bob = [client_of(two_tenant_port, **{"x-api-key": name}) for name in ("alice", "bob")]
    async with alice, bob:
        await submit_to(alice)
        assert_problem(await bob.post("/group/g/close"), 404, "group_not_found")
        await close(alice)
        assert (await submit_to(bob)).status_code == 202
        assert_problem(await submit_to(alice), 409, "group_closed")


# --- with the last submit --------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"headers": {"prefer": "wait=0"}}], ids=["202", "wait"])
async def test_the_last_submit_closes_its_group(
    api: httpx2.AsyncClient, more: dict[str, Any]
) -> None:
    await submit_to(api)
    assert (await submit_to(api, path="/predict?close=true", **more)).status_code == 202
    assert await is_closed(api)
    query = await api.post("/predict?group=h&close=true", json={"data": ROW}, **more)
    assert query.status_code == 202
    assert await is_closed(api, "h")
    job = (await api.get(query.json()["url"])).json()
    assert (job["group"], "close" in job) == ("h", False)


async def test_a_last_submit_that_is_sent_again_gets_its_job_and_closes_the_group(
    api: httpx2.AsyncClient,
) -> None:
    key = {"idempotency-key": "k"}
    first = (await submit_to(api, headers=key)).json()["job_id"]
    for _ in range(2):
        again = await submit_to(api, path="/predict?close=true", headers=key)
        assert (again.status_code, again.json()["job_id"]) == (202, first)
    assert await is_closed(api)


async def test_a_submit_that_names_no_group_closes_none(
    api: httpx2.AsyncClient, server: redis.Redis
) -> None:
    refused = [
        await api.post("/predict?close=true", json={"data": ROW}),
        await api.post("/predict?close=true", content=GOOD, headers=NDJSON),
    ]
    for reply in refused:
        assert "`group`" in assert_problem(reply, 400, "invalid_query")["detail"]
    assert server.llen(QUEUE) == 0


async def test_a_submit_that_is_refused_closes_no_group(api: httpx2.AsyncClient) -> None:
    await submit_to(api)
    wrong = await api.post("/predict?group=g&close=true", json={"data": [[1.0]]})
    assert_problem(wrong, 422, "invalid_input")
    assert not await is_closed(api)


async def test_lines_close_the_group_of_the_query_once_all_are_accepted(
    api: httpx2.AsyncClient,
) -> None:
    own = GOOD[:-1] + b', "options": {"group": "h"}}'
    answers = await post_lines(api, [GOOD, own, GOOD], "/predict?group=g&close=true")
    assert ["job_id" in answer for answer in answers] == [True] * 3
    assert await is_closed(api)
    assert not await is_closed(api, "h")


async def test_lines_of_which_some_are_refused_leave_the_group_open_and_say_so(
    api: httpx2.AsyncClient,
) -> None:
    answers = await post_lines(
        api, [GOOD, b'{"data": [[1.0]]}', GOOD], "/predict?group=g&close=true"
    )
    assert [answer.get("code") for answer in answers] == [
        *(None, "invalid_input", None),
        "group_not_closed",
    ]
    assert (answers[-1]["status"], answers[-1]["line"]) == (409, 4)
    assert "1 line was refused" in answers[-1]["detail"]
    assert (await submit_to(api)).status_code == 202


async def test_lines_that_a_closed_group_refuses_are_not_said_to_have_left_it_open(
    api: httpx2.AsyncClient,
) -> None:
    path = "/predict?group=g&close=true"
    assert len(await post_lines(api, [GOOD, GOOD], path)) == 2
    answers = await post_lines(api, [GOOD, GOOD], path)
    assert [answer["code"] for answer in answers] == ["group_closed"] * 3
    assert "2 lines were refused, and the group g was closed before" in answers[-1]["detail"]


async def test_a_close_whose_reply_is_lost_is_sent_again(proxied_api: ProxiedApi) -> None:
    async with client_of(proxied_api.port) as client:
        await submit_to(client)
        proxied_api.proxy.cut_reply_to(b"close_group")
        await close(client)
        assert proxied_api.proxy.replies_cut == 1
        assert await is_closed(client)


async def test_a_closed_group_says_so_in_its_events(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    await submit_to(api)
    await manual_worker.complete()
    await close(api)
    async with open_event_stream(api, "/events?group=g") as events:
        found = [await events.next_event() for _ in range(2)]
    assert [(event.name, event.data["closed"]) for event in found if event] == [
        *(("snapshot", True), ("done", True)),
    ]


async def test_a_damaged_key_of_a_closed_group_refuses_no_reading(
    api: httpx2.AsyncClient, server: redis.Redis
) -> None:
    await submit_to(api)
    server.set(keys.closed_group(QUEUE, "default", "g"), "x", ex=60)
    assert not await is_closed(api)
