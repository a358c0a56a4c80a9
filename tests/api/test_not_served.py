"""Answers for models in a worker's folder that are not loaded yet, or cannot be served."""

from typing import Any

import httpx2
import msgspec
import pytest

from asyncinfer.api.config import ApiConfig
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.store import Store

from .harness import ROW, announce, assert_problem, running_client, signature

BODY = {"data": ROW}
REQUESTS = (
    ("POST", "/predict/wine"),
    ("GET", "/models/wine"),
    ("POST", "/models/wine/validate"),
    ("POST", "/models/wine/pause"),
    ("POST", "/models/wine/resume"),
    ("GET", "/scale/wine"),
    ("GET", "/events?model=wine"),
)


async def worker(store: Store, worker_id: str = "host-1-aaaaaa", **about: Any) -> None:
    """Announces a worker as a real one does."""
    announcement = {"state": "ready", "default_model": "iris"}
    await Announcements(store).announce_worker(worker_id, announcement | about, ttl_seconds=60)


async def request_path(client: httpx2.AsyncClient, method: str, path: str) -> httpx2.Response:
    return await client.request(method, path, json=BODY if method == "POST" else None)


def assert_loading(reply: httpx2.Response) -> None:
    problem = assert_problem(reply, 503, "model_loading")
    assert "loading" in problem["detail"]
    assert int(reply.headers["retry-after"]) > 0


# --- being loaded ----------------------------------------------------------------------------


@pytest.mark.soak
async def test_a_model_that_is_not_loaded_yet_is_a_503_and_never_a_404(
    config: ApiConfig, store: Store
) -> None:
    await announce(store, "iris", default="iris")
    await worker(store, loading=["wine"])
    async with running_client(config) as client:
        for method, path in REQUESTS:
            assert_loading(await request_path(client, method, path))
        (line,) = (
            await client.post(
                "/predict/wine",
                content=b'{"data": [[1, 2, 3, 4]]}',
                headers={"content-type": "application/x-ndjson"},
            ),
        )
        assert_loading(line)
        assert_problem(await client.get("/models/beer"), 404, "model_not_found")
        # Loaded, but its signature is not announced yet.
        for about in ({"versions": {"wine": {"1": "0" * 64}}}, {"models": ["wine"]}):
            await worker(store, **about)
            assert_loading(await client.get("/models/wine"))
        await announce(store, "wine")
        assert (await client.post("/predict/wine", json=BODY)).status_code == 202


async def test_a_default_model_that_is_being_loaded_is_a_503(
    config: ApiConfig, store: Store
) -> None:
    await store.claim_default_model("iris")
    await worker(store, state="starting", loading=["iris", "wine"])
    async with running_client(config) as client:
        assert_loading(await client.post("/predict", json=BODY))
        assert_loading(await client.post("/predict/iris", json=BODY))


async def test_the_first_of_several_models_to_be_loaded_is_not_taken_for_the_only_one(
    config: ApiConfig, store: Store
) -> None:
    await announce(store, "wine")
    await worker(store, default_model=None, models=["wine"], loading=["beer"])
    async with running_client(config) as client:
        assert_loading(await client.post("/predict", json=BODY))
        await worker(store, default_model=None, models=["wine"])
        assert (await client.post("/predict", json=BODY)).status_code == 202


async def test_a_version_that_may_still_be_loaded_is_a_503(config: ApiConfig, store: Store) -> None:
    await announce(store, "iris", default="iris")
    await worker(store, loading=["iris"])
    newer = {**BODY, "options": {"version": "2"}}
    async with running_client(config) as client:
        assert_loading(await client.post("/predict", json=newer))
        assert_loading(await client.post("/models/iris/validate", json=newer))
        second = {"2": msgspec.json.encode(signature("iris", "2"))}
        await Announcements(store).announce_models({"iris": second})
        assert (await client.get("/models/wine")).status_code == 404, "the API refreshes once more"
        assert (await client.post("/predict", json=newer)).status_code == 202
        await worker(store, models=["iris"])
        newest = {**BODY, "options": {"version": "3"}}
        assert (await client.get("/models/beer")).status_code == 404, "the API refreshes once more"
        assert_problem(await client.post("/predict", json=newest), 404, "version_not_found")


# --- refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), REQUESTS)
async def test_a_model_whose_files_are_all_refused_is_unknown_for_that_reason(
    method: str, path: str, config: ApiConfig, store: Store
) -> None:
    await announce(store, "iris", default="iris")
    await worker(store, models=["iris"], problems={"wine": {"1": "a Git LFS pointer"}})
    async with running_client(config) as client:
        problem = assert_problem(await request_path(client, method, path), 404, "model_not_found")
    assert "Version 1 is not served: a Git LFS pointer." in problem["detail"]


async def test_a_reason_that_several_workers_give_is_told_once(
    config: ApiConfig, store: Store
) -> None:
    for worker_id in ("host-1-aaaaaa", "host-2-bbbbbb"):
        problems = {"wine": {"1": "a Git LFS pointer"}}
        await worker(store, worker_id, models=["iris"], problems=problems)
    async with running_client(config) as client:
        problem = assert_problem(await client.get("/models/wine"), 404, "model_not_found")
    assert problem["detail"].count("a Git LFS pointer") == 1


async def test_a_default_model_that_is_refused_is_unknown_for_that_reason(
    config: ApiConfig, store: Store
) -> None:
    await announce(store, "wine")
    await store.claim_default_model("iris")
    await worker(store, models=["wine"], problems={"iris": {"": "its model.toml is broken"}})
    async with running_client(config) as client:
        problem = assert_problem(await client.post("/predict", json=BODY), 404, "model_not_found")
        assert "It is not served: its model.toml is broken." in problem["detail"]
        assert (await client.post("/predict/wine", json=BODY)).status_code == 202


@pytest.mark.parametrize(
    ("problems", "explanation"),
    [
        ({}, "model folder is empty"),
        (
            {"wine": {"1": "too bad"}},
            "The only model in the workers' folder cannot be served. wine: ",
        ),
        (
            {"wine": {"1": "too bad"}, "beer": {"1": "cut off"}},
            "None of the 2 models in the workers' folder can be served. beer: Version 1 is not "
            "served: cut off.",
        ),
    ],
)
async def test_where_nothing_can_be_served_the_answer_says_why_and_has_no_retry_after(
    problems: dict[str, Any], explanation: str, config: ApiConfig, store: Store
) -> None:
    await worker(store, default_model=None, problems=problems)
    async with running_client(config) as client:
        for path in ("/predict", "/predict/other"):
            reply = await client.post(path, json=BODY)
            problem = assert_problem(reply, 503, "no_model_announced")
            assert explanation in problem["detail"]
            assert "starting" not in problem["detail"]
