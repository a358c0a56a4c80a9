"""Many event streams beside requests: the cost of a stream is bounded, and shared if possible."""

import asyncio
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import httpx2
import msgspec
import pytest
import redis

from asyncinfer.api.config import ApiConfig
from asyncinfer.api.live.position import Position, encode_position, split_position
from asyncinfer.repository import keys
from asyncinfer.repository.inspect.groups import Groups
from asyncinfer.repository.operations import Operations
from asyncinfer.repository.store import Store
from tests.faults.harness import eventually

from .harness import (
    QUEUE,
    ROW,
    ManualWorker,
    ProxiedApi,
    announce,
    client_of,
    hosted,
    running,
    submit,
)
from .sse import EventStream, open_event_stream

MANY_STREAMS = 200
MANY_JOBS = 5000
MAX_SECONDS = 5.0
"""Limit for one request. Without streams all requests together take less than 1 s; with 200
streams they took over 45 s."""


@pytest.fixture
async def port(config: ApiConfig, store: Store) -> AsyncIterator[int]:
    await announce(store, "iris", "digits", default="iris")
    async with hosted(running(config)) as port:
        yield port


@contextmanager
def unread_streams(port: int, count: int, path: str = "/events") -> Iterator[list[socket.socket]]:
    """Opens streams of a client that reads nothing."""
    streams = [socket.socket() for _ in range(count)]
    try:
        for stream in streams:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stream.connect(("127.0.0.1", port))
            stream.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        yield streams
    finally:
        for stream in streams:
            stream.close()


async def submit_many(client: httpx2.AsyncClient, count: int, path: str = "/predict") -> list[str]:
    """Submits jobs in one bulk request; their ids. Each must be accepted."""
    lines = msgspec.json.encode({"data": ROW}) + b"\n"
    reply = await client.post(
        path, content=lines * count, headers={"content-type": "application/x-ndjson"}
    )
    outcomes = [msgspec.json.decode(line) for line in reply.text.splitlines()]
    refused = Counter(
        outcome.get("code") for outcome in outcomes if outcome.get("status") != "pending"
    )
    assert not refused, f"{reply.status_code}: {refused}"
    assert len(outcomes) == count
    return [outcome["job_id"] for outcome in outcomes]


async def pending_jobs(stream: EventStream, count: int) -> list[str]:
    return [(await stream.wait_for_event("pending")).data["job_id"] for _ in range(count)]


async def max_seconds(client: httpx2.AsyncClient, rounds: int) -> float:
    """The longest time of a probe, a submit or a read."""
    longest = 0.0
    for _ in range(rounds):
        for method, path in (("GET", "/health/live"), ("GET", "/health/ready"), ("GET", "/queues")):
            began = time.monotonic()
            reply = await client.request(method, path)
            longest = max(longest, time.monotonic() - began)
            assert reply.status_code == 200, reply.text
        began = time.monotonic()
        await submit(client)
        longest = max(longest, time.monotonic() - began)
    return longest


@pytest.mark.soak
@pytest.mark.parametrize("path", ["/events", "/events?group=g"])
async def test_many_unread_streams_keep_no_request_from_being_answered(
    port: int, path: str
) -> None:
    async with client_of(port) as client:
        with unread_streams(port, MANY_STREAMS, path) as streams:
            for stream in streams:
                await asyncio.to_thread(stream.recv, 1)
            began = time.monotonic()
            for _ in range(3):
                await submit_many(client, MANY_JOBS, "/predict?group=g")
                assert await max_seconds(client, 5) < MAX_SECONDS
            assert time.monotonic() - began < 6 * MAX_SECONDS


@pytest.mark.soak
@pytest.mark.parametrize("path", ["/events", "/events?group=g"])
async def test_many_streams_that_are_read_get_every_event_while_requests_are_answered(
    port: int, path: str
) -> None:
    count, jobs = 20, 2000
    ready = asyncio.Semaphore(0)

    async def read(client: httpx2.AsyncClient) -> list[str]:
        async with open_event_stream(client, path) as stream:
            await stream.wait_for_event("snapshot")
            ready.release()
            return await pending_jobs(stream, jobs)

    async with client_of(port) as client, asyncio.TaskGroup() as group:
        reading = [group.create_task(read(client)) for _ in range(count)]
        for _ in reading:
            await ready.acquire()
        ids = await submit_many(client, jobs, "/predict?group=g")
        assert await max_seconds(client, 5) < MAX_SECONDS
    assert all(stream.result() == ids for stream in reading)


