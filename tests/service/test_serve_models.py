"""Changes of the model folder under `asyncinfer serve`, as clients see them over HTTP."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import httpx2
import pytest

from tests import zoo
from tests.faults.harness import eventually, eventually_sync
from tests.faults.model_folder import ModelFolder
from tests.serving import ServeProcess, running_serve


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A folder with the model `first`; each test adds models of its own."""
    folder = ModelFolder(tmp_path_factory.mktemp("folder"))
    folder.publish(zoo.adds(1), 1, name="first")
    return folder


@pytest.fixture(scope="module")
def served(folder: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    data_dir = str(tmp_path_factory.mktemp("data"))
    with running_serve(
        DATA_DIR=data_dir, MODEL_DIR=str(folder.path), RESCAN_SECONDS="0.5"
    ) as serve:
        eventually_sync(
            lambda: bool(serve.get("/models")["models"]), "a worker has announced a model"
        )
        yield serve


class Client:
    """A client of the models in the folder."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http

    async def post(
        self, name: str, value: float, version: str | None = None, *, wait: bool = True
    ) -> httpx2.Response:
        headers = {"Prefer": "wait=20"} if wait else {}
        options = {"version": version} if version else {}
        body = {"data": [[value]], "options": options}
        return await self._http.post(f"/predict/{name}", json=body, headers=headers)

    async def predict(self, name: str, value: float, version: str | None = None) -> float:
        """Submits and waits; returns the result. Fails the test if the job does not complete."""
        reply = await self.post(name, value, version)
        assert reply.status_code == 200, reply.text
        return result_of(reply.json())

    async def get(self, path: str, status: int = 200) -> Any:
        reply = await self._http.get(path)
        assert reply.status_code == status, reply.text
        return reply.json()

    async def run_action(self, path: str) -> None:
        """Sends a POST without a body, to pause or to resume a model."""
        assert (await self._http.post(path)).status_code == 200

    async def wait_for_model(self, name: str, condition: Callable[[dict[str, Any]], bool]) -> Any:
        """Waits until the description of a model meets `condition`; returns the description."""
        model: dict[str, Any] = {}

        async def is_met() -> bool:
            reply = await self._http.get(f"/models/{name}")
            model.update(reply.json())
            return reply.status_code == 200 and condition(model)

        await eventually(is_met, f"the description of {name} meets the condition: {model}", 20)
        return model


def result_of(job: dict[str, Any]) -> float:
    assert job["status"] == "completed", job
    return float(job["result"]["outputs"][0]["data"][0])


@pytest.fixture
async def client(served: ServeProcess) -> AsyncIterator[Client]:
    async with httpx2.AsyncClient(base_url=served.banner["URL"], timeout=30) as http:
        yield Client(http)


def has_status(client: Client, name: str, status: int) -> Callable[[], Awaitable[bool]]:
    """A condition: a request to the model gets this HTTP status."""

    async def is_met() -> bool:
        return (await client.post(name, 1)).status_code == status

    return is_met


@pytest.mark.soak
async def test_a_model_added_to_the_folder_is_served_and_a_removed_model_is_not_found(
    folder: ModelFolder, client: Client
) -> None:
    assert (await client.post("fresh", 1)).status_code == 404

    folder.publish(zoo.adds(5), 1, name="fresh")
    await eventually(has_status(client, "fresh", 200), "it is served", 20)
    assert await client.predict("fresh", 1) == 6

    folder.remove(1, name="fresh")
    await eventually(has_status(client, "fresh", 404), "it is not found", 20)
    assert (await client.get("/models/fresh", 404))["code"] == "model_not_found"
    assert await client.predict("first", 1) == 2


@pytest.mark.soak
async def test_a_new_version_is_served_while_requests_run_and_no_request_fails(
    folder: ModelFolder, client: Client
) -> None:
    folder.publish(zoo.adds(1), 1, name="busy")
    before = await client.wait_for_model("busy", lambda model: model["workers"] == 1)
    results: list[float] = []
    has_enough_results = asyncio.Event()

    async def load() -> None:
        while not has_enough_results.is_set():
            results.append(await client.predict("busy", 10))

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(load())
        await eventually(lambda: len(results) >= 20, "requests run")
        folder.publish(zoo.adds(2), 2, name="busy")
        await eventually(lambda: 12.0 in results, "the new version is served", 20)
        has_enough_results.set()

    assert set(results) == {11.0, 12.0}
    assert await client.predict("busy", 10) == 12
    assert await client.predict("busy", 10, version="1") == 11
    model = await client.wait_for_model("busy", lambda model: model["versions"] == ["2", "1"])
    assert (model["version"], model["version_sha256"]["1"]) == ("2", before["sha256"])
    assert model["sha256"] == model["version_sha256"]["2"] != before["sha256"]


@pytest.mark.soak
async def test_the_description_of_a_model_has_its_batching_run_times_and_problems(
    folder: ModelFolder, client: Client
) -> None:
    folder.publish(zoo.adds(1), 1, name="described")
    await client.wait_for_model("described", lambda model: model["workers"] == 1)
    assert await client.predict("described", 1) == 2
    folder.publish(b"not a model", 3, name="described")

    model = await client.wait_for_model(
        "described", lambda model: bool(model["problems"] and model["run_times"])
    )

    (problem,) = model["problems"]
    assert (problem["model"], problem["version"]) == ("described", "3")
    assert "no ONNX file" in problem["reason"]
    assert (model["versions"], model["workers"], model["batched"]) == (["1"], 1, True)
    assert model["batching"].startswith("on: ")
    (times,) = model["run_times"].values()
    assert 0 < times["1"] < 1
    assert await client.predict("described", 1) == 2
    codes: list[str] = []

    async def is_refused() -> bool:
        codes.append((await client.post("described", 1, version="3")).json()["code"])
        return codes[-1] == "version_not_found"

    # An API may have read the worker's status a second ago, when the file was still being tried.
    await eventually(is_refused, "the version is unknown")
    assert set(codes) <= {"version_not_found", "model_loading"}


@pytest.mark.soak
async def test_a_paused_model_accepts_jobs_and_runs_them_when_it_is_resumed(
    folder: ModelFolder, client: Client
) -> None:
    folder.publish(zoo.adds(7), 1, name="paused")
    await client.wait_for_model("paused", lambda model: model["workers"] == 1)
    await client.run_action("/models/paused/pause")

    reply = await client.post("paused", 1, wait=False)
    assert reply.status_code == 202
    url = reply.json()["url"]
    assert (await client.get(f"{url}?wait=0.5"))["status"] == "pending"
    assert (await client.get("/models/paused"))["paused"]
    assert await client.predict("first", 1) == 2

    await client.run_action("/models/paused/resume")
    assert result_of(await client.get(f"{url}?wait=20")) == 8
