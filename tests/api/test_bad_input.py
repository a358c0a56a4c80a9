"""Bad input is answered with a 4xx problem that names the place, and nothing is queued."""

import codecs
import io
from collections.abc import AsyncIterator
from itertools import product
from typing import Any

import httpx2
import msgspec
import numpy as np
import pytest
import redis

from asyncinfer.api.config import ApiConfig
from asyncinfer.repository.store import Store

from .harness import (
    QUEUE,
    announce,
    assert_problem,
    client_of,
    hosted,
    raw_exchange,
    running,
    running_client,
)
from .tensor_requests import binary

JSON = {"content-type": "application/json"}
NDJSON = {"content-type": "application/x-ndjson"}


@pytest.fixture(autouse=True)
async def nothing_queued(server: redis.Redis) -> AsyncIterator[None]:
    yield
    assert server.llen(QUEUE) == 0
    assert not server.keys("job:*")


MALFORMED = {
    "empty body": (b"", "empty"),
    "cut off": (b'{"data": [[1, 2', "truncated"),
    "cut off, and where": (b'{"data": [[1, 2', "truncated (byte 15)"),
    **{
        f"half a surrogate pair: {name}": (
            b'{"data": [[1, 2, 3, 4]], "options": {"webhook": {"metadata": {%b}}}}' % member,
            f"the escape {escape} is half of a surrogate pair, and no character by itself "
            f"(byte {place})",
        )
        for name, member, escape, place in (
            ("first", rb'"a": "\ud800"', r"\ud800", 68),
            ("second", rb'"a": "\udc00"', r"\udc00", 68),
            ("as a name", rb'"\uD800": 1', r"\uD800", 63),
            ("before a letter", rb'"a": "\ud800\u0041"', r"\ud800", 68),
            ("twice", rb'"a": "\ud800\ud800"', r"\ud800", 68),
            ("after a pair", rb'"a": "\ud83d\ude00\\ud800\udfff"', r"\udfff", 87),
            ("a backslash after it", rb'"a": "\ud800\\udc00"', r"\ud800", 68),
        )
    },
    "trailing comma": (b'{"data": [[1, 2, 3, 4,]]}', "byte 22"),
    "two values": (b'{"data": [[1, 2, 3, 4]]} {}', "byte 26"),
    "NaN": (b'{"data": [[NaN, 2, 3, 4]]}', "byte 11"),
    "NaN, and what to send": (b'{"data": [[NaN, 2, 3, 4]]}', 'the strings "NaN", "Infinity"'),
    "Infinity": (b'{"data": [[1, -Infinity, 3, 4]]}', "or null for NaN"),
    "single quotes": (b"{'data': [[1, 2, 3, 4]]}", "byte 1"),
    "not UTF-8": (b'{"data": "\xff"}', "UTF-8 (byte 10)"),
    "not UTF-8 in a key": (b'{"\xff": 1}', "UTF-8"),
    "UTF-16": ('{"data": [[1, 2, 3, 4]]}'.encode("utf-16"), "UTF-8"),
    "a BOM alone": (codecs.BOM_UTF8, "truncated"),
    "two BOMs": (codecs.BOM_UTF8 * 2 + b'{"data": [[1, 2, 3, 4]]}', "invalid character"),
    "depth a million": (b'{"data": ' + b"[" * 1_000_000, "deep"),
    "depth a million outside": (b"[" * 1_000_000, ""),
}


async def test_a_body_that_is_not_json_is_400(
    api: httpx2.AsyncClient, subtests: pytest.Subtests
) -> None:
    for case, (body, named) in MALFORMED.items():
        with subtests.test(case):
            reply = await api.post("/predict", content=body, headers=JSON)
            assert reply.status_code in (400, 422)
            if named:
                assert named in assert_problem(reply, 400, "invalid_json")["detail"]


