"""The whole service as its users see it: real processes, the shipped models, HTTP."""

import asyncio
import io
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import redis

from asyncinfer.jobs import decode_record
from tests.faults.harness import assert_at_rest, eventually_sync
from tests.ports import free_port
from tests.process import REPOSITORY, python_process

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def urls(redis_url: str, shipped_models: Path) -> Iterator[list[str]]:
    """The URLs of two APIs, with a worker, on one Redis; shared by the tests of this file."""
    server = redis.Redis.from_url(redis_url)
    server.flushall()
    environ = {"REDIS_URL": redis_url, "MODEL_DIR": str(shipped_models)}
    with ExitStack() as stack:
        ports = [free_port(), free_port()]
        stack.enter_context(python_process("-m", "asyncinfer", "work", cwd=REPOSITORY, **environ))
        for port in ports:
            argv = ("-m", "asyncinfer", "serve", "--port", str(port))
            api = stack.enter_context(python_process(*argv, cwd=REPOSITORY, **environ))
            while not api.read_line().strip().startswith("Stop"):
                pass
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        with httpx2.Client(verify=False) as client:
            eventually_sync(
                lambda: all(len(client.get(f"{url}/models").json()["models"]) == 2 for url in urls),
                "both APIs list both models",
            )
        yield urls
    assert_at_rest(server, "predict_queue", "predict_queue:digits")
    server.close()


@pytest.fixture
async def client() -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(timeout=30, verify=False) as client:
        yield client


async def _all_results(
    client: httpx2.AsyncClient, url: str, model: str, rows: np.ndarray
) -> list[dict[str, Any]]:
    """Submits a job per row, at most 16 at a time; returns the results in the order of `rows`."""
    gate = asyncio.Semaphore(16)

    async def predict(row: np.ndarray) -> dict[str, Any]:
        async with gate:
            body = {"data": [row.tolist()]}
            headers = {"Prefer": "wait=20"}
            reply = await client.post(f"{url}/predict/{model}", json=body, headers=headers)
        assert reply.status_code == 200, reply.text
        result: dict[str, Any] = reply.json()["result"]
        return result

    return list(await asyncio.gather(*(predict(row) for row in rows)))


@pytest.mark.soak
@pytest.mark.parametrize(
    ("model", "count"), [("iris", 150), pytest.param("digits", 360, marks=pytest.mark.soak)]
)
async def test_every_row_through_the_service_agrees_with_scikit_learn(
    model: str, count: int, urls: list[str], client: httpx2.AsyncClient
) -> None:
    with np.load(DATA / f"{model}.npz") as expected:
        rows, labels, probabilities = (
            expected[name] for name in ("inputs", "labels", "probabilities")
        )
    assert len(rows) == count

    results = await _all_results(client, urls[0], model, rows)

    assert [result["prediction"] for result in results] == labels.tolist()
    separate = np.array([result["probabilities"] for result in results])
    np.testing.assert_allclose(separate, probabilities, atol=1e-5)

    # The same rows as one job: no row is lost, and their order stays.
    body = {"data": rows.tolist()}
    reply = await client.post(
        f"{urls[1]}/predict/{model}", json=body, headers={"Prefer": "wait=20"}
    )
    together = np.array([result["probabilities"] for result in reply.json()["result"]])
    np.testing.assert_allclose(together, probabilities, atol=1e-5)


async def test_200_posts_of_one_key_to_two_api_processes_make_one_job(
    urls: list[str], client: httpx2.AsyncClient
) -> None:
    headers = {"Idempotency-Key": "one-key"}
    before = {job["job_id"] for job in await _jobs(client, urls[1])}
    body = {"data": [[5.1, 3.5, 1.4, 0.2]]}

    replies = await asyncio.gather(
        *(client.post(f"{urls[i % 2]}/predict", json=body, headers=headers) for i in range(200))
    )

    assert {reply.status_code for reply in replies} == {202}
    ids = Counter(reply.json()["job_id"] for reply in replies)
    assert list(ids.values()) == [200]
    (job_id,) = ids
    ended = await client.get(f"{urls[0]}/job/{job_id}?wait=20")
    assert ended.json()["result"]["class_name"] == "setosa"
    assert {job["job_id"] for job in await _jobs(client, urls[1])} - before == {job_id}


async def _jobs(client: httpx2.AsyncClient, url: str) -> list[dict[str, Any]]:
    """The newest jobs of the caller."""
    jobs: list[dict[str, Any]] = (await client.get(f"{url}/jobs")).json()["jobs"]
    return jobs


