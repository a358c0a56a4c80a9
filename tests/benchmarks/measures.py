"""The measures, a function each; a figure's name ends in its unit."""

import asyncio
import compileall
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import anyio
import msgspec
import redis
from hiredis import pack_command
from msgspec import Struct

import asyncinfer
from asyncinfer.processes import child_process
from asyncinfer.repository import keys
from asyncinfer.repository.inspect.listing import Inspection
from asyncinfer.repository.inspect.selection import Filter
from asyncinfer.repository.operations import Operations
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from asyncinfer.repository.submissions import Submissions
from tests.benchmarks import bulk, images, load, models
from tests.benchmarks.load import Load, Plan
from tests.benchmarks.scale import Figures, Workspace
from tests.benchmarks.systems import (
    MAX_QUEUE,
    MAX_QUEUE_BYTES,
    Plain,
    Service,
    System,
    answers,
    exact_cpu_seconds,
    running,
    until,
    usage,
)
from tests.ports import free_port

_KEYS: Final = (keys.data, keys.status, keys.result, keys.error, keys.meta)
MANY: Final = 300
BODY: Final = b'{"data": [[5.1, 3.5, 1.4, 0.2]]}'


class Paired(Struct, frozen=True):
    """A measure of a running system, which is done on both systems in alternation."""

    measure: Callable[[System, Workspace], Awaitable[Figures]]
    model: str = "iris"
    workers: int = 1


def _figures_of(result: Load, name: str) -> Figures:
    return {
        f"{name}_per_second": result.per_second,
        f"{name}_p50_ms": result.p50_ms,
        f"{name}_p99_ms": result.p99_ms,
        f"{name}_client_cores": result.client_cores,
    }


async def _measure_load(system: System, plan: Plan, name: str) -> Figures:
    """The clients' figures, and the CPU time per request of each process."""
    pids = {"api": system.api.pid, "worker": system.workers[0].pid, "redis": system.redis_pid}
    before = {process: usage(pid).cpu_seconds for process, pid in pids.items()}
    figures = _figures_of(await load.run(plan), name)
    for process, pid in pids.items():
        used = usage(pid).cpu_seconds - before[process]
        figures[f"{name}_{process}_cpu_us"] = 1e6 * used / plan.requests
    return figures


def _requests(system: System, workspace: Workspace) -> int:
    """Fewer for the plain pattern: it is several times slower, and turns should last as long."""
    return workspace.scale.requests // (6 if isinstance(system, Plain) else 1)


