"""What one process holds, and what it may claim next."""

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from asyncinfer.errors import RedisRefused, RedisUnavailable
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository.claims import (
    MOST_QUEUES_A_CLAIM,
    Claimed,
    ClaimRequest,
    Runs,
)
from asyncinfer.repository.doorbell import Doorbell
from asyncinfer.repository.store import Store
from asyncinfer.worker.claiming.batch_window import Gathering, Sharing
from asyncinfer.worker.held_claim import Held, Step
from asyncinfer.worker.lease_renewer import Renewer

log = LimitedLog(logging.getLogger(__name__))

T = TypeVar("T")

_LOW_FIRST_EVERY: Final = 16
_SHORT_SECONDS: Final = 0.0015
"""A run as short gains nothing from a second one beside it."""

_GROWING_SECONDS: Final = 0.1
"""How long a bell is listened for while a worker loads its models: a queue that comes meanwhile is
not among those listened to."""

_SOON_SECONDS: Final = 0.005
"""How long a bell may ring unheard while a slot is about to claim."""


class Claims:
    """The claims of one process, made one at a time."""

    def __init__(
        self,
        store: Store,
        runs: Runs,
        renewer: Renewer,
        queues: Mapping[str, Sharing],
        *,
        max_batch: int,
        brpop_timeout_seconds: float,
        on_step: Callable[[Step], None],
    ) -> None:
        self.held: dict[str, Held] = {}
        self.draining = asyncio.Event()
        self._runs = runs
        self._renewer = renewer
        self._max_batch = max_batch
        self._brpop_timeout_seconds = brpop_timeout_seconds
        self._on_step = on_step
        self._doorbell = Doorbell(store)
        self._bell: asyncio.Task[str | None] | None = None
        """A wait that goes on although its slot went to claim what had gathered."""
        self._awaits_bell = False
        self._waiting_turn = asyncio.Lock()
        self.gathering = Gathering(store, runs, self._is_idle, brpop_timeout_seconds)
        self._claiming = asyncio.Lock()
        self._let_go_event = asyncio.Event()
        self._blocked = False
        self._looked = False
        """Whether nothing waits that has not rung since."""
        self._asked = 0
        self._made = 0
        self._run_seconds = 0.0
        """From a claim to its outcomes, a running mean."""
        self.serve(queues)

    def serve(self, queues: Mapping[str, Sharing], *, is_growing: bool = False) -> None:
        """From now on claims of these; what waits for a bell hears of it within BRPOP_TIMEOUT.

        With `is_growing`, as more queues are about to come, it will hear of those sooner.
        """
        self._queues = list(queues)
        self._is_growing = is_growing
        self._unshared = {queue for queue, sharing in queues.items() if not sharing.shared}
        self.gathering.serve(queues)
        self._looked = False
        self._let_go_event.set()

    async def shuffle(self, queue: str) -> None:
        """Changes, by chance, who is first to hear the bell of a job that another worker must run:
        two idle workers that take turns at the bell would go on as they began."""
        if random.random() < 0.5:
            await self._ring_back(queue)

    def let_go(self, token: str) -> None:
        """Renews a claim no longer, as it was lost."""
        self._renewer.let_go(token)

    async def drain(self) -> None:
        """Claims nothing more; whoever waits for work returns."""
        self.draining.set()
        self._let_go_event.set()
        await self._doorbell.close()
        await self.gathering.close()

    async def next(self) -> Held | None:
        """Waits for work; one slot waits for all. None when draining.

        A claim that leaves work behind rings, so after one of ours the bell comes first: to look
        again at once found nothing, and cost a waiting client half its time.
        """
        rang: str | None = None
        async with self._waiting_turn:
            while not self.draining.is_set():
                self.gathering.slot_is_idle()
                if self._must_not_claim():
                    await self._ring_back(rang)
                    rang, self._looked = None, False
                    await self._something_let_go()
                elif self._looked and not self.gathering.ripe:
                    rang = None
                    if not await self._left_to_another():
                        rang = await self._wait()
                        self._looked = False
                elif held := await self._claim(rang):
                    return held
            await self._ring_back(rang)
        return None

    async def finish(
        self, held: Held, store_outcomes: Callable[[ClaimRequest | None], Awaitable[Claimed]]
    ) -> Held | None:
        """Lets go of a finished claim; the claim that may ride on its last call comes back."""
        async with self._claiming:
            following = self._following(held)
            claimed = await store_outcomes(following)
            self._run_seconds += 0.2 * (held.ran_at - held.claimed_at - self._run_seconds)
            self._renewer.let_go(held.claim.token)
            self.held.pop(held.claim.token, None)
            self._on_step("finished")
            following_held = self._hold(claimed, following) if following else None
            self._let_go_event.set()
        await self._let_others_call()
        return following_held

    async def _wait(self) -> str | None:
        """The queue whose bell rang; None after BRPOP_TIMEOUT, when an idle worker looks anyway,
        and as soon as jobs have gathered."""
        if not self.gathering.queues:
            return await self._rung(self._turn(None))
        loop = asyncio.get_running_loop()
        bell = self._bell = self._bell or loop.create_task(self._rung_for_a_slot())
        ripened = loop.create_task(self.gathering.ripened.wait())
        either: set[asyncio.Task[Any]] = {bell, ripened}
        self._awaits_bell = True
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        self._awaits_bell = False
        ripened.cancel()
        if not bell.done():
            return None
        self._bell = None
        return bell.result()

    async def _rung_for_a_slot(self) -> str | None:
        """A wait that may outlast the slot's: then its bell is for another worker."""
        queues = [queue for queue in self._turn(None) if queue not in self.gathering.queues]
        if queues:
            rang = await self._rung(queues)
        else:
            rang = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._brpop_timeout_seconds):
                    await self.draining.wait()
        if not self._awaits_bell:
            await self._ring_back(rang)
            return None
        return rang

    async def _rung(self, queues: Sequence[str]) -> str | None:
        seconds = self._brpop_timeout_seconds
        if self._is_growing:
            seconds = min(_GROWING_SECONDS, seconds)
        try:
            rang = await self._doorbell.wait(queues, seconds)
        except RedisUnavailable as error:
            if not self.draining.is_set():
                log.warning(f"Waiting: {error.detail}")
                await asyncio.sleep(random.uniform(0.1, 0.5))
            return None
        if rang:
            self._on_step("woken")
        return rang

    async def _left_to_another(self) -> bool:
        """Whether there was a slot to wait for before a bell is listened for: one whose run is
        brief, and that took all there was. Its next claim takes what comes meanwhile, one claim
        of sixteen jobs costs little more than one of four, and to send for a bell beside a run
        kept the run waiting."""
        brief = self._run_seconds <= _SHORT_SECONDS and not self.gathering.queues
        if not self.held or not brief or not all(map(self._took_all, self.held.values())):
            return False
        self._let_go_event.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SOON_SECONDS):
                await self._let_go_event.wait()
        return self._let_go_event.is_set()

    def _took_all(self, held: Held) -> bool:
        return held.claim.count < self._max_batch and held.claim.queue not in self._unshared

    async def _ring_back(self, rang: str | None) -> None:
        if rang:
            with contextlib.suppress(RedisUnavailable):
                await self._doorbell.ring(rang)

    def _must_not_claim(self) -> bool:
        """A redelivered job or a suspect runs with nothing beside it in its process."""
        if not self._queues:
            return True
        if not self.held:
            self._blocked = False
        return self._blocked or any(held.claim.exclusive for held in self.held.values())

    def _is_idle(self) -> bool:
        return self._waiting_turn.locked() and not self._must_not_claim()

    async def _something_let_go(self) -> None:
        self._let_go_event.clear()
        if self._must_not_claim() and not self.draining.is_set():
            await self._let_go_event.wait()

    async def _claim(self, rang: str | None) -> Held | None:
        self._looked = True
        turn = self._ready(rang)
        many = len(turn) > MOST_QUEUES_A_CLAIM
        if many and not rang and not await self._answered(lambda: self._runs.has_work(turn), False):
            self.gathering.claimed(turn)
            return None
        for start in range(0, len(turn), MOST_QUEUES_A_CLAIM):
            if held := await self._claim_of_any(turn[start : start + MOST_QUEUES_A_CLAIM]):
                return held
        return None

    async def _claim_of_any(self, queues: Sequence[str]) -> Held | None:
        try:
            return await self._claim_of(queues)
        except RedisRefused as error:
            log.error(f"Claiming: {error.detail}")
        # A damaged key of one queue must not starve the others.
        for queue in queues:
            with contextlib.suppress(RedisRefused):
                if held := await self._claim_of([queue]):
                    return held
        return None

    async def _claim_of(self, queues: Sequence[str]) -> Held | None:
        # One claim call at a time: with two under way, a poison job could come with one of them
        # while the other brings the innocents it would take along.
        async with self._claiming:
            if self._must_not_claim() or self.draining.is_set():
                return None
            request = self._request(queues, held=bool(self.held))
            try:
                claimed = await self._answered(lambda: self._runs.claim(request), Claimed(None))
            except RedisRefused:
                self.gathering.claimed(queues)
                raise
            held = self._hold(claimed, request)
        await self._let_others_call()
        return held

    async def _let_others_call(self) -> None:
        """Before one slot decodes what it claimed, another that waits to call sends its call: so
        Redis works while this process does. It made a drain a third faster."""
        if len(self.held) > 1:
            await asyncio.sleep(0)

    def _following(self, held: Held) -> ClaimRequest | None:
        """The claim that rides on a finish, unless this process must not claim just now."""
        others = [one for token, one in self.held.items() if token != held.claim.token]
        if not self._queues or self.draining.is_set() or any(one.claim.exclusive for one in others):
            return None
        if self._blocked and others:
            return None
        queues = self._ready(None)[:MOST_QUEUES_A_CLAIM]
        return self._request(queues, held=bool(others)) if queues else None

    def _request(self, queues: Sequence[str], *, held: bool) -> ClaimRequest:
        self._asked += 1
        return ClaimRequest(
            tuple(queues),
            self._runs.new_token(),
            held,
            self._max_batch,
            # A round of all queues, or the same one would be first each time; and until claims
            # come of it, since one that was blocked has not had its turn.
            low_first=self._made // len(self._queues) % _LOW_FIRST_EVERY == _LOW_FIRST_EVERY - 1,
            unshared=tuple(queue for queue in queues if queue in self._unshared),
        )

    def _turn(self, first: str | None) -> list[str]:
        """The queues, another first each time: BRPOP and claim serve theirs in order."""
        at = self._queues.index(first) if first in self._queues else self._asked
        at %= len(self._queues)
        return self._queues[at:] + self._queues[:at]

    def _ready(self, first: str | None) -> list[str]:
        """The queues in turn, without those whose jobs wait for others to run with."""
        return [queue for queue in self._turn(first) if not self.gathering.waits(queue)]

    def _hold(self, claimed: Claimed, request: ClaimRequest) -> Held | None:
        self._blocked = claimed.blocked
        if claimed.claim is None:
            if not claimed.blocked:
                self.gathering.claimed(request.queues)
            return None
        self.gathering.claimed([claimed.claim.queue])
        self._made += 1
        held = self.held[claimed.claim.token] = Held(claimed.claim)
        self._renewer.hold(claimed.claim)
        self._on_step("claimed")
        return held

    async def _answered(self, call: Callable[[], Awaitable[T]], otherwise: T) -> T:
        """Calls until Redis answers; the call is one that may be sent again. Gives up when
        draining, since whatever a lost reply claimed comes back by its lease."""
        while True:
            try:
                return await call()
            except RedisRefused:
                raise
            except RedisUnavailable as error:
                if self.draining.is_set():
                    return otherwise
                log.warning(f"Claiming: {error.detail}")
                await asyncio.sleep(random.uniform(0.1, 0.5))
