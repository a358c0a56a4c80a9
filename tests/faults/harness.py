"""What every fault test ends with: the invariants of a queue at rest."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import redis

from asyncinfer.jobs import TERMINAL
from asyncinfer.repository import keys

_SIDE_TABLES = (
    keys.running,
    keys.leases,
    keys.facts,
    keys.deadlines,
    keys.delayed,
    keys.stale_entries,
    keys.bytes_waiting,
)


def assert_bounded(client: redis.Redis) -> None:
    """Every key of an ended job has a TTL; every job key belongs to a job with a status."""
    names = list(client.scan_iter("job:*", count=1000))
    pipeline = client.pipeline(transaction=False)
    for name in names:
        pipeline.ttl(name)
        pipeline.get(b"job:%b:status" % name[len("job:") : name.rindex(b":")])
    replies = pipeline.execute()
    for name, ttl, status in zip(names, replies[::2], replies[1::2], strict=True):
        ended = status is None or status.decode() in TERMINAL
        assert not (ended and ttl == -1), f"{name!r} of a job {status!r} has no TTL"
    for name in client.scan_iter("{*}:group:*", count=1000):
        assert client.ttl(name) != -1, f"the group {name!r} has no TTL"


def assert_at_rest(client: redis.Redis, *queues: str) -> None:
    """Nothing waits, nothing runs, no side table remembers anything, no worker is connected."""
    for queue in queues:
        for waiting in keys.waiting(queue):
            assert client.llen(waiting) == 0, f"{waiting} holds {client.lrange(waiting, 0, 5)}"
        for name in _SIDE_TABLES:
            key = name(queue)
            assert not client.exists(key) or client.get(key) == b"0", f"{key} is not empty"
        claims = list(client.scan_iter(keys.claim(queue, "*"), count=1000))
        assert not claims, f"claims are left: {claims[:5]}"
    assert_bounded(client)
    eventually_sync(lambda: not _worker_connections(client), "the workers' connections are gone")


def _worker_connections(client: redis.Redis) -> list[str]:
    listed: list[dict[str, str]] = client.client_list()
    return [one["name"] for one in listed if one["name"].startswith("asyncinfer-worker")]


async def eventually(
    condition: Callable[[], bool | Awaitable[bool]], what: str, seconds: float = 30.0
) -> None:
    """Waits until `condition` holds; fails the test, naming `what`, when it does not."""
    deadline = time.monotonic() + seconds
    while True:
        holds = condition()
        if isinstance(holds, Awaitable):
            holds = await holds
        if holds:
            return
        assert time.monotonic() < deadline, f"still not after {seconds} s: {what}"
        await asyncio.sleep(0.005)


def eventually_sync(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    """`eventually` for tests without a loop."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not after {seconds} s: {what}"
        time.sleep(0.005)
