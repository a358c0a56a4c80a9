"""The bound of what ended jobs keep, over HTTP."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2
import msgspec

from asyncinfer.api.config import ApiConfig
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store

from .harness import ManualWorker, announce, assert_problem, client_of, running, submit

BOUND = 1 << 20
LINE = b'{"data": [[5.1, 3.5, 1.4, 0.2]]}'
NDJSON = {"content-type": "application/x-ndjson"}
ROWS = [[5.1, 3.5, 1.4, 0.2]] * 5000
RESULT = {"prediction": "x" * (BOUND // 4)}


@asynccontextmanager
async def bounded_api(config: ApiConfig, store: Store) -> AsyncIterator[httpx2.AsyncClient]:
    """An API whose ended jobs keep at most a MiB."""
    await announce(store, "iris", default="iris")
    bounded = msgspec.structs.replace(config, policy=Policy(max_kept_bytes=BOUND))
    async with running(bounded) as port, client_of(port) as client:
        yield client


async def test_submitting_and_cancelling_large_jobs_takes_no_room_from_others(
    config: ApiConfig, store: Store
) -> None:
    made = []
    async with bounded_api(config, store) as client:
        for _ in range(20):
            reply = await client.post("/predict", json={"data": ROWS})
            assert reply.status_code == 202, reply.text
            made.append(reply.json()["job_id"])
            assert (await client.delete(f"/job/{made[-1]}")).status_code == 200
        assert (await client.post(f"/job/{made[0]}/retry")).status_code == 202
        refused = await client.post(f"/job/{made[-1]}/retry")
    assert "input" in assert_problem(refused, 409, "job_not_retryable")["detail"]


async def test_large_results_refuse_new_jobs_until_some_are_deleted(
    config: ApiConfig, store: Store, manual_worker: ManualWorker
) -> None:
    async with bounded_api(config, store) as client:
        for _ in range(4):
            await submit(client)
            await manual_worker.complete(body=RESULT)
        refused = await client.post("/predict", json={"data": ROWS[:1]})
        line = await client.post("/predict", content=LINE, headers=NDJSON)
        # As the message says.
        query = {"purge": "true", "status": "ended"}
        assert (await client.delete("/jobs", params=query)).json()["purged"] == 4
        await submit(client)
    detail = assert_problem(refused, 429, "kept_full")["detail"]
    assert int(refused.headers["retry-after"]) > 0
    assert all(word in detail for word in (str(BOUND), "MAX_KEPT_BYTES", "JOB_TTL", "purge=true"))
    assert (line.json()["status"], line.json()["code"]) == (429, "kept_full")
