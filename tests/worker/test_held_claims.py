"""Cancels and deadlines reach the claim that holds the job, whenever their message arrives."""

from collections.abc import AsyncIterator

import pytest
import redis

from asyncinfer.repository.leases import Renewal
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from asyncinfer.worker.held_claim import HeldClaim, HeldClaims
from asyncinfer.worker.lease_renewer import LeaseRenewer
from tests.faults.harness import eventually
from tests.queue_driver import QueueDriver


@pytest.fixture
def policy() -> Policy:
    """The next renewal by itself comes after minutes."""
    return Policy(lease_seconds=600)


@pytest.fixture
def driver(store: Store, server: redis.Redis) -> QueueDriver:
    return QueueDriver(store, server)


@pytest.fixture
def renewals() -> list[Renewal]:
    """The renewals that found something."""
    return []


@pytest.fixture
async def held_claims(store: Store, renewals: list[Renewal]) -> AsyncIterator[HeldClaims]:
    renewer = LeaseRenewer(store, renewals.append)
    renewer.start()
    yield HeldClaims(renewer)
    await renewer.close()


@pytest.mark.parametrize("is_early", [False, True])
async def test_a_cancelled_job_is_found_though_the_message_overtakes_the_claim(
    held_claims: HeldClaims,
    driver: QueueDriver,
    renewals: list[Renewal],
    is_early: bool,
) -> None:
    _, cancelled_id = await driver.submit_many(2)
    claim = await driver.claim_jobs(2)
    await driver.cancel(cancelled_id)

    if is_early:
        held_claims.check_job(cancelled_id)
    held_claims.add(HeldClaim(claim, emptied_queue=True))
    if not is_early:
        held_claims.check_job(cancelled_id)

    await eventually(lambda: bool(renewals), "a renewal finds the cancel")
    assert renewals[0].cancelled == (cancelled_id,)


async def test_an_old_message_does_not_end_a_job_that_was_retried_since(
    held_claims: HeldClaims, driver: QueueDriver, renewals: list[Renewal]
) -> None:
    retried_id, cancelled_id = await driver.submit_many(2)
    held_claims.check_job(retried_id)
    claim = await driver.claim_jobs(2)
    held_claims.add(HeldClaim(claim, emptied_queue=True))

    await driver.cancel(cancelled_id)
    held_claims.check_job(cancelled_id)

    await eventually(lambda: bool(renewals), "a renewal finds the cancel")
    assert {renewal.cancelled for renewal in renewals} == {(cancelled_id,)}