UNFIT = {
    "no object": (b"[[1, 2, 3, 4]]", ""),
    "no data": (b"{}", "/data"),
    "unknown name": (b'{"data": [[1, 2, 3, 4]], "optoins": {}}', "/optoins"),
    "null": (b'{"data": null}', "/data"),
    "true": (b'{"data": true}', "/data"),
    "no rows": (b'{"data": []}', "/data"),
    "an empty row": (b'{"data": [[]]}', "/data/0"),
    "a single row without its list": (b'{"data": [1, 2, 3, 4]}', "/data"),
    "too deep by one": (b'{"data": [[[1], 2, 3, 4]]}', "/data/0/0"),
    "too narrow": (b'{"data": [[1, 2, 3]]}', "/data/0"),
    "too wide": (b'{"data": [[1, 2, 3, 4], [1, 2, 3, 4, 5]]}', "/data/1"),
    "a string": (b'{"data": [[1, "2", 3, 4]]}', "/data/0/1"),
    "another word": (b'{"data": [[1, "nan", 3, 4]]}', "/data/0/1"),
    "a truth": (b'{"data": [[1, 2, true, 4]]}', "/data/0/2"),
    "1e400": (b'{"data": [[1, 2, 3, 1e400]]}', "/data/0/3"),
    "1e39 into float32": (b'{"data": [[1e39, 2, 3, 4]]}', "/data/0/0"),
    "an object": (b'{"data": {"a": 1}}', "/data"),
    "data twice": (b'{"data": [[1]], "data": [[1, 2, 3, 4]]}', "/data"),
    "data twice and equal": (b'{"data": [[1, 2, 3, 4]], "data": [[1, 2, 3, 4]]}', "/data"),
    "data twice, one a prefix": (b'{"data": 12, "data": 1}', "/data"),
    "data twice, once escaped": (b'{"d\\u0061ta": [[1]], "data": [[1, 2, 3, 4]]}', "/data"),
    "options twice": (
        b'{"options": {"priority": "low"}, "data": [[1, 2, 3, 4]], "options": {}}',
        "/options",
    ),
    "an option twice": (
        b'{"data": [[1, 2, 3, 4]], "options": {"priority": "low", "priority": "high"}}',
        "/options/priority",
    ),
    "options null": (b'{"data": [[1, 2, 3, 4]], "options": null}', "/options"),
    "unknown option": (
        b'{"data": [[1, 2, 3, 4]], "options": {"prioritty": "low"}}',
        "/options/prioritty",
    ),
    "wrong option": (
        b'{"data": [[1, 2, 3, 4]], "options": {"priority": "urgent"}}',
        "/options/priority",
    ),
    "option out of range": (
        b'{"data": [[1, 2, 3, 4]], "options": {"delay_seconds": -1}}',
        "/options/delay_seconds",
    ),
}


async def test_json_that_does_not_fit_is_422_at_its_place(
    api: httpx2.AsyncClient, subtests: pytest.Subtests
) -> None:
    for case, (body, pointer) in UNFIT.items():
        with subtests.test(case):
            reply = await api.post("/predict", content=body, headers=JSON)
            faults = assert_problem(reply, 422, "invalid_input")["errors"]
            assert pointer in [fault["pointer"] for fault in faults]
            assert all(fault["detail"] for fault in faults)


async def test_an_unknown_name_comes_with_the_nearest_known(api: httpx2.AsyncClient) -> None:
    body = {"data": [[1, 2, 3, 4]], "options": {"prioritty": "low"}}
    reply = await api.post("/predict", json=body)
    assert "Did you mean `priority`?" in reply.json()["errors"][0]["detail"]


# --- a job that asks to be kept too long -----------------------------------------------------

MAX_TTL = 3600
TOO_LONG = {"ttl_seconds": MAX_TTL + 1}
DATA = [[1.0, 2.0, 3.0, 4.0]]
TENSOR = {"name": "input", "shape": [1, 4], "datatype": "FP32"}


