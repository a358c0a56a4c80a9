"""The routes about models: versions, problems, pause and resume."""

import httpx2
import msgspec
import redis

from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.store import Store

from .harness import QUEUE, assert_problem, signature, submit


async def test_a_broken_version_is_shown_with_its_reason(
    api: httpx2.AsyncClient, store: Store
) -> None:
    about = {
        "models": ["iris"],
        "state": "ready",
        "problems": {"iris": {"2": "too bad"}, "wine": {"1": "not a model"}},
        "run_times": {"iris": {"1": 0.001, "8": 0.002}},
    }
    await Announcements(store).announce_worker("host-17-f0fd4a", about, 60)

    iris = (await api.get("/models/iris")).json()
    broken = {"model": "iris", "version": "2", "worker": "w-f0fd4a", "reason": "too bad"}
    assert (iris["workers"], iris["problems"]) == (1, [broken])
    assert iris["run_times"] == {"w-f0fd4a": {"1": 0.001, "8": 0.002}}

    listed = (await api.get("/models")).json()
    assert [model["model"] for model in listed["models"]] == ["digits", "iris"]
    assert [entry["reason"] for entry in listed["problems"]] == ["not a model"]
    problem = assert_problem(await api.get("/models/wine"), 404, "model_not_found")
    assert "not a model" in problem["detail"]


async def test_a_model_counts_as_loading_until_the_api_has_seen_its_announcement(
    api: httpx2.AsyncClient, store: Store
) -> None:
    about = {
        "models": ["digits", "iris", "wine"],
        "versions": {"late": {"1": "a"}},
        "state": "ready",
    }
    await Announcements(store).announce_worker("host-17-f0fd4a", about, 60)
    assert (await api.get("/models")).json()["loading"] == ["late", "wine"]

    await Announcements(store).announce_worker("host-17-f0fd4a", {**about, "state": "draining"}, 60)
    assert (await api.get("/models")).json()["loading"] == []


async def test_the_served_version_is_the_one_that_the_operator_chose(
    api: httpx2.AsyncClient, store: Store
) -> None:
    versions = {version: msgspec.json.encode(signature("wine", version)) for version in ("1", "2")}
    announcements = Announcements(store)
    await announcements.announce_models({"wine": versions})
    await announcements.announce_default_versions({"wine": "1"})
    wine = (await api.get("/models/wine")).json()
    assert (wine["version"], wine["versions"]) == ("1", ["2", "1"])


async def test_a_model_without_a_living_worker_still_takes_jobs(api: httpx2.AsyncClient) -> None:
    assert (await api.get("/models/iris")).json()["workers"] == 0
    await submit(api)


async def test_a_removed_model_is_not_found(store: Store) -> None:
    announcements = Announcements(store)
    await announcements.announce_models({"wine": {"1": b"1", "2": b"2"}})
    await announcements.retract_version("wine", "1")
    assert set(await announcements.read_versions("wine")) == {"2"}
    await announcements.retract_version("wine", "2")
    assert not await store.command("EXISTS", keys.model(store.queue_name, "wine"))
    assert b"wine" not in await store.command("SMEMBERS", keys.models(store.queue_name))


async def test_a_paused_model_takes_jobs_and_is_resumed(
    api: httpx2.AsyncClient, server: redis.Redis
) -> None:
    for _ in range(2):
        assert (await api.post("/models/iris/pause")).json() == {"model": "iris", "paused": True}
    await submit(api)
    assert (await api.get("/models/iris")).json()["paused"]
    assert not (await api.get("/models/digits")).json()["paused"]
    scale = (await api.get("/scale/iris")).json()
    assert (scale["paused"], scale["waiting_jobs"]) == (True, 1)

    assert (await api.post("/models/iris/resume")).json() == {"model": "iris", "paused": False}
    assert not server.exists(keys.paused(QUEUE))
    assert_problem(await api.post("/models/wine/pause"), 404, "model_not_found")
