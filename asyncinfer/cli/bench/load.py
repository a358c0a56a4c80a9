"""The two loads of `bench`, and samples of API, Redis and workers meanwhile."""

import asyncio
import itertools
import time
import uuid
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from statistics import mean, median
from typing import Final
from urllib.parse import quote, urlsplit

import msgspec
from msgspec import Struct

from asyncinfer.cli.addresses import is_loopback, shown_url
from asyncinfer.cli.api_client import connect, seconds_by_rows
from asyncinfer.cli.bench.http_load import LoadConnection
from asyncinfer.cli.bench.verdict import Bench, LoadResult, Sides, latency, verdict
from asyncinfer.cli.options import ServerOptions
from asyncinfer.client import CannotSend, Client, ConnectionFailed, Forbidden, Model, Queue

_STATUS_QUEUE_FULL: Final = 429
_PAUSE_SECONDS: Final = 0.25
_WAIT_HEADER: Final = "prefer: wait=30\r\n"


class _LoadCounts(Struct):
    """Latencies and errors of all connections of one load."""

    seconds: list[float] = []
    full: int = 0
    errors: int = 0


class _SideSamples(Struct):
    """Samples taken during the first load."""

    live: list[float] = []
    """Seconds of a GET /health/live, which needs the API alone."""
    ready: list[float] = []
    """Seconds of a GET /health/ready, which asks Redis too."""
    busy: list[float] = []
    """Shares of the slots that were busy."""


def measure(server: ServerOptions, name: str | None, seconds: float, connections: int) -> Bench:
    """Runs both loads, `seconds` each, and cancels and deletes their jobs at the end.

    `name` None is the default model. Raises CannotSend if the model has no example, ModelNotFound,
    and ConnectionFailed if nothing answers or a connection is lost under load.
    """
    with connect(server) as client:
        model = client.model(name)
        group = f"bench-{uuid.uuid4().hex[:12]}"
        path = f"/predict/{quote(model.model, safe='')}"
        body = _body(model, group)
        try:
            runner = _LoadRunner(server, client, path, body, connections)
            return asyncio.run(runner.run(model, seconds))
        except ExceptionGroup as errors:
            lost, others = errors.split((OSError, EOFError))
            if lost is None or others:
                raise
            raise ConnectionFailed(
                f"A connection to {shown_url(server.url)} was cut while it was under load."
            ) from errors
        finally:
            client.cancel_all(group=group)
            client.purge(group=group)


def _body(model: Model, group: str) -> bytes:
    """The JSON of a request with the model's example; raises CannotSend if it has none."""
    example = model.shown_example
    if not isinstance(example, dict):
        raise CannotSend(
            f"The server knows no example of {model.model}: give its model.toml an `example`."
        )
    return msgspec.json.encode({**example, "options": {"group": group}})


