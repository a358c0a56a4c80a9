"""Large bodies that are being received take a bounded amount of memory, over all connections."""

import asyncio
import contextlib
import gc
import io
import re
import time
from collections.abc import AsyncIterator
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
import redis

from asyncinfer.api.config import ApiConfig
from asyncinfer.api.figures import RequestFigures
from asyncinfer.api.http.byte_budget import SMALL_BODY_BYTES, ByteBudget
from asyncinfer.repository.store import Store
from asyncinfer.repository.submissions import NewJob
from tests.faults.harness import eventually
from tests.faults.proxy import proxied

from .harness import QUEUE, ROW, ManualWorker, announce, client_of, hosted, running_server, submit

LIMIT_BYTES = 450_000
"""Room for two bodies of `BODY`."""
LINE_BYTES = 200_000


class Uploads(NamedTuple):
    """An API with its budgets for requests and for answers."""

    port: int
    budget: ByteBudget
    downloads: ByteBudget
    figures: RequestFigures

    async def all_given_back(self) -> None:
        await eventually(
            lambda: self.budget.taken_bytes == self.downloads.taken_bytes == 0,
            "all bytes are given back",
        )


def npy_of(rows: int) -> bytes:
    """An array for iris as numpy saves it."""
    file = io.BytesIO()
    np.save(file, np.ones((rows, 4), np.float32))
    return file.getvalue()


