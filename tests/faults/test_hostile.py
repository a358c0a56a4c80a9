"""Whatever anyone writes into Redis ends no worker and no role of the API."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import redis

from asyncinfer.errors import RedisRefused
from asyncinfer.jobs import SCHEMA, Outcome, Record, encode_record
from asyncinfer.repository import keys
from asyncinfer.repository.claims import ClaimRequest, Finished, Runs
from asyncinfer.repository.leases import Renewals
from asyncinfer.repository.maintenance import Maintenance
from asyncinfer.repository.store import Store
from asyncinfer.worker.worker import WorkerConfig
from tests.faults.load_client import Customer, transitions

from .harness import eventually
from .hostile import HOSTILE
from .processes import OpenCrew

Q = "predict_queue"
OTHER = f"{Q}:picky"
GARBAGE = b"\xc1\xff"


def _pack(value: object) -> bytes:
    return msgspec.msgpack.encode(value)


# redis-py types every reply as a union of all that RESP can say.
def _stranger(client: Any, facts: bytes | None = None, meta: bytes | None = None) -> None:
    client.mset({keys.data("odd"): "[[1.0]]", keys.status("odd"): "pending"})
    if meta is not None:
        client.set(keys.meta("odd"), meta)
    if facts is not None:
        client.hset(keys.facts(Q), "odd", facts)
    client.lpush(Q, "odd")


def _damaged_meta() -> bytes:
    whole = encode_record(Record(SCHEMA, Q, "slow", "default", 0), b"12345678")
    return whole[:-3] + GARBAGE


def _record_of(**more: Any) -> bytes:
    record = Record(SCHEMA, Q, "slow", "default", 0)
    return encode_record(msgspec.structs.replace(record, **more), b"12345678")


def _set(name: str) -> Callable[[Any], None]:
    def damage(client: Any) -> None:
        client.delete(name)
        client.set(name, "x")

    return damage


def _put(name: str, content: str) -> Callable[[Any], None]:
    """A list with something strange in it, in place of whatever is there."""

    def damage(client: Any) -> None:
        client.delete(name)
        client.rpush(name, content)

    return damage


def _wrong_status(client: Any) -> None:
    _stranger(client)
    client.delete(keys.status("odd"))
    client.hset(keys.status("odd"), "x", "y")
    client.zadd(keys.deadlines(Q), {"odd": 1})
    client.zadd(keys.delayed(Q), {"odd": 1})


def _wrong_deadline(client: Any) -> None:
    _stranger(client, facts=GARBAGE)
    client.zadd(keys.deadlines(Q), {"odd": 1})


def _wrong_delay(client: Any) -> None:
    _stranger(client, facts=_pack({"p": 5}))
    client.lrem(Q, 0, "odd")
    client.zadd(keys.delayed(Q), {"odd": 1})


DAMAGES: dict[str, Callable[[Any], None]] = {
    "control field": lambda client: client.xadd(keys.control(Q), {b"\xff": b"\xfe"}),
    "control type": _set(keys.control(Q)),
    "facts garbage": lambda client: _stranger(client, facts=GARBAGE),
    "facts values": lambda client: _stranger(client, facts=_pack({"d": "x", "b": [], "l": {}})),
    "facts inboxes": lambda client: _stranger(client, facts=_pack({"w": [[1], {}]})),
    "facts no table": lambda client: _stranger(client, facts=_pack(7)),
    "deadline": _wrong_deadline,
    "delay": _wrong_delay,
    "queues member": lambda client: client.sadd(
        keys.queues(Q), b"\xff", f"{Q}:\udcff".encode("utf-8", "surrogateescape")
    ),
    "list type": _set(OTHER),
    "high list type": _set(keys.waiting(OTHER)[0]),
    "wake type": _set(keys.wake(OTHER)),
    "leases type": _set(keys.leases(OTHER)),
    "models type": _set(keys.models(Q)),
    "meta": lambda client: _stranger(client, meta=_damaged_meta()),
    "facts ttl": lambda client: _stranger(client, facts=_pack({"t": -5})),
    "facts fraction": lambda client: _stranger(client, facts=_pack({"t": 0.5, "b": 1e300})),
    "facts priority": lambda client: _stranger(client, facts=_pack({"p": "running"})),
    "facts inbox": lambda client: _stranger(client, facts=_pack({"w": [Q, keys.running(Q)]})),
    "status type": _wrong_status,
    "swept type": _put(keys.swept(Q), "x"),
    "counters": lambda client: client.mset({keys.seq(Q): GARBAGE, keys.bytes_waiting(Q): "x"}),
    "marks": _put(keys.log_marks(Q), "12 not an entry"),
    "log type": _set(keys.log(Q)),
    "workers member": lambda client: client.zadd(keys.workers(Q), {GARBAGE: 1e18}),
    "versions": lambda client: client.hset(keys.model(Q, "slow"), GARBAGE, GARBAGE),
    "default versions": lambda client: client.hset(keys.default_versions(Q), GARBAGE, GARBAGE),
}
"""What a stranger does to Redis, by name."""


BUSY = WorkerConfig(concurrency=1, brpop_timeout_seconds=0.1)


@pytest.mark.soak
@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_worker_lives_on_and_serves_the_jobs_after(
    damage: str, crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    with crew(models=("slow", "picky"), default_model="slow", worker=BUSY) as workers:
        worker = workers.hire()
        await customer.submit([1.0])
        await customer.all_completed(5)
        DAMAGES[damage](server)
        for value in (2.0, 3.0):
            await customer.submit([value])
            await customer.all_completed(5)
        assert await worker.stop() == 0
    server.flushall()


def _as_a_list(server: redis.Redis) -> None:
    server.delete(keys.default_model(Q))
    server.lpush(keys.default_model(Q), "slow")


def _as_no_name(server: redis.Redis) -> None:
    server.set(keys.default_model(Q), b"\xff/..")


@pytest.mark.soak
@pytest.mark.parametrize("garble", [_as_a_list, _as_no_name])
async def test_a_worker_serves_on_when_the_name_of_the_default_model_is_garbled(
    garble: Callable[[redis.Redis], None], crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    with crew() as workers:
        worker = workers.hire()
        await customer.submit([1.0])
        await customer.all_completed()
        garble(server)
        await eventually(lambda: "the name of the default model" in workers.log, "it says so")
        await customer.submit([2.0])
        await customer.all_completed()
        assert await worker.stop() == 0
    server.delete(keys.default_model(Q))


FACTS: dict[str, object] = {
    "no time to live": {"t": -5},
    "a fraction of a time": {"t": 0.5},
    "a time that Redis does not take": {"t": 1 << 52},
    "a priority that is a hash": {"p": "running"},
    "an inbox that is a list": {"w": [Q, f"{Q}:other"]},
    "a count that is none": {"d": -1, "s": float("nan")},
}


@pytest.mark.parametrize("outcome", ["completed", "failed", "dead", "released", "suspect"])
@pytest.mark.parametrize("facts", FACTS.values(), ids=FACTS.keys())
async def test_a_job_ends_or_waits_again_whatever_its_facts_say(
    facts: object, outcome: Outcome, server: redis.Redis, store: Store
) -> None:
    runs = Runs(store, "w")
    _stranger(server, facts=_pack(facts))
    server.rpush(f"{Q}:other", "x")
    request = ClaimRequest((Q,), runs.new_token(), held=False, max_jobs=1)
    claim = (await runs.claim(request)).claim
    assert claim
    verdicts, _ = await runs.finish(claim, [Finished("odd", outcome, b"{}")], last=True)
    assert verdicts == [outcome]
    ended = {"completed": b"completed", "failed": b"failed", "dead": b"failed"}
    assert server.get(keys.status("odd")) == ended.get(outcome, b"pending")
    if outcome in ended:
        assert server.ttl(keys.status("odd")) > 0
    else:
        assert server.lrange(Q, 0, -1) == [b"odd"]
    server.flushall()


async def test_a_hostile_input_fails_alone_and_the_jobs_beside_it_run(
    crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    hostile = [*HOSTILE, *(b'{"data":' + one + b"}" for one in HOSTILE)]
    meta = _record_of(payload="tensors")
    for number, data in enumerate(hostile):
        for kind in ("stranger", "tensors"):
            job_id = f"{kind}-{number}"
            server.mset({keys.data(job_id): data, keys.status(job_id): "pending"})
            if kind == "tensors":
                server.set(keys.meta(job_id), meta)
            server.lpush(Q, job_id)
    await customer.submit([1.0, 2.0])
    with crew(worker=BUSY) as workers:
        worker = workers.hire()
        await customer.all_completed(30)
        assert await worker.stop() == 0
    ended = {server.get(keys.status(f"stranger-{number}")) for number in range(len(hostile))}
    assert ended == {b"failed"}
    server.flushall()


async def test_a_worker_starts_and_works_beside_announcements_that_nobody_can_read(
    crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    for damage in ("workers member", "versions", "default versions", "queues member"):
        DAMAGES[damage](server)
    server.set(keys.worker(Q, "deep"), b'{"x":' + b"[" * 20_000)
    server.zadd(keys.workers(Q), {"deep": 1})
    with crew(worker=BUSY) as workers:
        worker = workers.hire()
        await customer.submit([1.0])
        await customer.all_completed(10)
        await eventually(lambda: worker.announced(server), "it is announced")
        assert await worker.stop() == 0
    server.flushall()


async def test_a_damaged_bell_and_control_key_are_told_of_once_and_every_job_is_run(
    crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    with crew(models=("slow", "picky"), default_model="slow", worker=BUSY) as workers:
        worker = workers.hire()
        await customer.submit([1.0])
        await customer.all_completed(10)
        for name in (keys.wake(OTHER), keys.control(OTHER)):
            _set(name)(server)
        for value in range(2, 12):
            await customer.submit([float(value)])
            await customer.all_completed(10)
        assert await worker.stop() == 0
        assert workers.log.count("Waiting:") <= 1
        assert workers.log.count("Control:") <= 1
    server.flushall()


async def test_a_damaged_queue_does_not_keep_other_leases_from_being_renewed(
    server: redis.Redis, store: Store
) -> None:
    runs, renewals = Runs(store, "w"), Renewals(store)
    _stranger(server)
    claim = (await runs.claim(ClaimRequest((Q,), "token", held=False, max_jobs=1))).claim
    assert claim
    (before,) = server.zmscore(keys.leases(Q), ["token"])
    assert before is not None
    server.set(keys.leases(OTHER), "x")
    renewed = renewals.renew({OTHER: ["lost"], Q: ["token"]})
    renewals.close()
    (after,) = server.zmscore(keys.leases(Q), ["token"])
    assert after is not None
    assert (renewed.lost, after > before) == ((), True)
    server.flushall()


@pytest.mark.soak
async def test_a_lease_goes_on_being_renewed_after_a_claim_was_garbled(
    crew: OpenCrew, customer: Customer, server: redis.Redis
) -> None:
    with crew(worker=BUSY) as workers:
        worker = workers.hire()
        (garbled,) = await customer.submit([300.0])
        await eventually(lambda: server.hlen(keys.running(Q)) == 1, "it runs")
        for name in server.scan_iter(keys.claim(Q, "*"), count=1000):
            server.set(name, GARBAGE)
        await customer.all_completed()
        (longer_than_a_lease,) = await customer.submit([900.0])
        await customer.all_completed()
        assert await worker.stop() == 0
    seen = transitions(server, Q)
    assert [seen[one]["processing"] for one in (garbled, longer_than_a_lease)] == [1, 1]


@pytest.mark.parametrize("damage", [*DAMAGES, "claim"])
async def test_a_sweep_still_recovers_the_other_jobs(
    damage: str, customer: Customer, server: redis.Redis, store: Store
) -> None:
    maintenance = Maintenance(store)
    server.sadd(keys.queues(Q), OTHER)
    if damage == "claim":
        server.zadd(keys.leases(OTHER), {"t": 1})
        server.set(keys.claim(OTHER, "t"), GARBAGE)
    else:
        DAMAGES[damage](server)
    (job_id,) = await customer.submit([1.0])
    server.lrem(Q, 0, job_id)
    server.zadd(keys.delayed(Q), {job_id: 1})
    server.delete(keys.reap_gate(Q))
    await maintenance.sweep()
    assert job_id.encode() in server.lrange(Q, 0, -1)
    server.flushall()


async def test_a_repair_still_puts_back_the_jobs_of_other_queues(
    customer: Customer, server: redis.Redis, store: Store
) -> None:
    maintenance = Maintenance(store)
    server.sadd(keys.queues(Q), OTHER)
    server.set(keys.facts(OTHER), "x")
    (job_id,) = await customer.submit([1.0])
    server.lrem(Q, 0, job_id)
    for _ in range(2):
        server.delete(keys.repair_gate(Q))
        repaired = await maintenance.repair(0.001)
    assert (repaired, server.lrange(Q, 0, -1)) == (1, [job_id.encode()])
    server.flushall()


async def test_submits_to_a_damaged_queue_are_refused_and_others_taken(
    customer: Customer, server: redis.Redis, store: Store
) -> None:
    server.set(OTHER, "x")
    other = Customer(store, "picky")
    async with asyncio.TaskGroup() as group:
        sender = group.create_task(customer.submissions.run())
        refused = other.job(1.0)
        with pytest.raises(RedisRefused) as told:
            await customer.submissions.submit(refused)
        assert told.value.job_id == refused.job_id
        assert (await customer.submissions.submit(customer.job(1.0))).verdict == "ok"
        sender.cancel()
    server.flushall()
