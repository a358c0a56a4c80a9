"""Whatever anyone writes into Redis ends no worker and no role of the API."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import redis

from asyncinfer import keys
from asyncinfer.errors import RedisRefused
from asyncinfer.jobs import SCHEMA, Record, encode_record
from asyncinfer.repository.store import Store
from asyncinfer.repository.upkeep import Upkeep
from asyncinfer.worker.worker import WorkerConfig

from .customer import Customer, transitions
from .harness import eventually
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


def _set(name: str) -> Callable[[Any], None]:
    def damage(client: Any) -> None:
        client.delete(name)
        client.set(name, "x")

    return damage


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
        await eventually(lambda: "The default model and the list" in workers.log, "it says so")
        await customer.submit([2.0])
        await customer.all_completed()
        assert await worker.stop() == 0
    server.delete(keys.default_model(Q))


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
    upkeep = Upkeep(store)
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
    await upkeep.sweep()
    assert job_id.encode() in server.lrange(Q, 0, -1)
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
