"""Jobs that a later release wrote, claimed by a worker of this release."""

from collections.abc import Callable

import msgspec
import pytest
import redis

from asyncinfer.jobs import SCHEMA, Record, encode_record
from asyncinfer.repository import keys
from tests.faults.load_client import LoadClient, transitions

from .harness import eventually
from .processes import OpenWorkers


def _with_another_field(record: Record) -> bytes:
    fields = msgspec.msgpack.decode(encode_record(record))
    return msgspec.msgpack.encode([SCHEMA + 1, *fields[1:], {"a field": "more"}])


def _with_changed_fields(record: Record) -> bytes:
    head = [SCHEMA + 7, record.queue, record.model, record.tenant, record.created_ms]
    return msgspec.msgpack.encode([*head, 1, {"version": [1]}, 7, "options"])


@pytest.mark.parametrize(
    "encode", [_with_another_field, pytest.param(_with_changed_fields, marks=pytest.mark.soak)]
)
async def test_a_job_of_a_later_release_is_neither_run_nor_failed_and_delays_no_other_job(
    encode: Callable[[Record], bytes],
    open_workers: OpenWorkers,
    load_client: LoadClient,
    server: redis.Redis,
) -> None:
    later_jobs = await load_client.submit([1.0, 2.0, 3.0])
    metas = {}
    for job_id, stored in zip(later_jobs, await load_client.read(later_jobs), strict=True):
        assert stored
        assert stored.record
        metas[job_id] = stored.meta[:8] + encode(stored.record)
        server.set(keys.meta(job_id), metas[job_id])
    load_client.acknowledged.clear()
    with open_workers() as workers:
        worker = workers.start()
        await load_client.submit([4.0])
        await load_client.assert_all_completed()
        await eventually(
            lambda: all(
                counts["pending"] and counts["processing"]
                for job_id, counts in transitions(server, load_client.queue).items()
                if job_id in metas
            ),
            "each job was released",
        )
        assert await worker.stop() == 0
        assert workers.log.count("by a later release") == 1
    for job_id, meta in metas.items():
        assert server.get(keys.status(job_id)) == b"pending"
        assert server.get(keys.meta(job_id)) == meta
        assert not server.hexists(keys.facts(load_client.queue), job_id), "no delivery is counted"
