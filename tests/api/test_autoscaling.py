"""GET /scale: the numbers that an autoscaler gets for a model."""

from typing import Any

import httpx2
import pytest
import redis
from msgspec.structs import replace

from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.inspect.queue_load import read_load
from asyncinfer.repository.store import Store
from asyncinfer.repository.submissions import NewJob
from tests.queue_driver import QueueDriver, new_job

from .harness import QUEUE, ManualWorker, assert_problem, submit


async def scale(api: httpx2.AsyncClient, model: str = "iris") -> dict[str, Any]:
    reply = await api.get(f"/scale/{model}")
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


async def worker(store: Store, name: str = "w", **about: Any) -> None:
    """Announces a worker as a real one does."""
    announcement = {"concurrency": 4, "models": ["iris"], "state": "ready", "seconds_per_job": {}}
    await Announcements(store).announce_worker(name, announcement | about, ttl_seconds=60)


async def test_without_jobs_no_worker_is_needed(api: httpx2.AsyncClient) -> None:
    assert await scale(api) == {
        **{"model": "iris", "waiting_jobs": 0, "running_jobs": 0, "paused": False},
        **{"oldest_age_seconds": None, "seconds_per_job": None, "backlog_seconds": 0.0},
        **{"workers": 0, "slots": 0, "starved": 0},
    }


async def test_an_unknown_model_is_a_problem(api: httpx2.AsyncClient) -> None:
    assert_problem(await api.get("/scale/wine"), 404, "model_not_found")


async def test_jobs_without_a_worker_are_starved_before_anything_was_measured(
    api: httpx2.AsyncClient,
) -> None:
    await submit(api)
    found = await scale(api)
    assert (found["waiting_jobs"], found["starved"], found["backlog_seconds"]) == (1, 1, None)
    assert (await scale(api, "digits"))["starved"] == 0


async def test_a_backlog_is_counted_in_seconds_of_slot_time(
    api: httpx2.AsyncClient, store: Store, manual_worker: ManualWorker
) -> None:
    await worker(store, seconds_per_job={"iris": 0.5, "digits": 9.0})
    for _ in range(3):
        await submit(api)
    found = await scale(api)
    assert (found["waiting_jobs"], found["seconds_per_job"]) == (3, 0.5)
    assert found["backlog_seconds"] == 1.5
    assert (found["workers"], found["slots"], found["starved"]) == (1, 4, 0)
    await manual_worker.claim()
    found = await scale(api)
    assert (found["waiting_jobs"], found["running_jobs"]) == (0, 3)
    assert found["backlog_seconds"] == 0.0


async def test_workers_of_unlike_speed_count_by_their_slots(
    api: httpx2.AsyncClient, store: Store
) -> None:
    await worker(store, "fast", concurrency=3, seconds_per_job={"iris": 0.1})
    await worker(store, "slow", concurrency=1, seconds_per_job={"iris": 0.5})
    await worker(store, "new")
    await worker(store, "other", models=["digits"])
    found = await scale(api)
    assert found["seconds_per_job"] == pytest.approx(0.2)
    assert (found["workers"], found["slots"]) == (3, 8)


@pytest.mark.parametrize("state", ["draining", "hung"])
async def test_a_worker_that_does_not_claim_does_not_count(
    state: str, api: httpx2.AsyncClient, store: Store
) -> None:
    await worker(store, state=state, seconds_per_job={"iris": 0.5})
    await submit(api)
    found = await scale(api)
    assert (found["workers"], found["slots"], found["starved"]) == (0, 0, 1)
    assert found["backlog_seconds"] == 0.5


async def test_measured_times_are_known_when_no_worker_is_left(
    api: httpx2.AsyncClient, store: Store, hands: QueueDriver
) -> None:
    await Announcements(store).announce_paces({"iris": 0.25})
    await hands.submit_many(8)
    found = await scale(api)
    assert (found["starved"], found["backlog_seconds"]) == (1, 2.0)


async def test_an_older_or_unreadable_announcement_hides_no_other_worker(
    api: httpx2.AsyncClient, store: Store, server: redis.Redis
) -> None:
    about = {"concurrency": 2, "models": ["iris"], "state": "ready", "host": "h"}
    await Announcements(store).announce_worker("old", about, ttl_seconds=60)
    await worker(store, "damaged")
    server.set(keys.worker("predict_queue", "damaged"), b"\xff", px=9000)
    assert (await scale(api))["slots"] == 2


async def test_cancelled_jobs_still_in_the_list_are_no_backlog(
    api: httpx2.AsyncClient, store: Store, hands: QueueDriver
) -> None:
    await worker(store, seconds_per_job={"iris": 1.0})
    ids = await hands.submit_many(40)
    await hands.cancel_in_one_call(*ids[:39])
    assert len(hands.waiting_ids()) > 1
    found = await scale(api)
    assert (found["waiting_jobs"], found["backlog_seconds"]) == (1, 1.0)