BODY = npy_of(10_000)
assert 2 * len(BODY) < LIMIT_BYTES < 3 * len(BODY)
NPY = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-npy\r\n"
HEAD = NPY + b"Content-Length: %d\r\n\r\n" % len(BODY)
LINES = (
    b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-ndjson\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


@pytest.fixture
def limits(config: ApiConfig) -> ApiConfig:
    return msgspec.structs.replace(
        config,
        max_body_bytes=len(BODY),
        max_json_bytes=LINE_BYTES,
        max_inflight_bytes=LIMIT_BYTES,
    )


@pytest.fixture
async def uploads(limits: ApiConfig, store: Store) -> AsyncIterator[Uploads]:
    async with hosted(serving(limits, store)) as uploads:
        yield uploads


@contextlib.asynccontextmanager
async def serving(config: ApiConfig, store: Store) -> AsyncIterator[Uploads]:
    await announce(store, "iris", default="iris")
    async with running_server(config) as (server, port):
        yield Uploads(port, server._app.uploads, server._app.downloads, server._app.request_figures)


def chunk_of(part: bytes) -> bytes:
    """The part as a chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(part), part)


class Upload:
    """A connection that sends a request part by part."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, part: bytes) -> None:
        self.writer.write(part)

    async def answer(self) -> tuple[int, bytes]:
        """The status of the next answer that is no `100 Continue`, and its head."""
        async with asyncio.timeout(20):
            head = await self.reader.readuntil(b"\r\n\r\n")
        return int(head.split()[1]), head

    async def read_chunks(self) -> None:
        """Reads the rest of an answer that is sent in chunks."""
        last = b""
        async with asyncio.timeout(20):
            while not last.endswith(b"\r\n0\r\n\r\n"):
                last = last[-10:] + await self.reader.read(65_536)

    async def code(self) -> str:
        """The code of a problem whose head was read."""
        async with asyncio.timeout(20):
            await self.reader.readuntil(b'"code":"')
            return (await self.reader.readuntil(b'"'))[:-1].decode()


@contextlib.asynccontextmanager
async def connection(port: int, sent: bytes = b"") -> AsyncIterator[Upload]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(sent)
        yield Upload(reader, writer)
    finally:
        writer.close()


@contextlib.asynccontextmanager
async def holding(uploads: Uploads, *sent_bytes: int) -> AsyncIterator[list[Upload]]:
    """Connections whose bodies the API receives, so much of each."""
    async with contextlib.AsyncExitStack() as stack:
        opened = []
        for count in sent_bytes:
            before = uploads.budget.taken_bytes
            sent = HEAD + BODY[:count]
            opened.append(await stack.enter_async_context(connection(uploads.port, sent)))
            await eventually(lambda: uploads.budget.taken_bytes > before, "the body is admitted")  # noqa: B023
        yield opened


async def assert_refused(upload: Upload) -> None:
    status, head = await upload.answer()
    assert status == 503
    assert b"retry-after: 1\r\n" in head
    assert b"connection: close\r\n" in head
    assert await upload.code() == "too_many_uploads"


async def test_an_upload_that_fits_is_accepted_and_given_back(uploads: Uploads) -> None:
    async with connection(uploads.port, HEAD + BODY[:-1]) as upload:
        await eventually(lambda: uploads.budget.taken_bytes == len(BODY), "the body is received")
        upload.send(BODY[-1:])
        assert (await upload.answer())[0] == 202
    await uploads.all_given_back()


async def test_the_slowest_upload_ends_for_a_new_one(uploads: Uploads) -> None:
    async with (
        holding(uploads, len(BODY) // 2, 1000) as (faster, slowest),
        connection(uploads.port, HEAD + BODY) as new,
    ):
        assert (await new.answer())[0] == 202
        await assert_refused(slowest)
        faster.send(BODY[len(BODY) // 2 :])
        assert (await faster.answer())[0] == 202
    await uploads.all_given_back()


async def test_nothing_ends_while_there_is_room(uploads: Uploads) -> None:
    async with holding(uploads, 1000) as (slow,):
        await asyncio.wait_for(uploaded(uploads.port), 20)
        slow.send(BODY[1000:])
        assert (await slow.answer())[0] == 202


async def uploaded(port: int) -> None:
    async with connection(port, HEAD + BODY) as upload:
        assert (await upload.answer())[0] == 202


async def test_many_uploads_at_once_are_all_accepted(uploads: Uploads) -> None:
    """They take their turns: none is refused because of the others."""
    async with asyncio.TaskGroup() as group:
        for _ in range(40):
            group.create_task(uploaded(uploads.port))
    await uploads.all_given_back()


async def test_without_room_a_body_is_refused_before_it_is_read(
    limits: ApiConfig, store: Store
) -> None:
    impatient = msgspec.structs.replace(limits, room_wait_seconds=0.2)
    half = len(BODY) // 2
    async with (
        serving(impatient, store) as uploads,
        holding(uploads, half, half) as held,
        connection(uploads.port, HEAD[:-2] + b"Expect: 100-continue\r\n\r\n") as new,
    ):
        await assert_refused(new)
        assert uploads.budget.taken_bytes == 2 * len(BODY)
        for upload in held:
            upload.send(BODY[half:])
            assert (await upload.answer())[0] == 202
        await uploads.all_given_back()


async def test_a_small_request_needs_no_room(uploads: Uploads) -> None:
    half = len(BODY) // 2
    async with (
        holding(uploads, half, half),
        connection(uploads.port, HEAD),
        client_of(uploads.port) as client,
    ):
        began = time.monotonic()
        assert (await client.post("/predict", json={"data": ROW})).status_code == 202
        padded = b'{"data": [[1, 2, 3, 4]]}'.ljust(SMALL_BODY_BYTES)
        assert (await client.post("/predict", content=padded)).status_code == 202
        assert time.monotonic() - began < 2
        assert uploads.budget.taken_bytes == 2 * len(BODY)


@pytest.mark.parametrize("kind", ["slow", "silent"])
async def test_sixty_slow_uploads_take_no_more_than_the_limit(uploads: Uploads, kind: str) -> None:
    taken = []
    async with contextlib.AsyncExitStack() as stack:
        sent = HEAD + (BODY[:-1] if kind == "slow" else b"")
        for _ in range(60):
            await stack.enter_async_context(connection(uploads.port, sent))
            taken.append(uploads.budget.taken_bytes)
        async with client_of(uploads.port) as client:
            reply = await client.post("/predict", json={"data": ROW})
        assert reply.status_code == 202
        taken.append(uploads.budget.taken_bytes)
    assert max(taken) <= LIMIT_BYTES
    await uploads.all_given_back()


# --- every way in which a request ends gives its bytes back ------------------------------------


async def test_a_body_that_is_refused_gives_its_bytes_back(uploads: Uploads) -> None:
    async with connection(uploads.port, HEAD + bytes(len(BODY))) as upload:
        assert (await upload.answer())[0] == 422
    await uploads.all_given_back()


async def test_a_body_that_turns_out_too_large_gives_its_bytes_back(uploads: Uploads) -> None:
    head = NPY + b"Transfer-Encoding: chunked\r\n\r\n"
    chunk = chunk_of(BODY)
    async with connection(uploads.port, head + chunk) as upload:
        await eventually(lambda: uploads.budget.taken_bytes == len(BODY), "the body is admitted")
        upload.send(chunk)
        assert (await upload.answer())[0] == 413
    await uploads.all_given_back()


async def test_a_client_that_leaves_gives_its_bytes_back(uploads: Uploads) -> None:
    half = len(BODY) // 2
    async with holding(uploads, half, half), connection(uploads.port, HEAD + BODY):
        pass
    await uploads.all_given_back()


async def test_a_body_that_takes_too_long_gives_its_bytes_back(
    limits: ApiConfig, store: Store
) -> None:
    strict = msgspec.structs.replace(limits, body_timeout_seconds=0.3)
    async with serving(strict, store) as uploads, holding(uploads, 1000) as (slow,):
        assert (await slow.answer())[0] == 408
        await uploads.all_given_back()


@pytest.mark.soak
async def test_a_submit_that_redis_does_not_answer_leaves_nothing_in_memory(
    limits: ApiConfig, store: Store
) -> None:
    async with proxied(limits.redis_url) as proxy:
        away = msgspec.structs.replace(limits, redis_url=proxy.url)
        async with (
            serving(away, store) as uploads,
            holding(uploads, *[len(BODY) - 1] * 2) as held,
            without_garbage_collector(),
        ):
            proxy.black_hole()
            for upload in held:
                upload.send(BODY[-1:])
                assert (await upload.answer())[0] == 503
            await uploads.all_given_back()
            await eventually(lambda: not jobs_in_memory(), "no job is in memory")
            proxy.restore()


@contextlib.asynccontextmanager
async def without_garbage_collector() -> AsyncIterator[None]:
    """The collector finds cycles late: it counts objects, not their bytes."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def jobs_in_memory() -> list[NewJob]:
    return [found for found in gc.get_objects() if isinstance(found, NewJob)]


async def test_a_client_that_waits_for_its_job_takes_no_room(
    uploads: Uploads, manual_worker: ManualWorker, server: redis.Redis
) -> None:
    head = HEAD[:-2] + b"Prefer: wait=20\r\n\r\n"
    async with connection(uploads.port, head + BODY) as upload:
        await eventually(lambda: server.llen(QUEUE) == 1, "the job is stored")
        await uploads.all_given_back()
        await manual_worker.complete()
        assert (await upload.answer())[0] == 200


# --- bodies of unknown size --------------------------------------------------------------------


async def test_a_body_in_chunks_reserves_the_largest_size_once_it_is_large(
    uploads: Uploads,
) -> None:
    body = npy_of(5000)
    async with connection(uploads.port, NPY + b"Transfer-Encoding: chunked\r\n\r\n") as upload:
        upload.send(chunk_of(body[:70_000]))
        await eventually(lambda: uploads.budget.taken_bytes == len(BODY), "the body is admitted")
        upload.send(chunk_of(body[70_000:]) + b"0\r\n\r\n")
        assert (await upload.answer())[0] == 202
    await uploads.all_given_back()


async def test_lines_take_room_only_while_a_long_one_is_received(uploads: Uploads) -> None:
    line = b'{"data": [[1, 2, 3, 4]]}'
    long = line.ljust(150_000)
    async with connection(uploads.port, LINES) as upload:
        upload.send(chunk_of((line + b"\n") * 5200))
        assert (await upload.answer())[0] == 200
        await upload.reader.readuntil(b"}\n")
        assert uploads.budget.taken_bytes == 0
        upload.send(chunk_of(long[:100_000]))
        await eventually(lambda: uploads.budget.taken_bytes == LINE_BYTES, "the line is admitted")
        upload.send(chunk_of(long[100_000:] + b"\n"))
        await uploads.all_given_back()
        upload.send(b"0\r\n\r\n")
        await upload.read_chunks()


@pytest.mark.soak
async def test_a_long_line_that_comes_too_slowly_ends_for_others(
    limits: ApiConfig, store: Store
) -> None:
    brief = msgspec.structs.replace(limits, body_timeout_seconds=4.0)
    async with (
        serving(brief, store) as uploads,
        connection(uploads.port, LINES + chunk_of(b" " * 190_000)) as faster,
        connection(uploads.port, LINES + chunk_of(b" " * 70_000)) as slowest,
    ):
        await eventually(lambda: uploads.budget.taken_bytes == 2 * LINE_BYTES, "both are admitted")
        await asyncio.wait_for(uploaded(uploads.port), 20)
        assert (await slowest.answer())[0] == 200
        assert await slowest.code() == "too_many_uploads"
        faster.send(chunk_of(b"\n[]\n") + b"0\r\n\r\n")
        assert (await faster.answer())[0] == 200
        assert await faster.code() == "invalid_input"
        await uploads.all_given_back()


# --- answers -----------------------------------------------------------------------------------


RESULT = bytes(9_000_000)
"""More than the buffers of both sockets hold."""


async def completed(uploads: Uploads, worker: ManualWorker) -> bytes:
    """The request for the result of a job that was completed with `RESULT`."""
    async with client_of(uploads.port) as client:
        job_id = await submit(client)
    await worker.complete(body=b'"%b"' % RESULT.replace(b"\0", b"x"))
    return b"GET /job/%b/result HTTP/1.1\r\nHost: localhost\r\n\r\n" % job_id.encode()


async def read_all(download: Upload) -> None:
    status, _ = await download.answer()
    assert status == 200
    async with asyncio.timeout(20):
        assert len(await download.reader.readexactly(len(RESULT) + 2)) == len(RESULT) + 2


async def test_a_result_takes_room_until_its_client_has_read_it(
    limits: ApiConfig, store: Store, manual_worker: ManualWorker
) -> None:
    async with serving(limits, store) as uploads:
        request = await completed(uploads, manual_worker)
        async with connection(uploads.port, request) as first:
            await eventually(lambda: uploads.downloads.taken_bytes > 0, "the result is sent")
            async with connection(uploads.port, request) as second:
                await read_all(first)
                await read_all(second)
            first.send(request)
            await read_all(first)
            await uploads.all_given_back()


async def test_a_result_without_room_is_refused_and_small_answers_are_not(
    limits: ApiConfig, store: Store, manual_worker: ManualWorker
) -> None:
    impatient = msgspec.structs.replace(limits, room_wait_seconds=0.2)
    async with serving(impatient, store) as uploads:
        request = await completed(uploads, manual_worker)
        async with connection(uploads.port, request):
            await eventually(lambda: uploads.downloads.taken_bytes > 0, "the result is sent")
            async with connection(uploads.port, request) as refused:
                status, head = await refused.answer()
                assert status == 503
                assert b"retry-after: 1\r\n" in head
                assert await refused.code() == "too_many_downloads"
            await uploaded(uploads.port)
        await uploads.all_given_back()


async def test_a_waited_submit_whose_result_has_no_room_is_answered_with_its_202(
    limits: ApiConfig, store: Store, server: redis.Redis, manual_worker: ManualWorker
) -> None:
    body = msgspec.json.encode({"data": ROW})
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = head + b"Prefer: wait=20\r\nContent-Length: %d\r\n\r\n" % len(body) + body

    async def complete_with_a_large_result() -> None:
        await eventually(lambda: server.llen(QUEUE) == 1, "the job is stored")
        await manual_worker.complete(body=b'"%b"' % RESULT.replace(b"\0", b"x"))

    async with serving(limits, store) as uploads:
        async with connection(uploads.port, request) as first:
            await complete_with_a_large_result()
            assert (await first.answer())[0] == 200
            assert uploads.downloads.taken_bytes > len(RESULT)
            async with connection(uploads.port, request) as second:
                await complete_with_a_large_result()
                status, answer_head = await second.answer()
                assert status == 202
                (size,) = re.findall(rb"content-length: (\d+)", answer_head)
                accepted = msgspec.json.decode(await second.reader.readexactly(int(size)))
        await uploads.all_given_back()
        async with client_of(uploads.port) as client:
            job = (await client.get(accepted["url"])).json()
    assert accepted["status"] == job["status"] == "completed"
    assert ("POST", "/predict", "202", "yes") in uploads.figures.request_seconds()
    assert len(job["result"]) == len(RESULT)


async def test_a_client_that_does_not_read_its_result_is_disconnected(
    limits: ApiConfig, store: Store, manual_worker: ManualWorker
) -> None:
    strict = msgspec.structs.replace(limits, body_timeout_seconds=0.3)
    async with serving(strict, store) as uploads:
        request = await completed(uploads, manual_worker)
        async with connection(uploads.port, request) as slow:
            await eventually(lambda: uploads.downloads.taken_bytes > 0, "the result is sent")
            await uploads.all_given_back()
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await read_all(slow)
