"""Groups over HTTP: their jobs are counted, listed and cancelled together."""

from typing import Any

import httpx2
import redis

from asyncinfer.repository import keys

from .harness import QUEUE, ROW, ManualWorker, assert_problem, client_of


async def submit_to(
    client: httpx2.AsyncClient, group: str, model: str = "iris", **more: Any
) -> str:
    data = ROW if model == "iris" else [[1.0] * 64]
    body = {"data": data, "options": {"group": group}}
    reply = await client.post(f"/predict/{model}", json=body, **more)
    assert reply.status_code == 202, reply.text
    job_id: str = reply.json()["job_id"]
    return job_id


async def counts(client: httpx2.AsyncClient, group: str) -> dict[str, int]:
    """The group's counts that are not zero."""
    reply = await client.get(f"/group/{group}")
    assert reply.status_code == 200, reply.text
    return {name: count for name, count in reply.json()["counts"].items() if count}


async def test_a_group_counts_the_jobs_of_all_its_models(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    await submit_to(api, "night:1")
    await manual_worker.complete()
    failed = await submit_to(api, "night:1")
    await manual_worker.fail()
    await submit_to(api, "night:1")
    running_claim = await manual_worker.claim()
    await submit_to(api, "night:1", "digits")
    await submit_to(api, "another")

    group = (await api.get("/group/night:1")).json()

    assert await counts(api, "night:1") == {
        "completed": 1,
        "failed": 1,
        "processing": 1,
        "pending": 1,
    }
    assert (group["jobs"], group["progress"]) == (4, 0.5)
    assert group["first_failed"] == [failed]
    assert group["eta_seconds"] is None, "no worker has the model of the one that waits"
    assert await counts(api, "another") == {"pending": 1}
    await manual_worker.finish(running_claim)


async def test_a_group_that_has_ended_says_so(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    await submit_to(api, "g")
    assert (await api.get("/group/g")).json()["eta_seconds"] is None
    await manual_worker.complete()
    group = (await api.get("/group/g")).json()
    assert (group["progress"], group["eta_seconds"]) == (1.0, 0.0)


async def test_a_job_that_is_no_longer_kept_counts_as_ended(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    job_id = await submit_to(api, "g")
    await manual_worker.complete()
    assert (await api.delete(f"/job/{job_id}?purge=true")).status_code == 200
    group = (await api.get("/group/g")).json()
    assert (group["jobs"], group["counts"]["expired"], group["progress"]) == (1, 1, 1.0)


async def test_a_submit_that_is_sent_again_joins_its_group_once(api: httpx2.AsyncClient) -> None:
    key = {"Idempotency-Key": "k"}
    ids = {await submit_to(api, "g", headers=key) for _ in range(3)}
    assert len(ids) == 1
    assert await counts(api, "g") == {"pending": 1}


async def test_a_group_may_be_named_in_the_query(api: httpx2.AsyncClient) -> None:
    reply = await api.post("/predict?group=q", json={"data": ROW})
    assert reply.status_code == 202
    assert await counts(api, "q") == {"pending": 1}
    assert (await api.get(f"/job/{reply.json()['job_id']}")).json()["group"] == "q"


async def test_an_invalid_group_name_is_refused_by_a_submit(api: httpx2.AsyncClient) -> None:
    body = {"data": ROW, "options": {"group": "a b"}}
    problem = assert_problem(await api.post("/predict", json=body), 422, "invalid_input")
    assert problem["errors"][0]["pointer"] == "/options/group"
    for name in ("none", "a%20b", "x" * 200):
        assert_problem(await api.get(f"/group/{name}"), 404, "group_not_found")
        assert_problem(await api.delete(f"/group/{name}"), 404, "group_not_found")


async def test_cancelling_a_group_ends_waiting_jobs_and_stops_running_ones(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    done = await submit_to(api, "g")
    await manual_worker.complete()
    await submit_to(api, "g")
    claim = await manual_worker.claim()
    waiting = [await submit_to(api, "g") for _ in range(30)]
    waiting += [await submit_to(api, "g", "digits")]
    bystander = await submit_to(api, "h")

    reply = (await api.delete("/group/g")).json()

    assert reply == {"group": "g", "cancelled": 31, "stopping": 1}
    await manual_worker.finish(claim)
    assert await counts(api, "g") == {"completed": 1, "cancelled": 32}
    assert (await api.get(f"/job/{done}")).json()["status"] == "completed"
    assert (await api.get(f"/job/{bystander}")).json()["status"] == "pending"
    assert len(waiting) == 31


async def test_a_groups_jobs_are_listed_newest_first_page_by_page(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    ids = [await submit_to(api, "g") for _ in range(7)]
    await submit_to(api, "h")
    listed: list[str] = []
    cursor = ""
    while True:
        page = (await api.get(f"/jobs?group=g&limit=3{cursor}")).json()
        listed += [job["job_id"] for job in page["jobs"]]
        if page["cursor"] is None:
            break
        cursor = f"&cursor={page['cursor']}"
    assert listed == ids[::-1]
    await manual_worker.complete()
    await submit_to(api, "g")
    assert len((await api.get("/jobs?group=g&status=completed")).json()["jobs"]) == 7
    assert len((await api.get("/jobs?group=g&model=digits")).json()["jobs"]) == 0


async def test_a_group_is_visible_to_its_tenant_only(two_tenant_port: int) -> None:
    alice, bob = [client_of(two_tenant_port, **{"x-api-key": name}) for name in ("alice", "bob")]
    async with alice, bob:
        job_id = await submit_to(alice, "g")
        assert_problem(await bob.get("/group/g"), 404, "group_not_found")
        assert_problem(await bob.delete("/group/g"), 404, "group_not_found")
        await submit_to(bob, "g")
        await bob.delete("/group/g")
        assert await counts(bob, "g") == {"cancelled": 1}
        assert await counts(alice, "g") == {"pending": 1}
        assert (await alice.get(f"/job/{job_id}")).json()["status"] == "pending"


async def test_a_group_is_forgotten_a_week_after_its_last_submit(
    api: httpx2.AsyncClient, server: redis.Redis
) -> None:
    await submit_to(api, "g")
    left: Any = server.ttl(keys.group(QUEUE, "default", "g"))
    assert 7 * 86_400 - 60 < left <= 7 * 86_400
