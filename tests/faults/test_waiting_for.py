"""`waiting_for`, the reason why a job waits, with workers that start, load, and fail runs."""

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
from tests.api.harness import running_client, signature
from tests.faults.model_folder import ModelFolder

from .harness import eventually
from .processes import OpenWorkers

SLOW = zoo.loop_for_hours("batch").SerializeToString()
"""A model that takes 7 s to load: as long as probing may take."""


async def submit(client: httpx2.AsyncClient, model: str, value: float) -> dict[str, Any]:
    reply = await client.post(f"/predict/{model}", json={"data": [[value]]})
    assert reply.status_code == 202, reply.text
    body: dict[str, Any] = reply.json()
    return body


async def read(client: httpx2.AsyncClient, job_id: str) -> dict[str, Any]:
    body: dict[str, Any] = (await client.get(f"/job/{job_id}")).json()
    return body


@pytest.mark.soak
async def test_a_job_waits_for_no_worker_until_a_worker_has_started(
    open_workers: OpenWorkers, redis_url: str, policy: Policy, store: Store
) -> None:
    announced = msgspec.structs.replace(
        signature("slow"), inputs=(TensorSpec("x", "FP32", ("batch", 1)),)
    )
    await store.claim_default_model("slow")
    await Announcements(store).announce_models({"slow": {"1": msgspec.json.encode(announced)}})
    config = ApiConfig(redis_url=redis_url, policy=policy)
    with open_workers() as workers:
        async with running_client(config) as client:
            waiting = await submit(client, "slow", 1.0)
            assert waiting["waiting_for"]["code"] == "no_worker"
            assert (await client.get("/health")).json()["starved"] == ["slow"]

            worker = workers.start()

            async def has_run() -> bool:
                return bool((await read(client, waiting["job_id"]))["status"] == "completed")

            async def waits_for_nothing() -> bool:
                return (await submit(client, "slow", 1.0))["waiting_for"] is None

            await eventually(has_run, "the job ran")
            assert "waiting_for" not in await read(client, waiting["job_id"])
            await eventually(waits_for_nothing, "the API has seen the worker")
            assert (await client.get("/health")).json()["starved"] == []
        assert await worker.stop() == 0


@pytest.mark.soak
async def test_a_job_whose_run_got_no_memory_waits_for_its_retry(
    open_workers: OpenWorkers, redis_url: str, policy: Policy, server: redis.Redis
) -> None:
    codes: set[str] = set()
    with open_workers(models=("hungry",), policy=policy) as workers:
        worker = workers.start()
        await eventually(lambda: worker.is_announced(server), "the worker serves")
        async with running_client(ApiConfig(redis_url=redis_url, policy=policy)) as client:
            job_id = (await submit(client, "hungry", zoo.ENDLESS_MIB))["job_id"]

            async def has_failed() -> bool:
                body = await read(client, job_id)
                if reason := body.get("waiting_for"):
                    codes.add(reason["code"])
                return bool(body["status"] == "failed")

            await eventually(has_failed, "the job has failed")
        assert await worker.stop() == 0
    assert codes == {"retry"}


@pytest.mark.soak
async def test_a_model_that_its_worker_is_loading_is_never_unknown(
    open_workers: OpenWorkers,
    folder: ModelFolder,
    redis_url: str,
    policy: Policy,
    server: redis.Redis,
) -> None:
    """And no other model is taken for the only model meanwhile."""
    assert not server.keys(), "beside a model of another test these would be unknown at first"
    folder.publish(SLOW, 1, name="z")
    replies: set[tuple[str, str]] = set()
    with open_workers(model_dir=str(folder.path), models=()) as workers:
        async with running_client(ApiConfig(redis_url=redis_url, policy=policy)) as client:
            worker = workers.start()

            async def only_first_is_served() -> bool:
                for path in ("/predict", "/predict/m", "/predict/z"):
                    reply = await client.post(path, json={"data": [[1.0]]})
                    replies.add((path, reply.json().get("code", "accepted")))
                return replies >= {("/predict/m", "accepted"), ("/predict/z", "model_loading")}

            await eventually(only_first_is_served, "m is served, and z is being loaded")
        worker.kill()
    # These come before the worker's first announcement.
    replies -= {(path, "no_model_announced") for path, _ in replies}
    assert {code for _, code in replies} == {"accepted", "model_loading"}
    assert {path for path, code in replies if code == "accepted"} == {"/predict/m"}
