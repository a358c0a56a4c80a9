"""The two loads of a bench, and a look at each side meanwhile."""

import asyncio
import itertools
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import mean, median
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from asyncinfer.cli.api_client import Service, by_rows, part
from asyncinfer.cli.bench.http_load import Connection
from asyncinfer.cli.bench.verdict import Bench, Load, Sides, latency, verdict
from asyncinfer.cli.options import Server
from asyncinfer.client import CannotSend, ConnectionFailed, Forbidden, Model
from asyncinfer.schemas.operations import Queue, QueueList, WorkerList
from asyncinfer.schemas.responses import Cleared

_FULL: Final = 429
_LOOK_SECONDS: Final = 0.25
_WAIT: Final = "prefer: wait=30\r\n"


class _Taken(Struct):
    """What one load's connections saw together."""

    seconds: list[float] = []
    full: int = 0
    errors: int = 0
    cpu: float = 0.0


class _Seen(Struct):
    """What was seen of the sides meanwhile, in seconds."""

    live: list[float] = []
    ready: list[float] = []
    busy: list[float] = []


def measure(server: Server, name: str | None, seconds: float, connections: int) -> Bench:
    """Raises what stops it; whatever it made is cancelled and deleted."""
    with Service(server) as service:
        model = service.client.model(name)
        group = f"bench-{uuid.uuid4().hex[:12]}"
        path = f"/predict/{part(model.model)}"
        body = _body(model, group)
        try:
            load = _Loads(server, service, path, body, connections)
            return asyncio.run(load.run(model, seconds))
        except (OSError, EOFError) as error:
            raise ConnectionFailed(
                f"A connection to {server.url} was cut while it was under load ({error})."
            ) from error
        finally:
            _clean_up(service, group)


def _body(model: Model, group: str) -> bytes:
    shown = model.shown_example
    if not isinstance(shown, dict):
        raise CannotSend(
            f"The server knows no example of {model.model}: give its model.toml an `example`."
        )
    return msgspec.json.encode({**shown, "options": {"group": group}})


def _clean_up(service: Service, group: str) -> None:
    queries: tuple[dict[str, Any], ...] = ({}, {"purge": True, "status": "ended"})
    for query in queries:
        more = True
        while more:
            done = service.ask_as(Cleared, "DELETE", "/jobs", group=group, **query)
            more = done.more and done.cancelled + done.stopping + done.purged > 0


