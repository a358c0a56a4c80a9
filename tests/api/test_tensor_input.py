"""Named tensors in requests: JSON, the Open Inference layout, and `.npy`."""

import contextlib
import io
import itertools
import json
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx2
import msgspec
import numpy as np
import pytest
import redis
import tritonclient.http as triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncinfer import jobs
from asyncinfer.api.admission import ANYBODY, Reach
from asyncinfer.api.catalog import Served
from asyncinfer.api.config import ApiConfig
from asyncinfer.api.http.byte_budget import ByteBudget
from asyncinfer.api.http.messages import Request
from asyncinfer.api.inputs.request_input import Input, read_input, read_line
from asyncinfer.errors import InvalidInput, RequestError
from asyncinfer.models.signature import Signature
from asyncinfer.models.validation import check_data
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.store import Store
from asyncinfer.schemas.requests import RequestOptions
from asyncinfer.tensors import packing
from asyncinfer.tensors.datatypes import DTYPES, FLOATS, Array, TensorSpec

from .harness import QUEUE, announce, assert_problem, client_of, hosted, running
from .tensor_requests import LENGTH, binary, content_of, described, identity, with_json_length

NPY = {"content-type": "application/x-npy"}

TWO = Signature(
    "two",
    "3",
    "b" * 64,
    (
        TensorSpec("image", "FP32", ("batch", 3, "side", "side")),
        TensorSpec("ids", "INT64", ("batch",)),
        TensorSpec("words", "BYTES", (None,), optional=True),
    ),
    (TensorSpec("y", "FP32", ("batch",)), TensorSpec("z", "BF16", ("batch",))),
    max_rows=5,
)


def served(signature: Signature) -> Served:
    return Served("q", signature, (signature.version,), {signature.version: signature})


ENTRY = '{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]%s}'
DEEP_PLACES = {
    "data": '{"data": %s}',
    "options": '{"data": [1], "options": {"group": %s}}',
    "repeated metadata": '{"data": [1], "options": {"webhook": {"url": "https://a.example", '
    '"metadata": {"a": %s, "a": 1}}}}',
    "elements": '{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": %s}]}',
    "shape": '{"inputs": [{"name": "x", "shape": %s, "datatype": "FP32", "data": [1]}]}',
    "an unknown member": '{"inputs": [' + ENTRY % ', "y": %s' + "]}",
    "parameters": '{"inputs": [' + ENTRY % "" + '], "parameters": %s}',
    "outputs": '{"inputs": [' + ENTRY % "" + '], "outputs": [{"name": "y", "parameters": %s}]}',
}


_NESTINGS = (("[", "]"), ('{"a":', "}"))


@pytest.mark.parametrize("place", DEEP_PLACES)
def test_json_is_read_or_refused_at_any_depth_of_any_place(place: str) -> None:
    """How deep a step can read depends on the calls around it; so each depth near the limit."""
    model = served(identity("FP32"))
    depths = (3, 500, *range(850, 1000), 5000)
    for depth, (opening, closing) in itertools.product(depths, _NESTINGS):
        value = opening * depth + "1" + closing * depth
        with pytest.raises(RequestError) as refused:
            read_line((DEEP_PLACES[place] % value).encode(), RequestOptions(), model, 60)
        assert refused.value.status in (400, 422)


REPEATED = {
    "/inputs/0/data": '{"inputs": [' + ENTRY % ', "data": [2]' + "]}",
    "/inputs/0/parameters/binary_data_size": '{"inputs": ['
    '{"name": "x", "shape": [1], "datatype": "FP32", '
    '"parameters": {"binary_data_size": 3, "binary_data_size": 4}}]}',
    "/outputs/0/name": '{"inputs": [' + ENTRY % "" + '], "outputs": [{"name": "z", "name": "x"}]}',
    "/outputs/0/parameters/binary_data": '{"inputs": [' + ENTRY % "" + '], "outputs": '
    '[{"name": "x", "parameters": {"binary_data": true, "binary_data": false}}]}',
    "/parameters/binary_data_output": '{"inputs": [' + ENTRY % "" + '], "parameters": '
    '{"binary_data_output": true, "binary_data_output": false}}',
    "/options/webhook/metadata/b/1/a~1b": '{"data": [1], "options": {"webhook": {"url": '
    '"https://a.example", "metadata": {"b": [0, {"a/b": 1, "a/b": 2}]}}}}',
}