async def submit(system: System, workspace: Workspace) -> Figures:
    """Submits over 32 connections and more with the worker running, and over 32 and over one with
    the worker stopped."""
    count = _requests(system, workspace)
    plan = Plan(port=system.port, how="submit", requests=count, connections=32, body=BODY)
    figures = await _measure_load(system, plan, "submit")
    for connections in (64, 128):
        wider = msgspec.structs.replace(plan, connections=connections)
        name = f"submit_{connections}_connections_per_second"
        figures[name] = (await load.run(wider)).per_second
    system.workers[0].signal(signal.SIGSTOP)
    figures |= _figures_of(await load.run(plan), "submit_no_worker")
    alone = msgspec.structs.replace(plan, connections=1, requests=count // 10)
    figures |= _figures_of(await load.run(alone), "submit_one_connection")
    system.workers[0].signal(signal.SIGCONT)
    await until(lambda: system.redis.llen("predict_queue") == 0, "an empty queue", 60)
    return figures


async def done(system: System, workspace: Workspace) -> Figures:
    """From submit to result over HTTP, on 32 connections."""
    plan = Plan(
        port=system.port,
        how="wait",
        requests=_requests(system, workspace),
        connections=32,
        body=BODY,
    )
    if isinstance(system, Service):
        return await _measure_load(system, plan, "done")
    # Each poll costs the plain API, so its best result of three polling intervals counts.
    polling = [
        msgspec.structs.replace(plan, how="poll", requests=plan.requests // 3, poll_seconds=seconds)
        for seconds in (0.001, 0.005, 0.02)
    ]
    results = [await _measure_load(system, polling_plan, "done") for polling_plan in polling]
    return max(results, key=lambda figures: figures["done_per_second"])


async def single(system: System, workspace: Workspace) -> Figures:
    """One job at a time; the plain pattern's client polls every millisecond."""
    how: Any = "wait" if isinstance(system, Service) else "poll"
    plan = Plan(
        port=system.port, how=how, requests=workspace.scale.single, connections=1, body=BODY
    )
    return _figures_of(await load.run(plan), "single")


def draining(model: str, workers: int, *, aof: bool = True) -> Paired:
    """A measure of waiting jobs that one or two worker processes run."""
    name = f"drain_{model}_{workers}" + ("" if aof else "_no_aof")

    async def drain(system: System, workspace: Workspace) -> Figures:
        if not aof:
            system.redis.config_set("appendonly", "no")
        drains = workspace.scale.drains if isinstance(system, Service) else 1
        rates = [await _drain_once(system, workspace, model) for _ in range(drains)]
        figures = {f"{name}_per_second": statistics.harmonic_mean(rates)}
        if isinstance(system, Service):
            batch = _mean_batch(system.redis, system.list_of(model))
            bare = models.bare_rows_per_second(
                workspace.models, model, round(batch), workspace.scale.bare_seconds
            )
            figures[f"{name}_batch_jobs"] = batch
            figures[f"{name}_bare_rows_per_second"] = bare
            figures[f"{name}_share_of_bare"] = figures[f"{name}_per_second"] / bare
        return figures

    return Paired(drain, model, workers)


async def _drain_once(system: System, workspace: Workspace, model: str) -> float:
    """Jobs per second; asserts that all jobs complete, and checks some with ONNX Runtime alone.

    Both cores are busy, so it reads little until the list is empty.
    """
    for worker in system.workers:
        worker.signal(signal.SIGSTOP)
    inputs = models.inputs(model, workspace.scale.drained)
    ids = await system.enqueue(model, inputs)
    last_jobs, all_jobs = _StatusCheck(system.redis, ids[-600:]), _StatusCheck(system.redis, ids)
    queue = system.list_of(model)
    since = time.perf_counter()
    for worker in system.workers:
        worker.signal(signal.SIGCONT)
    await until(lambda: system.redis.llen(queue) == 0, "the end of the queue", 300)
    await until(last_jobs.all_completed, "the last jobs", step_seconds=0.001)
    seconds = time.perf_counter() - since
    if not all_jobs.all_completed():
        await until(all_jobs.all_completed, "all jobs")
        seconds = time.perf_counter() - since
    _check(system.redis, workspace, model, ids, inputs)
    # Each drain starts with an empty Redis: keys of the last drain would fill the caches.
    for start in range(0, len(ids), 1000):
        part = ids[start : start + 1000]
        system.redis.unlink(*(key(job_id) for job_id in part for key in _KEYS))
    return len(ids) / seconds


class _StatusCheck:
    """Checks whether jobs are completed; its command is packed beforehand, which takes a while."""

    def __init__(self, client: redis.Redis, ids: list[str]) -> None:
        self._client = client
        self._count = len(ids)
        names: Any = map(keys.status, ids)
        self._command = pack_command(("MGET", *names))

    def all_completed(self) -> bool:
        connection = self._client.connection_pool.get_connection()
        try:
            connection.send_packed_command([self._command])  # type: ignore[no-untyped-call]
            statuses: list[bytes] = connection.read_response()
        finally:
            self._client.connection_pool.release(connection)
        return statuses.count(b"completed") == self._count


def _check(
    client: redis.Redis, workspace: Workspace, model: str, ids: list[str], inputs: list[bytes]
) -> None:
    sample = random.Random(0).sample(range(len(ids)), 100)
    expected = models.predictions(workspace.models, model, [inputs[i] for i in sample])
    for i, right in zip(sample, expected, strict=True):
        stored: Any = client.get(f"job:{ids[i]}:result")
        result = msgspec.json.decode(stored)
        if "prediction" in result:
            found = result["prediction"]
        else:
            scores = result["outputs"][0]["data"]
            found = scores.index(max(scores))
        assert found == right, f"job {ids[i]}: {found}, ONNX Runtime alone says {right}"


def _mean_batch(client: redis.Redis, queue: str) -> float:
    """Jobs per claim, from the queue's log."""
    entries: Any = client.xrange(f"{{{queue}}}:log")
    claims = [fields[b"processing"] for _, fields in entries if b"processing" in fields]
    return sum(len(msgspec.msgpack.decode(ids)) for ids in claims) / max(1, len(claims))


async def idle(system: System, workspace: Workspace) -> Figures:
    """CPU time and memory of idle processes, and the size of a job in Redis."""
    processes = {"api": system.api.pid, "worker": system.workers[0].pid}
    before = {name: exact_cpu_seconds(pid) for name, pid in processes.items()}
    await anyio.sleep(workspace.scale.idle_seconds)
    figures: Figures = {}
    for name, pid in processes.items():
        used = exact_cpu_seconds(pid) - before[name]
        figures[f"idle_{name}_cpu_percent"] = 100 * used / workspace.scale.idle_seconds
        figures[f"rss_{name}_mib"] = usage(pid).rss_mib
    system.workers[0].signal(signal.SIGSTOP)
    empty = _memory(system.redis)
    ids = await system.enqueue("iris", models.inputs("iris", 5_000))
    figures["redis_queued_job_bytes"] = (_memory(system.redis) - empty) / len(ids)
    system.workers[0].signal(signal.SIGCONT)
    await until(_StatusCheck(system.redis, ids).all_completed, "all jobs", 60)
    figures["redis_finished_job_bytes"] = (_memory(system.redis) - empty) / len(ids)
    return figures


def _memory(client: redis.Redis) -> int:
    return int(client.info("memory")["used_memory"])


async def start(workspace: Workspace) -> Figures:
    """Seconds from `asyncinfer serve`, with an empty DATA_DIR, to the first result.

    A package that pip installed has its bytecode; a checkout may have none yet.
    """
    compileall.compile_dir(Path(asyncinfer.__file__).parent, quiet=1)
    port, folder = free_port(), workspace.new_folder()
    environ = {**os.environ, "PORT": str(port), "DATA_DIR": str(folder)}
    since = time.perf_counter()
    with (folder / "output.log").open("wb") as output:
        child = child_process.spawn(
            (sys.executable, "-m", "asyncinfer", "serve"),
            death_signal=signal.SIGTERM,
            env=environ,
            output=output,
        )
        await until(lambda: answers(port, "/models/iris"), "the model")
        # Sent from this process: a client of its own took a third of the whole time to start.
        assert answers(port, "/predict", body=BODY), "the first result"
        seconds = time.perf_counter() - since
        await child.stop(10)
    return {"start_to_first_result_seconds": seconds}


async def many(workspace: Workspace) -> Figures:
    """Seconds from the start of a worker with 300 new models to the first result, and until the
    last model is served."""
    folder = workspace.new_folder()
    models.place_many(folder, MANY)
    async with running(Service, folder, workspace.new_folder(), workers=0) as system:
        since = time.perf_counter()
        system.workers.append(
            system.spawn("-m", "asyncinfer", "work", MODEL_DIR=str(folder), DEFAULT_MODEL="m000")
        )
        await until(lambda: answers(system.port, "/models/m000"), "the first model")
        assert answers(system.port, "/predict", body=BODY), "the first result"
        first_seconds = time.perf_counter() - since
        announced = keys.models("predict_queue")
        await until(lambda: system.redis.scard(announced) == MANY, "all models", seconds=120)
        last = f"/predict/m{MANY - 1}"
        await until(lambda: answers(system.port, last, body=BODY), "a result of the last model")
        all_seconds = time.perf_counter() - since
    return {
        f"start_of_{MANY}_models_to_first_result_seconds": first_seconds,
        f"start_of_{MANY}_models_to_all_served_seconds": all_seconds,
    }


async def growth(workspace: Workspace) -> Figures:
    """Rates with more and more waiting jobs, and the times of calls that read all of them."""
    figures: Figures = {}
    for backlog in workspace.scale.backlogs:
        async with running(Service, workspace.models, workspace.new_folder(), workers=1) as system:
            system.redis.config_set("auto-aof-rewrite-percentage", 0)
            system.workers[0].signal(signal.SIGSTOP)
            for _ in range(0, backlog, 50_000):
                count = min(backlog, 50_000)
                await system.enqueue("iris", models.inputs("iris", count))
            plan = Plan(
                port=system.port, how="submit", requests=workspace.scale.requests,
                connections=32, body=BODY,
            )  # fmt: skip
            figures |= _figures_of(await load.run(plan), f"waiting_{backlog}_submit")
            figures[f"waiting_{backlog}_drain_per_second"] = await _drain_rate(system)
            system.redis.config_set("slowlog-log-slower-than", 0)
            system.redis.config_set("slowlog-max-len", 10_000)
            system.workers[0].signal(signal.SIGSTOP)
            figures |= await _longest_calls(system, backlog)
    return figures


async def _drain_rate(system: System, seconds: float = 2.0) -> float:
    """Jobs per second that leave the list while the worker runs."""
    queue = system.list_of("iris")
    enough = min(int(system.redis.llen(queue)) // 2, 40_000)
    system.workers[0].signal(signal.SIGCONT)
    first, since = int(system.redis.llen(queue)), time.perf_counter()
    left = first
    while time.perf_counter() - since < seconds and first - left < enough:
        await anyio.sleep(0.02)
        left = int(system.redis.llen(queue))
    return (first - left) / (time.perf_counter() - since)


async def _longest_calls(system: System, backlog: int) -> Figures:
    """The longest time that a Redis call of a list, a cancel and a purge blocks Redis."""
    policy = Policy(max_queue=MAX_QUEUE, max_queue_bytes=MAX_QUEUE_BYTES)
    figures: Figures = {}
    opened = Store.open(
        system.url, queue_name="predict_queue", policy=policy, name="benchmark", call_seconds=10
    )
    async with opened as store:
        submissions, queue = Submissions(store), system.list_of("iris")
        middle: Any = system.redis.lindex(queue, int(system.redis.llen(queue)) // 2)

        async def cancel() -> None:
            stored = await submissions.read(middle.decode())
            assert stored
            assert await Operations(store).cancel(stored) == "cancelled"

        async def list_jobs() -> None:
            await Inspection(store).jobs(
                Filter(tenant="default", statuses=frozenset(["pending"])), limit=100
            )

        async def purge() -> None:
            await Operations(store).cancel_queue(queue)

        for name, call in (("list_jobs", list_jobs), ("cancel", cancel), ("purge", purge)):
            system.redis.slowlog_reset()
            since = time.perf_counter()
            await call()
            seconds = time.perf_counter() - since
            slow: Any = system.redis.slowlog_get(10_000)
            longest = max(entry["duration"] for entry in slow) / 1000
            figures[f"waiting_{backlog}_{name}_longest_call_ms"] = longest
            figures[f"waiting_{backlog}_{name}_seconds"] = seconds
    assert not int(system.redis.llen(keys.waiting(queue)[1]))
    return figures


async def ceilings(system: System, workspace: Workspace) -> Figures:
    """The rates of the parts alone: HTTP without work, and Redis with pipelined commands."""
    path = "/health/live" if isinstance(system, Service) else "/health"
    plan = Plan(
        port=system.port, how="get", path=path, requests=workspace.scale.requests, connections=32
    )
    empty = await load.run(plan)
    pipeline = system.redis.pipeline(transaction=False)
    for number in range(20_000):
        pipeline.set(f"x:{number}", BODY)
    since = time.perf_counter()
    await asyncio.to_thread(pipeline.execute)
    return {
        "empty_endpoint_per_second": empty.per_second,
        "empty_endpoint_client_cores": empty.client_cores,
        "pipelined_set_per_second": 20_000 / (time.perf_counter() - since),
    }


PAIRED: Final[dict[str, list[Paired]]] = {
    "submit": [Paired(submit)],
    "done": [Paired(done)],
    "single": [Paired(single)],
    "drain": [
        draining("iris", 1, aof=False),
        *(draining(model, count) for model in ("iris", "digits", "mlp") for count in (1, 2)),
    ],
    "idle": [Paired(idle)],
    "ceilings": [Paired(ceilings)],
}
ALONE: Final[dict[str, Callable[[Workspace], Awaitable[Figures]]]] = {
    "start": start,
    "many": many,
    "bulk": bulk.bulk,
    "images": images.forms,
    "growth": growth,
}
"""Measures of this service alone; `growth` takes minutes, and one round is enough."""