async def test_an_external_reader_finds_a_job_under_its_documented_keys(
    urls: list[str], client: httpx2.AsyncClient, redis_url: str
) -> None:
    body = {"data": [[5.1, 3.5, 1.4, 0.2]]}
    reply = await client.post(f"{urls[0]}/predict", json=body, headers={"Prefer": "wait=20"})

    reader = (
        "import json, sys, redis\n"
        "client = redis.Redis.from_url(sys.argv[1], decode_responses=True)\n"
        "print(client.get(f'job:{sys.argv[2]}:status'))\n"
        "print(json.loads(client.get(f'job:{sys.argv[2]}:result'))['class_name'])\n"
    )
    command = [sys.executable, "-c", reader, redis_url, reply.json()["job_id"]]
    output = await asyncio.to_thread(subprocess.check_output, command, text=True)

    assert output.split() == ["completed", "setosa"]


async def test_a_client_can_wait_at_one_api_for_a_job_submitted_to_another(
    urls: list[str], client: httpx2.AsyncClient
) -> None:
    options = {"delay_seconds": 0.3}
    submitted = await client.post(
        f"{urls[0]}/predict", json={"data": [[5.1, 3.5, 1.4, 0.2]], "options": options}
    )
    job_id = submitted.json()["job_id"]

    waits = await asyncio.gather(*(client.get(f"{url}/job/{job_id}?wait=20") for url in urls))

    assert [wait.json()["status"] for wait in waits] == ["completed", "completed"]


async def test_the_example_of_every_shipped_model_runs(
    urls: list[str], client: httpx2.AsyncClient
) -> None:
    models = (await client.get(f"{urls[0]}/models")).json()["models"]
    for model in models:
        (spec,) = model["inputs"]
        rows = model["example"]["data"]
        tensor = {
            "name": spec["name"],
            "shape": [len(rows), len(rows[0])],
            "datatype": spec["datatype"],
            "data": rows,
        }
        for body in (model["example"], {"inputs": [tensor]}):
            reply = await client.post(
                f"{urls[0]}{model['url']}", json=body, headers={"Prefer": "wait=20"}
            )
            assert (reply.status_code, reply.json()["status"]) == (200, "completed")
            valid = await client.post(f"{urls[1]}/models/{model['model']}/validate", json=body)
            assert (valid.status_code, valid.json()["rows"]) == (200, len(rows))


async def test_a_result_has_the_requested_form_whatever_the_form_of_the_input(
    urls: list[str], client: httpx2.AsyncClient
) -> None:
    url = f"{urls[0]}/predict/iris"
    row = np.array([[5.1, 3.5, 1.4, 0.2]], np.float32)
    content = io.BytesIO()
    np.save(content, row)
    npy = {"Content-Type": "application/x-npy", "Prefer": "wait=20"}
    labelled = await client.post(f"{url}?answer=json", content=content.getvalue(), headers=npy)
    body = {"data": row.tolist(), "options": {"answer": "tensors"}}
    tensors = await client.post(url, json=body, headers={"Prefer": "wait=20"})

    result = labelled.json()["result"]
    assert (result["prediction"], result["class_name"]) == (0, "setosa")
    outputs = {output["name"]: output["data"] for output in tensors.json()["result"]["outputs"]}
    assert outputs["probabilities"] == pytest.approx(result["probabilities"])
    job_id = tensors.json()["job_id"]
    accept = {"Accept": "application/x-npy"}
    reply = await client.get(f"{urls[0]}/job/{job_id}/result?output=probabilities", headers=accept)
    assert np.load(io.BytesIO(reply.content)).shape == (1, 3)


async def test_a_finished_job_records_the_version_and_hash_of_its_model(
    urls: list[str], client: httpx2.AsyncClient, redis_url: str
) -> None:
    body = {"data": [[5.1, 3.5, 1.4, 0.2]]}
    reply = await client.post(f"{urls[0]}/predict/iris", json=body, headers={"Prefer": "wait=20"})
    model = (await client.get(f"{urls[0]}/models/iris")).json()

    with redis.Redis.from_url(redis_url) as server:
        meta = server.get(f"job:{reply.json()['job_id']}:meta")
    assert isinstance(meta, bytes)
    record = decode_record(meta)
    assert (record.ran_version, record.ran_sha256) == (model["version"], model["sha256"])
