"""Results as JSON and in binary forms, and the answers for jobs without one."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import numpy as np
import onnx
import pytest
import redis
import tritonclient.http as triton

from asyncinfer.api.config import ApiConfig
from asyncinfer.api.handlers.models import example_of
from asyncinfer.engine import Engine, Stop
from asyncinfer.models.folder import scan
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.store import Store
from asyncinfer.tensors import packing
from asyncinfer.tensors.datatypes import DTYPES, Array
from asyncinfer.worker.execution import prepare
from tests import zoo
from tests.faults.harness import eventually

from .harness import (
    QUEUE,
    RESULT,
    ManualWorker,
    assert_problem,
    client_of,
    hosted,
    running,
    submit,
)
from .tensor_requests import binary, identity

BINARY = {"accept": "application/octet-stream"}
NPY = {"accept": "application/x-npy"}
TENSORS: dict[str, Array] = {
    "x": np.array([[1.5, np.nan], [np.inf, -0.0]], np.float32),
    "words": np.array(["é", ""], object),
    "half": np.array([1, 2.5]).astype(DTYPES["BF16"]),
}
ROWS = {"inputs": [{"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}


async def submit_completed(
    client: httpx2.AsyncClient, manual_worker: ManualWorker, tensors: dict[str, Array]
) -> str:
    """Submits a job and completes it with these tensors; its id."""
    job_id: str = (await client.post("/predict", json=ROWS)).json()["job_id"]
    await manual_worker.complete(body=packing.pack(tensors))
    return job_id


def arrays(reply: httpx2.Response) -> dict[str, Array]:
    """A binary result as Triton's client reads it."""
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "application/octet-stream"
    length = int(reply.headers["inference-header-content-length"])
    parse = triton.InferenceServerClient.parse_response_body
    result = parse(reply.content, header_length=length)
    names = [output["name"] for output in result.get_response()["outputs"]]
    return {name: result.as_numpy(name) for name in names}


