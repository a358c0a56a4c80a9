"""The two measured systems, each on a Valkey of its own with the same settings."""

import os
import signal
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import anyio
import msgspec
import numpy as np
import redis
from msgspec import Struct

from asyncinfer import jobs
from asyncinfer.api.inputs.request_input import MAX_JSON_PAYLOAD_BYTES
from asyncinfer.processes import child_process, valkey
from asyncinfer.processes.child_process import Child
from asyncinfer.repository import keys
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from asyncinfer.repository.submissions import NewJob, Submissions
from asyncinfer.tensors import packing
from tests.ports import free_port

MAX_QUEUE: Final = 5_000_000
MAX_QUEUE_BYTES: Final = 16 << 30
MAX_JSON: Final = 16 << 20
_TICKS: Final = os.sysconf("SC_CLK_TCK")


class Common:
    """A Valkey, an API and workers, as both systems have them."""

    def __init__(self, name: str, url: str, folder: Path, output: Any) -> None:
        self.name = name
        self.port = free_port()
        self.url = url
        self.redis = redis.Redis.from_url(url)
        server: Any = self.redis.info("server")
        self.redis_pid = int(server["process_id"])
        self.folder = folder
        self.workers: list[Child] = []
        self.api: Child
        self._output = output

    def spawn(self, *argv: str, **environ: str) -> Child:
        environment = {**os.environ, "REDIS_URL": self.url, **environ}
        return child_process.spawn(
            (sys.executable, *argv),
            death_signal=signal.SIGKILL,
            env=environment,
            output=self._output,
        )

    async def stop(self) -> None:
        for child in [*self.workers, self.api]:
            child.signal(signal.SIGCONT)
            await child.stop(5)


