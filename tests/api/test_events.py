"""Event streams of jobs, groups and models: no change is missed or sent twice."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import msgspec
import pytest
import redis

from asyncinfer.api.config import ApiConfig
from asyncinfer.jobs import TERMINAL
from asyncinfer.repository import keys
from asyncinfer.repository.store import Store
from tests.faults.harness import eventually

from .harness import (
    QUEUE,
    ROW,
    ManualWorker,
    ProxiedApi,
    announce,
    assert_problem,
    client_of,
    hosted,
    raw_exchange,
    running,
    running_until_signal,
    submit,
)
from .sse import EventStream, open_event_stream

DIGITS = f"{QUEUE}:digits"
DIGITS_ROW = [[0.0] * 64]


async def submit_to(client: httpx2.AsyncClient, model: str, **options: Any) -> str:
    row = ROW if model == "iris" else DIGITS_ROW
    reply = await client.post(f"/predict/{model}", json={"data": row, "options": options})
    assert reply.status_code == 202, reply.text
    return str(reply.json()["job_id"])


async def next_change(listener: EventStream, *names: str) -> tuple[str, str]:
    event = await listener.wait_for_event(*names)
    assert event.name in (event.data["status"], "snapshot")
    return event.data["job_id"], event.name


# --- one job ---------------------------------------------------------------------------------


async def test_a_job_is_streamed_from_its_current_status_to_its_end(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    job_id = await submit(api)
    async with open_event_stream(api, f"/job/{job_id}/events") as stream:
        first = await stream.wait_for_event()
        assert (first.name, first.data["status"]) == ("snapshot", "pending")
        claim = await manual_worker.claim()
        assert await next_change(stream) == (job_id, "processing")
        await manual_worker.finish(claim)
        last = await stream.wait_for_event()
        assert (last.name, last.data["job_id"]) == ("completed", job_id)
        assert "result" not in last.data
        assert last.data["sha256"] == "a" * 64
        assert await stream.remaining_events() == []


async def test_an_ended_jobs_stream_is_its_snapshot_its_end_and_nothing_more(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    job_id = await submit(api)
    await manual_worker.fail()
    async with open_event_stream(api, f"/job/{job_id}/events") as stream:
        events = await stream.remaining_events()
    assert [event.name for event in events] == ["snapshot", "failed"]
    assert events[0].data == events[1].data
    assert events[1].data["error"]["code"] == "model_failed"


async def test_a_stream_over_http_1_0_has_no_chunks_and_ends_with_its_connection(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    job_id = await submit(api)
    await manual_worker.fail()
    request = f"GET /job/{job_id}/events HTTP/1.0\r\nHost: localhost\r\n\r\n".encode()
    assert api.base_url.port
    head, _, body = (await raw_exchange(api.base_url.port, request)).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    assert body.count(b"event: ") == 2
    assert b"\r\n" not in body, "the size of a chunk"


async def test_a_client_that_saw_the_end_and_reconnects_gets_a_204(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    job_id = await submit(api)
    path = f"/job/{job_id}/events"
    async with open_event_stream(api, path) as stream:
        first = await stream.wait_for_event()
        await manual_worker.fail()
        await stream.remaining_events()
    end_id = stream.last_id
    for again in (
        await api.get(path, headers={"last-event-id": stream.last_id}),
        await api.get(path, params={"last_event_id": stream.last_id}),
        # An EventSource that reconnects sends the header beside the query it began with.
        await api.get(
            path, params={"last_event_id": first.id}, headers={"last-event-id": stream.last_id}
        ),
    ):
        assert (again.status_code, again.content) == (204, b"")
        assert "content-length" not in again.headers
    await api.post(f"/job/{job_id}/retry")
    async with open_event_stream(api, path, stream.last_id) as stream:
        retried = await stream.wait_for_event()
        assert (retried.name, retried.data["round"]) == ("pending", 2)
        await manual_worker.complete()
        assert [event.name for event in await stream.remaining_events()] == [
            "processing",
            "completed",
        ]
    async with open_event_stream(api, path, end_id) as stream:
        names = [event.name for event in await stream.remaining_events()]
    assert names == ["pending", "processing", "completed"]


async def test_a_client_that_left_after_a_snapshot_of_the_ended_job_still_gets_its_end(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    job_id = await submit(api)
    await manual_worker.complete()
    async with open_event_stream(api, f"/job/{job_id}/events") as stream:
        snapshot = await stream.wait_for_event("snapshot")
    async with open_event_stream(api, f"/job/{job_id}/events", snapshot.id) as stream:
        assert [event.name for event in await stream.remaining_events()] == ["completed"]


async def test_a_cancelled_job_says_so(api: httpx2.AsyncClient) -> None:
    job_id = await submit(api)
    async with open_event_stream(api, f"/job/{job_id}/events") as stream:
        await stream.wait_for_event("snapshot")
        assert (await api.delete(f"/job/{job_id}")).status_code == 200
        assert [event.name for event in await stream.remaining_events()] == ["cancelled"]


async def test_an_external_job_can_be_followed(
    api: httpx2.AsyncClient, server: redis.Redis, manual_worker: ManualWorker
) -> None:
    server.set("job:x:data", "[[1,2,3,4]]")
    server.set("job:x:status", "pending")
    async with open_event_stream(api, "/job/x/events") as stream:
        await stream.wait_for_event("snapshot")
        server.lpush(QUEUE, "x")
        await manual_worker.complete()
        assert [event.name for event in await stream.remaining_events()] == [
            "processing",
            "completed",
        ]


async def test_an_unknown_job_has_no_events(api: httpx2.AsyncClient) -> None:
    assert_problem(await api.get("/job/nothing/events"), 404, "job_not_found")


async def test_an_invalid_last_event_id_is_refused(
    api: httpx2.AsyncClient, subtests: pytest.Subtests
) -> None:
    for wrong in ("x", "gw", "%%%", "k8Abcd", "kwCBoXgB"):
        with subtests.test(wrong):
            reply = await api.get("/events", headers={"last-event-id": wrong})
            assert "snapshot" in assert_problem(reply, 400, "invalid_query")["detail"]


async def test_the_head_of_a_stream_is_its_headers(api: httpx2.AsyncClient) -> None:
    reply = await api.head("/events")
    assert (reply.status_code, reply.headers["content-type"]) == (200, "text/event-stream")


# --- many jobs -------------------------------------------------------------------------------


async def test_a_group_is_streamed_from_its_counts_until_all_have_ended(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    first = await submit_to(api, "iris", group="g")
    await submit_to(api, "iris", group="other")
    async with open_event_stream(api, "/events?group=g") as stream:
        snapshot = await stream.wait_for_event()
        assert (snapshot.name, snapshot.data["jobs"]) == ("snapshot", 1)
        assert snapshot.data["counts"]["pending"] == 1
        second = await submit_to(api, "digits", group="g")
        assert await next_change(stream) == (second, "pending")
        await manual_worker.complete()
        await manual_worker.fail(DIGITS)
        names = {first: ["processing", "completed"], second: ["processing", "failed"]}
        seen: dict[str, list[str]] = {first: [], second: []}
        while seen != names:
            job_id, name = await next_change(stream, *TERMINAL, "processing")
            seen[job_id].append(name)
        done = await stream.wait_for_event("done")
        assert done.data == (await api.get("/group/g")).json()
        assert (done.data["progress"], done.data["eta_seconds"]) == (1.0, 0.0)


async def test_a_groups_progress_is_sent_while_its_jobs_run(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    async with open_event_stream(api, "/events?group=g") as stream:
        assert (await stream.wait_for_event("snapshot")).data["jobs"] == 0
        await submit_to(api, "iris", group="g")
        await submit_to(api, "digits", group="g")
        await manual_worker.complete()
        while (progress := await stream.wait_for_event("progress")).data["progress"] < 0.5:
            pass
        assert progress.data["counts"]["completed"] == 1
        assert progress.data["eta_seconds"] is None, "no worker has the models"
        await manual_worker.complete(DIGITS)
        assert (await stream.wait_for_event("done")).data["counts"]["completed"] == 2


async def test_a_group_that_has_ended_is_done_at_once_and_again_after_a_retry(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    job_id = await submit_to(api, "iris", group="g")
    await manual_worker.fail()
    async with open_event_stream(api, "/events?group=g") as stream:
        assert [(await stream.wait_for_event()).name for _ in range(2)] == ["snapshot", "done"]
    await api.post(f"/job/{job_id}/retry")
    async with open_event_stream(api, "/events?group=g", stream.last_id) as stream:
        assert await next_change(stream) == (job_id, "pending")
        await manual_worker.complete()
        events = [await stream.wait_for_event("processing", "completed", "done") for _ in range(3)]
        assert [event.name for event in events] == ["processing", "completed", "done"]


async def test_the_first_job_of_a_model_is_streamed_too(
    api: httpx2.AsyncClient, store: Store, server: redis.Redis
) -> None:
    await submit_to(api, "iris", group="g")
    async with open_event_stream(api, "/events?group=g") as stream:
        await stream.wait_for_event("snapshot")
        assert not server.exists(keys.log(DIGITS))
        job_id = await submit_to(api, "digits", group="g")
        assert await next_change(stream, "pending") == (job_id, "pending")


async def test_a_models_stream_begins_with_its_newest_jobs(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    ids = [await submit_to(api, "digits", priority="high") for _ in range(2)]
    async with open_event_stream(api, "/events?model=digits") as stream:
        snapshot = await stream.wait_for_event()
        assert [job["job_id"] for job in snapshot.data["jobs"]] == ids[::-1]
        assert {job["priority"] for job in snapshot.data["jobs"]} == {"high"}
        await submit_to(api, "iris")
        await manual_worker.complete()
        await manual_worker.complete(DIGITS)
        seen = [await next_change(stream) for _ in range(4)]
        assert set(seen[:2]) == {(job_id, "processing") for job_id in ids}
        assert set(seen[2:]) == {(job_id, "completed") for job_id in ids}
    assert_problem(await api.get("/events?model=nothing"), 404, "model_not_found")


async def test_each_tenant_gets_events_of_its_own_jobs_only(
    two_tenant_port: int, manual_worker: ManualWorker
) -> None:
    alice, bob = [client_of(two_tenant_port, **{"x-api-key": name}) for name in ("alice", "bob")]
    async with alice, bob:
        theirs = await submit_to(alice, "iris", group="g")
        async with (
            open_event_stream(bob, "/events?group=g") as stream,
            open_event_stream(bob, "/events") as all_,
        ):
            assert (await stream.wait_for_event("snapshot")).data["jobs"] == 0
            assert (await all_.wait_for_event("snapshot")).data["jobs"] == []
            await manual_worker.complete()
            await submit_to(alice, "iris", group="g")
            mine = await submit_to(bob, "iris", group="g")
            assert await next_change(stream, "pending", "processing", "completed") == (
                mine,
                "pending",
            )
            assert await next_change(all_) == (mine, "pending")
        assert_problem(await bob.get(f"/job/{theirs}/events"), 404, "job_not_found")


# --- continuing at a position ----------------------------------------------------------------


@pytest.fixture
async def replicas(config: ApiConfig, store: Store) -> AsyncIterator[list[httpx2.AsyncClient]]:
    """Clients of two APIs."""
    await announce(store, "iris", "digits", default="iris")
    async with (
        hosted(running(config)) as first_port,
        hosted(running(config)) as second_port,
        client_of(first_port) as first,
        client_of(second_port) as second,
    ):
        yield [first, second]


async def test_a_stream_continues_at_another_server_in_the_middle_of_a_log_entry(
    replicas: list[httpx2.AsyncClient], manual_worker: ManualWorker
) -> None:
    first, second = replicas
    ids = [await submit_to(first, "iris", group="g") for _ in range(5)]
    claim = await manual_worker.claim()
    async with open_event_stream(first, "/events?group=g") as stream:
        await stream.wait_for_event("snapshot")
        await manual_worker.finish(claim)
        seen = [(await stream.wait_for_event("completed")).data["job_id"] for _ in range(2)]
        last_id = stream.last_id
    async with open_event_stream(second, "/events?group=g", last_id) as stream:
        seen += [(await stream.wait_for_event("completed")).data["job_id"] for _ in range(3)]
        assert (await stream.wait_for_event("completed", "snapshot", "gap", "done")).name == "done"
    assert sorted(seen) == sorted(ids)


async def test_changes_that_the_log_no_longer_has_become_a_gap_and_a_snapshot(
    api: httpx2.AsyncClient, manual_worker: ManualWorker, server: redis.Redis
) -> None:
    job_id = await submit_to(api, "iris", group="g")
    paths = ("/events?group=g", f"/job/{job_id}/events")
    cursors = []
    for path in paths:
        async with open_event_stream(api, path) as stream:
            cursors.append((await stream.wait_for_event("snapshot")).id)
    claim = await manual_worker.claim()
    for _ in range(3):
        await submit(api)
    server.xtrim(keys.log(QUEUE), maxlen=1, approximate=False)
    for path, cursor in zip(paths, cursors, strict=True):
        async with open_event_stream(api, path, cursor) as stream:
            assert [(await stream.wait_for_event()).name for _ in range(2)] == ["gap", "snapshot"]
    async with open_event_stream(api, paths[1], cursors[1]) as stream:
        await stream.wait_for_event("snapshot")
        await manual_worker.finish(claim)
        assert [event.name for event in await stream.remaining_events()] == ["completed"]


async def _all_come_to_an_end(
    chance: random.Random,
    replicas: list[httpx2.AsyncClient],
    manual_worker: ManualWorker,
    total: int,
) -> dict[str, str]:
    """Submits and ends jobs of two models in one group; returns how each ended."""
    waiting: dict[str, list[str]] = {QUEUE: [], DIGITS: []}
    ends: dict[str, str] = {}
    while len(ends) < total:
        made = len(ends) + sum(map(len, waiting.values()))
        for _ in range(min(chance.randint(0, 8), total - made)):
            queue = chance.choice([QUEUE, DIGITS])
            model = "iris" if queue == QUEUE else "digits"
            client = chance.choice(replicas)
            waiting[queue].append(await submit_to(client, model, group="g"))
        queue = chance.choice([QUEUE, DIGITS])
        if not waiting[queue]:
            continue
        if chance.random() < 0.2:
            gone = waiting[queue].pop(chance.randrange(len(waiting[queue])))
            await chance.choice(replicas).delete(f"/job/{gone}")
            ends[gone] = "cancelled"
            continue
        good = chance.random() < 0.5
        await (manual_worker.complete(queue) if good else manual_worker.fail(queue))
        ends |= dict.fromkeys(waiting[queue], "completed" if good else "failed")
        waiting[queue].clear()
    return ends


async def test_a_client_that_reconnects_often_sees_every_end_once(
    replicas: list[httpx2.AsyncClient], manual_worker: ManualWorker
) -> None:
    chance = random.Random(11)
    total = 60
    seen: Counter[tuple[str, str]] = Counter()

    async def watch() -> None:
        last_id = ""
        while True:
            path = "/events?group=g"
            async with open_event_stream(chance.choice(replicas), path, last_id) as stream:
                for _ in range(chance.randint(1, 25)):
                    event = await stream.wait_for_event()
                    assert event.name != "gap"
                    assert event.name != "snapshot" or not last_id
                    last_id = stream.last_id
                    if event.name in TERMINAL:
                        seen[event.data["job_id"], event.name] += 1
                    if event.name == "done" and event.data["jobs"] == total:
                        return

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        watching = group.create_task(watch())
        await eventually(lambda: not watching.done(), "the watcher is connected")
        ends = await _all_come_to_an_end(chance, replicas, manual_worker, total)
    # A snapshot counts the jobs that ended before it; the first watch began before any job.
    assert seen == Counter(ends.items())


# --- limits and ends -------------------------------------------------------------------------


async def test_a_silent_stream_sends_comments(config: ApiConfig, store: Store) -> None:
    await announce(store, "iris", default="iris")
    brisk = msgspec.structs.replace(config, heartbeat_seconds=0.02)
    async with running(brisk) as port, client_of(port) as client:
        job_id = await submit(client)
        async with open_event_stream(client, f"/job/{job_id}/events") as stream:
            await stream.wait_for_event("snapshot")
            for _ in range(3):
                await stream.wait_for_comment()


@pytest.mark.parametrize("path", ["/events", "/events?group=g", "/job/JOB/events"])
async def test_a_disconnected_client_frees_its_place_and_no_stream_exceeds_the_limit(
    config: ApiConfig, store: Store, path: str
) -> None:
    await announce(store, "iris", default="iris")
    small = msgspec.structs.replace(config, max_streams=1)
    async with running(small) as port, client_of(port) as client:
        path = path.replace("JOB", await submit(client))
        async with open_event_stream(client, path) as stream:
            await stream.wait_for_event("snapshot")
            reply = await client.get("/events")
            assert_problem(reply, 503, "too_many_streams")
            assert int(reply.headers["retry-after"]) > 0
            assert (await client.get("/jobs")).status_code == 200
        await eventually(lambda: _is_taken(client), "its place in the limit is free")


async def _is_taken(client: httpx2.AsyncClient) -> bool:
    # HEAD is answered as GET would be, and does not count as a stream.
    return (await client.head("/events")).status_code == 200


async def test_streams_end_with_the_server(config: ApiConfig, store: Store) -> None:
    await announce(store, "iris", default="iris")
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        async with hosted(running_until_signal(config)) as port:
            client = client_of(port)
            job_id = await submit(client)
            streams = []
            for path in ("/events", "/events?group=g", f"/job/{job_id}/events"):
                snapshot = asyncio.Event()
                streams.append(group.create_task(_listen_to_the_end(client, path, snapshot)))
                await snapshot.wait()
        for stream in streams:
            assert await stream == []
        await client.aclose()


async def _listen_to_the_end(
    client: httpx2.AsyncClient, path: str, snapshot: asyncio.Event
) -> list[Any]:
    async with open_event_stream(client, path) as stream:
        await stream.wait_for_event("snapshot")
        snapshot.set()
        return await stream.remaining_events()


async def test_a_stream_outlives_an_outage_and_misses_nothing(
    proxied_api: ProxiedApi, manual_worker: ManualWorker
) -> None:
    async with client_of(proxied_api.port) as client:
        ids = [await submit_to(client, "iris", group="g") for _ in range(2)]
        async with (
            open_event_stream(client, f"/job/{ids[0]}/events") as job_stream,
            open_event_stream(client, "/events?group=g") as group,
        ):
            await job_stream.wait_for_event("snapshot")
            await group.wait_for_event("snapshot")
            await proxied_api.proxy.down()
            assert_problem(await client.get("/events"), 503, "redis_unavailable")
            await manual_worker.complete()
            await proxied_api.proxy.up()
            assert [event.name for event in await job_stream.remaining_events()] == [
                "processing",
                "completed",
            ]
            seen = [await next_change(group, "processing", "completed") for _ in range(4)]
            assert set(seen[2:]) == {(job_id, "completed") for job_id in ids}
            await group.wait_for_event("done")
