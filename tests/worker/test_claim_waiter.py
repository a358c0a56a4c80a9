"""The states of a free slot: each row of the table of `ClaimWaiter`, with a real queue."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest
import redis

from asyncinfer.repository import keys
from asyncinfer.repository.store import Store
from asyncinfer.worker.claiming.batch_window import QueueBatching
from asyncinfer.worker.claiming.claim_waiter import ClaimWaiter, WaitState
from asyncinfer.worker.claiming.claims import Claimer
from asyncinfer.worker.held_claim import HeldClaim, HeldClaims
from asyncinfer.worker.lease_renewer import LeaseRenewer
from asyncinfer.worker.output_sizes import OutputSizes
from tests.faults.harness import eventually
from tests.queue_driver import Q, QueueDriver, ids_of

_OTHER = f"{Q}:other"
_LONG_SECONDS = 60.0


class Slots:
    """The slots of one worker process; a test waits in one, and finishes what another one holds."""

    def __init__(self, store: Store, driver: QueueDriver, renewer: LeaseRenewer) -> None:
        self.held = HeldClaims(renewer)
        self.waiter = ClaimWaiter(
            store,
            driver.consumer,
            self.held,
            brpop_timeout_seconds=_LONG_SECONDS,
            on_step=lambda _: None,
        )
        self.claimer = Claimer(
            driver.consumer,
            self.held,
            self.waiter,
            OutputSizes(1 << 20),
            max_batch=8,
            on_step=lambda _: None,
            on_failed=lambda _: None,
        )
        self._driver = driver

    def state(self) -> WaitState:
        return self.waiter.state

    def serve(self, queues: Mapping[str, QueueBatching]) -> None:
        self.waiter.serve(queues)

    @asynccontextmanager
    async def waiting(self) -> AsyncIterator["asyncio.Task[HeldClaim | None]"]:
        """A slot that waits for its next claim; one that got none by the end is cancelled."""
        task = asyncio.create_task(self.claimer.next())
        await asyncio.sleep(0)
        yield task
        task.cancel()

    @asynccontextmanager
    async def windows_open(self) -> AsyncIterator[None]:
        """Batch windows are opened meanwhile."""
        listening = asyncio.create_task(self.waiter.windows.listen())
        yield
        await self.waiter.drain()
        await listening

    async def until(self, state: WaitState) -> None:
        await eventually(lambda: self.state() == state, f"the slot is {state}")

    async def claim(self) -> HeldClaim:
        """Claims the jobs that wait, in a slot."""
        async with self.waiting() as slot:
            return await _claim_of(slot)

    async def finish(self, held: HeldClaim) -> None:
        await self._driver.finish(held.claim)
        self.held.release(held)


async def _claim_of(slot: "asyncio.Task[HeldClaim | None]") -> HeldClaim:
    """The claim that a slot waits for."""
    held = await slot
    assert held
    return held


@pytest.fixture
def driver(store: Store, server: redis.Redis) -> QueueDriver:
    return QueueDriver(store, server)


@pytest.fixture
async def slots(store: Store, driver: QueueDriver) -> AsyncIterator[Slots]:
    renewer = LeaseRenewer(store, lambda _: None)
    renewer.start()
    slots = Slots(store, driver, renewer)
    yield slots
    await slots.waiter.drain()
    await renewer.close()


async def test_a_slot_without_queues_is_blocked_until_there_are_some_and_then_ready(
    slots: Slots, driver: QueueDriver
) -> None:
    await driver.submit_one()
    async with slots.waiting() as slot:
        assert slots.state() == "blocked"

        slots.serve({Q: QueueBatching()})

        assert slots.state() == "ready"
        assert (await _claim_of(slot)).claim.count == 1


async def test_a_slot_that_found_the_queues_empty_listens_until_the_doorbell_rings(
    slots: Slots, driver: QueueDriver
) -> None:
    slots.serve({Q: QueueBatching()})
    async with slots.waiting() as slot:
        await slots.until("listening")

        job_id = await driver.submit_one()

        assert ids_of((await _claim_of(slot)).claim.jobs) == [job_id]


async def test_a_slot_defers_to_a_short_run_while_that_is_held(
    slots: Slots, driver: QueueDriver
) -> None:
    slots.serve({Q: QueueBatching()})
    await driver.submit_one()
    held = await slots.claim()
    async with slots.waiting():
        assert slots.state() == "deferring"

        await slots.finish(held)

        await slots.until("listening")


async def test_a_slot_that_deferred_for_5_ms_listens_beside_the_run(
    slots: Slots, driver: QueueDriver
) -> None:
    slots.serve({Q: QueueBatching()})
    await driver.submit_one()
    held = await slots.claim()
    async with slots.waiting() as slot:
        await slots.until("listening")

        job_id = await driver.submit_one()

        beside = await _claim_of(slot)
        assert ids_of(beside.claim.jobs) == [job_id]
        assert [*slots.held.by_token.values()] == [held, beside]


async def test_a_slot_does_not_defer_to_a_run_that_left_jobs_in_its_queue(
    slots: Slots, driver: QueueDriver
) -> None:
    slots.serve({Q: QueueBatching(is_batched=False)})
    await driver.submit_many(2)
    await slots.claim()
    async with slots.waiting() as slot:
        assert slots.state() == "listening"

        # A claim that leaves jobs behind rings the doorbell.
        assert (await _claim_of(slot)).claim.count == 1


async def test_a_slot_is_blocked_while_a_redelivered_job_is_held_and_then_ready(
    slots: Slots, driver: QueueDriver
) -> None:
    slots.serve({Q: QueueBatching()})
    await driver.submit_one()
    lost = await driver.claim_jobs()
    driver.expire_leases(lost.token)
    await driver.sweep()
    held = await slots.claim()
    assert held.claim.exclusive
    await driver.submit_one()
    async with slots.waiting() as slot:
        await slots.until("blocked")

        await slots.finish(held)

        assert slots.state() == "ready"
        assert (await _claim_of(slot)).claim.count == 1


async def test_a_slot_claims_at_the_end_of_a_batch_window(
    slots: Slots, driver: QueueDriver
) -> None:
    slots.serve({Q: QueueBatching(max_wait_seconds=0.1, full_jobs=8)})
    async with slots.waiting() as slot, slots.windows_open():
        await slots.until("batching")

        await driver.submit_many(3)

        assert (await _claim_of(slot)).claim.count == 3


async def test_a_slot_claims_from_a_queue_without_a_batch_window_meanwhile(
    slots: Slots, driver: QueueDriver
) -> None:
    patient = QueueBatching(max_wait_seconds=_LONG_SECONDS, full_jobs=8)
    slots.serve({Q: patient, _OTHER: QueueBatching()})
    async with slots.waiting() as slot, slots.windows_open():
        await slots.until("batching")
        await driver.submit_one()

        await driver.submit_one(queue=_OTHER)

        assert (await _claim_of(slot)).claim.queue == _OTHER


@pytest.mark.parametrize("state", ["blocked", "listening", "batching"])
async def test_a_drain_ends_each_wait_without_a_claim(slots: Slots, state: WaitState) -> None:
    wait_seconds = _LONG_SECONDS if state == "batching" else 0.0
    batching = QueueBatching(max_wait_seconds=wait_seconds, full_jobs=8)
    slots.serve({} if state == "blocked" else {Q: batching})
    async with slots.waiting() as slot:
        await slots.until(state)

        await slots.waiter.drain()

        assert slots.state() == "draining"
        assert await slot is None


async def test_a_token_that_came_for_a_slot_that_is_blocked_now_is_given_back(
    slots: Slots, driver: QueueDriver
) -> None:
    slots.serve({Q: QueueBatching()})
    async with slots.waiting():
        await eventually(
            lambda: driver.redis.info("clients")["blocked_clients"] == 1, "it waits on the doorbell"
        )
        slots.serve({})

        await driver.submit_one()

        assert slots.state() == "blocked"
        await eventually(lambda: driver.redis.llen(keys.wake(Q)) == 1, "the doorbell rings again")


async def test_queues_that_change_while_a_claim_waits_for_its_turn_are_claimed_as_they_were(
    slots: Slots, driver: QueueDriver
) -> None:
    slots.waiter.serve({Q: QueueBatching(is_batched=False)})
    await driver.submit_one()
    async with slots.claimer.claim_lock:
        slot = asyncio.create_task(slots.claimer.next())
        await asyncio.sleep(0)
        slots.waiter.serve({_OTHER: QueueBatching()})

    assert (await _claim_of(slot)).claim.queue == Q
