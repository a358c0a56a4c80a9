"""GET /job/{id}/timeline: what has happened to a job, in every state, whatever the clocks show."""

from datetime import datetime
from typing import Any

import httpx2
import msgspec

from asyncinfer.errors import OutOfMemory
from asyncinfer.jobs import (
    MAX_HANDED_BACK,
    Delivery,
    PastDelivery,
    Webhook,
    encode_record,
    now_ms,
    record_seq,
)
from asyncinfer.repository import keys
from asyncinfer.repository.claims import Claim, JobOutcome
from asyncinfer.repository.deliveries import Attempt
from asyncinfer.repository.outbox import Outbox
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from asyncinfer.worker.held_claim import HeldClaim
from asyncinfer.worker.running.outcomes import OutcomeBuilder
from tests.queue_driver import RESULT, Q, QueueDriver

from .harness import ManualWorker, assert_problem, client_of, submit

HOUR_MS = 3_600_000


async def read(client: httpx2.AsyncClient, job_id: str) -> dict[str, Any]:
    """The timeline; asserts that its times do not go back, and agree with each other."""
    reply = await client.get(f"/job/{job_id}/timeline")
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    last_ms: int | None = None
    for event in body["events"]:
        assert (event["at"] is None) == (event["at_ms"] is None)
        if event["at_ms"] is None:
            assert event["seconds"] is None
            continue
        if last_ms is not None:
            assert event["seconds"] == (event["at_ms"] - last_ms) / 1000 >= 0
        last_ms = event["at_ms"]
    return body


def names(body: dict[str, Any]) -> list[str]:
    return [event["event"] for event in body["events"]]


def event(body: dict[str, Any], name: str) -> dict[str, Any]:
    """The last event of this name."""
    found: dict[str, Any] = [event for event in body["events"] if event["event"] == name][-1]
    return found


def held(claim: Claim) -> HeldClaim:
    return HeldClaim(claim, emptied_queue=True)


def builder(store: Store) -> OutcomeBuilder:
    return OutcomeBuilder(store, "host-1-abcdef", 1_000_000)


async def lose_worker(hands: QueueDriver) -> None:
    """A worker claims what waits, and its lease ends."""
    await hands.claim_jobs(token=f"host-77-{'0b' * 3}:{'1' * 60}{hands.now_ms()}")
    hands.expire_leases()
    await hands.sweep()


