"""The load client: keep-alive connections that each send a request after the last reply.

It is a process of its own: `python -m tests.benchmarks.load` reads a plan and prints the result.
"""

import asyncio
import re
import resource
import sys
import time
from typing import Final, Literal, cast

import anyio
import msgspec
import uvloop
from msgspec import Struct

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_JOB_ID = re.compile(rb'"job_id": ?"([^"]+)"')
_TIME_OUT_SECONDS: Final = 120


class Plan(Struct, frozen=True, kw_only=True):
    """The requests of a load.

    `submit` ends with the 202, `wait` uses `Prefer: wait`, `poll` sends GET requests until the job
    is completed; `lines` sends all jobs in one request, a line each.
    """

    port: int
    how: Literal["submit", "wait", "poll", "get", "lines"]
    requests: int
    connections: int
    body: bytes = b""
    path: str = "/predict"
    headers: tuple[str, ...] = ("Content-Type: application/json",)
    poll_seconds: float = 0.001


class Load(Struct, frozen=True):
    per_second: float
    p50_ms: float
    p99_ms: float
    client_cores: float
    """The CPU cores that the client used: near 1 it was the bottleneck."""


class _Client(asyncio.Protocol):
    def __init__(self, plan: Plan, remaining: list[int], seconds: list[float]) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._plan = plan
        self._request = _request(plan)
        self._remaining = remaining
        self._seconds = seconds
        self._buffer = b""
        self._poll_request = b""
        self._sent_at = 0.0
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's class does not inherit from it.
        self._transport = cast(asyncio.Transport, transport)
        self._send_next()

    def _send_next(self) -> None:
        if self._remaining[0] == 0:
            self.done.set_result(None)
            self._transport.close()
            return
        self._remaining[0] -= 1
        self._sent_at = time.perf_counter()
        self._poll_request = b""
        self._transport.write(self._request)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(f"the server closed the connection: {error}"))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = _LENGTH.search(head)
        if length and len(rest) < int(length[1]):
            return
        self._buffer = b""
        try:
            assert length, f"a reply without a length: {head!r}"
            self._handle_reply(head, rest)
        except AssertionError as error:
            self.done.set_exception(error)

    def _handle_reply(self, head: bytes, body: bytes) -> None:
        assert head[9:11] == b"20", f"{head!r} {body!r}"
        if self._plan.how == "wait":
            assert b'"completed"' in body, f"{body!r}"
        if self._plan.how == "poll" and b'"completed"' not in body:
            self._poll_later(body)
            return
        self._seconds.append(time.perf_counter() - self._sent_at)
        self._send_next()

    def _poll_later(self, body: bytes) -> None:
        if not self._poll_request:
            job_id = _JOB_ID.search(body)
            assert job_id, f"{body!r}"
            self._poll_request = b"GET /job/%b HTTP/1.1\r\nHost: localhost\r\n\r\n" % job_id[1]
        loop = asyncio.get_running_loop()
        loop.call_later(self._plan.poll_seconds, self._transport.write, self._poll_request)


def _request(plan: Plan) -> bytes:
    if plan.how == "get":
        return f"GET {plan.path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    lines = [f"POST {plan.path} HTTP/1.1", "Host: localhost", *plan.headers]
    if plan.how == "wait":
        lines.append("Prefer: wait=30")
    lines += [f"Content-Length: {len(plan.body)}", "", ""]
    return "\r\n".join(lines).encode() + plan.body


async def _run_lines(plan: Plan) -> Load:
    request = _request(msgspec.structs.replace(plan, body=(plan.body + b"\n") * plan.requests))
    reader, writer = await asyncio.open_connection("127.0.0.1", plan.port)
    cpu, since = _cpu_seconds(), time.perf_counter()
    writer.write(request)
    reply = bytearray()
    async with asyncio.timeout(_TIME_OUT_SECONDS):
        while not reply.endswith(b"\r\n0\r\n\r\n"):
            part = await reader.read(1 << 20)
            assert part, f"the server closed the connection after {bytes(reply[-300:])!r}"
            reply += part
    seconds = time.perf_counter() - since
    writer.close()
    accepted = reply.count(b'"status":"pending"')
    assert accepted == plan.requests, f"{accepted} of {plan.requests} lines were accepted"
    return Load(
        per_second=plan.requests / seconds,
        p50_ms=1000 * seconds,
        p99_ms=1000 * seconds,
        client_cores=(_cpu_seconds() - cpu) / seconds,
    )


async def _run(plan: Plan) -> Load:
    if plan.how == "lines":
        return await _run_lines(plan)
    loop = asyncio.get_running_loop()
    remaining, times = [plan.requests], list[float]()
    clients = [_Client(plan, remaining, times) for _ in range(plan.connections)]
    cpu, since = _cpu_seconds(), time.perf_counter()
    for client in clients:
        await loop.create_connection(lambda client=client: client, "127.0.0.1", plan.port)  # type: ignore[misc]
    async with asyncio.timeout(_TIME_OUT_SECONDS):
        for client in clients:
            await client.done
    seconds = time.perf_counter() - since
    times.sort()
    return Load(
        per_second=len(times) / seconds,
        p50_ms=1000 * times[len(times) // 2],
        p99_ms=1000 * times[int(len(times) * 0.99)],
        client_cores=(_cpu_seconds() - cpu) / seconds,
    )


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def run(plan: Plan) -> Load:
    """Runs the client in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.benchmarks.load"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        with anyio.fail_after(_TIME_OUT_SECONDS + 10):
            output, _ = await process.communicate(msgspec.json.encode(plan))
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, "the client failed; its output is above"
    return msgspec.json.decode(output, type=Load)


if __name__ == "__main__":
    _plan = msgspec.json.decode(sys.stdin.buffer.read(), type=Plan)
    sys.stdout.buffer.write(msgspec.json.encode(uvloop.run(_run(_plan))))