@pytest.mark.soak
async def test_a_stream_that_is_read_late_gets_every_event_once(port: int) -> None:
    """More changes than are kept in memory: the rest must come from the log."""
    async with client_of(port) as client, open_event_stream(client, "/events") as stream:
        await stream.wait_for_event("snapshot")
        ids = [job_id for _ in range(4) for job_id in await submit_many(client, 3000)]
        assert await pending_jobs(stream, len(ids)) == ids


@pytest.mark.soak
async def test_the_kernel_takes_little_for_a_client_that_does_not_read(port: int) -> None:
    """By default it buffers megabytes, which were read from Redis and encoded for no reader."""
    async with client_of(port) as client:
        with unread_streams(port, 1) as (stream,):
            await asyncio.to_thread(stream.recv, 1)
            await submit_many(client, 3000)
            async with open_event_stream(client, "/events") as other:
                await other.wait_for_event("snapshot")
                last = (await submit_many(client, 1))[0]
                assert await pending_jobs(other, 1) == [last]
            stream.setblocking(False)
            held = 0
            # Reads what the kernel has buffered: the server's event loop does not run meanwhile.
            while part := _received(stream):
                held += len(part)
            assert held < 500_000


def _received(stream: socket.socket) -> bytes:
    deadline = time.monotonic() + 0.2
    while time.monotonic() < deadline:
        try:
            return stream.recv(1 << 20)
        except BlockingIOError:
            continue
    return b""


async def test_streams_that_share_their_events_can_each_go_on_from_any_of_them(
    api: httpx2.AsyncClient, server: redis.Redis
) -> None:
    """The streams began at different times, so the ids of their events differ."""

    def now_ms() -> int:
        seconds, micros = server.time()
        return int(seconds * 1000 + micros // 1000)

    async with open_event_stream(api, "/events?group=g") as first:
        await first.wait_for_event("snapshot")
        began_ms = now_ms()
        await eventually(lambda: now_ms() > began_ms, "a millisecond has passed")
        async with open_event_stream(api, "/events?group=g") as second:
            await second.wait_for_event("snapshot")
            ids = await submit_many(api, 6, "/predict?group=g")
            seen = [
                [await stream.wait_for_event("pending") for _ in ids] for stream in (first, second)
            ]
    assert [[event.data["job_id"] for event in events] for events in seen] == [ids, ids]
    assert all(
        first_event.id != second_event.id for first_event, second_event in zip(*seen, strict=True)
    )
    for events in seen:
        async with open_event_stream(api, "/events?group=g", events[2].id) as stream:
            assert await pending_jobs(stream, 3) == ids[3:]


async def test_changes_that_the_log_lost_during_an_outage_are_a_gap_for_followers(
    proxied_api: ProxiedApi, manual_worker: ManualWorker, server: redis.Redis, store: Store
) -> None:
    async with client_of(proxied_api.port) as client:
        await submit_many(client, 3, "/predict?group=g")
        async with open_event_stream(client, "/events?group=g") as stream:
            await stream.wait_for_event("snapshot")
            await submit_many(client, 1, "/predict?group=g")
            await stream.wait_for_event("pending")
            await proxied_api.proxy.down()
            claim = await manual_worker.claim()
            await manual_worker.finish(claim)
            server.xtrim(keys.log(QUEUE), maxlen=1, approximate=False)
            await proxied_api.proxy.up()
            event = await stream.wait_for_event("gap", "processing", "completed", "done")
            assert event.name == "gap"
            assert (await stream.wait_for_event("snapshot")).data["counts"]["completed"] == 4


async def test_one_count_answers_all_clients_that_request_it_at_once(
    store: Store, server: redis.Redis
) -> None:
    groups = Groups(store, Operations(store))

    def lists_read() -> int:
        about = server.info("commandstats").get("cmdstat_lrange")
        return about["calls"] if about else 0

    before = lists_read()
    async with asyncio.TaskGroup() as group:
        counting = [group.create_task(groups.count("default", "g")) for _ in range(50)]
    assert [task.result() for task in counting] == [None] * 50
    assert lists_read() - before <= 2


@pytest.mark.parametrize(
    "acknowledged", [{QUEUE: (1_700_000_000_123, 4, 100)}, {"a": (1, 0, 0), "b": (2, 3, 4)}]
)
def test_the_part_of_an_id_after_the_base_does_not_depend_on_it(
    acknowledged: dict[str, tuple[int, int, int]],
) -> None:
    positions = [Position(base, acknowledged) for base in (1_700_000_000_000, 1_800_000_000_000)]
    parts = [split_position(position) for position in positions]
    assert parts[0][1] == parts[1][1]
    assert parts[0][0] != parts[1][0]
    assert [base + rest for base, rest in parts] == [
        encode_position(position) for position in positions
    ]
