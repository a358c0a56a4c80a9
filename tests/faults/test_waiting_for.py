"""Why a job waits, with workers that come and whose runs fail."""

from typing import Any

import httpx2
import msgspec
import pytest
import redis

from asyncinfer.api.config import ApiConfig
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from asyncinfer.tensors.datatypes import TensorSpec
from tests import zoo
from tests.api.harness import api_of, signature
from tests.faults.model_folder import Folder

from .harness import eventually
from .processes import OpenCrew

SLOW = zoo.loop_for_hours("batch").SerializeToString()
"""Takes 7 s to load: as long as probing may take."""


async def told(client: httpx2.AsyncClient, model: str, value: float) -> dict[str, Any]:
    reply = await client.post(f"/predict/{model}", json={"data": [[value]]})
    assert reply.status_code == 202, reply.text
    body: dict[str, Any] = reply.json()
    return body


async def read(client: httpx2.AsyncClient, job_id: str) -> dict[str, Any]:
    body: dict[str, Any] = (await client.get(f"/job/{job_id}")).json()
    return body


async def test_a_job_says_that_no_worker_is_there_until_one_has_come(
    crew: OpenCrew, redis_url: str, policy: Policy, store: Store
) -> None:
    known = msgspec.structs.replace(
        signature("slow"), inputs=(TensorSpec("x", "FP32", ("batch", 1)),)
    )
    await store.claim_default_model("slow")
    await Announcements(store).announce_models({"slow": {"1": msgspec.json.encode(known)}})
    config = ApiConfig(redis_url=redis_url, policy=policy)
    with crew() as workers:
        async with api_of(config) as client:
            waiting = await told(client, "slow", 1.0)
            assert waiting["waiting_for"]["code"] == "no_worker"
            assert (await client.get("/health")).json()["starved"] == ["slow"]

            worker = workers.hire()

            async def has_run() -> bool:
                return bool((await read(client, waiting["job_id"]))["status"] == "completed")

            async def nothing_is_missing() -> bool:
                return (await told(client, "slow", 1.0))["waiting_for"] is None

            await eventually(has_run, "the job ran")
            assert "waiting_for" not in await read(client, waiting["job_id"])
            await eventually(nothing_is_missing, "the API has seen the worker")
            assert (await client.get("/health")).json()["starved"] == []
        assert await worker.stop() == 0


@pytest.mark.soak
async def test_a_job_whose_run_had_no_memory_says_that_it_is_tried_again(
    crew: OpenCrew, redis_url: str, policy: Policy, server: redis.Redis
) -> None:
    codes: set[str] = set()
    with crew(models=("hungry",), policy=policy) as workers:
        worker = workers.hire()
        await eventually(lambda: worker.announced(server), "the worker serves")
        async with api_of(ApiConfig(redis_url=redis_url, policy=policy)) as client:
            job_id = (await told(client, "hungry", zoo.ENDLESS_MIB))["job_id"]

            async def has_failed() -> bool:
                body = await read(client, job_id)
                if reason := body.get("waiting_for"):
                    codes.add(reason["code"])
                return bool(body["status"] == "failed")

            await eventually(has_failed, "the job is given up")
        assert await worker.stop() == 0
    assert codes == {"retry"}


async def test_a_model_that_its_worker_still_loads_is_never_unknown(
    crew: OpenCrew, folder: Folder, redis_url: str, policy: Policy, server: redis.Redis
) -> None:
    """And no other model is taken for the only one meanwhile."""
    assert not server.keys(), "beside a model of another test these would be unknown at first"
    folder.publish(SLOW, 1, name="z")
    seen: set[tuple[str, str]] = set()
    with crew(model_dir=str(folder.path), models=()) as workers:
        async with api_of(ApiConfig(redis_url=redis_url, policy=policy)) as client:
            worker = workers.hire()

            async def only_first_is_served() -> bool:
                for path in ("/predict", "/predict/m", "/predict/z"):
                    reply = await client.post(path, json={"data": [[1.0]]})
                    seen.add((path, reply.json().get("code", "accepted")))
                return seen >= {("/predict/m", "accepted"), ("/predict/z", "model_loading")}

            await eventually(only_first_is_served, "m is served, and z is being loaded")
        worker.kill()
    # Before the worker has said anything.
    seen -= {(path, "no_model_announced") for path, _ in seen}
    assert {code for _, code in seen} == {"accepted", "model_loading"}
    assert {path for path, code in seen if code == "accepted"} == {"/predict/m"}
