"""A model folder that changes under `asyncinfer serve`, as its clients see it over HTTP."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import httpx2
import pytest

from tests import zoo
from tests.faults.harness import eventually, eventually_sync
from tests.faults.model_folder import Folder
from tests.serving import Serve, serving


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """With `first`, so that there is something to serve; each test has models of its own."""
    it = Folder(tmp_path_factory.mktemp("folder"))
    it.publish(zoo.adds(1), 1, name="first")
    return it


@pytest.fixture(scope="module")
def served(folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    data_dir = str(tmp_path_factory.mktemp("data"))
    with serving(DATA_DIR=data_dir, MODEL_DIR=str(folder.path), RESCAN_SECONDS="0.5") as it:
        eventually_sync(lambda: bool(it.get("/models")["models"]), "a worker has come")
        yield it


class Client:
    """Asks for `value`, and sees what comes of it."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http

    async def post(
        self, name: str, value: float, version: str | None = None, *, wait: bool = True
    ) -> httpx2.Response:
        headers = {"Prefer": "wait=20"} if wait else {}
        options = {"version": version} if version else {}
        body = {"data": [[value]], "options": options}
        return await self._http.post(f"/predict/{name}", json=body, headers=headers)

    async def ask(self, name: str, value: float, version: str | None = None) -> float:
        """The answer, of a job that must complete."""
        reply = await self.post(name, value, version)
        assert reply.status_code == 200, reply.text
        return number_in(reply.json())

    async def get(self, path: str, status: int = 200) -> Any:
        reply = await self._http.get(path)
        assert reply.status_code == status, reply.text
        return reply.json()

    async def switch(self, path: str) -> None:
        assert (await self._http.post(path)).status_code == 200

    async def until_known(self, name: str, what: Callable[[dict[str, Any]], bool]) -> Any:
        """What is told of a model, once it is so."""
        told: dict[str, Any] = {}

        async def is_so() -> bool:
            reply = await self._http.get(f"/models/{name}")
            told.update(reply.json())
            return reply.status_code == 200 and what(told)

        await eventually(is_so, f"what is told of {name} is so: {told}", 20)
        return told


def number_in(job: dict[str, Any]) -> float:
    assert job["status"] == "completed", job
    return float(job["result"]["outputs"][0]["data"][0])


@pytest.fixture
async def client(served: Serve) -> AsyncIterator[Client]:
    async with httpx2.AsyncClient(base_url=served.welcome["URL"], timeout=30) as http:
        yield Client(http)


def answered_with(client: Client, name: str, status: int) -> Callable[[], Awaitable[bool]]:
    async def is_so() -> bool:
        return (await client.post(name, 1)).status_code == status

    return is_so


async def test_a_model_dropped_in_is_answered_and_a_removed_one_is_not_found(
    folder: Folder, client: Client
) -> None:
    assert (await client.post("fresh", 1)).status_code == 404

    folder.publish(zoo.adds(5), 1, name="fresh")
    await eventually(answered_with(client, "fresh", 200), "it is answered", 20)
    assert await client.ask("fresh", 1) == 6

    folder.remove(1, name="fresh")
    await eventually(answered_with(client, "fresh", 404), "it is not found", 20)
    assert (await client.get("/models/fresh", 404))["code"] == "model_not_found"
    assert await client.ask("first", 1) == 2


@pytest.mark.soak
async def test_a_new_version_takes_over_while_requests_run_and_none_fails(
    folder: Folder, client: Client
) -> None:
    folder.publish(zoo.adds(1), 1, name="busy")
    before = await client.until_known("busy", lambda told: told["workers"] == 1)
    answers: list[float] = []
    enough = asyncio.Event()

    async def load() -> None:
        while not enough.is_set():
            answers.append(await client.ask("busy", 10))

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(load())
        await eventually(lambda: len(answers) >= 20, "requests run")
        folder.publish(zoo.adds(2), 2, name="busy")
        await eventually(lambda: 12.0 in answers, "the new version answers", 20)
        enough.set()

    assert set(answers) == {11.0, 12.0}
    assert await client.ask("busy", 10) == 12
    assert await client.ask("busy", 10, version="1") == 11
    told = await client.until_known("busy", lambda told: told["versions"] == ["2", "1"])
    assert (told["version"], told["version_sha256"]["1"]) == ("2", before["sha256"])
    assert told["sha256"] == told["version_sha256"]["2"] != before["sha256"]


@pytest.mark.soak
async def test_what_is_told_of_a_model_is_how_it_is_run_and_what_is_wrong_with_it(
    folder: Folder, client: Client
) -> None:
    folder.publish(zoo.adds(1), 1, name="told")
    await client.until_known("told", lambda told: told["workers"] == 1)
    assert await client.ask("told", 1) == 2
    folder.publish(b"not a model", 3, name="told")

    told = await client.until_known(
        "told", lambda told: bool(told["problems"] and told["run_times"])
    )

    (problem,) = told["problems"]
    assert (problem["model"], problem["version"]) == ("told", "3")
    assert "no ONNX file" in problem["reason"]
    assert (told["versions"], told["workers"], told["batched"]) == (["1"], 1, True)
    assert told["batching"].startswith("on: ")
    (times,) = told["run_times"].values()
    assert 0 < times["1"] < 1
    assert await client.ask("told", 1) == 2
    refused: list[str] = []

    async def is_refused() -> bool:
        refused.append((await client.post("told", 1, version="3")).json()["code"])
        return refused[-1] == "version_not_found"

    # An API may have seen the worker a second ago, when the file was still being tried.
    await eventually(is_refused, "the version is unknown")
    assert set(refused) <= {"version_not_found", "model_loading"}


async def test_a_paused_model_takes_jobs_in_and_runs_them_when_it_is_resumed(
    folder: Folder, client: Client
) -> None:
    folder.publish(zoo.adds(7), 1, name="paused")
    await client.until_known("paused", lambda told: told["workers"] == 1)
    await client.switch("/models/paused/pause")

    reply = await client.post("paused", 1, wait=False)
    assert reply.status_code == 202
    url = reply.json()["url"]
    assert (await client.get(f"{url}?wait=0.5"))["status"] == "pending"
    assert (await client.get("/models/paused"))["paused"]
    assert await client.ask("first", 1) == 2

    await client.switch("/models/paused/resume")
    assert number_in(await client.get(f"{url}?wait=20")) == 8