async def test_a_waiting_job_shows_since_when_it_waits(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    job_id = await submit(api)
    body = await read(api, job_id)
    assert names(body) == ["submitted", "now"]
    assert (body["status"], body["round"], body["omitted"]) == ("pending", 1, 0)
    assert event(body, "now")["status"] == "pending"
    assert abs(event(body, "now")["at_ms"] - hands.now_ms()) < 10_000
    assert body["seconds"] == event(body, "now")["seconds"]


async def test_a_running_job_shows_its_worker_and_that_the_time_of_its_claim_is_not_known(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    job_id = await submit(api)
    await hands.claim_jobs(token=f"host-77-0b0b0b:{'1' * 60}")
    body = await read(api, job_id)
    assert names(body) == ["submitted", "claimed", "now"]
    assert event(body, "claimed") == {
        **{"event": "claimed", "at": None, "at_ms": None, "seconds": None},
        **{"delivery": 1, "worker": "w-0b0b0b"},
    }
    assert event(body, "now")["status"] == "processing"


async def test_no_time_is_negative_though_every_clock_shows_another_hour(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    """The API is two hours ahead of Redis, the worker an hour behind."""
    job_id = await submit(api)
    claim = await hands.claim_jobs()
    (job,) = claim.jobs
    assert job.record
    started_ms = claim.claimed_ms - HOUR_MS
    record = msgspec.structs.replace(
        job.record,
        created_ms=claim.claimed_ms + 2 * HOUR_MS,
        **{"started_ms": started_ms, "finished_ms": started_ms + 1500, "worker": "host-1-abcdef"},
        **{"claim": claim.token, "ran_version": "1", "ran_sha256": "a" * 64},
        delivery=Delivery(claim.claimed_ms, 5, 250, 3, 12, "CUDA"),
    )
    meta = encode_record(record, record_seq(job.meta))
    await hands.consumer.finish(claim, [JobOutcome(job_id, "completed", RESULT, meta)], last=True)
    body = await read(api, job_id)
    assert names(body) == ["submitted", "claimed", "running", "finished"]
    assert [event["clock"] for event in body["events"]] == ["api", "redis", "redis", "redis"]
    assert [event["seconds"] for event in body["events"]] == [None, 0.0, 0.25, 1.25]
    assert event(body, "claimed")["at_ms"] == claim.claimed_ms
    assert event(body, "claimed")["jobs"] == 5
    run = event(body, "running")
    assert (run["jobs"], run["rows"], run["provider"], run["version"]) == (3, 12, "CUDA", "1")
    assert (run["sha256"], run["worker"]) == ("a" * 64, "w-abcdef")
    assert body["seconds"] == 1.5


async def test_a_job_that_an_earlier_release_ran_shows_the_times_of_its_worker(
    api: httpx2.AsyncClient, manual_worker: ManualWorker
) -> None:
    job_id = await submit(api)
    await manual_worker.complete()
    body = await read(api, job_id)
    assert names(body) == ["submitted", "claimed", "running", "finished"]
    assert event(body, "running")["at"] is None
    assert event(body, "finished")["clock"] == "worker"
    # Its clock shows 1970.
    assert body["seconds"] == 0.001


async def test_a_job_that_was_cancelled_while_it_waited_shows_when(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    job_id = await submit(api)
    before_ms = hands.now_ms()
    await api.delete(f"/job/{job_id}")
    body = await read(api, job_id)
    assert names(body) == ["submitted", "finished"]
    end = event(body, "finished")
    assert (end["status"], end["clock"]) == ("cancelled", "redis")
    assert before_ms <= end["at_ms"] <= hands.now_ms()


async def test_a_job_a_list_and_an_event_tell_the_end_at_the_time_of_the_timeline(
    api: httpx2.AsyncClient, hands: QueueDriver, store: Store
) -> None:
    """However it ended: by a worker whose clock is an hour late, by a script, by a lost worker."""
    ends: dict[str, str] = {}
    ends["cancelled"] = await submit(api)
    await api.delete(f"/job/{ends['cancelled']}")
    ends["purged"] = await submit(api)
    await api.post("/models/iris/cancel")
    ends["expired"] = await submit(api, params={"start_within_seconds": 60})
    hands.make_due(keys.deadlines(Q))
    await hands.sweep()
    ends["stopped"] = await submit(api)
    claim = await hands.claim_jobs()
    await hands.cancel(ends["stopped"])
    released = builder(store).released(held(claim), claim.jobs, "stopping")
    await hands.consumer.finish(claim, released, last=True)
    ends["lost"] = await submit(api)
    await hands.claim_jobs(token=f"host-77-0b0b0b:{'1' * 60}")
    await hands.cancel(ends["lost"])
    hands.make_due(keys.leases(Q))
    await hands.sweep()
    ends["completed"] = await submit(api)
    claim = await hands.claim_jobs()
    (job,) = claim.jobs
    assert job.record
    record = msgspec.structs.replace(
        job.record,
        **{"started_ms": claim.claimed_ms - HOUR_MS, "finished_ms": claim.claimed_ms - HOUR_MS + 7},
        delivery=Delivery(claim.claimed_ms, 1, 2, 1, 1, "CPU"),
    )
    meta = encode_record(record, record_seq(job.meta))
    outcome = JobOutcome(ends["completed"], "completed", RESULT, meta)
    await hands.consumer.finish(claim, [outcome], last=True)

    listed = {job["job_id"]: job for job in (await api.get("/jobs")).json()["jobs"]}
    for how, job_id in ends.items():
        job = (await api.get(f"/job/{job_id}")).json()
        end = event(await read(api, job_id), "finished")
        assert job["finished_at"] == end["at"], how
        assert listed[job_id]["finished_at"] == end["at"], how
        events = (await api.get(f"/job/{job_id}/events")).text
        assert f'"finished_at":"{end["at"]}"' in events, how
    claimed = event(await read(api, ends["completed"]), "claimed")
    assert listed[ends["completed"]]["started_at"] == claimed["at"]
    # A cancel forgets no lost worker.
    assert event(await read(api, ends["lost"]), "worker_lost")["worker"] == "w-0b0b0b"


async def test_a_job_that_expired_after_it_lost_a_worker_shows_both(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    job_id = await submit(api, params={"finish_within_seconds": 60})
    await lose_worker(hands)
    hands.make_due(keys.deadlines(Q))
    await hands.sweep()
    body = await read(api, job_id)
    assert names(body) == ["submitted", "claimed", "worker_lost", "redelivered", "finished"]
    assert event(body, "finished")["code"] == "expired"
    assert event(body, "worker_lost")["worker"] == "w-0b0b0b"


async def test_a_dead_letter_shows_each_delivery_and_a_retry_begins_anew(
    api: httpx2.AsyncClient, hands: QueueDriver, policy: Policy
) -> None:
    job_id = await submit(api)
    for number in range(policy.max_deliveries):
        body = await read(api, job_id)
        assert names(body).count("worker_lost") == number
        await lose_worker(hands)
    body = await read(api, job_id)
    assert names(body)[-4:] == ["redelivered", "claimed", "worker_lost", "finished"]
    assert names(body).count("worker_lost") == policy.max_deliveries
    assert event(body, "worker_lost")["delivery"] == policy.max_deliveries
    assert (event(body, "finished")["status"], event(body, "finished")["code"]) == (
        *("failed", "worker_lost"),
    )
    error = (await api.get(f"/job/{job_id}")).json()["error"]
    assert set(error) == {"code", "message"}

    assert (await api.post(f"/job/{job_id}/retry")).status_code == 202
    body = await read(api, job_id)
    assert (names(body), body["round"]) == (["submitted", "now"], 2)


async def test_a_job_shows_why_each_worker_handed_it_back(
    api: httpx2.AsyncClient, hands: QueueDriver, store: Store
) -> None:
    job_id = await submit(api)
    build = builder(store)
    await lose_worker(hands)
    for step in ("stopping", "timeout", "out_of_memory"):
        claim = await hands.claim_jobs()
        (job,) = claim.jobs
        outcomes = {
            "stopping": lambda h, j: build.released(h, [j], "stopping")[0],
            "timeout": lambda h, j: build.suspects(h, [j])[0],
            "out_of_memory": lambda h, j: build.failed(h, j, OutOfMemory("no memory")),
        }
        outcome = outcomes[step](held(claim), job)
        await hands.consumer.finish(claim, [outcome], last=True)
        body = await read(api, job_id)
        assert names(body)[-3:] == ["claimed", "handed_back", "now"]
        assert event(body, "handed_back")["reason"] == step
    hands.make_due(keys.delayed(Q))
    await hands.sweep()
    claim = await hands.claim_jobs()
    (job,) = claim.jobs
    cancelled = build.cancelled(held(claim), job)
    await hands.consumer.finish(claim, [cancelled], last=True)

    body = await read(api, job_id)
    assert names(body) == [
        *("submitted", "claimed", "worker_lost", "redelivered"),
        *("claimed", "handed_back") * 3,
        *("claimed", "finished"),
    ]
    claims = [event for event in body["events"] if event["event"] == "claimed"]
    assert [claim["delivery"] for claim in claims] == [1, 2, 3, 4, 5]
    assert claims[-1]["jobs"] == 1
    assert 0 <= event(body, "handed_back").get("delay_seconds", 0) <= 2


async def test_only_the_newest_deliveries_that_were_handed_back_are_kept(
    api: httpx2.AsyncClient, hands: QueueDriver, store: Store
) -> None:
    job_id = await submit(api)
    for _ in range(MAX_HANDED_BACK + 3):
        claim = await hands.claim_jobs()
        outcomes = builder(store).released(held(claim), claim.jobs, "stopping")
        assert (await hands.consumer.finish(claim, outcomes, last=True))[0] == ["released"]
    body = await read(api, job_id)
    assert body["omitted"] == 3
    assert names(body).count("handed_back") == MAX_HANDED_BACK
    assert event(body, "handed_back")["delivery"] == MAX_HANDED_BACK + 3


async def test_the_attempts_of_a_webhook_follow_the_end_of_its_job(
    api: httpx2.AsyncClient, hands: QueueDriver, store: Store
) -> None:
    outbox = Outbox(store)
    job_id = await hands.submit_one(webhook=Webhook(url="https://example.com/hook"))
    await hands.run_all()
    end_ms = event(await read(api, job_id), "finished")["at_ms"]
    (delivery,) = await outbox.take([Q], 10, 60_000)
    await outbox.note(delivery, Attempt(end_ms + 10, 0, "refused", 20), end_ms + 5010)
    body = await read(api, job_id)
    assert names(body)[-2:] == ["finished", "webhook"]
    tried = event(body, "webhook")
    assert (tried["error"], tried["seconds"], tried["duration_seconds"]) == ("refused", 0.01, 0.02)
    assert (tried["delay_seconds"], "reason" in tried) == (5.0, False)
    # The host fails, so that a sender puts the next try off.
    hands.make_due(keys.outbox(Q))
    (delivery,) = await outbox.take([Q], 10, 60_000)
    await outbox.postpone([delivery], end_ms + 17_510)
    assert event(await read(api, job_id), "webhook")["delay_seconds"] == 17.5
    webhook = (await api.get(f"/job/{job_id}/webhook")).json()
    due = datetime.fromisoformat(webhook["deliveries"][0]["next_at"])
    assert round(1000 * due.timestamp()) == end_ms + 17_510

    hands.make_due(keys.outbox(Q))
    (delivery,) = await outbox.take([Q], 10, 60_000)
    await outbox.note(delivery, Attempt(end_ms + 5030, 204, "", 50), None, "delivered")
    body = await read(api, job_id)
    assert names(body)[-3:] == ["finished", "webhook", "webhook"]
    tried = event(body, "webhook")
    assert (tried["http_status"], tried["reason"], tried["clock"]) == (204, "delivered", "redis")
    assert body["seconds"] == (end_ms - event(body, "submitted")["at_ms"]) / 1000
    assert "example.com" not in str(body)


async def test_an_external_job_shows_what_is_known(
    api: httpx2.AsyncClient, hands: QueueDriver, policy: Policy
) -> None:
    hands.add_external_job("order-1")
    body = await read(api, "order-1")
    assert names(body) == ["submitted", "now"]
    assert event(body, "submitted")["at"] is None
    assert body["seconds"] is None
    for _ in range(policy.max_deliveries):
        await lose_worker(hands)
    body = await read(api, "order-1")
    assert names(body).count("worker_lost") == policy.max_deliveries
    hands.add_external_job("order-2")
    await hands.run_all()
    body = await read(api, "order-2")
    assert names(body) == ["submitted", "finished"]
    assert abs(event(body, "finished")["at_ms"] - now_ms()) < 10_000


async def test_hostile_names_of_workers_leave_the_error_readable(
    api: httpx2.AsyncClient, hands: QueueDriver, policy: Policy
) -> None:
    job_id = await submit(api)
    for number in range(policy.max_deliveries):
        await hands.claim_jobs(token='"},\n\\\xe9:' + str(number) * 65)
        hands.expire_leases()
        await hands.sweep()
    assert hands.error_code(job_id) == "worker_lost"
    body = await read(api, job_id)
    assert names(body)[-3:] == ["claimed", "worker_lost", "finished"]


async def test_damaged_times_and_counts_are_shown_as_far_as_they_can_be(
    api: httpx2.AsyncClient, hands: QueueDriver
) -> None:
    job_id = await submit(api)
    stored = await hands.read(job_id)
    assert stored.record
    largest = (1 << 64) - 1
    for created_ms in (-1, largest):
        record = msgspec.structs.replace(
            stored.record,
            **{"created_ms": created_ms, "handed_back": largest},
            past_deliveries=(PastDelivery("?", largest, "\x1b", largest, largest),),
        )
        hands.redis.set(keys.meta(job_id), encode_record(record, record_seq(stored.meta)))
        body = await read(api, job_id)
        assert names(body) == ["submitted", "claimed", "handed_back", "now"]
        assert {event["at"] for event in body["events"][:3]} == {None}
        assert body["omitted"] > 1 << 50


async def test_a_timeline_is_its_tenants_and_an_operators(two_tenant_port: int) -> None:
    port = two_tenant_port
    async with client_of(port, **{"x-api-key": "alice"}) as alice:
        job_id = await submit(alice)
        assert names(await read(alice, job_id)) == ["submitted", "now"]
    async with client_of(port, **{"x-api-key": "bob"}) as bob:
        assert_problem(await bob.get(f"/job/{job_id}/timeline"), 404, "job_not_found")
    async with client_of(port, **{"x-api-key": "ops"}) as ops:
        reply = await ops.get(f"/job/{job_id}/timeline", params={"tenant": "alice"})
        assert reply.status_code == 200
    async with client_of(port, **{"x-api-key": "sender"}) as sender:
        assert_problem(await sender.get(f"/job/{job_id}/timeline"), 403, "forbidden")
