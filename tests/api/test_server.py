"""The server's start and stop: it starts or says why not, and returns after a signal."""

import asyncio
import logging
import os
import signal

import httpx2
import msgspec
import pytest
import redis
import uvicorn
from uvicorn.server import ServerState

from asyncinfer.api.app import create_app
from asyncinfer.api.config import ApiConfig
from asyncinfer.api.http.sockets import listen
from asyncinfer.api.server import serve, unexpected
from asyncinfer.errors import DefaultModelChanged, ServerRefused, StartError
from asyncinfer.repository.store import Store
from asyncinfer.repository.submissions import Submissions
from tests.queue_driver import Q, new_job

from .harness import announce, assert_problem, client_of, running_until_signal, submit


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_server_returns_after_a_signal(
    config: ApiConfig, store: Store, number: signal.Signals
) -> None:
    ready = asyncio.Event()
    config = msgspec.structs.replace(config, port=0)
    before = signal.getsignal(number)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(serve(config, on_ready=ready.set))
        await ready.wait()
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


@pytest.mark.soak
async def test_a_body_that_does_not_end_is_refused_when_the_server_stops(
    config: ApiConfig, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    await announce(store, "iris", default="iris")
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 30\r\n"
    types = (b"application/json", b"application/x-npy", b"application/x-ndjson")
    async with running_until_signal(config) as port:
        streams = [await asyncio.open_connection("127.0.0.1", port) for _ in types]
        for kind, (_, writer) in zip(types, streams, strict=True):
            writer.write(head + b"Content-Type: " + kind + b"\r\n\r\n{")
        async with client_of(port) as client:
            await submit(client)
    for _, writer in streams:
        writer.close()
    answers = [await reader.read() for reader, _ in streams]
    for kind, answer in zip(types, answers, strict=True):
        assert b"server_stopping" in answer, (kind, answer)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_server_that_loses_jobs_stops_the_start(
    config: ApiConfig, server: redis.Redis
) -> None:
    server.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(ServerRefused, match="noeviction"):
            await serve(msgspec.structs.replace(config, port=0), on_ready=lambda: None)
    finally:
        server.config_set("maxmemory-policy", "noeviction")


async def test_another_default_model_stops_the_start_while_a_job_waits(
    config: ApiConfig, store: Store
) -> None:
    await store.claim_default_model("iris")
    await Submissions(store).submit_many(Q, [new_job()])
    with pytest.raises(DefaultModelChanged, match="iris"):
        await serve(
            msgspec.structs.replace(config, port=0, default_model="digits"), on_ready=lambda: None
        )


def test_uvicorn_is_as_expected() -> None:
    assert unexpected(ServerState()) is None
    for name in ("startup", "shutdown", "handle_exit"):
        assert hasattr(uvicorn.Server, name), f"uvicorn calls no Server.{name} that we extend"


def test_what_uvicorn_lacks_is_named_at_the_start() -> None:
    assert "has no ServerState.connections" in str(unexpected(object()))


def test_a_port_in_use_stops_the_start_and_says_what_to_do() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(StartError, match="another HOST or PORT"):
        listen("127.0.0.1", taken.getsockname()[1])


@pytest.mark.traceback("asks an application that was not started")
async def test_an_unexpected_error_is_a_500_without_internals_and_one_log_entry(
    config: ApiConfig, caplog: pytest.LogCaptureFixture
) -> None:
    never_started = httpx2.ASGITransport(app=create_app(config))
    with caplog.at_level(logging.ERROR):
        async with httpx2.AsyncClient(transport=never_started, base_url="http://localhost") as it:
            assert "lifespan" not in assert_problem(await it.get("/"), 500, "internal_error")
    assert len(caplog.records) == 1
    assert caplog.records[0].exc_info
