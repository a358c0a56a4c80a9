"""What is measured, one function each; a figure's name ends in its unit."""

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
from asyncinfer.repository.operations import Operations
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from asyncinfer.repository.submissions import Submissions
from tests.benchmarks import bulk, images, load, models
from tests.benchmarks.load import Load, Plan
from tests.benchmarks.scale import Figures, Room
from tests.benchmarks.systems import (
    MAX_QUEUE,
    MAX_QUEUE_BYTES,
    Plain,
    Service,
    System,
    answers,
    free_port,
    running,
    until,
    usage,
)

_KEYS: Final = (keys.data, keys.status, keys.result, keys.error, keys.meta)
MANY: Final = 300
BODY: Final = b'{"data": [[5.1, 3.5, 1.4, 0.2]]}'


class Paired(Struct, frozen=True):
    """A measure of one running system; the driver runs it on both, turn and turn about."""

    of: Callable[[System, Room], Awaitable[Figures]]
    model: str = "iris"
    workers: int = 1


def _of(one: Load, name: str) -> Figures:
    return {
        f"{name}_per_second": one.per_second,
        f"{name}_p50_ms": one.p50_ms,
        f"{name}_p99_ms": one.p99_ms,
        f"{name}_client_cores": one.client_cpu,
    }


async def _loaded(system: System, plan: Plan, name: str) -> Figures:
    """What the clients saw, and the CPU time that each process spent on a request."""
    pids = {"api": system.api.pid, "worker": system.workers[0].pid, "redis": system.redis_pid}
    before = {process: usage(pid).cpu_seconds for process, pid in pids.items()}
    figures = _of(await load.run(plan), name)
    for process, pid in pids.items():
        used = usage(pid).cpu_seconds - before[process]
        figures[f"{name}_{process}_cpu_us"] = 1e6 * used / plan.requests
    return figures


def _requests(system: System, room: Room) -> int:
    """The plain pattern is several times slower; its share keeps the turns of like length."""
    return room.scale.requests // (6 if isinstance(system, Plain) else 1)