async def test_delayed_jobs_are_no_backlog_before_they_are_due(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    await hands.submit_one(delay_seconds=60)
    assert (await scale(api))["waiting_jobs"] == 0


async def test_a_paused_queue_needs_no_worker(
    api: httpx2.AsyncClient, store: Store, hands: QueueDriver
) -> None:
    await Announcements(store).announce_paces({"iris": 1.0})
    await submit(api)
    await hands.operations.pause("predict_queue", paused=True)
    found = await scale(api)
    assert (found["paused"], found["waiting_jobs"]) == (True, 1)
    assert (found["backlog_seconds"], found["starved"]) == (0.0, 0)


# --- the oldest ------------------------------------------------------------------------------


def aged(seconds: float, hands: QueueDriver, **options: Any) -> NewJob:
    """A job that was submitted `seconds` ago."""
    job = new_job(**options)
    age_ms = int(seconds * 1000)
    return replace(job, record=replace(job.record, created_ms=hands.now_ms() - age_ms))


async def age(api: httpx2.AsyncClient) -> float | None:
    found: float | None = (await scale(api))["oldest_age_seconds"]
    return found


async def test_the_oldest_job_is_found_at_any_priority(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    await hands.submit(aged(30, hands, priority="low"), aged(10, hands), aged(20, hands))
    assert await age(api) == pytest.approx(30, abs=1)


async def test_the_oldest_job_is_one_that_still_waits(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    old = [aged(60, hands) for _ in range(30)]
    await hands.submit(*old)
    await hands.submit(aged(5, hands))
    await hands.cancel_in_one_call(*(job.job_id for job in old))
    assert await age(api) == pytest.approx(5, abs=1)


async def test_an_external_job_without_a_time_is_passed_over(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    hands.add_external_job("theirs")
    assert await age(api) is None
    await hands.submit(aged(5, hands))
    assert await age(api) == pytest.approx(5, abs=1)


async def test_a_requested_delay_does_not_count_as_waiting(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    await hands.submit(aged(60, hands, delay_seconds=50))
    hands.make_due(keys.delayed("predict_queue"))
    await hands.sweep()
    assert await age(api) == pytest.approx(10, abs=1)


# --- what it costs ---------------------------------------------------------------------------


async def calls_of_a_gauge(hands: QueueDriver) -> dict[str, int]:
    return await hands.commands_of(read_load(hands.store, "iris", "predict_queue"))


async def test_an_answer_costs_redis_the_same_for_any_number_of_waiting_jobs(
    hands: QueueDriver,
) -> None:
    await worker(hands.store)
    await hands.submit_many(200)
    few = await calls_of_a_gauge(hands)
    for _ in range(8):
        await hands.submit_many(250)
    assert await calls_of_a_gauge(hands) == few
    assert few["fcall"] == 1
    assert sum(few.values()) < 25


@pytest.mark.soak
async def test_a_million_waiting_jobs_do_not_block_redis_for_longer(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    jobs = await hands.submit_many(200)
    fill = "for i = 1, 1000 do redis.call('LPUSH', KEYS[1], ARGV[1] .. i) end"
    for part in range(1000):
        hands.redis.eval(fill, 1, "predict_queue", f"x{part}:")
    hands.redis.config_resetstat()
    assert (await scale(api))["waiting_jobs"] == 1_000_000 + len(jobs)
    stats = hands.redis.info("commandstats")["cmdstat_fcall"]
    assert stats["usec_per_call"] < 2000
    hands.redis.delete("predict_queue")


# --- starved models --------------------------------------------------------------------------


async def starved(api: httpx2.AsyncClient) -> list[str]:
    """The starved models, on which /health and /queues must agree."""
    health = (await api.get("/health")).json()
    assert health["status"] == "ok"
    queues = (await api.get("/queues")).json()["queues"]
    assert sorted(queue["model"] for queue in queues if queue["starved"]) == health["starved"]
    found: list[str] = health["starved"]
    return found


async def test_models_with_due_jobs_and_no_worker_are_listed(
    api: httpx2.AsyncClient, store: Store, hands: QueueDriver
) -> None:
    assert await starved(api) == []
    await submit(api)
    await hands.submissions.submit_many(f"{QUEUE}:wine", [new_job(queue=f"{QUEUE}:wine")])
    assert await starved(api) == ["iris", "wine"], (
        "a model that no worker announces any more is starved too"
    )

    await worker(store, "starts", models=[], state="starting", loading=["iris"])
    assert await starved(api) == ["wine"], "a model that is being loaded is not starved"
    await worker(store, "leaves", models=["wine"], state="draining")
    assert await starved(api) == ["wine"]
    await worker(store, "works", models=["wine"])
    assert await starved(api) == []


async def test_a_model_that_is_paused_or_whose_jobs_are_not_due_is_not_starved(
    api: httpx2.AsyncClient,
) -> None:
    await submit(api)
    await api.post("/models/iris/pause")
    late = {"data": [[0.0] * 64], "options": {"delay_seconds": 60}}
    assert (await api.post("/predict/digits", json=late)).status_code == 202
    assert await starved(api) == []


async def test_cancelled_jobs_make_no_model_starved(api: httpx2.AsyncClient) -> None:
    await api.delete(f"/job/{await submit(api)}")
    assert await starved(api) == []
