"""Where a waiting job is: its position, an estimate of its end, and when to ask again."""

import asyncio
import re
from typing import Any

import httpx2
import pytest
from msgspec.structs import replace

from asyncinfer.api.config import ApiConfig
from asyncinfer.jobs import Priority
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.inspect.queue_look import look_at
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from tests.faults.harness import eventually
from tests.queue_driver import QueueDriver, new_job

from .harness import ROW, announce, assert_problem, running_client, submit
from .sse import open_event_stream


async def worker(
    store: Store,
    seconds_per_job: float | None = None,
    slots: int = 2,
    *,
    number: int = 0,
    isolating: bool = False,
) -> None:
    """Announces a worker as a real one does."""
    paces = {} if seconds_per_job is None else {"iris": seconds_per_job}
    about = {
        **{"models": ["iris"], "versions": {"iris": {"1": "0" * 64}}, "state": "ready"},
        **{"concurrency": slots, "seconds_per_job": paces, "isolating": isolating},
    }
    await Announcements(store).announce_worker(f"host-1-aaaaa{number}", about, ttl_seconds=60)


async def read(api: httpx2.AsyncClient, job_id: str, query: str = "") -> dict[str, Any]:
    reply = await api.get(f"/job/{job_id}{query}")
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


async def position(api: httpx2.AsyncClient, job_id: str) -> tuple[int, bool] | None:
    found = (await read(api, job_id))["position"]
    return found and (found["ahead"], found["about"])