async def test_stored_tensors_are_shown_as_json(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    job_id = await submit_completed(api, manual_worker, TENSORS)
    job = (await api.get(f"/job/{job_id}")).json()
    alone = await api.get(f"/job/{job_id}/result")
    assert (job["version"], job["sha256"]) == ("1", "a" * 64)
    assert alone.headers["content-type"] == "application/json"
    assert (
        alone.json()
        == job["result"]
        == {
            "outputs": [
                {
                    "name": "x",
                    "datatype": "FP32",
                    "shape": [2, 2],
                    "data": [1.5, "NaN", "Infinity", -0.0],
                },
                {"name": "words", "datatype": "BYTES", "shape": [2], "data": ["é", ""]},
                {"name": "half", "datatype": "BF16", "shape": [2], "data": [1.0, 2.5]},
            ]
        }
    )


async def test_a_result_is_given_in_the_layout_that_tritons_client_reads(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    job_id = await submit_completed(
        api, manual_worker, {**TENSORS, "none": np.empty((0, 3), np.int64)}
    )
    reply = await api.get(f"/job/{job_id}/result", headers=BINARY)
    head = json.loads(reply.content[: int(reply.headers["inference-header-content-length"])])
    found = arrays(reply)
    assert (head["model_name"], head["model_version"], head["id"]) == ("iris", "1", job_id)
    assert found["x"].tobytes() == TENSORS["x"].tobytes()
    assert found["words"].tolist() == ["é".encode(), b""]
    assert found["none"].shape == (0, 3)
    np.testing.assert_array_equal(found["half"].astype(np.float32), [1, 2.5])
    only_x = await api.get(f"/job/{job_id}/result?output=x", headers=BINARY)
    assert list(arrays(only_x)) == ["x"]


async def test_one_output_is_given_as_numpy_saves_it(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    job_id = await submit_completed(api, manual_worker, TENSORS)
    several = await api.get(f"/job/{job_id}/result", headers=NPY)
    problem = assert_problem(several, 406, "not_acceptable")
    assert "`x`, `words`, `half`" in problem["detail"]
    assert problem["job_id"] == job_id
    reply = await api.get(f"/job/{job_id}/result?output=x", headers=NPY)
    assert reply.headers["content-type"] == "application/x-npy"
    array = np.load(io.BytesIO(reply.content), allow_pickle=False)
    assert array.tobytes() == TENSORS["x"].tobytes()
    for name in ("words", "half"):
        refused = await api.get(f"/job/{job_id}/result?output={name}", headers=NPY)
        assert_problem(refused, 406, "not_acceptable")
    unknown = await api.get(f"/job/{job_id}/result?output=word")
    assert "Did you mean `words`" in assert_problem(unknown, 400, "invalid_query")["detail"]


async def test_the_form_is_the_one_that_accept_prefers(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    job_id = await submit_completed(api, manual_worker, {"x": TENSORS["x"]})
    for accept, form in {
        "*/*": "application/json",
        "text/html, application/xml;q=0.9, */*;q=0.8": "application/json",
        "application/*": "application/json",
        "application/octet-stream, */*;q=0.1": "application/octet-stream",
        "application/x-npy;q=0.5, application/octet-stream;q=0.4": "application/x-npy",
        "application/json;q=0, */*": "application/octet-stream",
    }.items():
        reply = await api.get(f"/job/{job_id}/result", headers={"accept": accept})
        assert (accept, reply.headers["content-type"]) == (accept, form)
    for accept in ("text/html", "application/json;q=0", "application/json;q=x", "", ";"):
        reply = await api.get(f"/job/{job_id}/result", headers={"accept": accept})
        assert_problem(reply, 406, "not_acceptable")


async def test_a_result_that_is_text_is_no_tensor(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    job_id = await submit(api)
    await manual_worker.complete()
    assert (await api.get(f"/job/{job_id}/result")).json() == RESULT
    for headers in (BINARY, NPY):
        refused = await api.get(f"/job/{job_id}/result", headers=headers)
        assert "`inputs`" in assert_problem(refused, 406, "not_acceptable")["detail"]


async def test_a_job_without_a_result_is_answered_with_the_reason(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    job_id = await submit(api)
    waiting = await api.get(f"/job/{job_id}/result", headers=BINARY)
    assert_problem(waiting, 409, "job_not_finished")
    assert int(waiting.headers["retry-after"]) > 0
    await manual_worker.fail()
    failed = assert_problem(await api.get(f"/job/{job_id}/result"), 422, "job_failed")
    assert failed["error"] == {"code": "model_failed", "message": "no"}
    cancelled = await submit(api)
    await api.delete(f"/job/{cancelled}")
    assert_problem(await api.get(f"/job/{cancelled}/result"), 409, "job_cancelled")
    assert_problem(await api.get("/job/none/result"), 404, "job_not_found")


async def test_a_damaged_result_is_answered_with_its_own_error(
    api: httpx2.AsyncClient, manual_worker: ManualWorker, server: redis.Redis
) -> None:
    job_id = await submit_completed(api, manual_worker, TENSORS)
    server.set(keys.result(job_id), b"\x01damaged", keepttl=True)
    assert (await api.get(f"/job/{job_id}")).status_code == 200
    for headers in (BINARY, NPY):
        reply = await api.get(f"/job/{job_id}/result", headers=headers)
        assert_problem(reply, 410, "result_damaged")


async def test_a_result_is_visible_to_its_tenant_only(
    two_tenant_port: int, manual_worker: ManualWorker
) -> None:
    mine, theirs = (client_of(two_tenant_port, **{"x-api-key": name}) for name in ("alice", "bob"))
    async with mine, theirs:
        job_id = await submit_completed(mine, manual_worker, TENSORS)
        assert (await mine.get(f"/job/{job_id}/result")).status_code == 200
        assert_problem(await theirs.get(f"/job/{job_id}/result"), 404, "job_not_found")


async def test_a_wait_may_answer_with_the_binary_result(
    api: httpx2.AsyncClient, manual_worker: ManualWorker, server: redis.Redis
) -> None:
    async def wait_for_result(headers: dict[str, str], body: bytes) -> httpx2.Response:
        async with asyncio.TaskGroup() as group:
            more = {**headers, "prefer": "wait=10"}
            post = group.create_task(api.post("/predict", json=ROWS, headers=more))
            await eventually(lambda: bool(server.llen(QUEUE)), "the job waits")
            await manual_worker.complete(body=body)
        return post.result()

    packed = packing.pack(TENSORS)
    reply = await wait_for_result(BINARY, packed)
    assert arrays(reply)["x"].tobytes() == TENSORS["x"].tobytes()
    assert reply.headers["location"].startswith("/job/")
    assert (await wait_for_result({}, packed)).json()["result"]["outputs"][0]["name"] == "x"
    refused = await api.post(
        "/predict", json={"data": [[1, 2, 3, 4]]}, headers={**BINARY, "prefer": "wait=1"}
    )
    assert_problem(refused, 406, "not_acceptable")
    assert server.llen(QUEUE) == 0


# --- through real models ---------------------------------------------------------------------


@pytest.fixture
async def identities(
    config: ApiConfig, store: Store, tmp_path: Path
) -> AsyncIterator[tuple[httpx2.AsyncClient, dict[str, Engine]]]:
    """A client, and an engine of y = x for each datatype that ONNX Runtime copies."""
    for datatype in sorted(DTYPES.keys() - {"BF16", "BYTES"}):
        elem_type = onnx.helper.np_dtype_to_tensor_dtype(DTYPES[datatype])
        zoo.place(tmp_path, datatype, zoo.identity(elem_type))
    zoo.place(tmp_path, "BYTES", zoo.identity(onnx.TensorProto.STRING))
    zoo.place(tmp_path, "added", zoo.added())
    engines = {file.model: Engine.load(file, intra_op_threads=1) for file in scan(tmp_path)}
    await Announcements(store).announce_models(
        {name: {"1": msgspec.json.encode(item.signature)} for name, item in engines.items()}
    )
    async with hosted(running(config)) as port, client_of(port) as client:
        yield client, engines


async def _run_through_engine(
    client: httpx2.AsyncClient,
    manual_worker: ManualWorker,
    engines: dict[str, Engine],
    model: str,
    **sent: Any,
) -> httpx2.Response:
    """Submits a request and runs it through the engine as a worker does; the binary result."""
    submitted = await client.post(f"/predict/{model}", **sent)
    assert submitted.status_code == 202, submitted.text
    claim = await manual_worker.claim(f"{QUEUE}:{model}")
    prepared = prepare(claim.jobs, lambda _: engines[model], None)
    assert not prepared.refused
    engine = engines[model]
    outputs = engine.run(prepared.batches[0].inputs[0], Stop())
    names = [spec.name for spec in engine.signature.outputs]
    await manual_worker.finish(claim, body=packing.pack(dict(zip(names, outputs, strict=True))))
    return await client.get(f"/job/{submitted.json()['job_id']}/result", headers=BINARY)


async def test_tensors_of_every_datatype_go_through_a_model_and_come_back(
    identities: tuple[httpx2.AsyncClient, dict[str, Engine]], manual_worker: ManualWorker
) -> None:
    client, engines = identities
    for datatype in engines.keys() - {"added"}:
        if datatype == "BYTES":
            array = np.array([["a", "é"]], object)
        else:
            dtype = DTYPES[datatype]
            bits = np.random.default_rng(0).integers(0, 256, 6 * dtype.itemsize, np.uint8)
            array = (bits % 2 if datatype == "BOOL" else bits).view(dtype).reshape(3, 2)
        body, headers = binary(("x", array))
        reply = await _run_through_engine(
            client, manual_worker, engines, datatype, content=body, headers=headers
        )
        back = arrays(reply)["y"]
        if datatype == "BYTES":
            assert back.ravel().tolist() == [b"a", "é".encode()]
        else:
            assert back.tobytes() == array.tobytes()


async def test_the_example_of_every_model_runs(
    identities: tuple[httpx2.AsyncClient, dict[str, Engine]], manual_worker: ManualWorker
) -> None:
    client, engines = identities
    for name, engine in engines.items():
        example = example_of(engine.signature)
        assert ("inputs" in (example or {})) == (name == "added")
        shown = (await client.get(f"/models/{name}")).json()["example"]
        reply = await _run_through_engine(client, manual_worker, engines, name, json=shown)
        assert list(arrays(reply)) == ["y"]


def test_a_model_too_large_to_show_has_no_example() -> None:
    assert example_of(identity("FP32", (1, 3, 224, 224))) is None


def test_the_example_of_several_inputs_is_the_one_that_model_toml_shows() -> None:
    (spec,) = identity("FP32", (None, 2)).inputs
    signature = msgspec.structs.replace(
        identity("FP32", (None, 2)),
        inputs=(spec, msgspec.structs.replace(spec, name="b")),
        example_inputs={"b": [[3, 4], [5, 6]], "x": [[1, 2]]},
    )

    assert example_of(signature) == {
        "inputs": [
            {"name": "x", "shape": (1, 2), "datatype": "FP32", "data": [[1, 2]]},
            {"name": "b", "shape": (2, 2), "datatype": "FP32", "data": [[3, 4], [5, 6]]},
        ]
    }
