"""Leases are renewed while the event loop is stalled, and end after it has ended."""

import asyncio

import pytest
import redis

from asyncinfer.repository import keys
from asyncinfer.repository.claims import Claim, ClaimRequest, QueueConsumer
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from asyncinfer.worker.lease_renewer import LeaseRenewer
from tests.faults.harness import eventually, eventually_sync
from tests.faults.load_client import LoadClient


@pytest.fixture
def policy() -> Policy:
    """Of a lease that ends soon."""
    return Policy(lease_seconds=1)


async def _claimed(store: Store, customer: LoadClient) -> Claim:
    await customer.submit([1.0])
    runs = QueueConsumer(store, "w")
    claim = (await runs.claim(ClaimRequest((customer.queue,), runs.new_token(), False, 1))).claim
    assert claim
    return claim


def _lease_end_seconds(server: redis.Redis, claim: Claim) -> float:
    return (server.zscore(keys.leases(claim.queue), claim.token) or 0) / 1000


def _lease_left_seconds(server: redis.Redis, claim: Claim) -> float:
    end_seconds = _lease_end_seconds(server, claim)
    seconds, micros = server.time()
    return end_seconds - seconds - micros / 1e6


async def test_a_stalled_loop_loses_no_lease(store: Store, server: redis.Redis) -> None:
    customer = LoadClient(store)
    claim = await _claimed(store, customer)
    renewer = LeaseRenewer(store, lambda _: None)
    renewer.add(claim)
    ends_at = _lease_end_seconds(server, claim)
    renewer.start()

    # None of the loop's tasks runs meanwhile.
    eventually_sync(
        lambda: _lease_end_seconds(server, claim) > ends_at + store.policy.lease_seconds,
        "it is renewed later than it would have ended",
    )

    await renewer.close()
    server.flushall()


async def test_a_loop_that_has_ended_holds_no_lease_for_ever(
    store: Store, server: redis.Redis
) -> None:
    customer = LoadClient(store)
    claim = await _claimed(store, customer)
    renewer = LeaseRenewer(store, lambda _: None)
    renewer.add(claim)
    renewer.start()

    # The loop gives no sign of life, since no task runs `beat`.
    await eventually(lambda: _lease_left_seconds(server, claim) < 0, "the lease has run out")

    await renewer.close()
    server.flushall()


async def test_a_renewal_reports_cancelled_jobs_and_lost_claims(
    store: Store, server: redis.Redis
) -> None:
    customer = LoadClient(store)
    claim, lost = await _claimed(store, customer), await _claimed(store, customer)
    reports: list[tuple[str, ...]] = []
    renewer = LeaseRenewer(store, lambda renewal: reports.extend([renewal.cancelled, renewal.lost]))
    for held in (claim, lost):
        renewer.add(held)
    server.zrem(keys.leases(lost.queue), lost.token)
    (stored,) = await customer.read([claim.jobs[0].job_id])
    assert stored
    await customer.operations.cancel(stored)
    renewer.start()
    async with asyncio.TaskGroup() as group:
        beat = group.create_task(renewer.beat())
        await eventually(lambda: len(reports) >= 2, "a renewal reports both")
        beat.cancel()

    assert reports[:2] == [(claim.jobs[0].job_id,), (lost.token,)]
    await renewer.close()
    server.flushall()
