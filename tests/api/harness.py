"""Helpers that start an API, announce models and finish jobs."""

import asyncio
import gc
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from typing import Any, NamedTuple, TypeVar, cast

import anyio
import httpx2
import msgspec

from asyncinfer import jobs
from asyncinfer.api.app import create_app
from asyncinfer.api.config import ApiConfig
from asyncinfer.api.http.connection import Connection
from asyncinfer.api.http.sockets import listen
from asyncinfer.api.live.inbox import Ticket
from asyncinfer.api.server import Server
from asyncinfer.models.signature import Signature
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.claims import Claim, ClaimedJob, ClaimRequest, JobOutcome, QueueConsumer
from asyncinfer.repository.store import Store
from asyncinfer.tensors.datatypes import TensorSpec
from tests.faults.harness import eventually, stop_listening
from tests.faults.proxy import Proxy

T = TypeVar("T")

QUEUE = "predict_queue"
ROW = [[5.1, 3.5, 1.4, 0.2]]
KEYS = (
    ("alice", "alice", "submit,read,admin"),
    ("alice-2", "alice", "submit,read"),
    ("reader", "alice", "read"),
    ("sender", "alice", "submit"),
    ("bob", "bob", "submit,read"),
    ("ops", "ops", "operator"),
)
"""Each API key of the fixtures, its tenant and its scopes."""
RESULT = {"prediction": 0, "class_name": "setosa", "probabilities": [1.0, 0.0, 0.0]}
COLUMNS = {"iris": 4, "digits": 64}


@asynccontextmanager
async def running(config: ApiConfig) -> AsyncIterator[int]:
    """Runs an API in this event loop, on a real socket; its port."""
    async with running_server(config) as (server, port):
        yield port
        # Does what uvicorn's shutdown does, without its pauses.
        connections = server.server_state.connections
        for connection in list(connections):
            connection.shutdown()
        await eventually(lambda: not connections, "all connections are closed")


@asynccontextmanager
async def running_until_signal(config: ApiConfig) -> AsyncIterator[int]:
    """`running`, but stopped at the end as by a signal."""
    async with running_server(config) as (server, port):
        yield port
        server.should_exit = True
        await eventually(lambda: not server.servers[0].is_serving(), "the server stops listening")
        await eventually(lambda: not server.server_state.connections, "all requests are answered")


@asynccontextmanager
async def running_server(
    config: ApiConfig, connection: type[Connection] = Connection
) -> AsyncIterator[tuple[Server, int]]:
    ready = anyio.Event()
    app = create_app(config)
    server = Server(app, config, on_ready=ready.set, connection=connection)
    with closing(listen("127.0.0.1", 0)) as listener:
        async with app.lifespan(), anyio.create_task_group() as group:
            group.start_soon(server.serve, [listener])
            await ready.wait()
            yield server, listener.getsockname()[1]
            await stop_listening(server.servers[0])
            for open_connection in list(server.server_state.connections):
                cast(Connection, open_connection)._abort()
            group.cancel_scope.cancel()


@asynccontextmanager
async def hosted(context: AbstractAsyncContextManager[T]) -> AsyncIterator[T]:
    """Enters and leaves `context` in a task of its own, for fixtures: pytest-asyncio ends a
    fixture in another task than it began in, and a task group must be left where it was entered."""
    entered: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    leave = asyncio.Event()

    async def host() -> None:
        async with context as value:
            entered.set_result(value)
            await leave.wait()

    task = asyncio.create_task(host())
    task.add_done_callback(lambda _: entered.done() or entered.cancel())
    try:
        yield await entered
    finally:
        leave.set()
        await task


def client_of(port: int, **headers: str) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(
        base_url=f"http://127.0.0.1:{port}",
        headers=headers,
        timeout=30,
        trust_env=False,
        verify=False,
    )


@asynccontextmanager
async def running_client(config: ApiConfig) -> AsyncIterator[httpx2.AsyncClient]:
    """Runs an API; a client of it."""
    async with running(config) as port, client_of(port) as client:
        yield client


