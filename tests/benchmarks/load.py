"""The client: keep-alive connections that each send their next request at the last one's answer.

A process of its own; `python -m tests.benchmarks.load` reads a plan and prints what it measured.
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
_LONGEST_SECONDS: Final = 120


class Plan(Struct, frozen=True, kw_only=True):
    """`submit` ends with the 202, `wait` asks with `Prefer: wait`, `poll` with GET until done;
    `lines` sends all in one request, one a line."""

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
    client_cpu: float
    """Cores that the client itself used: near 1 it was the bottleneck."""


class _Client(asyncio.Protocol):
    def __init__(self, plan: Plan, left: list[int], taken: list[float]) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._plan = plan
        self._request = _request(plan)
        self._left = left
        self._taken = taken
        self._buffer = b""
        self._job = b""
        self._since = 0.0
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        self._next()

    def _next(self) -> None:
        if self._left[0] == 0:
            self.done.set_result(None)
            self._transport.close()
            return
        self._left[0] -= 1
        self._since = time.perf_counter()
        self._job = b""
        self._transport.write(self._request)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(f"the server hung up: {error}"))

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
            assert length, f"an answer without a length: {head!r}"
            self._answered(head, rest)
        except AssertionError as error:
            self.done.set_exception(error)

    def _answered(self, head: bytes, body: bytes) -> None:
        assert head[9:11] == b"20", f"{head!r} {body!r}"
        if self._plan.how == "wait":
            assert b'"completed"' in body, f"{body!r}"
        if self._plan.how == "poll" and b'"completed"' not in body:
            self._look_later(body)
            return
        self._taken.append(time.perf_counter() - self._since)
        self._next()

    def _look_later(self, body: bytes) -> None:
        if not self._job:
            job_id = _JOB_ID.search(body)
            assert job_id, f"{body!r}"
            self._job = b"GET /job/%b HTTP/1.1\r\nHost: localhost\r\n\r\n" % job_id[1]
        loop = asyncio.get_running_loop()
        loop.call_later(self._plan.poll_seconds, self._transport.write, self._job)


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
    answer = bytearray()
    async with asyncio.timeout(_LONGEST_SECONDS):
        while not answer.endswith(b"\r\n0\r\n\r\n"):
            part = await reader.read(1 << 20)
            assert part, f"the server hung up after {bytes(answer[-300:])!r}"
            answer += part
    seconds = time.perf_counter() - since
    writer.close()
    accepted = answer.count(b'"status":"pending"')
    assert accepted == plan.requests, f"{accepted} of {plan.requests} lines were accepted"
    return Load(
        per_second=plan.requests / seconds,
        p50_ms=1000 * seconds,
        p99_ms=1000 * seconds,
        client_cpu=(_cpu_seconds() - cpu) / seconds,
    )


async def _run(plan: Plan) -> Load:
    if plan.how == "lines":
        return await _run_lines(plan)
    loop = asyncio.get_running_loop()
    left, taken = [plan.requests], list[float]()
    clients = [_Client(plan, left, taken) for _ in range(plan.connections)]
    cpu, since = _cpu_seconds(), time.perf_counter()
    for client in clients:
        await loop.create_connection(lambda client=client: client, "127.0.0.1", plan.port)  # type: ignore[misc]
    async with asyncio.timeout(_LONGEST_SECONDS):
        for client in clients:
            await client.done
    seconds = time.perf_counter() - since
    taken.sort()
    return Load(
        per_second=len(taken) / seconds,
        p50_ms=1000 * taken[len(taken) // 2],
        p99_ms=1000 * taken[int(len(taken) * 0.99)],
        client_cpu=(_cpu_seconds() - cpu) / seconds,
    )


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def run(plan: Plan) -> Load:
    """Runs the client in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.benchmarks.load"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        with anyio.fail_after(_LONGEST_SECONDS + 10):
            output, _ = await process.communicate(msgspec.json.encode(plan))
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, "the client failed; what it said is above"
    return msgspec.json.decode(output, type=Load)


if __name__ == "__main__":
    _plan = msgspec.json.decode(sys.stdin.buffer.read(), type=Plan)
    sys.stdout.buffer.write(msgspec.json.encode(uvloop.run(_run(_plan))))