@pytest.mark.parametrize("pointer", REPEATED)
def test_a_member_that_is_given_twice_is_refused_with_its_place(pointer: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        read_line(REPEATED[pointer].encode(), RequestOptions(), served(identity("FP32")), 60)
    assert [fault.pointer for fault in refused.value.faults] == [pointer]


def npy_bytes(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


async def read_body_for(
    signature: Signature, body: bytes, headers: dict[str, str], query: RequestOptions | None = None
) -> Input:
    """The input that the API would store for a request."""
    parts = [body[at : at + 65_536] for at in range(0, max(len(body), 1), 65_536)]

    async def receive() -> dict[str, Any]:
        chunk = parts.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(parts)}

    raw = {name.encode(): value.encode() for name, value in headers.items()}
    asked = query or RequestOptions()
    budget = ByteBudget(64 << 20, body_seconds=30, wait_seconds=5)
    request = Request(
        {},
        receive,
        headers=raw,
        query=asked,
        admission=ANYBODY,
        reach=Reach("t", across=False),
        uploads=budget,
        downloads=budget,
    )
    long_reads = anyio.CapacityLimiter(1)
    return await read_input(request, ApiConfig(redis_url=""), served(signature), long_reads)


@pytest.fixture
async def client(config: ApiConfig, store: Store) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of an API that serves iris, `two`, and an identity of every datatype."""
    await announce(store, "iris", default="iris")
    models = [TWO, *map(identity, DTYPES)]
    await Announcements(store).announce_models(
        {model.model: {model.version: msgspec.json.encode(model)} for model in models}
    )
    async with hosted(running(config)) as port, client_of(port) as it:
        yield it


def stored(server: redis.Redis, reply: httpx2.Response) -> tuple[jobs.Record, dict[str, Array]]:
    """The record of the job that `reply` accepted, and its input as a worker reads it."""
    assert reply.status_code == 202, reply.text
    job_id = reply.json()["job_id"]
    data, meta = server.get(keys.data(job_id)), server.get(keys.meta(job_id))
    assert isinstance(data, bytes)
    assert isinstance(meta, bytes)
    return jobs.decode_record(meta), packing.unpack(data)


IMAGE = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 2, 2)
IDS = np.array([2**53 + 1, -(2**63)])


# --- accepted --------------------------------------------------------------------------------


async def test_named_tensors_in_json_arrive_flat_or_nested(
    client: httpx2.AsyncClient, server: redis.Redis
) -> None:
    body = {
        "inputs": [
            described("ids", IDS, data=IDS.tolist()),
            described("image", IMAGE, data=IMAGE.ravel().tolist()),
        ],
        "outputs": [{"name": "z"}],
        "options": {"priority": "high"},
    }
    flat, feeds = stored(server, await client.post("/predict/two", json=body))
    body["inputs"][1]["data"] = IMAGE.tolist()  # type: ignore[index]
    _, again = stored(server, await client.post("/predict/two", json=body))

    assert (flat.payload, flat.answer, flat.outputs) == ("tensors", "tensors", ("z",))
    assert flat.options.priority == "high"
    assert list(feeds) == ["image", "ids"]
    for name, array in (("image", IMAGE), ("ids", IDS)):
        np.testing.assert_array_equal(feeds[name], array)
        np.testing.assert_array_equal(again[name], array)


async def test_binary_tensors_need_no_content_type(
    client: httpx2.AsyncClient, server: redis.Redis
) -> None:
    words = np.array(["", "naïve"], object)
    body, headers = binary(("words", words), ("image", IMAGE), ("ids", IDS))
    for more in ({}, {"content-type": "application/octet-stream"}):
        reply = await client.post("/predict/two", content=body, headers={**headers, **more})
        _, feeds = stored(server, reply)
        assert feeds["words"].tolist() == ["", "naïve"]
        np.testing.assert_array_equal(feeds["image"], IMAGE)
        np.testing.assert_array_equal(feeds["ids"], IDS)


async def test_some_inputs_may_be_json_and_others_binary(
    client: httpx2.AsyncClient, server: redis.Redis
) -> None:
    size = {"binary_data_size": IMAGE.nbytes}
    inputs = [described("ids", IDS, data=IDS.tolist()), described("image", IMAGE, parameters=size)]
    body, headers = with_json_length({"inputs": inputs}, IMAGE.tobytes())
    _, feeds = stored(server, await client.post("/predict/two", content=body, headers=headers))
    np.testing.assert_array_equal(feeds["image"], IMAGE)


async def test_requests_of_tritons_client_are_accepted(
    client: httpx2.AsyncClient, server: redis.Redis
) -> None:
    image = triton.InferInput("image", list(IMAGE.shape), "FP32")
    image.set_data_from_numpy(IMAGE)
    ids = triton.InferInput("ids", [2], "INT64")
    ids.set_data_from_numpy(IDS, binary_data=False)
    words = triton.InferInput("words", [2], "BYTES")
    words.set_data_from_numpy(np.array(["é", "b"], object))
    for outputs in (None, [triton.InferRequestedOutput("y", binary_data=True)]):
        generate = triton.InferenceServerClient.generate_request_body
        body, length = generate([image, ids, words], outputs=outputs)
        headers = {LENGTH: str(length)}
        record, feeds = stored(
            server,
            await client.post("/predict/two?priority=low&version=3", content=body, headers=headers),
        )
        np.testing.assert_array_equal(feeds["image"], IMAGE)
        np.testing.assert_array_equal(feeds["ids"], IDS)
        assert feeds["words"].tolist() == ["é", "b"]
        assert record.outputs == (("y",) if outputs else ())
        assert (record.options.priority, record.version) == ("low", "3")


@pytest.mark.parametrize("order", ["C", "F"])
async def test_an_array_that_numpy_saved_is_accepted(
    client: httpx2.AsyncClient, server: redis.Redis, order: Any
) -> None:
    rows = np.arange(8, dtype=np.float32).reshape(2, 4)
    reply = await client.post(
        "/predict?ttl_seconds=60", content=npy_bytes(np.asarray(rows, order=order)), headers=NPY
    )
    record, feeds = stored(server, reply)
    np.testing.assert_array_equal(feeds["input"], rows)
    assert (record.answer, record.options.ttl_seconds) == ("tensors", 60)


async def test_long_data_is_stored_as_tensors_and_short_as_the_text_it_was(
    client: httpx2.AsyncClient, server: redis.Redis
) -> None:
    rows = [[0.1, 2, 3, 4]] * 100
    record, feeds = stored(server, await client.post("/predict", json={"data": rows}))
    assert (record.payload, record.answer) == ("tensors", "json")
    np.testing.assert_array_equal(feeds["input"], np.array(rows, np.float32))
    short = await client.post("/predict", json={"data": rows[:1]})
    assert server.get(keys.data(short.json()["job_id"])) == b"[[0.1,2,3,4]]"


GAPS: list[Any] = ["NaN", 1, None, "-Infinity", -2.5, "Infinity"]
AS_JSON = {
    "flat": {"inputs": [{"name": "x", "shape": [2, 3], "data": GAPS}]},
    "nested": {"inputs": [{"name": "x", "shape": [2, 3], "data": [GAPS[:3], GAPS[3:]]}]},
    "data": {"data": [GAPS[:3], GAPS[3:]]},
    "long data": {"data": [GAPS[:3], GAPS[3:]] * 400},
    "long tensors": {"inputs": [{"name": "x", "shape": [800, 3], "data": GAPS * 400}]},
}


@pytest.mark.parametrize("datatype", sorted(FLOATS))
@pytest.mark.parametrize("form", AS_JSON)
async def test_floats_in_json_may_be_nan_or_infinite(form: str, datatype: str) -> None:
    body = msgspec.json.decode(msgspec.json.encode(AS_JSON[form]))
    for tensor in body.get("inputs", ()):
        tensor["datatype"] = datatype
    signature = identity(datatype, ("n", 3))
    text = json.dumps(body).encode()

    alone = await read_body_for(signature, text, {})
    of_a_line, _ = read_line(text, RequestOptions(), served(signature), 60)

    for taken in (alone, of_a_line):
        if taken.payload == "json":
            array = check_data(taken.content, signature)
        else:
            array = packing.unpack(taken.content)["x"]
        expected = [[np.nan, 1, np.nan], [-np.inf, -2.5, np.inf]] * (len(array) // 2)
        np.testing.assert_array_equal(array.astype(np.float64), expected)


@pytest.mark.parametrize("datatype", ["INT64", "BOOL", "BYTES"])
@pytest.mark.parametrize("form", AS_JSON)
async def test_other_datatypes_than_floats_take_no_null_or_nan(form: str, datatype: str) -> None:
    body = msgspec.json.decode(msgspec.json.encode(AS_JSON[form]))
    for tensor in body.get("inputs", ()):
        tensor["datatype"] = datatype
    with pytest.raises(InvalidInput) as refused:
        await read_body_for(identity(datatype, ("n", 3)), json.dumps(body).encode(), {})

    where = {"flat": "/inputs/0/data/2", "long tensors": "/inputs/0/data/2"}
    pointer = where.get(form, "/data/0/2" if "data" in body else "/inputs/0/data/0/2")
    found = {fault.pointer: fault.detail for fault in refused.value.faults}
    assert found[pointer].startswith("null, expected ")
    assert 'only FP16, BF16, FP32 and FP64 take null and "NaN"' in found[pointer]
    assert (pointer[:-1] + "0" in found) is (datatype != "BYTES")


def _values(datatype: str) -> st.SearchStrategy[Any]:
    if datatype == "BYTES":
        return st.text(st.characters(codec="utf-8"), max_size=4)
    size = DTYPES[datatype].itemsize
    return st.booleans() if datatype == "BOOL" else st.binary(min_size=size, max_size=size)


@st.composite
def arrays(draw: st.DrawFn) -> tuple[str, Array]:
    """Arrays of any datatype with any bits, including NaN and infinities."""
    datatype = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    count = shape[0] * shape[1]
    values = draw(st.lists(_values(datatype), min_size=count, max_size=count))
    if datatype in ("BYTES", "BOOL"):
        array = np.empty(count, DTYPES[datatype])
        array[:] = values
    else:
        array = (
            np.frombuffer(b"".join(values), DTYPES[datatype])
            if count
            else np.empty(0, DTYPES[datatype])
        )
    return datatype, array.reshape(shape)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(arrays())
async def test_every_bit_of_an_array_arrives(case: tuple[str, Array]) -> None:
    datatype, array = case
    body, headers = binary(("x", array))
    taken = await read_body_for(identity(datatype), body, headers)
    arrived = packing.unpack(taken.content)["x"]
    assert (arrived.shape, arrived.dtype) == (array.shape, array.dtype)
    assert content_of(arrived) == content_of(array)


async def test_numbers_in_json_arrive_as_the_datatype_has_them(
    client: httpx2.AsyncClient, server: redis.Redis
) -> None:
    cases = {
        "INT64": [-(2**63), 2**53 + 1],
        "UINT64": [2**64 - 1, 0],
        "FP16": [1.5, 65504],
        "BF16": [0.1, -3],
        "FP64": [1e308, 0.1],
        "BOOL": [True, False],
        "BYTES": ["a", ""],
    }
    for datatype, values in cases.items():
        tensor = {"name": "x", "shape": [1, 2], "datatype": datatype, "data": values}
        reply = await client.post(f"/predict/{datatype}", json={"inputs": [tensor]})
        _, feeds = stored(server, reply)
        np.testing.assert_array_equal(feeds["x"], np.array([values], DTYPES[datatype]))


@pytest.mark.parametrize("data", ["5", "[5]", " 5 "])
async def test_a_scalar_is_given_bare_or_in_a_list(data: str) -> None:
    text = f'{{"inputs": [{{"name": "x", "shape": [], "datatype": "INT8", "data": {data}}}]}}'
    taken = await read_body_for(identity("INT8", ()), text.encode(), {})
    assert packing.unpack(taken.content)["x"].tolist() == 5


async def test_a_model_without_inputs_is_requested_with_none(
    client: httpx2.AsyncClient, store: Store
) -> None:
    dice = Signature("dice", "1", "", (), (TensorSpec("y", "FP32", (1,)),))
    await Announcements(store).announce_models({"dice": {"1": msgspec.json.encode(dice)}})
    assert (await client.get("/models/dice")).json()["example"] == {"inputs": []}
    reply = await client.post("/models/dice/validate", json={"inputs": []})
    assert (reply.status_code, reply.json()["rows"]) == (200, None)
    assert (await client.post("/predict/dice", json={"inputs": []})).status_code == 202


async def test_an_open_dimension_may_be_zero_in_a_tensor() -> None:
    for array in (np.empty((0, 3), np.float32), np.empty((2, 0), np.float32)):
        body, headers = binary(("x", array))
        taken = await read_body_for(identity("FP32"), body, headers)
        assert packing.unpack(taken.content)["x"].shape == array.shape
        text = json.dumps({"inputs": [described("x", array, data=[])]}).encode()
        assert (await read_body_for(identity("FP32"), text, {})).tensors[0].shape == array.shape


async def test_a_large_tensor_is_copied_as_little_as_possible() -> None:
    image = np.ones((1, 3, 224, 224), np.float32)
    signature = identity("FP32", ("n", 3, 224, 224))
    body, headers = binary(("x", image))
    await read_body_for(signature, body, headers)
    tracemalloc.start()
    try:
        taken = await read_body_for(signature, body, headers)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(taken.content) > image.nbytes
    assert peak < 3 * image.nbytes


# --- refused ---------------------------------------------------------------------------------


def _fp32(name: str = "x", shape: Any = (1, 2), **more: Any) -> dict[str, Any]:
    return {"name": name, "shape": shape, "datatype": "FP32", **more}


UNFIT: dict[str, tuple[Any, str, str]] = {
    "no inputs": ({"inputs": []}, "/inputs", "`x` is missing"),
    "inputs no list": ({"inputs": {}}, "/inputs", "a list"),
    "unknown name": ({"inputs": [_fp32("X", data=[1, 2])]}, "/inputs/0/name", "Known: `x`"),
    "given twice": ({"inputs": [_fp32(data=[1, 2])] * 2}, "/inputs/1/name", "2 times"),
    "other datatype": (
        {"inputs": [{**_fp32(data=[1, 2]), "datatype": "FP64"}]},
        "/inputs/0/datatype",
        "`x` is FP32",
    ),
    "no datatype": (
        {"inputs": [{**_fp32(data=[1, 2]), "datatype": "FP31"}]},
        "/inputs/0/datatype",
        "`x` is FP32",
    ),
    "other rank": ({"inputs": [_fp32(shape=[2], data=[1, 2])]}, "/inputs/0/shape", "has 2"),
    "other size": ({"inputs": [_fp32(shape=[1, 3], data=[1] * 3)]}, "/inputs/0/shape/1", "takes 2"),
    "below zero": ({"inputs": [_fp32(shape=[-1, 2], data=[])]}, "/inputs/0/shape/0", "from 0"),
    "too large": ({"inputs": [_fp32(shape=[2**31 - 1] * 9, data=[])]}, "/inputs/0/shape", "large"),
    "a dim too large": ({"inputs": [_fp32(shape=[2**70], data=[])]}, "/inputs/0/shape/0", ""),
    "rank 33": (
        {"inputs": [_fp32(shape=[1] * 33, data=[1])]},
        "/inputs/0/shape",
        "at most 32 items",
    ),
    "too few": ({"inputs": [_fp32(data=[1])]}, "/inputs/0/data", "1 number, its `shape` takes 2"),
    "too many": ({"inputs": [_fp32(data=[1, 2, 3])]}, "/inputs/0/data", "3 numbers"),
    "nested otherwise": ({"inputs": [_fp32(data=[[1], [2]])]}, "/inputs/0/data", "2 rows"),
    "another word": ({"inputs": [_fp32(data=[1, "inf"])]}, "/inputs/0/data/1", '"Infinity"'),
    "a string": ({"inputs": [_fp32(data=[[1, "1.5"]])]}, "/inputs/0/data/0/1", "a string"),
    "true": ({"inputs": [_fp32(data=[1, True])]}, "/inputs/0/data/1", "true"),
    "out of range": ({"inputs": [_fp32(data=[1, 1e39])]}, "/inputs/0/data/1", "range of FP32"),
    "neither": ({"inputs": [_fp32()]}, "/inputs/0", "`data` or"),
    "both": (
        {"inputs": [_fp32(data=[1, 2], parameters={"binary_data_size": 8})]},
        "/inputs/0",
        "`data` or",
    ),
    "binary without its header": (
        {"inputs": [_fp32(parameters={"binary_data_size": 8})]},
        "/inputs/0/parameters/binary_data_size",
        "Inference-Header-Content-Length",
    ),
    "shared memory": (
        {"inputs": [_fp32(parameters={"shared_memory_region": "a"})]},
        "/inputs/0/parameters/shared_memory_region",
        "no such name",
    ),
    "no name": ({"inputs": [{"shape": [1], "datatype": "FP32"}]}, "/inputs/0/name", "required"),
    "data beside inputs": ({"data": [[1, 2]], "inputs": []}, "/data", "not both"),
    "outputs beside data": ({"data": [[1, 2]], "outputs": []}, "/outputs", "goes with"),
    "unknown output": (
        {"inputs": [_fp32(data=[1, 2])], "outputs": [{"name": "xx"}]},
        "/outputs/0/name",
        "Did you mean `x`",
    ),
    "an output twice": (
        {"inputs": [_fp32(data=[1, 2])], "outputs": [{"name": "x"}] * 2},
        "/outputs/1/name",
        "more than once",
    ),
    "an unknown parameter": (
        {"inputs": [_fp32(data=[1, 2])], "parameters": {"priority": 1}},
        "/parameters/priority",
        "no such name",
    ),
    "an unknown key": ({"inputs": [], "id": "1"}, "/id", "no such name"),
}


@pytest.mark.parametrize("case", UNFIT)
async def test_tensors_that_do_not_fit_are_422_at_their_place(case: str) -> None:
    body, pointer, detail = UNFIT[case]
    with pytest.raises(RequestError) as refused:
        await read_body_for(identity("FP32", ("n", 2)), json.dumps(body).encode(), {})
    assert refused.value.status == 422
    found = {fault.pointer: fault.detail for fault in refused.value.faults}
    assert detail in found.get(pointer, "?"), found


async def test_a_key_of_a_tensor_given_twice_is_refused() -> None:
    text = b'{"inputs": [{"name": "x", "name": "x", "shape": [1, 2], "datatype": "FP32"'
    with pytest.raises(RequestError) as refused:
        await read_body_for(identity("FP32"), text + b', "data": [1, 2]}]}', {})
    assert refused.value.faults[0].pointer == "/inputs/0/name"


async def test_all_faults_of_all_tensors_come_in_one_answer(client: httpx2.AsyncClient) -> None:
    inputs = [
        {"name": "imag", "shape": [1], "datatype": "FP32", "data": [1]},
        {"name": "ids", "shape": [6], "datatype": "INT64", "data": [1, 1.5, None, 2**63, 5, 6]},
        {"name": "words", "shape": [1, 1], "datatype": "FP32", "data": [0]},
    ]
    reply = await client.post("/predict/two", json={"inputs": inputs})
    found = assert_problem(reply, 422, "invalid_input")["errors"]
    assert [fault["pointer"] for fault in found] == [
        "/inputs",
        "/inputs/0/name",
        "/inputs/1/shape/0",
        "/inputs/2/datatype",
        "/inputs/2/shape",
        "/inputs/1/data/1",
        "/inputs/1/data/2",
        "/inputs/1/data/3",
    ]
    assert "Did you mean `image`" in found[1]["detail"]


async def test_equal_symbols_must_be_equal_across_inputs(client: httpx2.AsyncClient) -> None:
    body, headers = binary(("image", IMAGE[:, :, :, :1]), ("ids", IDS[:1]))
    reply = await client.post("/predict/two", content=body, headers=headers)
    found = assert_problem(reply, 422, "invalid_input")["errors"]
    assert {fault["pointer"]: fault["detail"] for fault in found} == {
        "/inputs/0/shape/3": "`side` is 1 here and 2 in `image`; they must be equal",
        "/inputs/1/shape/0": "`batch` is 1 here and 2 in `image`; they must be equal",
    }


async def test_data_for_a_model_of_several_inputs_is_answered_with_what_to_send(
    client: httpx2.AsyncClient,
) -> None:
    for headers, content in (({}, b'{"data": [1]}'), (NPY, npy_bytes(IDS))):
        reply = await client.post("/predict/two", content=content, headers=headers)
        assert "inputs" in assert_problem(reply, 422, "invalid_input")["detail"]


X = np.array([[1, 2]], np.float32)


def _broken(size: int, content: bytes, **more: Any) -> tuple[bytes, dict[str, str]]:
    tensor = {**_fp32(parameters={"binary_data_size": size}), **more}
    return with_json_length({"inputs": [tensor]}, content)


BROKEN: dict[str, tuple[bytes, dict[str, str]]] = {
    "too few bytes": _broken(8, b"1234567"),
    "too many bytes": _broken(8, b"123456789"),
    "a size below zero": _broken(-8, b""),
    "a size beyond all": _broken(2**80, b""),
    "a size of no such shape": _broken(7, b"1234567"),
    "a shape that overflows": _broken(8, b"12345678", shape=[2**31 - 1, 2**31 - 1]),
    "nothing, of an impossible shape": _broken(0, b"", shape=[0, 2**31 - 1, 2**31 - 1, 2**31 - 1]),
    "a length beyond the body": (b"{}", {LENGTH: "3"}),
    "a length that is none": (b"{}", {LENGTH: "-1"}),
    "a length of zero": (b"12345678", {LENGTH: "0"}),
    "a length that overflows": (b"{}", {LENGTH: "9" * 18}),
    "a length with a sign": (b"{}", {LENGTH: "+2"}),
    "a length inside the JSON": (_broken(8, b"12345678")[0], {LENGTH: "20"}),
    "data with tensors behind": with_json_length({"data": [[1, 2]]}, b"1234"),
    "strings cut off": _broken(6, b"\x09\0\0\0ab", datatype="BYTES"),
    "strings of another count": _broken(5, b"\x01\0\0\0a", datatype="BYTES"),
    "text that is no text": _broken(10, b"\x01\0\0\0\xff\x01\0\0\0a", datatype="BYTES"),
    "booleans of 2": _broken(2, b"\x01\x02", datatype="BOOL"),
}


async def test_a_broken_layout_is_a_4xx_and_never_a_500(
    client: httpx2.AsyncClient, subtests: pytest.Subtests
) -> None:
    for case, (body, headers) in BROKEN.items():
        with subtests.test(case):
            model = next(
                (datatype for datatype in ("BYTES", "BOOL") if f'"{datatype}"'.encode() in body),
                "FP32",
            )
            reply = await client.post(f"/predict/{model}", content=body, headers=headers)
            assert reply.status_code in (400, 413, 422), reply.text
            assert reply.json()["code"] != "internal_error"


@given(st.binary(max_size=80), st.integers(0, 90))
async def test_any_bytes_are_accepted_or_refused(noise: bytes, length: int) -> None:
    for headers in ({LENGTH: str(length)}, NPY, {}):
        for prefix in (b"", b'{"inputs": [', b"\x93NUMPY\x01\x00"):
            with pytest.raises(RequestError) as refused:
                await read_body_for(identity("FP32", ()), prefix + noise, headers)
            assert refused.value.status in (400, 422)


HEAD = b"\x93NUMPY\x01\x00"


UNFIT_ARRAYS: list[tuple[Any, str]] = [
    (np.zeros((1, 4)), 'array.astype("<f4")'),
    (np.zeros((1, 4), ">f4"), 'array.astype("<f4")'),
    (np.zeros((1, 4), np.int32), "iris takes FP32"),
    (np.zeros((1, 3), np.float32), "takes 4"),
    (np.zeros(4, np.float32), "has 2"),
    (np.array([["a", "b", "c", "d"]]), "iris takes FP32"),
    (np.zeros((1, 4), [("a", "f4")]), "iris takes FP32"),
    (
        np.array([[1, 2, 3, 1e300]]),
        "numbers from -3.40282e+38 to 3.40282e+38, and the array has 1e+300; replace",
    ),
]


async def test_an_array_of_another_dtype_is_answered_with_the_remedy(
    client: httpx2.AsyncClient, subtests: pytest.Subtests
) -> None:
    for array, named in UNFIT_ARRAYS:
        with subtests.test(named, dtype=array.dtype):
            reply = await client.post("/predict", content=npy_bytes(array), headers=NPY)
            assert named in assert_problem(reply, 422, "invalid_input")["detail"]


async def test_an_array_that_numpy_would_unpickle_is_refused(client: httpx2.AsyncClient) -> None:
    file = io.BytesIO()
    np.save(file, np.array([[{}]]), allow_pickle=True)
    reply = await client.post("/predict", content=file.getvalue(), headers=NPY)
    detail = assert_problem(reply, 422, "invalid_input")["detail"]
    assert "its dtype is object. Convert it with `array.astype()`" in detail
    whole = npy_bytes(np.zeros((1, 4), np.float32))
    deep = HEAD + b"\xff\xff" + b"(" * 65_535
    for body in (file.getvalue(), whole[:-1], whole + b"x", b"", HEAD, deep):
        reply = await client.post("/predict", content=body, headers=NPY)
        assert_problem(reply, 422, "invalid_input")


def npy_with_header(descr: str, order: str, shape: str, data: bytes) -> bytes:
    """A `.npy` file with this header, which `np.save` may never write."""
    header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    return HEAD + len(header).to_bytes(2, "little") + header + data


_DESCRS = (
    *("'<f4'", "'2f4'", "'(2,)<f4'", "'(2,2)f4'", "'>i8'", "'|O'", "'V4'", "'V0'", "'<U1'"),
    *("'M8[s]'", "[('a', '<f4')]", "[('a', '2f4')]", "[('', '<f4')]", "[]", "'f4,f4'", "''", "4"),
    *("None", "'|b1'", "'<c8'", "'float'", "'?'", "'S0'", "['<f4']", "{'names': []}"),
)
_SHAPES = (
    *("(1,)", "(True, 2)", "(-1,)", "(0,)", "()", "(2, 2)", "(1.0,)", "('1',)", "(None,)", "1"),
    *("(2147483648, 2147483648)", "(1,) * 64", "(9223372036854775807,)", "[1]", "(0, 10**30)"),
)


@given(
    st.sampled_from(_DESCRS),
    st.sampled_from(("True", "False", "1", "None")),
    st.sampled_from(_SHAPES),
    st.integers(0, 40),
)
async def test_any_npy_header_is_accepted_or_refused(
    descr: str, order: str, shape: str, size: int
) -> None:
    for taken in (("batch", 2), (), (None, None)):
        with contextlib.suppress(InvalidInput):
            await read_body_for(
                identity("FP32", taken), npy_with_header(descr, order, shape, bytes(size)), NPY
            )


@pytest.mark.parametrize(
    ("descr", "shape", "size"),
    [("'2f4'", "(1,)", 8), ("'(2,)<f4'", "(1,)", 8), ("'<f4'", "(True, 2)", 8)],
)
async def test_an_npy_header_without_a_plain_array_is_a_4xx(
    client: httpx2.AsyncClient, descr: str, shape: str, size: int
) -> None:
    body = npy_with_header(descr, "False", shape, bytes(size))
    assert_problem(await client.post("/predict", content=body, headers=NPY), 422, "invalid_input")


async def test_a_refusal_shows_no_address_of_memory(client: httpx2.AsyncClient) -> None:
    body = npy_with_header("'<f4'", "False", "(2**62, 4)", b"")
    reply = await client.post("/predict", content=body, headers=NPY)
    assert "0x" not in assert_problem(reply, 422, "invalid_input")["detail"]


@pytest.mark.parametrize("name", ["content-type", "content-encoding"])
async def test_only_space_and_tab_are_white_space_in_a_header(
    client: httpx2.AsyncClient, name: str
) -> None:
    """Python's `strip()` also removes the byte 0xA0, which a proxy in front does not."""
    value = {"content-type": b"application/json\xa0", "content-encoding": b"identity\xa0"}[name]
    reply = await client.post(
        "/predict", content=b'{"data": [[1, 2, 3, 4]]}', headers=[(name.encode(), value)]
    )
    assert reply.status_code == 415


async def test_no_option_takes_a_line_end(client: httpx2.AsyncClient) -> None:
    """The `$` of a pattern also matches before a line end at the end of a text."""
    for name, value in {"group": "a\n", "version": "1\n", "priority": "low\n"}.items():
        body = {"data": [[1, 2, 3, 4]], "options": {name: value}}
        assert_problem(await client.post("/predict", json=body), 422, "invalid_input")
        reply = await client.post("/predict", params={name: value}, json={"data": [[1, 2, 3, 4]]})
        assert_problem(reply, 400, "invalid_query")
    for query in ({"tenant": "*\n"}, {"tenant": "a\n"}):
        assert_problem(await client.get("/jobs", params=query), 400, "invalid_query")


# --- options, versions, keys, sizes ----------------------------------------------------------


async def test_options_are_in_the_body_or_in_the_query(client: httpx2.AsyncClient) -> None:
    body = {"data": [[1, 2, 3, 4]], "options": {"priority": "high"}}
    assert_problem(await client.post("/predict?ttl_seconds=5", json=body), 400, "invalid_query")
    for query in ("ttl_seconds=0", "ttl_seconds=x", "prio=high", "version=1.5", "version=01"):
        reply = await client.post(f"/predict?{query}", json={"data": [[1, 2, 3, 4]]})
        assert_problem(reply, 400, "invalid_query")


async def test_a_version_is_checked_against_its_own_signature(
    client: httpx2.AsyncClient, store: Store, server: redis.Redis
) -> None:
    old, new = identity("FP32", ("n", 1)), identity("INT64", ("n", 2))
    versions = {
        "9": msgspec.json.encode(msgspec.structs.replace(old, model="m", version="9")),
        "10": msgspec.json.encode(msgspec.structs.replace(new, model="m", version="10")),
    }
    await Announcements(store).announce_models({"m": versions})
    path = "/predict/m"
    assert (await client.post(path, json={"data": [[1, 2]]})).status_code == 202
    reply = await client.post(path, json={"data": [[0.5]], "options": {"version": "9"}})
    assert reply.status_code == 202
    assert_problem(await client.post(path, json={"data": [[0.5]]}), 422, "invalid_input")
    unknown = await client.post(f"{path}?version=8", json={"data": [[0.5]]})
    assert "10, 9" in assert_problem(unknown, 404, "version_not_found")["detail"]


async def test_an_idempotency_key_covers_all_of_a_tensor_request(
    client: httpx2.AsyncClient,
) -> None:
    once = {"idempotency-key": "k"}
    ids = described("ids", IDS, data=IDS.tolist())
    image = described("image", IMAGE, data=IMAGE.tolist())
    first = await client.post("/predict/two", json={"inputs": [ids, image]}, headers=once)
    body, headers = binary(("image", IMAGE), ("ids", IDS))
    equal = await client.post("/predict/two", content=body, headers={**headers, **once})
    assert equal.json()["job_id"] == first.json()["job_id"]
    others: list[dict[str, Any]] = [
        {"inputs": [ids, image], "outputs": [{"name": "y"}]},
        {"inputs": [ids, image], "options": {"priority": "low"}},
        {"inputs": [{**ids, "data": [1, 2]}, image]},
    ]
    for other in others:
        reply = await client.post("/predict/two", json=other, headers=once)
        assert_problem(reply, 422, "idempotency_conflict")


async def test_ten_mebibytes_are_accepted_and_more_than_max_body_are_not(
    client: httpx2.AsyncClient, server: redis.Redis
) -> None:
    body, headers = binary(("x", np.zeros((10, 1 << 18), np.float32)))
    assert len(body) > 10 << 20
    reply = await client.post("/predict/FP32", content=body, headers=headers)
    _, feeds = stored(server, reply)
    assert feeds["x"].shape == (10, 1 << 18)
    over, headers = binary(("x", np.zeros((16, 1 << 18), np.float32)))
    refused = await client.post("/predict/FP32", content=over, headers=headers)
    assert "MAX_BODY" in assert_problem(refused, 413, "body_too_large")["detail"]
    text = json.dumps({"data": [[1, 2, 3, 4]] * 200_000}).encode()
    for more in ({}, {LENGTH: str(len(text))}):
        refused = await client.post("/predict", content=text, headers=more)
        assert "MAX_JSON" in assert_problem(refused, 413, "body_too_large")["detail"]


async def test_a_validation_shows_what_it_understood_and_stores_nothing(
    client: httpx2.AsyncClient, server: redis.Redis
) -> None:
    body, headers = binary(("image", IMAGE), ("ids", IDS))
    reply = await client.post("/models/two/validate", content=body, headers=headers)
    assert reply.status_code == 200
    answer = reply.json()
    assert (answer["valid"], answer["model"], answer["version"]) == (True, "two", "3")
    assert answer["inputs"][0] == {"name": "image", "datatype": "FP32", "shape": [2, 3, 2, 2]}
    assert (answer["rows"], answer["outputs"]) == (2, ["y", "z"])
    bad = {"data": [[1, 2, 3, "4"]]}
    refused = assert_problem(
        await client.post("/models/iris/validate", json=bad), 422, "invalid_input"
    )
    assert refused["errors"] == (await client.post("/predict", json=bad)).json()["errors"]
    assert server.llen(QUEUE) == 0
    assert not server.keys("job:*")


async def test_every_example_is_a_request_that_works(client: httpx2.AsyncClient) -> None:
    for model in (await client.get("/models")).json()["models"]:
        if model["example"] is None:
            continue
        for path in (model["url"], f"/models/{model['model']}/validate"):
            reply = await client.post(path, json=model["example"])
            assert reply.status_code in (200, 202), reply.text
    two = (await client.get("/models/two")).json()
    assert [tensor["name"] for tensor in two["example"]["inputs"]] == ["image", "ids"]