def signature(model: str, version: str = "1") -> Signature:
    columns = COLUMNS.get(model, 4)
    return Signature(
        model=model,
        version=version,
        sha256="0" * 64,
        inputs=(TensorSpec("input", "FP32", ("batch", columns)),),
        outputs=(
            TensorSpec("label", "INT64", ("batch",)),
            TensorSpec("probabilities", "FP32", ("batch", 3)),
        ),
        labels=("setosa", "versicolor", "virginica"),
        example=[[1.0] * columns],
    )


async def announce(store: Store, *models: str, default: str | None = None) -> None:
    if default:
        await store.claim_default_model(default)
    announcements = Announcements(store)
    await announcements.announce_models(
        {model: {"1": msgspec.json.encode(signature(model))} for model in models}
    )


class ProxiedApi(NamedTuple):
    """The port of an API, and the proxy between it and Redis."""

    port: int
    proxy: Proxy


class ManualWorker:
    """Claims and finishes jobs as a worker does, one step at a time."""

    def __init__(self, store: Store) -> None:
        self._runs = QueueConsumer(store, "hand")

    async def claim(self, queue: str = QUEUE) -> Claim:
        request = ClaimRequest((queue,), self._runs.new_token(), is_holding=False, max_jobs=100)
        claim = (await self._runs.claim(request)).claim
        assert claim is not None, f"no job waits in {queue}"
        return claim

    async def finish(
        self, claim: Claim, outcome: jobs.Outcome = "completed", body: Any = RESULT
    ) -> None:
        stored = body if isinstance(body, bytes) else msgspec.json.encode(body)
        finished = [
            JobOutcome(job.job_id, outcome, stored, _finished_record(job, claim))
            for job in claim.jobs
        ]
        await self._runs.finish(claim, finished, last=True)

    async def complete(self, queue: str = QUEUE, body: Any = RESULT) -> None:
        await self.finish(await self.claim(queue), body=body)

    async def fail(self, queue: str = QUEUE) -> None:
        body = {"code": "model_failed", "message": "no"}
        await self.finish(await self.claim(queue), "failed", body)


def _finished_record(job: ClaimedJob, claim: Claim) -> bytes:
    if job.record is None:
        return b""
    record = msgspec.structs.replace(
        job.record,
        started_ms=1,
        finished_ms=2,
        worker=claim.token.rpartition(":")[0],
        claim=claim.token,
        ran_version="1",
        ran_sha256="a" * 64,
    )
    return jobs.encode_record(record, jobs.record_seq(job.meta))


async def submit(client: httpx2.AsyncClient, **more: Any) -> str:
    """Submits one row to the default model; returns the job's id."""
    reply = await client.post("/predict", json={"data": ROW}, **more)
    assert reply.status_code == 202, reply.text
    job_id: str = reply.json()["job_id"]
    return job_id


def assert_problem(reply: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    """Asserts that `reply` is a complete problem with this status and code; returns its body."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = reply.json()
    assert (body["status"], body["code"]) == (status, code), body
    assert body["title"]
    assert body["detail"]
    assert "Traceback" not in reply.text
    return body


async def raw_exchange(
    port: int, sent: bytes, seconds: float = 20.0, *, half_close: bool = False
) -> bytes:
    """Sends bytes, and with `half_close` their end; returns everything the server answers until it
    closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(seconds):
            writer.write(sent)
            if half_close:
                writer.write_eof()
            return await reader.read()
    finally:
        writer.close()


def reset(writer: asyncio.StreamWriter) -> None:
    """Closes both directions of the connection at once, so that the server knows of both."""
    taken = writer.get_extra_info("socket")
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def count_waiters() -> int:
    """How many requests wait for the end of a job, in all APIs of this process."""
    gc.collect()
    return sum(isinstance(referent, Ticket) for referent in gc.get_objects())
