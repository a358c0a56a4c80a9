"""A `serve` stays within the memory that compose.yaml gives it, whatever clients upload."""

import asyncio
import io
import logging
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import numpy as np
import pytest
import yaml

from asyncinfer.models.signature import Signature
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.store import Store
from asyncinfer.tensors.datatypes import TensorSpec
from tests.faults.harness import eventually
from tests.process import REPOSITORY
from tests.serving import ServeProcess, running_serve

COLUMNS = 1000
ROWS = 4190
"""16.0 MiB of float32, just below MAX_BODY."""
UPLOADS = 60
HELD_MIB = 100
"""Most of MAX_INFLIGHT_BYTES."""

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc"),
]


def body() -> bytes:
    file = io.BytesIO()
    np.save(file, np.ones((ROWS, COLUMNS), np.float32))
    return file.getvalue()


def limit_mib() -> int:
    """The memory of the service `serve` in compose.yaml."""
    compose = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())
    memory = compose["services"]["serve"]["deploy"]["resources"]["limits"]["memory"]
    assert memory.endswith("M")
    return int(memory[:-1])


def peak_mib(serve: ServeProcess) -> float:
    status = Path(f"/proc/{serve.process.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


async def announce_wide(store: Store) -> None:
    wide = Signature(
        model="wide",
        version="1",
        sha256="0" * 64,
        inputs=(TensorSpec("x", "FP32", ("batch", COLUMNS)),),
        outputs=(TensorSpec("y", "FP32", ("batch", COLUMNS)),),
    )
    await store.claim_default_model("wide")
    await Announcements(store).announce_models({"wide": {"1": msgspec.json.encode(wide)}})


async def upload(port: int, sent: bytes, rest: bytes, proceed: asyncio.Event) -> int:
    """Sends a body, and `rest` when told to; the status of the answer, which may come before."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def send_rest() -> None:
        await proceed.wait()
        writer.write(rest)

    sending = asyncio.create_task(send_rest())
    try:
        head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-npy\r\n"
        writer.write(head + b"Content-Length: %d\r\n\r\n" % (len(sent) + len(rest)))
        writer.write(sent)
        return int((await reader.readline()).split()[1])
    finally:
        sending.cancel()
        writer.close()


async def test_sixty_open_uploads_leave_serve_within_its_memory(
    store: Store, redis_url: str
) -> None:
    await announce_wide(store)
    whole = body()
    with running_serve(REDIS_URL=redis_url) as serve:
        port = urlsplit(serve.banner["URL"]).port
        assert port is not None
        before_mib = peak_mib(serve)
        proceed = asyncio.Event()
        async with asyncio.timeout(120), asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(upload(port, whole[:-1], whole[-1:], proceed))
                for _ in range(UPLOADS)
            ]
            await eventually(
                lambda: peak_mib(serve) > before_mib + HELD_MIB, "many bodies are received"
            )
            open_mib = peak_mib(serve)
            proceed.set()
        answers = [task.result() for task in tasks]
        logging.info(
            "Peak: %.0f MiB while open, %.0f at the end; %d of %d accepted.",
            *(open_mib, peak_mib(serve), answers.count(202), UPLOADS),
        )
        assert set(answers) <= {202, 503}
        assert peak_mib(serve) < limit_mib()