class Service(Common):
    """asyncinfer: an API, and workers of one process each."""

    def list_of(self, model: str) -> str:
        return keys.queue("predict_queue", model, "iris")

    async def start_api(self) -> None:
        self.api = self.spawn(
            "-m", "asyncinfer", "serve", PORT=str(self.port), MAX_QUEUE=str(MAX_QUEUE),
            MAX_QUEUE_BYTES=str(MAX_QUEUE_BYTES), MAX_JSON=str(MAX_JSON),
        )  # fmt: skip
        await until(lambda: answers(self.port, "/health/ready"), "the API")

    async def start_workers(self, count: int, model: str) -> None:
        before = len(self.workers)
        models = str(self.folder)
        for _ in range(count):
            self.workers.append(self.spawn("-m", "asyncinfer", "work", MODEL_DIR=models))
        if not count:
            return
        await until(lambda: answers(self.port, f"/models/{model}"), "the model's announcement")
        await until(lambda: self._workers_of(model) >= before + count, "the workers")

    async def enqueue(self, model: str, inputs: Sequence[bytes]) -> list[str]:
        policy = Policy(max_queue=MAX_QUEUE, max_queue_bytes=MAX_QUEUE_BYTES)
        queue, now_ms = self.list_of(model), time.time_ns() // 1_000_000
        record = jobs.Record(
            schema=jobs.SCHEMA, queue=queue, model=model, tenant=jobs.DEFAULT_TENANT,
            created_ms=now_ms, options=jobs.Options(),
        )  # fmt: skip
        if len(inputs[0]) > MAX_JSON_PAYLOAD_BYTES:
            record = msgspec.structs.replace(record, payload="tensors")
            inputs = _pack(inputs, input_name=self._input_name(model))
        new_jobs = [NewJob(jobs.new_id(now_ms), queue, data, record) for data in inputs]
        open_store = Store.open(
            self.url, queue_name="predict_queue", policy=policy, name="load", call_seconds=30
        )
        async with open_store as store:
            for start in range(0, len(new_jobs), 128):
                await Submissions(store).submit_many(queue, new_jobs[start : start + 128])
        return [job.job_id for job in new_jobs]

    def _workers_of(self, model: str) -> int:
        """The number of workers that serve a model."""
        return int(self._model(model)["workers"])

    def _input_name(self, model: str) -> str:
        return str(self._model(model)["inputs"][0]["name"])

    def _model(self, model: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/models/{model}") as reply:
            description: dict[str, Any] = msgspec.json.decode(reply.read())
            return description


class Plain(Common):
    """The plain pattern: FastAPI, and workers that take one job at a time."""

    def list_of(self, model: str) -> str:
        return "predict_queue"

    async def start_api(self) -> None:
        self.api = self.spawn(
            "-m", "uvicorn", "tests.benchmarks.plain.api:app", "--port", str(self.port),
            "--no-access-log", "--log-level", "warning",
        )  # fmt: skip
        await until(lambda: answers(self.port, "/health"), "the plain API")

    async def start_workers(self, count: int, model: str) -> None:
        path = self.folder / model / "1" / "model.onnx"
        total = len(self.workers) + count
        for _ in range(count):
            self.workers.append(self.spawn("-m", "tests.benchmarks.plain.worker", str(path)))
        await until(
            lambda: int(self.redis.info("clients")["blocked_clients"]) >= total,
            "the plain workers",
        )

    async def enqueue(self, model: str, inputs: Sequence[bytes]) -> list[str]:
        pipeline = self.redis.pipeline(transaction=False)
        names = [f"{os.urandom(16).hex()}" for _ in inputs]
        for job_id, data in zip(names, inputs, strict=True):
            pipeline.set(f"job:{job_id}:data", data)
            pipeline.set(f"job:{job_id}:status", "pending")
            pipeline.lpush("predict_queue", job_id)
        pipeline.execute()
        return names


def _pack(texts: Sequence[bytes], *, input_name: str) -> list[bytes]:
    """Packs long JSON inputs as the API stores them."""
    packed = {
        text: packing.pack({input_name: np.array(msgspec.json.decode(text), np.float32)})
        for text in set(texts)
    }
    return [packed[text] for text in texts]


System: TypeAlias = Service | Plain
SystemT = TypeVar("SystemT", Service, Plain)


@asynccontextmanager
async def running(
    kind: type[SystemT], models: Path, folder: Path, *, workers: int, model: str = "iris"
) -> AsyncIterator[SystemT]:
    """Starts a new Valkey, an API and workers; stops all at the end."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(valkey.embedded(folder))
        output = stack.enter_context((folder / "output.log").open("wb"))
        system = kind(kind.__name__.lower(), _over_tcp(server.url), models, output)
        stack.push_async_callback(system.stop)
        await system.start_api()
        await system.start_workers(workers, model)
        yield system


def _over_tcp(url: str) -> str:
    """Opens a TCP port: both systems connect to their Redis as to one on another machine."""
    port = free_port()
    with redis.Redis.from_url(url) as client:
        client.config_set("port", port)
    return f"redis://127.0.0.1:{port}"


class Usage(Struct, frozen=True):
    cpu_seconds: float
    rss_mib: float


def usage(pid: int) -> Usage:
    """CPU time and memory of a process (Linux only: it reads /proc)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return Usage(
        (int(fields[11]) + int(fields[12])) / _TICKS, pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
    )


def exact_cpu_seconds(pid: int) -> float:
    """CPU time of the threads that a process has now, to the nanosecond; `usage` counts in
    hundredths of a second."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def reset_peak_mib(pid: int) -> float:
    """Resets the peak that `peak_mib` reads; returns the memory that the process has now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return usage(pid).rss_mib


def peak_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def answers(port: int, path: str, *, body: bytes | None = None) -> bool:
    """Whether a GET, or a POST that waits for its result, is answered with 200."""
    headers = {"Content-Type": "application/json", "Prefer": "wait=10"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=10 if body else 1) as reply:
            return int(reply.status) == 200
    except OSError:
        return False


async def until(
    condition: Callable[[], bool],
    description: str,
    seconds: float = 30,
    step_seconds: float = 0.005,
) -> None:
    """Waits until `condition` returns true; raises TimeoutError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{description}: not after {seconds:g} s")
        await anyio.sleep(step_seconds)
