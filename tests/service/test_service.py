"""The whole service, as its users meet it: real processes, real models, HTTP."""

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
from tests.process import REPOSITORY, parent
from tests.serving import free_port

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def urls(redis_url: str, shipped_models: Path) -> Iterator[list[str]]:
    """Two APIs and a worker, processes of their own, on one Redis; all tests here use them."""
    server = redis.Redis.from_url(redis_url)
    server.flushall()
    environ = {"REDIS_URL": redis_url, "MODEL_DIR": str(shipped_models)}
    with ExitStack() as stack:
        ports = [free_port(), free_port()]
        stack.enter_context(parent("-m", "asyncinfer", "work", cwd=REPOSITORY, **environ))
        for port in ports:
            argv = ("-m", "asyncinfer", "serve", "--port", str(port))
            api = stack.enter_context(parent(*argv, cwd=REPOSITORY, **environ))
            while not api.says().strip().startswith("Stop"):
                pass
        found = [f"http://127.0.0.1:{port}" for port in ports]
        with httpx2.Client(verify=False) as client:
            eventually_sync(
                lambda: all(
                    len(client.get(f"{url}/models").json()["models"]) == 2 for url in found
                ),
                "both know both models",
            )
        yield found
    assert_at_rest(server, "predict_queue", "predict_queue:digits")
    server.close()


@pytest.fixture
async def client() -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(timeout=30, verify=False) as it:
        yield it


async def _all_results(
    client: httpx2.AsyncClient, url: str, model: str, rows: np.ndarray
) -> list[dict[str, Any]]:
    """One job a row, 16 clients at once."""
    gate = asyncio.Semaphore(16)

    async def one(row: np.ndarray) -> dict[str, Any]:
        async with gate:
            body = {"data": [row.tolist()]}
            headers = {"Prefer": "wait=20"}
            answer = await client.post(f"{url}/predict/{model}", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        result: dict[str, Any] = answer.json()["result"]
        return result

    return list(await asyncio.gather(*(one(row) for row in rows)))


@pytest.mark.parametrize(("model", "count"), [("iris", 150), ("digits", 360)])
async def test_every_row_through_the_service_agrees_with_scikit_learn(
    model: str, count: int, urls: list[str], client: httpx2.AsyncClient
) -> None:
    with np.load(DATA / f"{model}.npz") as expected:
        rows, labels, probabilities = (
            expected[name] for name in ("inputs", "labels", "probabilities")
        )
    assert len(rows) == count

    results = await _all_results(client, urls[0], model, rows)

    assert [one["prediction"] for one in results] == labels.tolist()
    answered = np.array([one["probabilities"] for one in results])
    np.testing.assert_allclose(answered, probabilities, atol=1e-5)

    # The same again as one job of many rows: none is dropped, none changes places.
    body = {"data": rows.tolist()}
    answer = await client.post(
        f"{urls[1]}/predict/{model}", json=body, headers={"Prefer": "wait=20"}
    )
    together = np.array([one["probabilities"] for one in answer.json()["result"]])
    np.testing.assert_allclose(together, probabilities, atol=1e-5)


async def test_200_posts_of_one_key_to_two_api_processes_make_one_job(
    urls: list[str], client: httpx2.AsyncClient
) -> None:
    headers = {"Idempotency-Key": "one-and-only"}
    before = {job["job_id"] for job in await _jobs(client, urls[1])}
    body = {"data": [[5.1, 3.5, 1.4, 0.2]]}

    answers = await asyncio.gather(
        *(client.post(f"{urls[i % 2]}/predict", json=body, headers=headers) for i in range(200))
    )

    assert {answer.status_code for answer in answers} == {202}
    ids = Counter(answer.json()["job_id"] for answer in answers)
    assert list(ids.values()) == [200]
    (job_id,) = ids
    ended = await client.get(f"{urls[0]}/job/{job_id}?wait=20")
    assert ended.json()["result"]["class_name"] == "setosa"
    assert {job["job_id"] for job in await _jobs(client, urls[1])} - before == {job_id}


async def _jobs(client: httpx2.AsyncClient, url: str) -> list[dict[str, Any]]:
    """The newest jobs."""
    jobs: list[dict[str, Any]] = (await client.get(f"{url}/jobs")).json()["jobs"]
    return jobs


async def test_a_strangers_reader_finds_our_job_where_the_pattern_says(
    urls: list[str], client: httpx2.AsyncClient, redis_url: str
) -> None:
    body = {"data": [[5.1, 3.5, 1.4, 0.2]]}
    answer = await client.post(f"{urls[0]}/predict", json=body, headers={"Prefer": "wait=20"})

    reader = (
        "import json, sys, redis\n"
        "client = redis.Redis.from_url(sys.argv[1], decode_responses=True)\n"
        "print(client.get(f'job:{sys.argv[2]}:status'))\n"
        "print(json.loads(client.get(f'job:{sys.argv[2]}:result'))['class_name'])\n"
    )
    command = [sys.executable, "-c", reader, redis_url, answer.json()["job_id"]]
    told = await asyncio.to_thread(subprocess.check_output, command, text=True)

    assert told.split() == ["completed", "setosa"]


async def test_a_job_submitted_to_one_api_is_waited_for_at_another(
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
            answer = await client.post(
                f"{urls[0]}{model['url']}", json=body, headers={"Prefer": "wait=20"}
            )
            assert (answer.status_code, answer.json()["status"]) == (200, "completed")
            known = await client.post(f"{urls[1]}/models/{model['model']}/validate", json=body)
            assert (known.status_code, known.json()["rows"]) == (200, len(rows))


async def test_an_answer_comes_in_the_form_that_is_asked_for_however_the_input_was_sent(
    urls: list[str], client: httpx2.AsyncClient
) -> None:
    url = f"{urls[0]}/predict/iris"
    row = np.array([[5.1, 3.5, 1.4, 0.2]], np.float32)
    saved = io.BytesIO()
    np.save(saved, row)
    npy = {"Content-Type": "application/x-npy", "Prefer": "wait=20"}
    labelled = await client.post(f"{url}?answer=json", content=saved.getvalue(), headers=npy)
    body = {"data": row.tolist(), "options": {"answer": "tensors"}}
    tensors = await client.post(url, json=body, headers={"Prefer": "wait=20"})

    shown = labelled.json()["result"]
    assert (shown["prediction"], shown["class_name"]) == (0, "setosa")
    outputs = {one["name"]: one["data"] for one in tensors.json()["result"]["outputs"]}
    assert outputs["probabilities"] == pytest.approx(shown["probabilities"])
    job_id = tensors.json()["job_id"]
    wanted = {"Accept": "application/x-npy"}
    read = await client.get(f"{urls[0]}/job/{job_id}/result?output=probabilities", headers=wanted)
    assert np.load(io.BytesIO(read.content)).shape == (1, 3)


async def test_a_finished_job_remembers_the_model_file_that_ran_it(
    urls: list[str], client: httpx2.AsyncClient, redis_url: str
) -> None:
    body = {"data": [[5.1, 3.5, 1.4, 0.2]]}
    answer = await client.post(f"{urls[0]}/predict/iris", json=body, headers={"Prefer": "wait=20"})
    model = (await client.get(f"{urls[0]}/models/iris")).json()

    with redis.Redis.from_url(redis_url) as server:
        meta = server.get(f"job:{answer.json()['job_id']}:meta")
    assert isinstance(meta, bytes)
    record = decode_record(meta)
    assert (record.ran_version, record.ran_sha256) == (model["version"], model["sha256"])