class _LoadRunner:
    """Runs both loads on one model, and samples the service during the first."""

    def __init__(
        self, server: ServerOptions, client: Client, path: str, body: bytes, connections: int
    ) -> None:
        self._server = server
        self._client = client
        self._path = path
        self._body = body
        self._connections = connections

    async def run(self, model: Model, seconds: float) -> Bench:
        """Runs the two loads, `seconds` each, one after the other, and returns all measurements.

        Raises OSError or EOFError if a connection is lost, in an exception group.
        """
        samples = _SideSamples()
        machine = _CpuMeter(self._server.url)
        async with asyncio.TaskGroup() as group:
            sampling = group.create_task(self._sample_sides(model.model, samples))
            waits, cpu = await self._run_load(seconds, _WAIT_HEADER)
            sampling.cancel()
        machine_cpu = machine.busy_share()
        queue = self._queue(model.model)
        submits, _ = await self._run_load(seconds, "")
        now = self._client.model(model.model)
        sides = _sides(samples, cpu, machine_cpu, queue, now)
        return Bench(
            model=model.model,
            connections=self._connections,
            waits=waits,
            submits=submits,
            sides=sides,
            verdict=verdict(waits, sides, self._connections),
        )

    # --- load -------------------------------------------------------------------------------

    async def _run_load(self, seconds: float, headers: str) -> tuple[LoadResult, float]:
        """Sends requests over all connections for some seconds, with `headers` as extra lines.

        Returns the load and the share of one core that this process used for it.
        """
        counts = _LoadCounts()
        started, cpu = time.perf_counter(), time.process_time()
        until = started + seconds
        async with asyncio.TaskGroup() as group:
            for _ in range(self._connections):
                group.create_task(self._send_requests(until, headers, counts))
        elapsed_seconds = time.perf_counter() - started
        load = LoadResult(
            requests=len(counts.seconds),
            per_second=round(len(counts.seconds) / elapsed_seconds, 1),
            latency_ms=latency(counts.seconds),
            refused_full=counts.full,
            errors=counts.errors,
            seconds=round(elapsed_seconds, 3),
        )
        return load, (time.process_time() - cpu) / elapsed_seconds

    async def _send_requests(self, until: float, headers: str, counts: _LoadCounts) -> None:
        """Sends requests over one connection until a time of `perf_counter`; adds to `counts`.

        After a refusal for a full queue it pauses; other errors are counted and it goes on.
        """
        async with self._connected() as connection:
            request = connection.encode_request("POST", self._path, self._body, headers)
            while (sent := time.perf_counter()) < until:
                status = await connection.exchange(request)
                if status in (200, 202):
                    counts.seconds.append(time.perf_counter() - sent)
                elif status == _STATUS_QUEUE_FULL:
                    counts.full += 1
                    await asyncio.sleep(_PAUSE_SECONDS)  # a full queue asks for a pause
                else:
                    counts.errors += 1

    def _connected(self) -> AbstractAsyncContextManager[LoadConnection]:
        server = self._server
        return LoadConnection.open(server.url, server.api_key, server.ca)

    # --- samples ----------------------------------------------------------------------------

    async def _sample_sides(self, model: str, samples: _SideSamples) -> None:
        """Adds samples of API, Redis and workers until it is cancelled."""
        async with self._connected() as connection:
            live = connection.encode_request("GET", "/health/live")
            ready = connection.encode_request("GET", "/health/ready")
            for turn in itertools.count():
                samples.live.append(await _time_exchange(connection, live))
                samples.ready.append(await _time_exchange(connection, ready))
                if turn % 4 == 3:
                    await asyncio.to_thread(self._sample_workers, model, samples)
                await asyncio.sleep(_PAUSE_SECONDS)

    def _sample_workers(self, model: str, samples: _SideSamples) -> None:
        """Adds the share of busy slots; nothing if the key lacks the scope `admin`."""
        try:
            workers = self._client.workers()
        except Forbidden:
            return
        serving = [
            worker for worker in workers if model in worker.models and worker.busy is not None
        ]
        if slots := sum(worker.slots for worker in serving):
            samples.busy.append(sum(worker.busy or 0 for worker in serving) / slots)

    def _queue(self, model: str) -> Queue | None:
        """The state of the model's queue; None if the server lists none for it."""
        return next((queue for queue in self._client.queues() if queue.model == model), None)


def _sides(
    samples: _SideSamples,
    client_cpu: float,
    machine_cpu: float | None,
    queue: Queue | None,
    model: Model,
) -> Sides:
    """The time and load of each side, from the samples taken during the first load.

    `client_cpu` is the share of one core that this process used, and `machine_cpu` that of all
    cores; `model` is the model as it was after the loads.
    """
    live = median(samples.live or [0.0])
    wait_times = queue.wait_seconds if queue else None
    run_times = queue.run_seconds if queue else None
    return Sides(
        client_cpu=round(client_cpu, 3),
        machine_cpu=machine_cpu,
        api_ms=round(1000 * live, 3),
        redis_ms=round(max(0.0, 1000 * (median(samples.ready or [0.0]) - live)), 3),
        queue_ms=round(1000 * wait_times.p50, 3) if wait_times else None,
        run_ms=round(1000 * run_times.p50, 3) if run_times else None,
        slots_busy=round(mean(samples.busy), 3) if samples.busy else None,
        workers=queue.workers if queue else 0,
        slots=queue.slots if queue else 0,
        batched=model.batched,
        run_times=_run_times(model),
    )


class _CpuMeter:
    """Measures how busy all cores are, from its creation on, if the service is on this machine."""

    def __init__(self, url: str) -> None:
        self._is_local = is_loopback(urlsplit(url).hostname or "")
        self._before = _jiffies()

    def busy_share(self) -> float | None:
        """The busy share of all cores since the meter was made, 0 to 1.

        None if the service is on another machine, or there is no /proc/stat.
        """
        after = _jiffies()
        if not (self._is_local and self._before and after):
            return None
        idle, total = (new - old for old, new in zip(self._before, after, strict=True))
        return round(1 - idle / total, 3) if total else None


def _jiffies() -> tuple[int, int] | None:
    """Clock ticks of all cores since the boot: the idle ones, and all; None without /proc/stat."""
    try:
        fields = Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
        ticks = [int(field) for field in fields]
    except (OSError, ValueError):
        return None
    return ticks[3] + ticks[4], sum(ticks)


def _run_times(model: Model) -> dict[str, float]:
    """Milliseconds of a run by its number of rows, the median of the workers."""
    by_rows: dict[int, list[float]] = {}
    for times in model.run_times.values():
        for rows, seconds in seconds_by_rows(times):
            by_rows.setdefault(rows, []).append(seconds)
    return {str(rows): round(1000 * median(times), 3) for rows, times in sorted(by_rows.items())}


async def _time_exchange(connection: LoadConnection, request: bytes) -> float:
    """Sends a request, and returns after how many seconds its response was there."""
    started = time.perf_counter()
    await connection.exchange(request)
    return time.perf_counter() - started