async def test_a_job_is_behind_those_of_higher_priority_and_those_that_came_earlier(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    by_priority: dict[Priority, list[str]] = {}
    order: tuple[Priority, ...] = ("low", "normal", "high")
    for priority in order:
        by_priority[priority] = await hands.submit_many(3, priority=priority)
    await hands.cancel_in_one_call(by_priority["normal"][0])
    expected: dict[Priority, list[int | None]] = {
        "high": [0, 1, 2],
        "normal": [None, 3, 4],
        "low": [5, 6, 7],
    }
    for priority, places in expected.items():
        for job_id, place in zip(by_priority[priority], places, strict=True):
            found = (await read(api, job_id)).get("position")
            assert found == (None if place is None else {"ahead": place, "about": False})


async def test_in_a_long_queue_a_position_is_about_right(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    ids = [job_id for _ in range(16) for job_id in await hands.submit_many(250)]
    late = await hands.submit_one(priority="low")
    for place in (0, 500, 999):
        assert await position(api, ids[place]) == (place, False)
    for place in (1000, 1001, 2500, 3999):
        found = await position(api, ids[place])
        assert found
        assert found[0] == pytest.approx(place, abs=2)
        assert found[1]
    assert await position(api, late) == (4000, True)


async def test_stale_entries_and_jobs_out_of_order_do_not_count(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    ids = [job_id for _ in range(16) for job_id in await hands.submit_many(250)]
    for start in range(0, 2000, 250):
        await hands.cancel_in_one_call(*ids[start : start + 250 : 2])
    retried = ids[0]
    assert await hands.operations.retry(await hands.read(retried), hands.now_ms()) == "ok"
    assert await position(api, ids[1]) == (0, False)
    found = await position(api, ids[3001])
    assert found
    assert found[0] == pytest.approx(2001, rel=0.1)
    found = await position(api, retried)
    assert found
    assert found[0] == pytest.approx(3000, rel=0.1)


async def test_a_job_that_came_after_the_look_is_behind_all_that_it_saw(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    first, *_ = await hands.submit_many(5)
    assert await position(api, first) == (0, False)
    _, second = await hands.submit_many(2)
    assert await position(api, second) == (6, True)


async def test_a_delayed_job_has_no_position_until_it_is_due(
    api: httpx2.AsyncClient, hands: QueueDriver, store: Store
) -> None:
    await worker(store, 1.0)
    delayed = await hands.submit_one(delay_seconds=60)
    await hands.submit_many(3)
    job = await read(api, delayed)
    assert (job["position"], job["eta_seconds"]) == (None, None)
    assert job["waiting_for"]["code"] == "delayed"


async def test_the_job_of_another_program_has_a_position_too(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    await hands.submit_many(2)
    hands.add_external_job("theirs")
    assert await position(api, "theirs") == (2, False)


async def test_a_job_is_shown_without_a_position_where_its_queue_cannot_be_read(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    job_id = await hands.submit_one()
    hands.redis.set(keys.waiting("predict_queue")[0], "no list")
    job = await read(api, job_id)
    assert (job["status"], job["position"], job["eta_seconds"]) == ("pending", None, None)


async def test_only_the_job_itself_shows_its_position_and_only_while_it_waits(
    api: httpx2.AsyncClient, hands: QueueDriver, store: Store
) -> None:
    await worker(store, 1.0)
    early = await hands.submit_one()
    await eventually(lambda: has_reason(api, early, None), "the worker is known", 5)
    await hands.finish(await hands.claim_jobs(1))
    first, job_id = await hands.submit_many(2)
    await eventually(lambda: is_at(api, job_id, 1), "both are seen", 5)
    assert await has_reason(api, job_id, "queue")
    async with open_event_stream(api, f"/job/{job_id}/events") as stream:
        streamed = (await stream.wait_for_event("snapshot")).data
    submitted = (await api.post("/predict", json={"data": ROW})).json()
    listed = (await api.get("/jobs?status=pending")).json()["jobs"]
    waited = await read(api, job_id, "?wait=0.01")
    for job in (streamed, submitted, *listed, waited):
        assert job["waiting_for"] is None
        assert not {"position", "eta_seconds"} & job.keys()

    claim = await hands.claim_jobs(1)
    assert "position" not in await read(api, first)
    await hands.finish(claim)
    assert not {"position", "eta_seconds", "waiting_for"} & (await read(api, first)).keys()


async def is_at(api: httpx2.AsyncClient, job_id: str, ahead: int) -> bool:
    return await position(api, job_id) == (ahead, False)


async def has_reason(api: httpx2.AsyncClient, job_id: str, code: str | None) -> bool:
    reason = (await read(api, job_id))["waiting_for"]
    return bool((reason and reason["code"]) == code)


# --- the estimate ----------------------------------------------------------------------------


async def test_the_end_is_estimated_by_the_work_ahead_and_the_living_slots(
    config: ApiConfig, store: Store, hands: QueueDriver
) -> None:
    await announce(store, "iris", default="iris")
    await worker(store, seconds_per_job=3.0, slots=2)
    ids = await hands.submit_many(10)
    await hands.claim_jobs(2)
    async with running_client(config) as api:
        last = await read(api, ids[-1])
        # Ten jobs have to end, two at a time, in 3 s each; of those that run a part is done. The
        # look that says so may be a second old.
        assert 13.25 <= last["eta_seconds"] <= 14.25
        assert last["waiting_for"]["code"] == "queue"
        assert last["waiting_for"]["message"] in {
            f"It waits behind 7 jobs, some {seconds} s." for seconds in (13, 14)
        }
        assert 2.75 <= (await read(api, ids[2]))["eta_seconds"] <= 3.75
        assert (await api.get(f"/job/{ids[-1]}")).headers["retry-after"] in {"14", "15"}

        async def counts_down() -> bool:
            before, after = [(await read(api, ids[-1]))["eta_seconds"] for _ in range(2)]
            return bool(after < before)

        await eventually(counts_down, "it counts down within a look", 5)


async def test_a_group_and_its_last_job_have_the_same_estimate(
    config: ApiConfig, store: Store, hands: QueueDriver
) -> None:
    """Also if the group is fast by its own pace: others are ahead of what is left of it."""
    await announce(store, "iris", default="iris")
    await worker(store, seconds_per_job=3.0, slots=2)
    await hands.submit_many(20, group="g")
    await hands.run_all()
    await hands.submit_many(10)
    last = await hands.submit_one(group="g")
    async with running_client(config) as api, open_event_stream(api, "/events?group=g") as events:
        group = (await api.get("/group/g")).json()
        job = await read(api, last)
        assert job["eta_seconds"] > 10
        assert abs(group["eta_seconds"] - job["eta_seconds"]) < 2
        snapshot = await events.wait_for_event("snapshot")
        assert abs(snapshot.data["eta_seconds"] - job["eta_seconds"]) < 2
    await hands.operations.pause("predict_queue", paused=True)
    async with running_client(config) as api:
        assert (await api.get("/group/g")).json()["eta_seconds"] is None


async def test_nothing_is_estimated_while_nothing_runs_or_nothing_was_measured(
    config: ApiConfig, store: Store, hands: QueueDriver
) -> None:
    await announce(store, "iris", default="iris")
    *_, job_id = await hands.submit_many(3)
    await hands.claim_jobs(1)
    async with running_client(config) as api:
        job = await read(api, job_id)
        assert (job["eta_seconds"], job["waiting_for"]["code"]) == (None, "no_worker")
        assert (await api.get(f"/job/{job_id}")).headers["retry-after"] == "1"
    await worker(store)
    async with running_client(config) as api:
        job = await read(api, job_id)
        assert job["eta_seconds"] is None
        assert job["waiting_for"] == {"code": "queue", "message": "It waits behind 1 job."}
    await worker(store, 1.0)
    async with running_client(config) as api:
        # The look that says 1.25 may be a second old.
        assert 0.25 <= (await read(api, job_id))["eta_seconds"] <= 1.25
    await hands.operations.pause("predict_queue", paused=True)
    async with running_client(config) as api:
        job = await read(api, job_id)
        assert (job["eta_seconds"], job["waiting_for"]["code"]) == (None, "paused")


async def test_a_rate_that_was_measured_lately_beats_the_time_that_workers_announce(
    config: ApiConfig, store: Store, hands: QueueDriver
) -> None:
    await announce(store, "iris", default="iris")
    await worker(store, seconds_per_job=1000.0)
    old = await submit_earlier(hands, 60_000, count=40)
    for _ in range(20):
        await hands.finish(await hands.claim_jobs(1))
    # In their 20 s each run ended a second after the one before.
    entries = hands.redis.xrange(keys.log("predict_queue"))
    hands.redis.delete(keys.log("predict_queue"))
    ended = [fields for _, fields in entries if b"completed" in fields]
    for number, fields in enumerate(ended):
        at_ms = hands.now_ms() - 1000 * (len(ended) - number)
        hands.redis.xadd(keys.log("predict_queue"), fields, id=f"{at_ms}-1")
    await hands.claim_jobs(1)
    async with running_client(config) as api:
        found = (await read(api, old[-1]))["eta_seconds"]
    # A lower bound is the announced time of a slot, which a single job cannot undercut.
    assert found == pytest.approx(1000.0, abs=1)
    await worker(store, seconds_per_job=2.0)
    async with running_client(config) as api:
        found = (await read(api, old[-1]))["eta_seconds"]
    # The rate is that of the last 16 runs until now, so that the time since then counts too.
    idle_seconds = (hands.now_ms() - at_ms) / 1000 - 1
    assert 17 < found < 23 * (16 + idle_seconds) / 16


# --- when to ask again -----------------------------------------------------------------------


async def test_a_submit_and_a_full_queue_say_when_to_come_back(
    config: ApiConfig, store: Store, hands: QueueDriver
) -> None:
    await announce(store, "iris", default="iris")
    await worker(store, seconds_per_job=20.0, slots=2)
    ids = await hands.submit_many(4)
    await hands.claim_jobs(1)
    full = replace(config, policy=replace(config.policy, max_queue=4))
    async with running_client(full) as api:
        reply = await api.post("/predict", json={"data": ROW})
        assert (reply.status_code, reply.headers["retry-after"]) == (202, "1")
        assert_problem(await api.post("/predict", json={"data": ROW}), 429, "queue_full")
        assert (await api.get(f"/job/{ids[-1]}")).headers["retry-after"] == "35"

        async def is_estimated() -> bool:
            reply = await api.post("/predict", json={"data": ROW})
            assert reply.status_code == 429
            return reply.headers["retry-after"] == "1"

        # A hundredth of the four jobs has left in less than a second.
        await eventually(is_estimated, "the time is that of the queue", 5)
        await hands.cancel(ids[-1])
        again = await api.post("/predict", json={"data": ROW})
        assert again.status_code == 202
        # Behind three jobs, or four as last seen, and one that runs.
        assert again.headers["retry-after"] in ("45", "55")


# --- a lost worker ---------------------------------------------------------------------------


async def test_a_job_whose_worker_is_lost_says_when_it_runs_again(
    config: ApiConfig, store: Store, hands: QueueDriver
) -> None:
    await announce(store, "iris", default="iris")
    await worker(store, 1.0)
    hands.store.policy = Policy()
    config = replace(config, policy=Policy())
    job_id = await hands.submit_one()
    for deliveries, then in enumerate(("runs again", "runs again", "fails"), start=1):
        claim = await hands.claim_jobs(1)
        assert await reason_now(config, job_id) is None
        # A lease of 15 s is renewed when it has 10 s left.
        hands.redis.zadd(keys.leases("predict_queue"), {claim.token: hands.now_ms() + 7000})
        reason = await reason_now(config, job_id)
        assert reason["code"] == "worker_lost"
        assert re.search(rf"the job {then} in at most ([6-9]|10) s", reason["message"])
        hands.expire_leases(claim.token)
        await hands.sweep()
        if deliveries < 3:
            reason = await reason_now(config, job_id)
            assert reason["code"] == "worker_lost"
            assert f"was lost, {deliveries} of 3" in reason["message"]
    assert hands.error_code(job_id) == "worker_lost"


async def test_the_jobs_of_a_lost_worker_delay_only_those_that_end_after_they_are_put_back(
    config: ApiConfig, store: Store, hands: QueueDriver
) -> None:
    await announce(store, "iris", default="iris")
    await worker(store, seconds_per_job=2.0, slots=1)
    hands.store.policy = Policy()
    ids = await hands.submit_many(12)
    lost = await hands.claim_jobs(4)
    await hands.claim_jobs(1)
    # Its jobs are put back in at most 10 s: a sweep comes within 3 s after the end of the lease.
    hands.redis.zadd(keys.leases("predict_queue"), {lost.token: hands.now_ms() + 7000})
    async with running_client(replace(config, policy=Policy())) as api:
        soon, late = [(await read(api, job_id))["eta_seconds"] for job_id in (ids[5], ids[-1])]
    # Behind one that runs, and behind six that wait, one that runs and four that are put back.
    assert 2.0 <= soon <= 3.0
    assert 22.0 <= late <= 23.0


# --- no free slot ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("isolating", "words"),
    [
        (
            (True,),
            "its worker may run only one job at a time, one with which a worker was lost before",
        ),
        ((False,), "the slots of its workers run jobs of other models"),
        ((True, False), "1 of its 2 workers may run only one job at a time"),
    ],
)
async def test_a_job_whose_workers_run_other_jobs_for_long_says_so(
    config: ApiConfig,
    store: Store,
    hands: QueueDriver,
    isolating: tuple[bool, ...],
    words: str,
) -> None:
    await announce(store, "iris", default="iris")
    for number, is_isolating in enumerate(isolating):
        await worker(store, 1.0, number=number, isolating=is_isolating)
    old = await submit_earlier(hands, 60_000, count=2)
    async with running_client(config) as api:
        first, second = [await read(api, job_id) for job_id in old]
    assert first["waiting_for"]["code"] == second["waiting_for"]["code"] == "no_free_slot"
    assert re.match(r"No job of its queue has run for 6\d s", first["waiting_for"]["message"])
    assert words in first["waiting_for"]["message"]
    assert (first["position"]["ahead"], first["eta_seconds"]) == (0, None)
    assert "It waits behind 1 more." in second["waiting_for"]["message"]


async def test_a_job_of_a_queue_that_moves_on_only_waits_for_its_turn(
    config: ApiConfig, store: Store, hands: QueueDriver
) -> None:
    await announce(store, "iris", default="iris")
    await worker(store, 1.0)
    first, second = await submit_earlier(hands, 60_000, count=2)
    claim = await hands.claim_jobs(1)
    assert (await reason_now(config, second)) is None
    async with running_client(config) as api:
        # Its first look comes at once after the end of a job.
        await hands.finish(claim)
        assert (await read(api, second))["waiting_for"] is None
    assert (await hands.read(first)).status == "completed"


async def submit_earlier(hands: QueueDriver, age_ms: int, *, count: int) -> list[str]:
    """Submits jobs that have waited for so long already; returns their ids."""
    created_ms = hands.now_ms() - age_ms
    old = [new_job() for _ in range(count)]
    await hands.submit(
        *(replace(job, record=replace(job.record, created_ms=created_ms)) for job in old)
    )
    return [job.job_id for job in old]


async def reason_now(config: ApiConfig, job_id: str) -> Any:
    """Why the job waits, as an API sees it that has just started."""
    async with running_client(config) as api:
        return (await read(api, job_id))["waiting_for"]


# --- what it costs ---------------------------------------------------------------------------


def calls(hands: QueueDriver, command: str) -> int:
    found = hands.redis.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})
    return int(found["calls"])


async def test_however_many_poll_a_queue_it_is_looked_at_once_a_second(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    ids = await hands.submit_many(100)
    await read(api, ids[0])
    # Only a look asks for the log from its end.
    before, looks = calls(hands, "mget"), calls(hands, "xrevrange")
    began = asyncio.get_running_loop().time()
    await asyncio.gather(*(read(api, job_id) for job_id in ids * 3))
    seconds = asyncio.get_running_loop().time() - began
    assert calls(hands, "xrevrange") - looks <= 1 + seconds
    assert calls(hands, "mget") - before >= 300


async def calls_of_a_look(hands: QueueDriver) -> dict[str, int]:
    return await hands.commands_of(look_at(hands.store, "predict_queue", "iris"))


async def test_a_look_costs_redis_the_same_for_any_number_of_waiting_jobs(
    hands: QueueDriver,
) -> None:
    for _ in range(5):
        await hands.submit_many(250)
    few = await calls_of_a_look(hands)
    for _ in range(5):
        await hands.submit_many(250)
    assert await calls_of_a_look(hands) == few
    assert few["fcall"] == 1
    assert sum(few.values()) < 80


@pytest.mark.soak
async def test_without_requests_no_queue_is_looked_at(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    hands.redis.config_resetstat()
    await submit(api)
    await eventually(lambda: calls(hands, "xrevrange") == 1, "the look for submits", 5)
    # An API reads the workers once a second.
    reads = calls(hands, "zrevrange")
    await eventually(lambda: calls(hands, "zrevrange") >= reads + 3, "three seconds pass", 10)
    assert calls(hands, "xrevrange") == 1
