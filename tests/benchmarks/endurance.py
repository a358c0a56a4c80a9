"""`python -m tests.benchmarks.endurance`: hours of mixed requests to one `asyncinfer serve`.

Writes a row a minute of memory, descriptors and keys, and at the end how fast each of them grew.
"""

import argparse
import asyncio
import csv
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import redis
from onnx import TensorProto, helper, numpy_helper

from asyncinfer.client import AsyncClient, JobCancelled, RequestError
from asyncinfer.processes import child_process
from tests.benchmarks.systems import answers, until
from tests.ports import free_port

_SHIPPED: Final = Path(__file__).parent.parent.parent / "model"
_FLOWER: Final = [5.1, 3.5, 1.4, 0.2]
_TILES: Final = 62_500
"""A row of the model `wide` has 4 numbers and gives 1 MB."""
_JOB_TTL_SECONDS: Final = 300

Activity = Callable[[AsyncClient, int], Awaitable[None]]
"""A user's few steps; the number is how often it has been done before. Asserts what it is told."""


async def _wait_for_one(client: AsyncClient, number: int) -> None:
    for _ in range(20):
        result = await client.predict([_FLOWER], "iris")
        assert result["class_name"] == "setosa", result


async def _map_rows(client: AsyncClient, number: int) -> None:
    rows = [_FLOWER, [6.7, 3.0, 5.2, 2.3]] * 1000
    # Kept for an hour otherwise, in which the keys would grow.
    results = client.map(rows, "iris", progress=False, ttl_seconds=_JOB_TTL_SECONDS)
    assert [row["prediction"] async for row in results] == [0, 2] * 1000


async def _upload_images(client: AsyncClient, number: int) -> None:
    images = np.full((4, 64 << 10), number % 7, np.float32)
    result = await client.predict(images, "mean", answer="tensors")
    assert np.allclose(result, number % 7)


async def _read_large_result(client: AsyncClient, number: int) -> None:
    row = np.arange(4, dtype=np.float32) + number % 100
    result = await client.predict(row[None], "wide")
    assert np.array_equal(np.asarray(result).reshape(-1, 4)[-1], row)


async def _cancel_and_retry(client: AsyncClient, number: int) -> None:
    job = await client.submit([_FLOWER], "iris", delay_seconds=600, priority="high")
    await job.cancel()
    with suppress(JobCancelled):
        await job.result(timeout=1)
        raise AssertionError("a cancelled job has a result")
    await job.retry()
    await job.cancel()


async def _use_a_group(client: AsyncClient, number: int) -> None:
    name = f"group-{number}"
    jobs = [await client.submit([_FLOWER], "iris", group=name) for _ in range(20)]
    for job in jobs:
        await job.wait(30)
    assert (await client.group(name)).counts.completed == 20
    listed = await client.jobs(group=name, limit=50)
    assert len(listed) == 20
    if number % 2:
        assert (await client.purge(group=name)).purged == 20


async def _follow_events(client: AsyncClient, number: int) -> None:
    job = await client.submit([_FLOWER], "iris", delay_seconds=1)
    names = [event.name async for event in job.events()]
    assert names[-1] == "completed", names


async def _send_what_is_wrong(client: AsyncClient, number: int) -> None:
    for data, model in (([[1.0, 2.0]], "iris"), ([_FLOWER], "nosuch"), ("x", "iris")):
        try:
            await client.predict(data, model)
        except RequestError:
            continue
        raise AssertionError(f"{data} was accepted")


async def _leave_in_the_middle(client: AsyncClient, number: int) -> None:
    port = int(client.url.rpartition(":")[2])
    head = b"POST /predict/iris HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    wait = b"Prefer: wait=30\r\n" if number % 2 else b""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head + wait + b'Content-Length: 200000\r\n\r\n{"data": [[' + b"1, " * 20_000)
    await writer.drain()
    writer.close()


async def _look_around(client: AsyncClient, number: int) -> None:
    await client.queues()
    await client.workers()
    await client.catalog()
    assert (await client.health()).status == "ok"
    await client.jobs(status="failed", limit=20)


_ACTIVITIES: Final[dict[str, tuple[Activity, float]]] = {
    "wait": (_wait_for_one, 0.5),
    "map": (_map_rows, 2.0),
    "images": (_upload_images, 0.5),
    "large": (_read_large_result, 1.0),
    "cancel": (_cancel_and_retry, 0.3),
    "group": (_use_a_group, 1.0),
    "events": (_follow_events, 0.5),
    "wrong": (_send_what_is_wrong, 0.5),
    "leave": (_leave_in_the_middle, 0.5),
    "look": (_look_around, 2.0),
}
"""Each activity, and its pause in seconds after each turn."""


async def _repeat(
    client: AsyncClient, name: str, until_s: float, turns: Counter[str], errors: list[str]
) -> None:
    activity, pause_seconds = _ACTIVITIES[name]
    while time.monotonic() < until_s:
        try:
            await activity(client, turns[name])
        except Exception as error:
            errors.append(f"{time.strftime('%H:%M:%S', time.gmtime())} {name}: {error!r}"[:300])
            sys.stderr.write(errors[-1] + "\n")
        turns[name] += 1
        await asyncio.sleep(pause_seconds)


