"""Damaged keys in Redis, one by one: no worker and no role of the API ends because of them."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import redis

from asyncinfer.errors import RedisRefused
from asyncinfer.jobs import SCHEMA, Outcome, Record, encode_record
from asyncinfer.repository import keys
from asyncinfer.repository.claims import ClaimRequest, JobOutcome, QueueConsumer
from asyncinfer.repository.leases import Leases
from asyncinfer.repository.maintenance import Maintenance
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from asyncinfer.worker.worker import WorkerConfig
from tests.faults.load_client import LoadClient, transitions

from .damaged_redis import HOSTILE_VALUES
from .harness import eventually, is_renewed, wait_for_next_millisecond
from .processes import OpenWorkers

Q = "predict_queue"
OTHER = f"{Q}:picky"
GARBAGE = b"\xc1\xff"


def _pack(value: object) -> bytes:
    return msgspec.msgpack.encode(value)


# redis-py types every reply as a union of all that RESP can say.
def _add_external_job(client: Any, facts: bytes | None = None, meta: bytes | None = None) -> None:
    client.mset({keys.data("external"): "[[1.0]]", keys.status("external"): "pending"})
    if meta is not None:
        client.set(keys.meta("external"), meta)
    if facts is not None:
        client.hset(keys.facts(Q), "external", facts)
    client.lpush(Q, "external")


def _damaged_meta() -> bytes:
    meta = encode_record(Record(SCHEMA, Q, "slow", "default", 0), b"12345678")
    return meta[:-3] + GARBAGE


def _record_with(**fields: Any) -> bytes:
    record = Record(SCHEMA, Q, "slow", "default", 0)
    return encode_record(msgspec.structs.replace(record, **fields), b"12345678")


def _make_string(name: str) -> Callable[[Any], None]:
    """Replaces a key by a string."""

    def damage(client: Any) -> None:
        client.delete(name)
        client.set(name, "x")

    return damage


def _make_list(name: str, content: str) -> Callable[[Any], None]:
    """Replaces a key by a list that contains `content`."""

    def damage(client: Any) -> None:
        client.delete(name)
        client.rpush(name, content)

    return damage


def _wrong_status(client: Any) -> None:
    _add_external_job(client)
    client.delete(keys.status("external"))
    client.hset(keys.status("external"), "x", "y")
    client.zadd(keys.deadlines(Q), {"external": 1})
    client.zadd(keys.delayed(Q), {"external": 1})


def _wrong_deadline(client: Any) -> None:
    _add_external_job(client, facts=GARBAGE)
    client.zadd(keys.deadlines(Q), {"external": 1})


def _wrong_delay(client: Any) -> None:
    _add_external_job(client, facts=_pack({"p": 5}))
    client.lrem(Q, 0, "external")
    client.zadd(keys.delayed(Q), {"external": 1})


DAMAGES: dict[str, Callable[[Any], None]] = {
    "control field": lambda client: client.xadd(keys.control(Q), {b"\xff": b"\xfe"}),
    "control type": _make_string(keys.control(Q)),
    "facts garbage": lambda client: _add_external_job(client, facts=GARBAGE),
    "facts values": lambda client: _add_external_job(
        client, facts=_pack({"d": "x", "b": [], "l": {}})
    ),
    "facts inboxes": lambda client: _add_external_job(client, facts=_pack({"w": [[1], {}]})),
    "facts no table": lambda client: _add_external_job(client, facts=_pack(7)),
    "deadline": _wrong_deadline,
    "delay": _wrong_delay,
    "queues member": lambda client: client.sadd(
        keys.queues(Q), b"\xff", f"{Q}:\udcff".encode("utf-8", "surrogateescape")
    ),
    "list type": _make_string(OTHER),
    "high list type": _make_string(keys.waiting(OTHER)[0]),
    "wake type": _make_string(keys.wake(OTHER)),
    "leases type": _make_string(keys.leases(OTHER)),
    "models type": _make_string(keys.models(Q)),
    "meta": lambda client: _add_external_job(client, meta=_damaged_meta()),
    "facts ttl": lambda client: _add_external_job(client, facts=_pack({"t": -5})),
    "facts fraction": lambda client: _add_external_job(client, facts=_pack({"t": 0.5, "b": 1e300})),
    "facts priority": lambda client: _add_external_job(client, facts=_pack({"p": "running"})),
    "facts inbox": lambda client: _add_external_job(
        client, facts=_pack({"w": [Q, keys.running(Q)]})
    ),
    "status type": _wrong_status,
    "swept type": _make_list(keys.swept(Q), "x"),
    "counters": lambda client: client.mset({keys.seq(Q): GARBAGE, keys.bytes_waiting(Q): "x"}),
    "marks": _make_list(keys.log_marks(Q), "12 not an entry"),
    "log type": _make_string(keys.log(Q)),
    "workers member": lambda client: client.zadd(keys.workers(Q), {GARBAGE: 1e18}),
    "versions": lambda client: client.hset(keys.model(Q, "slow"), GARBAGE, GARBAGE),
    "default versions": lambda client: client.hset(keys.default_versions(Q), GARBAGE, GARBAGE),
}
"""Damages that an external program may do in Redis, by name."""


BUSY = WorkerConfig(concurrency=1, brpop_timeout_seconds=0.1, prediction_timeout_seconds=60)


@pytest.mark.soak
@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_worker_survives_any_damage_and_runs_the_jobs_after_it(
    damage: str, open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    with open_workers(models=("slow", "picky"), default_model="slow", worker=BUSY) as workers:
        worker = workers.start()
        await load_client.submit([1.0])
        await load_client.assert_all_completed(5)
        DAMAGES[damage](server)
        for value in (2.0, 3.0):
            await load_client.submit([value])
            await load_client.assert_all_completed(5)
        assert await worker.stop() == 0
    server.flushall()


def _make_default_a_list(server: redis.Redis) -> None:
    server.delete(keys.default_model(Q))
    server.lpush(keys.default_model(Q), "slow")


def _make_default_an_invalid_name(server: redis.Redis) -> None:
    server.set(keys.default_model(Q), b"\xff/..")


@pytest.mark.soak
@pytest.mark.parametrize("damage", [_make_default_a_list, _make_default_an_invalid_name])
async def test_a_worker_still_serves_when_the_key_of_the_default_model_is_damaged(
    damage: Callable[[redis.Redis], None],
    open_workers: OpenWorkers,
    load_client: LoadClient,
    server: redis.Redis,
) -> None:
    with open_workers() as workers:
        worker = workers.start()
        await load_client.submit([1.0])
        await load_client.assert_all_completed()
        damage(server)
        await eventually(
            lambda: "the name of the default model" in workers.log, "the worker logs it"
        )
        await load_client.submit([2.0])
        await load_client.assert_all_completed()
        assert await worker.stop() == 0
    server.delete(keys.default_model(Q))


FACTS: dict[str, object] = {
    "a negative TTL": {"t": -5},
    "a fraction as TTL": {"t": 0.5},
    "a TTL that Redis refuses": {"t": 1 << 52},
    "a priority that names a hash": {"p": "running"},
    "an inbox that is a list": {"w": [Q, f"{Q}:other"]},
    "counts that are no counts": {"d": -1, "s": float("nan")},
}


@pytest.mark.parametrize("outcome", ["completed", "failed", "dead", "released", "suspect"])
@pytest.mark.parametrize("facts", FACTS.values(), ids=FACTS.keys())
async def test_a_job_with_wrong_facts_ends_or_waits_again(
    facts: object, outcome: Outcome, server: redis.Redis, store: Store
) -> None:
    runs = QueueConsumer(store, "w")
    _add_external_job(server, facts=_pack(facts))
    server.rpush(f"{Q}:other", "x")
    request = ClaimRequest((Q,), runs.new_token(), is_holding=False, max_jobs=1)
    claim = (await runs.claim(request)).claim
    assert claim
    verdicts, _ = await runs.finish(claim, [JobOutcome("external", outcome, b"{}")], last=True)
    assert verdicts == [outcome]
    ended = {"completed": b"completed", "failed": b"failed", "dead": b"failed"}
    assert server.get(keys.status("external")) == ended.get(outcome, b"pending")
    if outcome in ended:
        assert server.ttl(keys.status("external")) > 0
    else:
        assert server.lrange(Q, 0, -1) == [b"external"]
    server.flushall()


async def test_a_hostile_input_fails_alone_and_the_jobs_beside_it_run(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    values = [*HOSTILE_VALUES, *(b'{"data":' + value + b"}" for value in HOSTILE_VALUES)]
    meta = _record_with(payload="tensors")
    for number, data in enumerate(values):
        for kind in ("external", "tensors"):
            job_id = f"{kind}-{number}"
            server.mset({keys.data(job_id): data, keys.status(job_id): "pending"})
            if kind == "tensors":
                server.set(keys.meta(job_id), meta)
            server.lpush(Q, job_id)
    await load_client.submit([1.0, 2.0])
    with open_workers(worker=BUSY) as workers:
        worker = workers.start()
        await load_client.assert_all_completed(30)
        assert await worker.stop() == 0
    ended = {server.get(keys.status(f"external-{number}")) for number in range(len(values))}
    assert ended == {b"failed"}
    server.flushall()


@pytest.mark.soak
async def test_a_worker_starts_and_works_beside_unreadable_announcements(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    for damage in ("workers member", "versions", "default versions", "queues member"):
        DAMAGES[damage](server)
    server.set(keys.worker(Q, "deep"), b'{"x":' + b"[" * 20_000)
    server.zadd(keys.workers(Q), {"deep": 1})
    with open_workers(worker=BUSY) as workers:
        worker = workers.start()
        await load_client.submit([1.0])
        await load_client.assert_all_completed(10)
        await eventually(lambda: worker.is_announced(server), "the worker is announced")
        assert await worker.stop() == 0
    server.flushall()


@pytest.mark.soak
async def test_a_damaged_doorbell_and_control_key_are_logged_once_and_every_job_is_run(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    with open_workers(models=("slow", "picky"), default_model="slow", worker=BUSY) as workers:
        worker = workers.start()
        await load_client.submit([1.0])
        await load_client.assert_all_completed(10)
        for name in (keys.wake(OTHER), keys.control(OTHER)):
            _make_string(name)(server)
        for value in range(2, 12):
            await load_client.submit([float(value)])
            await load_client.assert_all_completed(10)
        assert await worker.stop() == 0
        assert workers.log.count("Waiting:") <= 1
        assert workers.log.count("Control:") <= 1
    server.flushall()


async def test_a_damaged_queue_does_not_prevent_the_renewal_of_other_leases(
    server: redis.Redis, store: Store
) -> None:
    runs, renewals = QueueConsumer(store, "w"), Leases(store)
    _add_external_job(server)
    claim = (await runs.claim(ClaimRequest((Q,), "token", is_holding=False, max_jobs=1))).claim
    assert claim
    (before,) = server.zmscore(keys.leases(Q), ["token"])
    assert before is not None
    server.set(keys.leases(OTHER), "x")
    wait_for_next_millisecond()
    renewed = renewals.renew({OTHER: ["lost"], Q: ["token"]})
    renewals.close()
    (after,) = server.zmscore(keys.leases(Q), ["token"])
    assert after is not None
    assert (renewed.lost, after > before) == ((), True)
    server.flushall()


@pytest.mark.soak
async def test_leases_are_still_renewed_after_a_damaged_claim(
    open_workers: OpenWorkers, load_client: LoadClient, server: redis.Redis
) -> None:
    # Long enough that neither lease ends because the machine is busy.
    with open_workers(worker=BUSY, policy=Policy(lease_seconds=3)) as workers:
        worker = workers.start()
        (of_damaged_claim,) = await load_client.submit([300.0])
        await eventually(lambda: server.hlen(keys.running(Q)) == 1, "it runs")
        for name in server.scan_iter(keys.claim(Q, "*"), count=1000):
            server.set(name, GARBAGE)
        await load_client.assert_all_completed()
        (renewed,) = await load_client.submit([1500.0])
        await eventually(lambda: server.hlen(keys.running(Q)) == 1, "it runs")
        await eventually(is_renewed(server, Q), "its lease is renewed")
        await load_client.assert_all_completed()
        assert await worker.stop() == 0
    logged = transitions(server, Q)
    job_ids = (of_damaged_claim, renewed)
    assert [logged[job_id]["processing"] for job_id in job_ids] == [1, 1]


@pytest.mark.parametrize("damage", [*DAMAGES, "claim"])
async def test_a_sweep_still_recovers_the_other_jobs(
    damage: str, load_client: LoadClient, server: redis.Redis, store: Store
) -> None:
    maintenance = Maintenance(store)
    server.sadd(keys.queues(Q), OTHER)
    if damage == "claim":
        server.zadd(keys.leases(OTHER), {"t": 1})
        server.set(keys.claim(OTHER, "t"), GARBAGE)
    else:
        DAMAGES[damage](server)
    (job_id,) = await load_client.submit([1.0])
    server.lrem(Q, 0, job_id)
    server.zadd(keys.delayed(Q), {job_id: 1})
    server.delete(keys.reap_gate(Q))
    await maintenance.sweep()
    assert job_id.encode() in server.lrange(Q, 0, -1)
    server.flushall()


async def test_a_repair_still_requeues_the_jobs_of_other_queues(
    load_client: LoadClient, server: redis.Redis, store: Store
) -> None:
    maintenance = Maintenance(store)
    server.sadd(keys.queues(Q), OTHER)
    server.set(keys.facts(OTHER), "x")
    (job_id,) = await load_client.submit([1.0])
    server.lrem(Q, 0, job_id)
    for _ in range(2):
        server.delete(keys.repair_gate(Q))
        for _ in range(2):  # more than the pause, which is a millisecond
            wait_for_next_millisecond()
        repaired = await maintenance.repair(0.001)
    assert (repaired, server.lrange(Q, 0, -1)) == (1, [job_id.encode()])
    server.flushall()


async def test_submits_to_a_damaged_queue_are_refused_and_others_accepted(
    load_client: LoadClient, server: redis.Redis, store: Store
) -> None:
    server.set(OTHER, "x")
    other = LoadClient(store, "picky")
    async with asyncio.TaskGroup() as group:
        sender = group.create_task(load_client.submissions.run())
        refused = other.new_job(1.0)
        with pytest.raises(RedisRefused) as error:
            await load_client.submissions.submit(refused)
        assert error.value.job_id == refused.job_id
        assert (await load_client.submissions.submit(load_client.new_job(1.0))).verdict == "ok"
        sender.cancel()
    server.flushall()