class _Loads:
    def __init__(
        self, server: Server, service: Service, path: str, body: bytes, connections: int
    ) -> None:
        self._server = server
        self._service = service
        self._path = path
        self._body = body
        self._connections = connections

    async def run(self, model: Model, seconds: float) -> Bench:
        seen = _Seen()
        machine = _Machine(self._server.url)
        async with asyncio.TaskGroup() as group:
            looking = group.create_task(self._look(model.model, seen))
            waits, cpu = await self._load(seconds, _WAIT)
            looking.cancel()
        machine_cpu = machine.busy()
        queue = self._queue(model.model)
        submits, _ = await self._load(seconds, "")
        sides = self._sides(seen, cpu, machine_cpu, queue)
        return Bench(
            model=model.model,
            connections=self._connections,
            waits=waits,
            submits=submits,
            sides=sides,
            verdict=verdict(waits, sides, self._connections),
        )

    # --- load ----------------------------------------------------------------------------

    async def _load(self, seconds: float, headers: str) -> tuple[Load, float]:
        """And how much of a core it took here."""
        taken = _Taken()
        started, cpu = time.perf_counter(), time.process_time()
        until = started + seconds
        async with asyncio.TaskGroup() as group:
            for _ in range(self._connections):
                group.create_task(self._connection(until, headers, taken))
        took = time.perf_counter() - started
        load = Load(
            requests=len(taken.seconds),
            per_second=round(len(taken.seconds) / took, 1),
            latency_ms=latency(taken.seconds),
            refused_full=taken.full,
            errors=taken.errors,
            seconds=round(took, 3),
        )
        return load, (time.process_time() - cpu) / took

    async def _connection(self, until: float, headers: str, taken: _Taken) -> None:
        async with Connection.open(self._server.url, self._server.api_key) as connection:
            request = connection.prepared("POST", self._path, self._body, headers)
            while (sent := time.perf_counter()) < until:
                status = await connection.exchange(request)
                if status in (200, 202):
                    taken.seconds.append(time.perf_counter() - sent)
                elif status == _FULL:
                    taken.full += 1
                    await asyncio.sleep(_LOOK_SECONDS)  # as it asks for
                else:
                    taken.errors += 1

    # --- the sides -----------------------------------------------------------------------

    async def _look(self, model: str, seen: _Seen) -> None:
        async with Connection.open(self._server.url, self._server.api_key) as connection:
            live = connection.prepared("GET", "/health/live")
            ready = connection.prepared("GET", "/health/ready")
            for turn in itertools.count():
                seen.live.append(await _timed(connection.exchange, live))
                seen.ready.append(await _timed(connection.exchange, ready))
                if turn % 4 == 3:
                    await asyncio.to_thread(self._look_at_workers, model, seen)
                await asyncio.sleep(_LOOK_SECONDS)

    def _look_at_workers(self, model: str, seen: _Seen) -> None:
        """How busy they are; a key without the scope `admin` is not told."""
        try:
            found = self._service.ask_as(WorkerList, "GET", "/workers").workers
        except Forbidden:
            return
        ours = [one for one in found if model in one.models and one.busy is not None]
        if slots := sum(one.slots for one in ours):
            seen.busy.append(sum(one.busy or 0 for one in ours) / slots)

    def _queue(self, model: str) -> Queue | None:
        found = self._service.ask_as(QueueList, "GET", "/queues").queues
        return next((one for one in found if one.model == model), None)

    def _sides(
        self, seen: _Seen, cpu: float, machine_cpu: float | None, queue: Queue | None
    ) -> Sides:
        now = self._service.client.model(queue.model if queue else None)
        live = median(seen.live or [0.0])
        waited = queue.wait_seconds if queue else None
        ran = queue.run_seconds if queue else None
        return Sides(
            client_cpu=round(cpu, 3),
            machine_cpu=machine_cpu,
            api_ms=round(1000 * live, 3),
            redis_ms=round(max(0.0, 1000 * (median(seen.ready or [0.0]) - live)), 3),
            queue_ms=round(1000 * waited.p50, 3) if waited else None,
            run_ms=round(1000 * ran.p50, 3) if ran else None,
            slots_busy=round(mean(seen.busy), 3) if seen.busy else None,
            workers=queue.workers if queue else 0,
            slots=queue.slots if queue else 0,
            batched=now.batched,
            run_times=_run_times(now),
        )


class _Machine:
    """How busy all cores were since it was made, where the service runs on them too."""

    def __init__(self, url: str) -> None:
        self._is_here = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
        self._before = _jiffies()

    def busy(self) -> float | None:
        """None where that cannot be told."""
        after = _jiffies()
        if not (self._is_here and self._before and after):
            return None
        idle, whole = (new - old for old, new in zip(self._before, after, strict=True))
        return round(1 - idle / whole, 3) if whole else None


def _jiffies() -> tuple[int, int] | None:
    """Idle ones, and all."""
    try:
        numbers = [int(one) for one in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    return numbers[3] + numbers[4], sum(numbers)


def _run_times(model: Model) -> dict[str, float]:
    """Of several workers the median."""
    found: dict[int, list[float]] = {}
    for times in model.run_times.values():
        for rows, took in by_rows(times):
            found.setdefault(rows, []).append(took)
    return {str(rows): round(1000 * median(took), 3) for rows, took in sorted(found.items())}


async def _timed(exchange: Callable[[bytes], Awaitable[int]], request: bytes) -> float:
    started = time.perf_counter()
    await exchange(request)
    return time.perf_counter() - started