@pytest.fixture
async def short_lived(config: ApiConfig, store: Store) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of an API that keeps jobs for an hour at most."""
    await announce(store, "iris", default="iris")
    limited = msgspec.structs.replace(config, max_ttl_seconds=MAX_TTL)
    async with hosted(running(limited)) as port, client_of(port) as client:
        yield client


def npy_of(data: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(data, np.float32))
    return file.getvalue()


def body_with_options(**more: Any) -> dict[str, Any]:
    return {"json": {"options": TOO_LONG, **more}}


WAYS_IN_A_BODY = {
    "data": body_with_options(data=DATA),
    "a body that is parsed in a thread": body_with_options(data=DATA * 10_000),
    "tensors": body_with_options(inputs=[{**TENSOR, "data": DATA}]),
    "binary tensors": dict(
        zip(
            ("content", "headers"),
            binary(("input", np.ones((1, 4), np.float32)), options=TOO_LONG),
            strict=True,
        )
    ),
}
WAYS_IN_A_QUERY: dict[str, dict[str, Any]] = {
    "data": {"json": {"data": DATA}},
    "tensors": {"json": {"inputs": [{**TENSOR, "data": DATA}]}},
    "npy": {"content": npy_of(DATA), "headers": {"content-type": "application/x-npy"}},
    "lines": {"content": b'{"data": [[1, 2, 3, 4]]}\n', "headers": NDJSON},
    "lines with options of their own": {
        "content": b'{"data": [[1, 2, 3, 4]], "options": {}}\n',
        "headers": NDJSON,
    },
}


async def test_a_body_that_asks_for_more_than_max_ttl_is_422_at_its_place(
    short_lived: httpx2.AsyncClient, subtests: pytest.Subtests
) -> None:
    paths = ("/predict", "/predict/iris", "/models/iris/validate")
    for (way, sent), path in product(WAYS_IN_A_BODY.items(), paths):
        with subtests.test(way, path=path):
            reply = await short_lived.post(path, **sent)

            (fault,) = assert_problem(reply, 422, "invalid_input")["errors"]
            assert fault["pointer"] == "/options/ttl_seconds"
            assert fault["detail"] == (
                "3601 s is longer than this server keeps a job, 3600 s at most. Ask for less, or "
                "raise MAX_TTL."
            )


@pytest.mark.parametrize("way", WAYS_IN_A_QUERY)
async def test_a_query_that_asks_for_more_than_max_ttl_is_400(
    short_lived: httpx2.AsyncClient, way: str
) -> None:
    reply = await short_lived.post("/predict", params=TOO_LONG, **WAYS_IN_A_QUERY[way])

    detail = assert_problem(reply, 400, "invalid_query")["detail"]
    assert detail.startswith("Query parameter `ttl_seconds`: 3601 s is longer")
    assert "MAX_TTL" in detail


async def test_a_line_that_asks_for_more_than_max_ttl_is_refused_by_itself(
    short_lived: httpx2.AsyncClient,
) -> None:
    """Also one that is so long that it is parsed in a thread."""
    lines = [{"data": data, "options": TOO_LONG} for data in (DATA, DATA * 10_000)]
    content = b"\n".join(map(msgspec.json.encode, lines))
    reply = await short_lived.post("/predict", content=content, headers=NDJSON)

    answers = [msgspec.json.decode(line) for line in reply.content.splitlines()]
    assert [(answer["code"], answer["line"]) for answer in answers] == [
        ("invalid_input", 1),
        ("invalid_input", 2),
    ]
    assert {answer["errors"][0]["pointer"] for answer in answers} == {"/options/ttl_seconds"}


# --- a deadline that a delay cannot meet -----------------------------------------------------


@pytest.mark.parametrize("deadline", ["start_within_seconds", "finish_within_seconds"])
async def test_a_deadline_that_passes_before_the_job_may_start_is_refused(
    api: httpx2.AsyncClient, deadline: str
) -> None:
    options = {"delay_seconds": 30, deadline: 30}
    body = {"data": DATA, "options": options}
    for path in ("/predict", "/models/iris/validate"):
        problem = assert_problem(await api.post(path, json=body), 422, "invalid_input")
        (fault,) = problem["errors"]
        assert fault["pointer"] == f"/options/{deadline}"
        assert "starts after `delay_seconds`, 30 s" in fault["detail"]
    query = await api.post("/predict", params=options, json={"data": DATA})
    assert f"`{deadline}`" in assert_problem(query, 400, "invalid_query")["detail"]
    line = await api.post("/predict", content=msgspec.json.encode(body), headers=NDJSON)
    assert msgspec.json.decode(line.content)["errors"][0]["pointer"] == f"/options/{deadline}"
    for in_time in ({"delay_seconds": 29.9, deadline: 30}, {"delay_seconds": 0, deadline: 0.5}):
        reply = await api.post("/models/iris/validate", json={**body, "options": in_time})
        assert reply.status_code == 200, reply.text


async def test_parameters_of_the_open_inference_protocol_set_no_ttl(
    short_lived: httpx2.AsyncClient,
) -> None:
    body = {"inputs": [{**TENSOR, "data": DATA}], "parameters": TOO_LONG}
    reply = await short_lived.post("/predict", json=body)

    (fault,) = assert_problem(reply, 422, "invalid_input")["errors"]
    assert fault["pointer"] == "/parameters/ttl_seconds"


@pytest.mark.parametrize("seconds", [1, MAX_TTL])
async def test_max_ttl_itself_may_be_asked_for(
    short_lived: httpx2.AsyncClient, seconds: int
) -> None:
    body = {"data": DATA, "options": {"ttl_seconds": seconds}}
    reply = await short_lived.post("/models/iris/validate", json=body)

    assert reply.json()["options"] == {"ttl_seconds": seconds}


async def test_a_model_tells_the_largest_ttl_that_a_job_may_have(
    config: ApiConfig, store: Store
) -> None:
    """Not more than an option may have, whatever MAX_TTL is."""
    await announce(store, "iris", default="iris")
    for max_ttl, told in ((MAX_TTL, MAX_TTL), (365 * 24 * 3600, 30 * 24 * 3600)):
        async with running_client(
            msgspec.structs.replace(config, max_ttl_seconds=max_ttl)
        ) as client:
            model = (await client.get("/models/iris")).json()
            assert model["max_ttl_seconds"] == told
            body = {"data": DATA, "options": {"ttl_seconds": told}}
            assert (await client.post("/models/iris/validate", json=body)).status_code == 200


# --- media types, routes and methods -----------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/jsonp",
        "application/json; charset=latin-1",
        "",
        "json",
    ],
)
async def test_only_json_media_types_are_accepted(api: httpx2.AsyncClient, value: str) -> None:
    headers = {"content-type": value}
    reply = await api.post("/predict", content=b'{"data": [[1, 2, 3, 4]]}', headers=headers)
    assert_problem(reply, 415, "media_type_refused")


@pytest.mark.parametrize("value", ["gzip", "br", "identity, gzip", "x"])
async def test_only_uncompressed_bodies_are_accepted(api: httpx2.AsyncClient, value: str) -> None:
    headers = {**JSON, "content-encoding": value}
    reply = await api.post("/predict", content=b'{"data": [[1, 2, 3, 4]]}', headers=headers)
    assert_problem(reply, 415, "encoding_refused")
    assert reply.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("path", ["/predict/", "/jobs/", "/job/", "/nothing", "/job/x/"])
async def test_an_unknown_route_is_404_and_never_a_redirect(
    api: httpx2.AsyncClient, path: str
) -> None:
    assert_problem(await api.get(path), 404, "route_not_found")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/predict", "POST"),
        ("PUT", "/job/x", "DELETE, GET, HEAD"),
        ("POST", "/models", "GET, HEAD"),
        ("DELETE", "/health", "GET, HEAD"),
        ("OPTIONS", "/predict", "POST"),
    ],
)
async def test_a_wrong_method_is_405_with_the_right_ones(
    api: httpx2.AsyncClient, method: str, path: str, allow: str
) -> None:
    reply = await api.request(method, path)
    assert_problem(reply, 405, "method_not_allowed")
    assert reply.headers["allow"] == allow


# --- size ------------------------------------------------------------------------------------


@pytest.fixture
async def small(config: ApiConfig, store: Store) -> AsyncIterator[int]:
    """The port of an API that takes bodies of 1,000 bytes."""
    await announce(store, "iris", default="iris")
    async with hosted(running(msgspec.structs.replace(config, max_json_bytes=1000))) as port:
        yield port


async def test_a_body_may_be_as_large_as_allowed_and_no_larger(small: int) -> None:
    body = b'{"data": [[1, 2, 3]]' + b" " * 1000
    async with client_of(small) as client:
        at_most = await client.post("/predict", content=body[:999] + b"}", headers=JSON)
        assert_problem(at_most, 422, "invalid_input")
        above = await client.post("/predict", content=body[:1000] + b"}", headers=JSON)
        assert_problem(above, 413, "body_too_large")
        assert above.headers["connection"] == "close"


async def test_a_chunked_body_is_counted_while_it_is_read(small: int) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield b" " * 100

    async with client_of(small) as client:
        reply = await client.post("/predict", content=chunks(), headers=JSON)
    assert_problem(reply, 413, "body_too_large")


async def test_a_too_large_content_length_is_refused_before_a_byte_is_sent(small: int) -> None:
    answer = await raw_exchange(
        small,
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1001\r\nExpect: 100-continue\r\n\r\n",
    )
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"body_too_large" in answer


@pytest.mark.parametrize("length", [b"-1", b"1, 2", b"x", b"99999999999999999999999"])
async def test_an_invalid_content_length_is_400(small: int, length: bytes) -> None:
    answer = await raw_exchange(
        small, b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %b\r\n\r\n" % length
    )
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"application/problem+json" in answer
