"""Assertions that a queue is bounded and at rest, and functions that wait for a condition."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, Self

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
    """Asserts that every key of an ended job, or of a job without a status, has a TTL."""
    names = list(client.scan_iter("job:*", count=1000))
    pipeline = client.pipeline(transaction=False)
    for name in names:
        pipeline.ttl(name)
        pipeline.get(b"job:%b:status" % name[len("job:") : name.rindex(b":")])
    replies = pipeline.execute()
    for name, ttl, status in zip(names, replies[::2], replies[1::2], strict=True):
        ended = status is None or status.decode() in TERMINAL
        assert not (ended and ttl == -1), f"{name!r} of a job {status!r} has no TTL"
    for pattern in ("{*}:group:*", "{*}:closed:*"):
        for name in client.scan_iter(pattern, count=1000):
            assert client.ttl(name) != -1, f"the group {name!r} has no TTL"


def assert_at_rest(client: redis.Redis, *queues: str) -> None:
    """Asserts that no job waits or runs, side tables are empty, and no worker is connected."""
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
    return [
        connection["name"]
        for connection in listed
        if connection["name"].startswith("asyncinfer-worker")
    ]


def waiting_workers(client: redis.Redis) -> int:
    """How many workers wait on the doorbell, as far as the server knows."""
    listed: list[dict[str, str]] = client.client_list()
    return sum(connection["cmd"] == "brpop" for connection in listed)


async def eventually(
    condition: Callable[[], bool | Awaitable[bool]], description: str, seconds: float = 30.0
) -> None:
    """Waits until `condition` returns true; fails the test with `description` after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        holds = condition()
        if isinstance(holds, Awaitable):
            holds = await holds
        if holds:
            return
        assert time.monotonic() < deadline, f"still not after {seconds} s: {description}"
        await asyncio.sleep(0.005)


async def stop_listening(server: asyncio.Server) -> None:
    """Closes a server's listeners. Connections that it has just accepted get their protocols before
    that: `close` alone makes asyncio drop them without closing them, and the garbage collector then
    warns in some later test."""
    loop = asyncio.get_running_loop()
    for listener in server.sockets:
        loop.remove_reader(listener.fileno())
    for _ in range(5):
        await asyncio.sleep(0)
    server.close()


def eventually_sync(condition: Callable[[], bool], description: str, seconds: float = 30.0) -> None:
    """`eventually` for tests without an event loop."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not after {seconds} s: {description}"
        time.sleep(0.005)


class Halts:
    """Measures in a block how long the machine keeps this process from running. A time that is
    promised on a free machine is then bounded by it and `seconds`."""

    _TICK_SECONDS: Final = 0.01

    def __init__(self) -> None:
        self.seconds = 0.0
        """The sum of all halts; complete at the end of the block."""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        last = time.monotonic()
        while True:
            has_ended = self._end.wait(self._TICK_SECONDS)
            now = time.monotonic()
            late_seconds = now - last - self._TICK_SECONDS
            # Another thread of a process that runs may delay this one by 5 ms.
            if late_seconds > self._TICK_SECONDS:
                self.seconds += late_seconds
            if has_ended:
                return
            last = now


def wait_for_next_millisecond() -> None:
    """Returns when the clock shows another millisecond, the unit in which Redis orders what ends
    and what is logged."""
    began = time.time_ns() // 1_000_000
    while time.time_ns() // 1_000_000 == began:
        pass


def is_renewed(client: redis.Redis, queue: str) -> Callable[[], bool]:
    """A condition: the lease of the queue's only claim has been renewed since this call."""

    def lease_end() -> float:
        leases: Any = client.zrange(keys.leases(queue), 0, -1, withscores=True)
        return float(leases[0][1])

    before = lease_end()
    return lambda: lease_end() > before