def _processes(pid: int) -> Iterator[int]:
    """The service and its children; not theirs: Valkey forks for a while to write its file."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        yield from map(int, (task / "children").read_text().split())


def _figures(pid: int, server: redis.Redis) -> dict[str, float]:
    """Memory in MiB, descriptors and threads of each process, and the keys of the server."""
    figures: dict[str, float] = {}
    for place, one in enumerate(_processes(pid)):
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{one}/status").read_text().splitlines()
        )
        name = f"{place}-{status['Name'].strip()}"
        figures[f"{name} MiB"] = round(int(status["VmRSS"].split()[0]) / 1024, 1)
        figures[f"{name} fds"] = len(os.listdir(f"/proc/{one}/fd"))
        figures[f"{name} threads"] = int(status["Threads"])
    memory: Any = server.info("memory")
    figures["used_memory MiB"] = round(memory["used_memory"] / (1 << 20), 1)
    clients: Any = server.info("clients")
    figures["connections"] = clients["connected_clients"]
    figures["keys"] = server.dbsize()
    return figures


async def _sample(
    pid: int, server: redis.Redis, seconds: float, path: Path, turns: Counter[str]
) -> None:
    began = time.monotonic()
    with path.open("w", newline="") as file:
        writer: Any = None
        while True:
            row = {"seconds": round(time.monotonic() - began), **_figures(pid, server)}
            row |= {f"turns {name}": turns[name] for name in _ACTIVITIES}
            writer = writer or csv.DictWriter(file, list(row), extrasaction="ignore")
            if row["seconds"] == 0:
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            await asyncio.sleep(seconds)


def _place_models(folder: Path) -> None:
    shutil.copytree(_SHIPPED / "iris", folder / "iris")
    batch: list[str | int] = ["batch"]
    for name, width, nodes, weights, outputs in (
        ("mean", 64 << 10, [helper.make_node("ReduceMean", ["x", "axes"], ["y"])], "axes", 1),
        ("wide", 4, [helper.make_node("Tile", ["x", "times"], ["y"])], "times", 4 * _TILES),
    ):
        values = np.array([1] if weights == "axes" else [1, _TILES], np.int64)
        graph = helper.make_graph(
            nodes,
            name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [*batch, width])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*batch, outputs])],
            [numpy_helper.from_array(values, weights)],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        (folder / name / "1").mkdir(parents=True)
        onnx.save(model, folder / name / "1" / "model.onnx")


async def _run(arguments: argparse.Namespace) -> None:
    turns, errors = Counter[str](), list[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _place_models(folder / "models")
        port = free_port()
        environ = {**os.environ, "PORT": str(port), "DATA_DIR": str(folder / "data")}
        environ |= {"MODEL_DIR": str(folder / "models"), "JOB_TTL": str(_JOB_TTL_SECONDS)}
        argv = (sys.executable, "-m", "asyncinfer", "serve")
        with arguments.csv.with_suffix(".log").open("wb") as output:
            service = child_process.spawn(
                argv, death_signal=signal.SIGTERM, env=environ, output=output
            )
            try:
                await until(lambda: answers(port, "/models/wide"), "the models")
                await _load(service.pid, port, folder / "data", arguments, turns, errors)
            finally:
                await service.stop(20)
    _print_growth(arguments.csv, turns, errors)


async def _load(
    pid: int,
    port: int,
    data: Path,
    arguments: argparse.Namespace,
    turns: Counter[str],
    errors: list[str],
) -> None:
    until_s = time.monotonic() + 3600 * arguments.hours
    server = _server(data)
    sampler = asyncio.create_task(
        _sample(pid, server, arguments.sample_seconds, arguments.csv, turns)
    )
    client = AsyncClient(f"http://127.0.0.1:{port}", retries=0)
    async with client, asyncio.TaskGroup() as users:
        for activity in _ACTIVITIES:
            users.create_task(_repeat(client, activity, until_s, turns, errors))
    sampler.cancel()
    server.close()


def _server(data: Path) -> redis.Redis:
    (socket,) = data.rglob("*.sock")
    return redis.Redis(unix_socket_path=str(socket))


def _print_growth(path: Path, turns: Counter[str], errors: list[str]) -> None:
    """Prints each figure at five times, and its growth an hour over the last two thirds."""
    with path.open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    hours = np.array([row["seconds"] for row in rows]) / 3600
    last = slice(len(rows) // 3, None)
    for name in rows[0]:
        if name.startswith(("turns", "seconds")):
            continue
        values = np.array([row[name] for row in rows])
        shown = [f"{values[round(part * (len(values) - 1))]:g}" for part in (0, 0.1, 0.4, 0.7, 1)]
        growth = np.polyfit(hours[last], values[last], 1)[0] if len(hours[last]) > 2 else 0.0
        sys.stdout.write(
            f"{name}: {' '.join(shown)}, highest {values.max():g}, {growth:+.2f} an hour\n"
        )
    sys.stdout.write(f"turns: {dict(turns)}\nerrors: {len(errors)} {errors[:10]}\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.endurance", description=__doc__
    )
    parser.add_argument("--hours", type=float, default=3.0)
    parser.add_argument("--sample-seconds", type=float, default=60)
    parser.add_argument("--csv", type=Path, default=Path("endurance.csv"))
    asyncio.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
