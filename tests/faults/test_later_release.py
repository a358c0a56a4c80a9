"""Jobs that a later release wrote, in the hands of a worker of this one."""

from collections.abc import Callable

import msgspec
import pytest
import redis

from asyncinfer.jobs import SCHEMA, Record, encode_record
from asyncinfer.repository import keys
from tests.faults.load_client import Customer, transitions

from .harness import eventually
from .processes import OpenCrew


def _with_a_field_more(record: Record) -> bytes:
    fields = msgspec.msgpack.decode(encode_record(record))
    return msgspec.msgpack.encode([SCHEMA + 1, *fields[1:], {"a field": "more"}])


def _with_fields_that_changed(record: Record) -> bytes:
    head = [SCHEMA + 7, record.queue, record.model, record.tenant, record.created_ms]
    return msgspec.msgpack.encode([*head, 1, {"version": [1]}, 7, "options"])


@pytest.mark.parametrize("packed", [_with_a_field_more, _with_fields_that_changed])
async def test_a_job_of_a_later_release_is_neither_run_nor_failed_and_holds_nobody_up(
    packed: Callable[[Record], bytes],
    crew: OpenCrew,
    customer: Customer,
    server: redis.Redis,
) -> None:
    theirs = await customer.submit([1.0, 2.0, 3.0])
    metas = {}
    for job_id, stored in zip(theirs, await customer.read(theirs), strict=True):
        assert stored
        assert stored.record
        metas[job_id] = stored.meta[:8] + packed(stored.record)
        server.set(keys.meta(job_id), metas[job_id])
    customer.acknowledged.clear()
    with crew() as workers:
        worker = workers.hire()
        await customer.submit([4.0])
        await customer.all_completed()
        await eventually(
            lambda: all(
                counts["pending"] and counts["processing"]
                for job_id, counts in transitions(server, customer.queue).items()
                if job_id in metas
            ),
            "each was released",
        )
        assert await worker.stop() == 0
        assert workers.log.count("by a later release") == 1
    for job_id, meta in metas.items():
        assert server.get(keys.status(job_id)) == b"pending"
        assert server.get(keys.meta(job_id)) == meta
        assert not server.hexists(keys.facts(customer.queue), job_id), "no delivery is counted"
