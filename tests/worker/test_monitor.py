"""The monitor port of a worker: health, metrics, and requests that are malformed or too slow."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from socket import create_connection, socket

import msgspec
import pytest

from asyncinfer.cli import main
from asyncinfer.monitoring.port import Answer, open_listener, serve_pages
from asyncinfer.worker.monitor import Monitor, serve_monitor
from tests.api.harness import hosted, raw_exchange
from tests.faults.harness import eventually


@pytest.fixture
def listener() -> Iterator[socket]:
    with closing(open_listener("127.0.0.1", 0, "MONITOR")) as listener:
        yield listener


@pytest.fixture
def port(listener: socket) -> int:
    return int(listener.getsockname()[1])


@pytest.fixture
async def monitor(listener: socket) -> AsyncIterator[Monitor]:
    async with hosted(serve_monitor(listener, head_seconds=0.1)) as monitor:
        yield monitor


async def send_request(port: int, path: str, method: str = "GET") -> tuple[str, bytes]:
    """Sends a request; returns the head and the body of the response."""
    raw = await raw_exchange(port, f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head, _, body = raw.partition(b"\r\n\r\n")
    return head.decode(), body


def assert_problem(answer: tuple[str, bytes], status: int, code: str) -> str:
    head, body = answer
    assert head.startswith(f"HTTP/1.1 {status} "), head
    assert "content-type: application/problem+json" in head
    problem = msgspec.json.decode(body)
    assert (problem["status"], problem["code"]) == (status, code)
    return str(problem["detail"])


async def test_it_lives_before_it_is_ready(monitor: Monitor, port: int) -> None:
    assert (await send_request(port, "/health/live"))[1] == b'{"status":"ok"}'
    assert "Redis" in assert_problem(await send_request(port, "/health/ready"), 503, "not_ready")
    monitor.why_not_ready = lambda: None
    assert (await send_request(port, "/health/ready"))[1] == b'{"status":"ok"}'
    monitor.why_not_ready = lambda: "It drains."
    assert (
        assert_problem(await send_request(port, "/health/ready"), 503, "not_ready") == "It drains."
    )


@pytest.mark.usefixtures("monitor")
async def test_before_the_worker_has_started_there_are_no_metrics(port: int) -> None:
    assert_problem(await send_request(port, "/metrics"), 503, "not_ready")


@pytest.mark.usefixtures("monitor")
async def test_an_unknown_path_or_method_gets_a_problem_as_the_api_gives_it(port: int) -> None:
    assert_problem(await send_request(port, "/predict"), 404, "route_not_found")
    refused = await send_request(port, "/health/live", "POST")
    assert_problem(refused, 405, "method_not_allowed")
    assert "allow: GET, HEAD" in refused[0]
    assert (await send_request(port, "/health/live", "HEAD"))[1] == b""


@pytest.mark.usefixtures("monitor")
@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 2000, b"431"),
        (b"GET /health/live HT", b"408"),
        (b"", b""),
    ],
)
async def test_bytes_that_are_no_request_are_refused_in_time(
    sent: bytes, status: bytes, port: int
) -> None:
    raw = await raw_exchange(port, sent, seconds=2)
    assert raw.startswith(b"HTTP/1.1 %b " % status if status else b"")
    assert bool(raw) == bool(status)


async def test_a_client_that_closes_its_sending_side_gets_its_answer(
    listener: socket, port: int
) -> None:
    release = asyncio.Event()

    async def page() -> Answer:
        await release.wait()
        return Answer(200, b"page")

    async with serve_pages(listener, {"/": page}):
        request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
        answer = asyncio.create_task(raw_exchange(port, request, half_close=True))
        assert await raw_exchange(port, request[:-1], half_close=True) == b""
        # The end of the first request came before this one.
        assert_problem(await send_request(port, "/other"), 404, "route_not_found")
        release.set()
        assert (await answer).endswith(b"\r\n\r\npage")


@pytest.mark.usefixtures("monitor")
async def test_silent_connections_do_not_keep_a_probe_out(port: int) -> None:
    """The connection that is silent for longest is closed at once."""
    silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(64)]
    async with asyncio.timeout(1):
        assert (await send_request(port, "/health/live"))[1] == b'{"status":"ok"}'
        assert await silent[0][0].read() == b""
    for _, writer in silent:
        writer.close()


async def test_a_client_that_does_not_read_its_answer_is_disconnected(
    listener: socket, port: int
) -> None:
    async def large_page() -> Answer:
        return Answer(200, bytes(32 << 20))

    async with hosted(serve_pages(listener, {"/metrics": large_page}, head_seconds=0.1)):
        with closing(create_connection(("127.0.0.1", port))) as client:
            open_files = len(os.listdir("/proc/self/fd"))
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            await eventually(
                lambda: len(os.listdir("/proc/self/fd")) == open_files + 1, "it is accepted"
            )
            await eventually(lambda: len(os.listdir("/proc/self/fd")) == open_files, "it is closed")


async def test_an_unexpected_error_of_a_page_is_a_problem_and_in_the_log(
    listener: socket, port: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken_page() -> Answer:
        raise ArithmeticError("a bug")

    async with hosted(serve_pages(listener, {"/metrics": broken_page})):
        assert_problem(await send_request(port, "/metrics"), 500, "internal_error")
    assert "ArithmeticError: a bug" in caplog.text


def test_a_port_in_use_stops_the_start_and_says_what_to_do(
    port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    work = ("work", "--redis-url", "unix:///nowhere", "--monitor-port", str(port))
    assert main(work) == 2
    message = capsys.readouterr().err
    assert f"127.0.0.1:{port}" in message
    assert "MONITOR_PORT" in message
