"""POST /predict with one request per line: each line is answered in its place, independently."""

import asyncio
import random
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import httpx2
import msgspec
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from asyncinfer.api.answer_sizes import AnswerSizes
from asyncinfer.api.config import ApiConfig
from asyncinfer.api.http.ndjson import LineSplitter
from asyncinfer.repository import keys
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Store
from tests.faults.harness import eventually
from tests.faults.proxy import proxied

from .bulk_client import CHUNKED, HEAD, BulkClient, bulk_client
from .harness import (
    QUEUE,
    RESULT,
    ROW,
    ManualWorker,
    ProxiedApi,
    announce,
    assert_problem,
    client_of,
    count_waiters,
    hosted,
    running,
    running_until_signal,
    submit,
)

NDJSON = {"content-type": "application/x-ndjson"}
GOOD = b'{"data": [[5.1, 3.5, 1.4, 0.2]]}'


async def post_lines(
    client: httpx2.AsyncClient, lines: Iterable[bytes], path: str = "/predict", **headers: str
) -> list[dict[str, Any]]:
    reply = await client.post(path, content=b"\n".join(lines), headers={**NDJSON, **headers})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "application/x-ndjson"
    return parse_answers(reply.content)


def parse_answers(body: bytes) -> list[dict[str, Any]]:
    assert body.endswith(b"\n") or not body
    return [msgspec.json.decode(line) for line in body.splitlines()]


def lines_with_keys(*numbers: int) -> list[bytes]:
    return [
        b'{"data": [[%d, 2, 3, 4]], "idempotency_key": "row-%d"}' % (number, number)
        for number in numbers
    ]


@pytest.fixture
async def port(config: ApiConfig, store: Store) -> AsyncIterator[int]:
    """The port of an API with a body timeout of 0.4 s and lines of at most 1,000 bytes."""
    await announce(store, "iris", "digits", default="iris")
    strict = msgspec.structs.replace(config, body_timeout_seconds=0.4, max_json_bytes=1000)
    async with hosted(running(strict)) as found:
        yield found


# --- lines -----------------------------------------------------------------------------------


def split_lines(pieces: Sequence[bytes], max_bytes: int) -> list[tuple[int, bytes | None]]:
    lines = LineSplitter(max_bytes)
    found = [line for piece in pieces for line in lines.cut(piece)]
    return [(line.number, line.text) for line in (*found, *lines.rest())]


@given(st.lists(st.sampled_from([b"\n", b"\r", b" ", b"a", b"bcd", b"\r\n", b"e" * 7])), st.data())
def test_lines_are_the_same_however_their_bytes_were_split(
    parts: list[bytes], data: st.DataObject
) -> None:
    text = b"".join(parts)
    places = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    assert split_lines(pieces, 5) == split_lines([text], 5)
    expected = [
        (number, line.removesuffix(b"\r")) for number, line in enumerate(text.split(b"\n"), 1)
    ]
    assert split_lines([text], 5) == [
        (number, line if len(line) <= 5 else None)
        for number, line in expected
        if len(line) > 5 or line.strip(b" \t\r")
    ]


def test_a_line_that_never_ends_is_not_kept() -> None:
    lines = LineSplitter(10)
    tracemalloc.start()
    for _ in range(100):
        # A new object each time, since one that is kept twice takes no more memory.
        assert not list(lines.cut(bytes(10_000)))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 100_000
    assert [(line.number, line.text) for line in lines.cut(b"\nok\n")] == [(1, None), (2, b"ok")]


# --- what is answered ------------------------------------------------------------------------


async def test_each_line_becomes_a_job_in_order(
    api: httpx2.AsyncClient, server: redis.Redis
) -> None:
    lines = [b'{"data": [[%d, 2, 3, 4]]}' % number for number in range(600)]
    answers = await post_lines(api, lines)
    ids = [answer["job_id"] for answer in answers]
    assert answers[7].pop("waiting_for")["code"] == "no_worker"
    assert answers[7] == {"job_id": ids[7], "status": "pending", "url": f"/job/{ids[7]}"}
    assert server.lrange(QUEUE, 0, -1) == [job_id.encode() for job_id in reversed(ids)]
    assert server.get(keys.data(ids[7])) == b"[[7, 2, 3, 4]]"