async def submit(system: System, room: Room) -> Figures:
    """Submits over 32 connections and over one, the worker running and stopped."""
    count = _requests(system, room)
    plan = Plan(port=system.port, how="submit", requests=count, connections=32, body=BODY)
    figures = await _loaded(system, plan, "submit")
    system.workers[0].signal(signal.SIGSTOP)
    figures |= _of(await load.run(plan), "submit_no_worker")
    alone = msgspec.structs.replace(plan, connections=1, requests=count // 10)
    figures |= _of(await load.run(alone), "submit_one_connection")
    system.workers[0].signal(signal.SIGCONT)
    await until(lambda: system.redis.llen("predict_queue") == 0, "an empty queue", 60)
    return figures


async def done(system: System, room: Room) -> Figures:
    """From submit to result over HTTP, on 32 connections."""
    plan = Plan(
        port=system.port, how="wait", requests=_requests(system, room), connections=32, body=BODY
    )
    if isinstance(system, Service):
        return await _loaded(system, plan, "done")
    # The plain API pays for each look, so its clients look as often as suits it best.
    polling = [
        msgspec.structs.replace(plan, how="poll", requests=plan.requests // 3, poll_seconds=seconds)
        for seconds in (0.001, 0.005, 0.02)
    ]
    found = [await _loaded(system, one, "done") for one in polling]
    return max(found, key=lambda one: one["done_per_second"])


async def single(system: System, room: Room) -> Figures:
    """One job at a time; the plain pattern's client looks every millisecond."""
    how: Any = "wait" if isinstance(system, Service) else "poll"
    plan = Plan(port=system.port, how=how, requests=room.scale.single, connections=1, body=BODY)
    return _of(await load.run(plan), "single")


def draining(model: str, workers: int, *, aof: bool = True) -> Paired:
    """Jobs that wait already, drained by one worker process or by two."""
    name = f"drain_{model}_{workers}" + ("" if aof else "_no_aof")

    async def drain(system: System, room: Room) -> Figures:
        if not aof:
            system.redis.config_set("appendonly", "no")
        drains = room.scale.drains if isinstance(system, Service) else 1
        rates = [await _drained(system, room, model) for _ in range(drains)]
        figures = {f"{name}_per_second": statistics.harmonic_mean(rates)}
        if isinstance(system, Service):
            batch = _mean_batch(system.redis, system.list_of(model))
            bare = models.bare_rows_per_second(
                room.models, model, round(batch), room.scale.bare_seconds
            )
            figures[f"{name}_batch_jobs"] = batch
            figures[f"{name}_bare_rows_per_second"] = bare
            figures[f"{name}_share_of_bare"] = figures[f"{name}_per_second"] / bare
        return figures

    return Paired(drain, model, workers)


async def _drained(system: System, room: Room, model: str) -> float:
    """Jobs a second; every job is checked to be there, some against ONNX Runtime alone.

    Both cores are at work, so it looks at little until the list is empty.
    """
    for worker in system.workers:
        worker.signal(signal.SIGSTOP)
    inputs = models.inputs(model, room.scale.drained)
    ids = await system.enqueue(model, inputs)
    last, everyone = _Look(system.redis, ids[-600:]), _Look(system.redis, ids)
    queue = system.list_of(model)
    since = time.perf_counter()
    for worker in system.workers:
        worker.signal(signal.SIGCONT)
    await until(lambda: system.redis.llen(queue) == 0, "the end of the queue", 300)
    await until(last.all_completed, "the last jobs", step_seconds=0.001)
    seconds = time.perf_counter() - since
    if not everyone.all_completed():
        await until(everyone.all_completed, "all jobs")
        seconds = time.perf_counter() - since
    _check(system.redis, room, model, ids, inputs)
    # Each drain begins alike: what is kept of the one before would fill the caches.
    for start in range(0, len(ids), 1000):
        some = ids[start : start + 1000]
        system.redis.unlink(*(key(job_id) for job_id in some for key in _KEYS))
    return len(ids) / seconds


class _Look:
    """Whether jobs are done: what asks it is packed beforehand, since that takes a while."""

    def __init__(self, client: redis.Redis, ids: list[str]) -> None:
        self._client = client
        self._count = len(ids)
        names: Any = map(keys.status, ids)
        self._asks = pack_command(("MGET", *names))

    def all_completed(self) -> bool:
        connection = self._client.connection_pool.get_connection()
        try:
            connection.send_packed_command([self._asks])  # type: ignore[no-untyped-call]
            statuses: list[bytes] = connection.read_response()
        finally:
            self._client.connection_pool.release(connection)
        return statuses.count(b"completed") == self._count


def _check(
    client: redis.Redis, room: Room, model: str, ids: list[str], inputs: list[bytes]
) -> None:
    chosen = random.Random(0).sample(range(len(ids)), 100)
    expected = models.predictions(room.models, model, [inputs[i] for i in chosen])
    for i, right in zip(chosen, expected, strict=True):
        stored: Any = client.get(f"job:{ids[i]}:result")
        result = msgspec.json.decode(stored)
        if "prediction" in result:
            found = result["prediction"]
        else:
            scores = result["outputs"][0]["data"]
            found = scores.index(max(scores))
        assert found == right, f"job {ids[i]}: {found}, ONNX Runtime alone says {right}"


def _mean_batch(client: redis.Redis, queue: str) -> float:
    """Jobs a claim, by the queue's log."""
    entries: Any = client.xrange(f"{{{queue}}}:log")
    claims = [fields[b"processing"] for _, fields in entries if b"processing" in fields]
    return sum(len(msgspec.msgpack.decode(ids)) for ids in claims) / max(1, len(claims))


async def idle(system: System, room: Room) -> Figures:
    """What processes use that have nothing to do, and what a job takes in Redis."""
    processes = {"api": system.api.pid, "worker": system.workers[0].pid}
    before = {name: usage(pid) for name, pid in processes.items()}
    await anyio.sleep(room.scale.idle_seconds)
    after = {name: usage(pid) for name, pid in processes.items()}
    figures: Figures = {}
    for name in processes:
        used = after[name].cpu_seconds - before[name].cpu_seconds
        figures[f"idle_{name}_cpu_percent"] = 100 * used / room.scale.idle_seconds
        figures[f"rss_{name}_mib"] = after[name].rss_mib
    system.workers[0].signal(signal.SIGSTOP)
    empty = _memory(system.redis)
    ids = await system.enqueue("iris", models.inputs("iris", 5_000))
    figures["redis_queued_job_bytes"] = (_memory(system.redis) - empty) / len(ids)
    system.workers[0].signal(signal.SIGCONT)
    await until(_Look(system.redis, ids).all_completed, "all jobs", 60)
    figures["redis_finished_job_bytes"] = (_memory(system.redis) - empty) / len(ids)
    return figures


def _memory(client: redis.Redis) -> int:
    return int(client.info("memory")["used_memory"])


async def start(room: Room) -> Figures:
    """Seconds from `asyncinfer serve`, on an empty folder, to the first result.

    Installed by pip, the package has its bytecode; a checkout may not.
    """
    compileall.compile_dir(Path(asyncinfer.__file__).parent, quiet=1)
    port, folder = free_port(), room.new()
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
        # Asked from here: a client's process of its own took a third of it all to start.
        assert answers(port, "/predict", body=BODY), "the first result"
        seconds = time.perf_counter() - since
        await child.stop(10)
    return {"start_to_first_result_seconds": seconds}


async def many(room: Room) -> Figures:
    """Seconds from the start of a worker with 300 models, none of them known, to the first result,
    and until the last model is served."""
    folder = room.new()
    models.place_many(folder, MANY)
    async with running(Service, folder, room.new(), workers=0) as system:
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
        await until(lambda: answers(system.port, last, body=BODY), "a result of the last one")
        all_seconds = time.perf_counter() - since
    return {
        f"start_of_{MANY}_models_to_first_result_seconds": first_seconds,
        f"start_of_{MANY}_models_to_all_served_seconds": all_seconds,
    }


async def growth(room: Room) -> Figures:
    """Rates with more and more jobs waiting, and the calls that look at all of them."""
    figures: Figures = {}
    for backlog in room.scale.backlogs:
        async with running(Service, room.models, room.new(), workers=1) as system:
            system.redis.config_set("auto-aof-rewrite-percentage", 0)
            system.workers[0].signal(signal.SIGSTOP)
            for _ in range(0, backlog, 50_000):
                count = min(backlog, 50_000)
                await system.enqueue("iris", models.inputs("iris", count))
            plan = Plan(
                port=system.port, how="submit", requests=room.scale.requests,
                connections=32, body=BODY,
            )  # fmt: skip
            figures |= _of(await load.run(plan), f"waiting_{backlog}_submit")
            figures[f"waiting_{backlog}_drain_per_second"] = await _rate(system)
            system.redis.config_set("slowlog-log-slower-than", 0)
            system.redis.config_set("slowlog-max-len", 10_000)
            system.workers[0].signal(signal.SIGSTOP)
            figures |= await _looks(system, backlog)
    return figures


async def _rate(system: System, seconds: float = 2.0) -> float:
    """Jobs a second that leave a list while its worker works on it."""
    queue = system.list_of("iris")
    enough = min(int(system.redis.llen(queue)) // 2, 40_000)
    system.workers[0].signal(signal.SIGCONT)
    first, since = int(system.redis.llen(queue)), time.perf_counter()
    left = first
    while time.perf_counter() - since < seconds and first - left < enough:
        await anyio.sleep(0.02)
        left = int(system.redis.llen(queue))
    return (first - left) / (time.perf_counter() - since)


async def _looks(system: System, backlog: int) -> Figures:
    """The longest time that one call of a list, a cancel and a purge holds Redis."""
    policy = Policy(max_queue=MAX_QUEUE, max_queue_bytes=MAX_QUEUE_BYTES)
    figures: Figures = {}
    opened = Store.open(
        system.url, queue_name="predict_queue", policy=policy, name="looks", call_seconds=10
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
                tenant="default", status="pending", model=None, limit=100, cursor=None
            )

        async def purge() -> None:
            await Operations(store).purge(queue)

        for name, call in (("list_jobs", list_jobs), ("cancel", cancel), ("purge", purge)):
            system.redis.slowlog_reset()
            since = time.perf_counter()
            await call()
            seconds = time.perf_counter() - since
            slow: Any = system.redis.slowlog_get(10_000)
            longest = max(one["duration"] for one in slow) / 1000
            figures[f"waiting_{backlog}_{name}_longest_call_ms"] = longest
            figures[f"waiting_{backlog}_{name}_seconds"] = seconds
    assert not int(system.redis.llen(keys.waiting(queue)[1]))
    return figures


async def ceilings(system: System, room: Room) -> Figures:
    """What the parts reach alone: HTTP without work, and Redis without Python between."""
    path = "/health/live" if isinstance(system, Service) else "/health"
    plan = Plan(
        port=system.port, how="get", path=path, requests=room.scale.requests, connections=32
    )
    empty = await load.run(plan)
    pipeline = system.redis.pipeline(transaction=False)
    for number in range(20_000):
        pipeline.set(f"x:{number}", BODY)
    since = time.perf_counter()
    await asyncio.to_thread(pipeline.execute)
    return {
        "empty_endpoint_per_second": empty.per_second,
        "empty_endpoint_client_cores": empty.client_cpu,
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
ALONE: Final[dict[str, Callable[[Room], Awaitable[Figures]]]] = {
    "start": start,
    "many": many,
    "bulk": bulk.bulk,
    "images": images.forms,
    "growth": growth,
}
"""What only this service has, or is asked; `growth` takes minutes, and one round is enough."""