@pytest.mark.parametrize(
    "media_type", ["application/jsonl", "Application/X-JSONLines; charset=utf-8"]
)
async def test_the_other_names_of_the_media_type_are_taken(
    api: httpx2.AsyncClient, media_type: str
) -> None:
    answers = await post_lines(api, [GOOD, GOOD], "/predict", **{"content-type": media_type})
    assert [answer["status"] for answer in answers] == ["pending", "pending"]


async def test_a_model_in_the_path_gets_every_line(
    api: httpx2.AsyncClient, server: redis.Redis
) -> None:
    line = msgspec.json.encode({"data": [[0.5] * 64]})
    await post_lines(api, [line] * 3, "/predict/digits")
    assert server.llen(f"{QUEUE}:digits") == 3
    reply = await api.post("/predict/none", content=GOOD, headers=NDJSON)
    assert_problem(reply, 404, "model_not_found")


async def test_named_tensors_and_rows_may_be_mixed(api: httpx2.AsyncClient) -> None:
    tensor = {"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}
    lines = [GOOD, msgspec.json.encode({"inputs": [tensor], "outputs": [{"name": "label"}]}), GOOD]
    assert [answer["status"] for answer in await post_lines(api, lines)] == ["pending"] * 3


WRONG = {
    "no json": (b'{"data": [[1, 2', 400, "invalid_json"),
    "no utf-8": (b'{"data": "\xff"}', 400, "invalid_json"),
    "two values": (GOOD + b" {}", 400, "invalid_json"),
    "too narrow": (b'{"data": [[1, 2, 3]]}', 422, "invalid_input"),
    "unknown name": (b'{"date": [[1, 2, 3, 4]]}', 422, "invalid_input"),
    "key twice": (
        GOOD[:-1] + b', "idempotency_key": "a", "idempotency_key": "a"}',
        422,
        "invalid_input",
    ),
    "key of no text": (GOOD[:-1] + b', "idempotency_key": 7}', 422, "invalid_input"),
    "key with a blank": (GOOD[:-1] + b', "idempotency_key": "a b"}', 422, "invalid_input"),
    "too long": (GOOD + b" " * 1000, 413, "body_too_large"),
    "much too long": (b"[" * 100_000, 413, "body_too_large"),
    "no such version": (GOOD[:-1] + b', "options": {"version": "9"}}', 404, "version_not_found"),
}


async def test_a_wrong_line_is_answered_in_its_place(port: int, subtests: pytest.Subtests) -> None:
    for case, (line, status, code) in WRONG.items():
        with subtests.test(case):
            async with client_of(port) as client:
                first, wrong, last = await post_lines(client, [GOOD, b"", line, GOOD])
            assert (wrong["status"], wrong["code"], wrong["line"]) == (status, code, 3)
            assert wrong["title"]
            assert wrong["detail"]
            assert (first["status"], last["status"]) == ("pending", "pending")


async def test_every_fault_of_a_line_is_named(api: httpx2.AsyncClient) -> None:
    (wrong,) = await post_lines(api, [b'{"data": [[1, "2", true, 4]]}'])
    assert [error["pointer"] for error in wrong["errors"]] == ["/data/0/1", "/data/0/2"]


@pytest.mark.soak
async def test_ten_thousand_lines_with_wrong_ones_among_them(
    port: int, server: redis.Redis
) -> None:
    chance = random.Random(7)
    codes = [chance.choice(list(WRONG)) if chance.random() < 0.05 else None for _ in range(10_000)]
    lines = [GOOD if code is None else WRONG[code][0] for code in codes]
    async with client_of(port) as client:
        answers = await post_lines(client, lines)
    assert len(answers) == len(codes)
    for number, (answer, code) in enumerate(zip(answers, codes, strict=True), 1):
        if code is None:
            assert answer["status"] == "pending"
        else:
            assert (answer["line"], answer["code"]) == (number, WRONG[code][2])
    taken = [entry["job_id"].encode() for entry in answers if "job_id" in entry]
    assert server.lrange(QUEUE, 0, -1) == taken[::-1]
    server.flushall()


async def test_blank_lines_and_either_line_end_are_taken(api: httpx2.AsyncClient) -> None:
    body = b"\r\n \n" + GOOD + b"\r\n\n" + GOOD + b"\n\t\n" + GOOD
    reply = await api.post("/predict", content=body, headers=NDJSON)
    assert len(parse_answers(reply.content)) == 3
    empty = await api.post("/predict", content=b"", headers=NDJSON)
    assert (empty.status_code, empty.content) == (200, b"")


async def test_a_byte_order_mark_at_the_start_is_passed_over(api: httpx2.AsyncClient) -> None:
    line = b'\xef\xbb\xbf{"data": [[1, 2, 3, 4]]}'

    alone = await api.post("/predict", content=line, headers={"content-type": "application/json"})
    answers = await post_lines(api, [line, line[3:]])
    blank = await post_lines(api, [b"\xef\xbb\xbf", line[3:]])

    assert alone.status_code == 202, alone.text
    assert ["job_id" in answer for answer in answers] == [True, True]
    assert ["job_id" in line for line in blank] == [True]


async def test_the_querys_options_are_for_lines_without_their_own(
    api: httpx2.AsyncClient, server: redis.Redis
) -> None:
    own = GOOD[:-1] + b', "options": {"priority": "high"}}'
    await post_lines(api, [GOOD, own, GOOD], "/predict?priority=low")
    assert [server.llen(name) for name in keys.waiting(QUEUE)] == [1, 0, 2]


async def test_headers_that_do_not_fit_a_bulk_request_refuse_all_of_it(
    api: httpx2.AsyncClient, server: redis.Redis
) -> None:
    refused = [
        ({"idempotency-key": "a"}, 400, "invalid_header", "idempotency_key"),
        ({"inference-header-content-length": "5"}, 400, "invalid_header", "tensors"),
        ({"content-encoding": "gzip"}, 415, "encoding_refused", "uncompressed"),
        ({"prefer": "wait=61"}, 400, "invalid_header", "0 to 60"),
    ]
    for headers, status, code, named in refused:
        reply = await api.post("/predict", content=GOOD, headers={**NDJSON, **headers})
        assert named in assert_problem(reply, status, code)["detail"]
    reply = await api.post("/models/iris/validate", content=GOOD, headers=NDJSON)
    assert "POST /predict" in assert_problem(reply, 415, "media_type_refused")["detail"]
    assert server.llen(QUEUE) == 0


async def test_a_full_queue_refuses_the_lines_that_have_no_room(
    config: ApiConfig, store: Store, server: redis.Redis
) -> None:
    await announce(store, "iris", default="iris")
    full = msgspec.structs.replace(config, policy=Policy(max_queue=3))
    async with running(full) as port, client_of(port) as client:
        answers = await post_lines(client, [GOOD] * 5)
    assert [answer["status"] for answer in answers] == ["pending"] * 3 + [429] * 2
    assert answers[3]["code"] == "queue_full"
    assert answers[3]["retry_after_seconds"] > 0
    assert server.llen(QUEUE) == 3


async def test_the_document_shows_lines(api: httpx2.AsyncClient) -> None:
    operation = (await api.get("/openapi.json")).json()["paths"]["/predict"]["post"]
    for content in (operation["requestBody"]["content"], operation["responses"]["200"]["content"]):
        assert content["application/x-ndjson"]["schema"]["oneOf"]


# --- the same key ----------------------------------------------------------------------------


async def test_a_key_twice_in_one_request_gives_one_job(
    api: httpx2.AsyncClient, server: redis.Redis
) -> None:
    lines = lines_with_keys(1, 2, 1)
    other = b'{"data": [[9, 9, 9, 9]], "idempotency_key": "row-2"}'
    first, second, again, conflict = await post_lines(api, [*lines, other])
    assert again == first
    assert (conflict["status"], conflict["code"], conflict["line"]) == (
        422,
        "idempotency_conflict",
        4,
    )
    assert conflict["job_id"] == second["job_id"]
    assert server.llen(QUEUE) == 2


async def test_a_key_is_the_same_on_a_line_and_in_a_header(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    job_id = await submit(api, headers={"idempotency-key": "once"})
    await manual_worker.complete()
    text = b'{"data": %b, "idempotency_key": "once"}' % msgspec.json.encode(ROW)
    (answer,) = await post_lines(api, [text])
    assert (answer["job_id"], answer["status"]) == (job_id, "completed")


@pytest.mark.soak
async def test_a_request_sent_again_after_a_cut_gives_the_same_jobs(
    config: ApiConfig, store: Store, server: redis.Redis
) -> None:
    await announce(store, "iris", default="iris")
    lines = lines_with_keys(*range(2000))
    async with running(config) as port:
        async with (
            proxied(f"redis://127.0.0.1:{port}") as between,
            client_of(between.port) as client,
        ):
            between.cut_reply_to(b"row-1999")
            with pytest.raises(httpx2.TransportError):
                await post_lines(client, lines)
            answers = await post_lines(client, lines)
        async with client_of(port) as client:
            again = await post_lines(client, lines)
    assert [repeated["job_id"] for repeated in again] == [answer["job_id"] for answer in answers]
    assert len({answer["job_id"] for answer in answers}) == 2000
    assert server.llen(QUEUE) == 2000


# --- waiting ---------------------------------------------------------------------------------


async def test_a_wait_answers_each_line_with_its_finished_job(
    api: httpx2.AsyncClient, manual_worker: ManualWorker, server: redis.Redis
) -> None:
    async with asyncio.TaskGroup() as group:
        lines = [GOOD, b"no", *[GOOD] * 148]
        post = group.create_task(post_lines(api, lines, prefer="wait=10"))
        await eventually(lambda: server.llen(QUEUE) == 149, "the jobs wait")
        await manual_worker.complete()
        await manual_worker.fail()
    answers = post.result()
    statuses = [answer["status"] for answer in answers]
    assert statuses == ["completed", 400, *["completed"] * 99, *["failed"] * 49]
    assert answers[0]["result"] == RESULT
    assert answers[-1]["error"] == {"code": "model_failed", "message": "no"}


async def test_a_wait_too_short_answers_with_the_job_as_it_is(
    api: httpx2.AsyncClient, server: redis.Redis
) -> None:
    for wait in (0, 1):
        began = time.monotonic()
        reply = await api.post(
            "/predict",
            content=b"\n".join([GOOD] * 70),
            headers={**NDJSON, "prefer": f"wait={wait}"},
        )
        assert wait <= time.monotonic() - began < wait + 4
        assert reply.headers["preference-applied"] == f"wait={wait}"
        answers = parse_answers(reply.content)
        assert {(answer["status"], answer["model"], answer["result"]) for answer in answers} == {
            ("pending", "iris", None)
        }
    assert server.llen(QUEUE) == 140


async def test_a_line_is_answered_before_the_next_is_sent(
    port: int, manual_worker: ManualWorker
) -> None:
    async with bulk_client(port, b"Prefer: wait=10\r\n") as bulk:
        assert b" 200 " in await bulk.read_head()
        for _ in range(3):
            await bulk.send(GOOD + b"\n")
            # Longer than a client may be silent: the server still has to answer.
            await asyncio.sleep(0.6)
            await manual_worker.complete()
            answer = await bulk.read_line()
            assert answer
            assert answer["status"] == "completed"
        bulk.end()
        assert await bulk.read_line() is None


async def test_a_finished_job_is_answered_while_a_later_one_waits(
    port: int, manual_worker: ManualWorker, server: redis.Redis
) -> None:
    later = GOOD[:-1] + b', "options": {"delay_seconds": 60}}'
    async with bulk_client(port, b"Prefer: wait=10\r\n") as bulk:
        await bulk.read_head()
        await bulk.send(b"\n".join([GOOD, b"no", later, GOOD, b""]))
        await eventually(lambda: server.llen(QUEUE) == 2, "the jobs wait")
        await manual_worker.complete()
        assert [(await bulk.read_line() or {})["status"] for _ in range(2)] == ["completed", 400]
    server.flushall()


@pytest.mark.soak
async def test_nothing_waits_for_a_client_that_disconnected(
    port: int, server: redis.Redis, manual_worker: ManualWorker
) -> None:
    async with bulk_client(port, b"Prefer: wait=60\r\n") as bulk:
        await bulk.send((GOOD + b"\n") * 100)
        await bulk.read_head()
        await eventually(lambda: server.llen(QUEUE) == 100, "the jobs wait")
        await eventually(lambda: server.hlen(keys.facts(QUEUE)) > 0, "the API waits for them")
        bulk.disconnect()
    await eventually(lambda: not count_waiters(), "the API waits for no job")
    await manual_worker.complete()


async def test_a_stopping_api_answers_what_it_has_read(
    config: ApiConfig, store: Store, server: redis.Redis
) -> None:
    await announce(store, "iris", default="iris")
    async with running_until_signal(config) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        text = (GOOD + b"\n") * 100
        writer.write(CHUNKED + b"Prefer: wait=60\r\n\r\n%x\r\n%b\r\n" % (len(text), text))
        await eventually(lambda: server.llen(QUEUE) == 100, "the jobs wait")
        reading = asyncio.create_task(_all_of(reader, writer))
    answer = await reading
    assert answer.endswith(b"\r\n0\r\n\r\n")
    assert answer.count(b'"status":"pending"') == 100
    assert b'"code":"server_stopping"' in answer
    assert b'"line":101' in answer


@pytest.mark.soak
async def test_a_wait_that_redis_breaks_off_still_names_its_jobs(
    proxied_api: ProxiedApi, server: redis.Redis
) -> None:
    async with bulk_client(proxied_api.port, b"Prefer: wait=1\r\n") as bulk:
        await bulk.read_head()
        await bulk.send((GOOD + b"\n") * 70)
        await eventually(lambda: server.hlen(keys.facts(QUEUE)) > 0, "the first jobs are watched")
        proxied_api.proxy.black_hole()
        answers = [await bulk.read_line() or {} for _ in range(70)]
        proxied_api.proxy.restore()
        bulk.end()
    assert {answer["job_id"].encode() for answer in answers} == set(server.lrange(QUEUE, 0, -1))
    assert {answer["status"] for answer in answers} == {"pending"}


async def _all_of(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()
    return answer


# --- kinds of clients ------------------------------------------------------------------------


@pytest.mark.soak
async def test_a_client_that_sends_everything_before_it_reads_gets_every_answer(
    port: int, server: redis.Redis
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 16)
    body = (GOOD + b"\n") * 20_000
    async with asyncio.timeout(60):
        writer.write(HEAD + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
        writer.transport.set_write_buffer_limits(0)
        await writer.drain()
        await eventually(
            lambda: server.llen(QUEUE) == 20_000, "all jobs are submitted, no answer is read"
        )
        answer = await reader.read()
    writer.close()
    assert answer.count(b'"status":"pending"') == 20_000
    server.flushall()


async def test_a_body_that_is_generated_while_it_is_sent_is_accepted(
    api: httpx2.AsyncClient,
) -> None:
    async def generated_body() -> AsyncIterator[bytes]:
        for number in range(50):
            text = GOOD + b"\n"
            yield text[:number]
            yield text[number:]

    reply = await api.post("/predict", content=generated_body(), headers=NDJSON)
    assert [answer["status"] for answer in parse_answers(reply.content)] == ["pending"] * 50


async def test_a_bulk_client_that_expects_100_continue_gets_it(port: int) -> None:
    async with bulk_client(port, b"Expect: 100-continue\r\n") as bulk:
        assert await bulk.read_head() == b"HTTP/1.1 100 Continue\r\n\r\n"
        await bulk.send(GOOD)
        bulk.end()
        assert b" 200 " in await bulk.read_head()
        assert (await bulk.read_line() or {})["status"] == "pending"
        assert await bulk.read_line() is None


async def test_a_client_that_falls_silent_is_cut_off(port: int) -> None:
    for begun, taken in ((b"", 0), (GOOD + b"\n" + GOOD[:9], 1)):
        async with bulk_client(port) as bulk:
            if begun:
                await bulk.send(begun)
            began = time.monotonic()
            answers = [await bulk.read_first_line() for _ in range(taken + 1)]
            assert 0.3 < time.monotonic() - began < 5
            assert (answers[-1]["status"], answers[-1]["line"]) == (408, taken + 1)
            assert await bulk.read_line() is None
            assert await bulk.is_closed()


@pytest.mark.soak
async def test_a_client_that_is_slow_but_not_silent_is_read_to_the_end(port: int) -> None:
    async with bulk_client(port) as bulk:
        for place in range(0, len(GOOD), 4):
            await bulk.send(GOOD[place : place + 4])
            await asyncio.sleep(0.15)
        bulk.end()
        assert (await bulk.read_first_line())["status"] == "pending"


async def test_lines_that_no_route_reads_have_the_usual_body_timeout(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(CHUNKED.replace(b"/predict", b"/nowhere") + b"\r\n")
    began = time.monotonic()
    answer = asyncio.ensure_future(reader.read())
    while not answer.done() and time.monotonic() - began < 8:
        await asyncio.wait([answer], timeout=0.05)
        writer.write(b"1\r\n \r\n")
    assert time.monotonic() - began < 7
    assert (await answer).startswith(b"HTTP/1.1 404 ")
    writer.close()


async def test_a_connection_is_used_again(port: int) -> None:
    client_addresses: set[tuple[str, int]] = set()

    async def record_address(reply: httpx2.Response) -> None:
        stream = reply.extensions["network_stream"]
        client_addresses.add(stream.get_extra_info("client_addr"))

    async with client_of(port) as client:
        client.event_hooks = {"response": [record_address]}
        for _ in range(3):
            await post_lines(client, [GOOD])
            await submit(client)

    assert len(client_addresses) == 1


@pytest.mark.soak
async def test_answers_that_no_client_reads_are_bounded(port: int) -> None:
    # With valid lines among them, since a request ends after a thousand refused lines.
    text = (GOOD + b"\n" + b"x\n" * 9) * 1000
    async with bulk_client(port) as bulk:
        reading = asyncio.ensure_future(_read_answers(bulk, 80_000))
        for _ in range(8):
            await bulk.send(text)
        await reading
        bulk.end()
    async with bulk_client(port) as bulk:
        with pytest.raises(ConnectionError):
            await _send_forever(bulk, text)


async def _send_forever(bulk: BulkClient, text: bytes) -> None:
    while True:
        await bulk.send(text)


async def _read_answers(bulk: BulkClient, lines: int) -> None:
    await bulk.read_head()
    for number in range(1, lines + 1):
        answer = await bulk.read_line() or {}
        assert answer.get("line", number) == number


def test_many_small_answers_are_read_at_a_time_and_large_ones_singly() -> None:
    sizes = AnswerSizes()
    assert sizes.fit("iris") == 1
    sizes.note("iris", 4, 1200)
    assert sizes.fit("iris") == 64
    sizes.note("images", 4, 4 * 14_000_000)
    assert sizes.fit("images") == 1
    # The answers of unfinished jobs do not show how large their results are.
    sizes.note("images", 4, 4 * 120)
    assert sizes.fit("images") == 1


@pytest.mark.soak
async def test_large_results_are_in_memory_a_few_at_a_time(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    """Forty results of 14 MB in memory at once killed a server with 512 MB."""
    lines = lines_with_keys(*range(24))
    await post_lines(api, lines)
    result = msgspec.json.encode("x" * 4_000_000)
    await manual_worker.complete(body=result)
    content = b"\n".join(lines)
    size = 0
    tracemalloc.start()
    async with api.stream(
        "POST", "/predict", content=content, headers={**NDJSON, "prefer": "wait=20"}
    ) as reply:
        async for chunk in reply.aiter_raw():
            size += len(chunk)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > len(lines) * len(result)
    assert peak_bytes < 30 * len(result)


async def test_a_request_with_too_many_refused_lines_is_ended(
    api: httpx2.AsyncClient, server: redis.Redis
) -> None:
    """A refused line of two bytes costs as much as a job, and is answered with 300 bytes."""
    lines = [GOOD] * 20 + [b"x"] * 5000 + [GOOD]

    answers = await post_lines(api, lines)

    taken, refused, last = answers[:20], answers[20:-1], answers[-1]
    assert all(answer["status"] == "pending" for answer in taken)
    assert {answer["code"] for answer in refused} == {"invalid_json"}
    assert 1000 < len(refused) < 2000
    assert (last["code"], last["status"]) == ("too_many_refused_lines", 422)
    assert last["line"] == len(answers)
    assert server.llen(QUEUE) == 20


async def test_some_refused_lines_among_many_end_nothing(api: httpx2.AsyncClient) -> None:
    answers = await post_lines(api, ([b"x"] * 9 + [GOOD]) * 300)

    assert len(answers) == 3000


# --- without Redis ---------------------------------------------------------------------------


@pytest.mark.soak
async def test_a_line_whose_submit_is_uncertain_names_its_job(
    proxied_api: ProxiedApi, server: redis.Redis
) -> None:
    async with bulk_client(proxied_api.port) as bulk:
        await bulk.read_head()
        await bulk.send(GOOD + b"\n")
        assert (await bulk.read_line() or {})["status"] == "pending"
        proxied_api.proxy.cut_reply_to(script("submit").function.encode(), 3)
        proxied_api.proxy.black_hole()
        await bulk.send((GOOD + b"\n") * 2000)
        refused = [await bulk.read_line() or {} for _ in range(2000)]
        assert {(answer["status"], answer["code"]) for answer in refused} == {
            (503, "redis_unavailable")
        }
        assert [answer["line"] for answer in refused] == list(range(2, 2002))
        assert refused[0]["job_id"]
        assert "job_id" not in refused[-1]
        proxied_api.proxy.restore()

        async def taken_again() -> bool:
            await bulk.send(GOOD + b"\n")
            return bool((await bulk.read_first_line())["status"] == "pending")

        await eventually(taken_again, "lines are accepted again")
        bulk.end()
