"""The role that sends webhooks: takes due deliveries by lease, tries them and notes the outcome."""

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final

import anyio
from anyio.abc import TaskGroup

from asyncinfer import __version__
from asyncinfer.errors import RedisUnavailable, StorageFull, WebhookRefused
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository.deliveries import Attempt
from asyncinfer.repository.outbox import Delivery, Outbox
from asyncinfer.repository.redis_errors import log_refused
from asyncinfer.repository.store import Store
from asyncinfer.timeouts import pause_before_retry, set_within
from asyncinfer.webhook_signatures import signed_headers
from asyncinfer.webhooks.answers import TRY_SECONDS, Answer
from asyncinfer.webhooks.bodies import MAX_RESULT_BYTES, Bodies
from asyncinfer.webhooks.checks import WebhookChecks
from asyncinfer.webhooks.figures import WebhookFigures
from asyncinfer.webhooks.hosts import (
    DRAIN_SECONDS,
    OVERDUE_SECONDS,
    SHORT_TRY_SECONDS,
    Held,
    Hosts,
    Trial,
)
from asyncinfer.webhooks.schedule import verdict
from asyncinfer.webhooks.url_rules import Target

if TYPE_CHECKING:
    from asyncinfer.webhooks.posting import Poster

LEASE_SECONDS: Final = 30.0
"""Longer than a delivery waits for its turn, is tried and noted."""
_START_SHARE: Final = 1 / 3
"""The part of its lease in which a delivery's try must begin: the rest is enough to try and to note
it, and no other process tries it meanwhile."""
assert DRAIN_SECONDS < _START_SHARE * LEASE_SECONDS
assert TRY_SECONDS < (1 - _START_SHARE) * LEASE_SECONDS

_MAX_HELD: Final = 1000
_MAX_TAKEN: Final = 50
"""Of one call, so that the event loop is not kept from requests for long."""
_IDLE_SECONDS: Final = (0.8, 1.0)
_BUSY_SECONDS: Final = (0.08, 0.12)
_BUSY_FOR_SECONDS: Final = 10.0
"""How long after a submit with a webhook, or a delivery, it is looked for others more often."""

_QUEUES_SECONDS: Final = (1.0, 5.0)
"""How old the list of queues may be, while there are deliveries and while there are none."""
_CLOSE_SECONDS: Final = 2.0

_HEADERS: Final = {
    "content-type": "application/json",
    "user-agent": f"asyncinfer/{__version__}",
}
_log = logging.getLogger(__name__)


class Sender:
    """Sends the webhooks of all queues, together with the senders of other processes; one for each
    API process."""

    def __init__(
        self,
        store: Store,
        checks: WebhookChecks,
        open_poster: "Callable[[], Poster]",
        bodies: Bodies,
        figures: WebhookFigures,
        *,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        """`open_poster` is called in a thread, for the first delivery: loading an HTTP library and
        the system's certificates takes a tenth of a second, which most APIs never need."""
        self._store = store
        self._outbox = Outbox(store)
        self._checks = checks
        self._open_poster = open_poster
        self._poster: Poster | None = None
        self._bodies = bodies
        self._figures = figures
        self._lease_seconds = lease_seconds
        self._stack = AsyncExitStack()
        self._hosts = Hosts()
        self._held = 0
        self._queues: list[str] = []
        self._queues_read_at = self._busy_at = -_BUSY_FOR_SECONDS
        self._turn = 0
        self._log = LimitedLog(_log)
        self._closing = asyncio.Event()
        self._ended = asyncio.Event()

    async def run(self) -> None:
        """Sends until it is closed or cancelled. What goes wrong with Redis is logged by the store,
        and what goes wrong with a receiver is noted with its delivery."""
        try:
            async with self._stack, anyio.create_task_group() as group:
                while not self._closing.is_set():
                    has_more = await self._take_safely(group)
                    await set_within(self._closing, 0.0 if has_more else self._pause_seconds())
                await self._give_back(self._hosts.all_waiting(), 0.0)
        finally:
            self._ended.set()

    async def close(self) -> None:
        """Takes nothing more, gives back what is not tried yet, and waits up to 2 s for tries that
        run; cancel `run` after that."""
        self._closing.set()
        await set_within(self._ended, _CLOSE_SECONDS)

    def _pause_seconds(self) -> float:
        is_busy = self._is_busy(time.monotonic())
        return random.uniform(*(_BUSY_SECONDS if is_busy else _IDLE_SECONDS))

    def _is_busy(self, now: float) -> bool:
        return now - max(self._busy_at, self._checks.passed_at) < _BUSY_FOR_SECONDS

    # --- taking ------------------------------------------------------------------------------

    async def _take_safely(self, group: TaskGroup) -> bool:
        """Takes due deliveries; returns whether there may be more. Raises nothing."""
        try:
            return await self._take(group)
        except RedisUnavailable as error:
            log_refused(self._log, "Sending webhooks", error)
            return False
        except StorageFull:
            return False
        except Exception as error:
            # Redis holds data that anyone may write; no content may end the task.
            self._log.unexpected("Webhooks could not be taken.", error)
            return False

    async def _take(self, group: TaskGroup) -> bool:
        room = min(_MAX_TAKEN, _MAX_HELD - self._held)
        if room <= 0:
            return False
        queues = await self._queues_in_turn()
        if await self._outbox.is_empty(queues):
            return False
        lease_ms = round(1000 * self._lease_seconds)
        taken = await self._outbox.take(queues, room, lease_ms, max_result_bytes=MAX_RESULT_BYTES)
        if not taken:
            return False
        if self._poster is None:
            poster = await anyio.to_thread.run_sync(self._open_poster)
            self._poster = await self._stack.enter_async_context(poster)
        now = self._busy_at = time.monotonic()
        put_off: dict[int, list[Held]] = {}
        for delivery in taken:
            held = Held(delivery, self._target_of(delivery), now)
            self._held += 1
            if pause_seconds := self._accept(held, group):
                put_off.setdefault(int(pause_seconds), []).append(held)
        self._start(group)
        for seconds, deliveries in put_off.items():
            await self._give_back(deliveries, seconds + random.uniform(0.5, 1.5 + seconds / 2))
        return True

    async def _queues_in_turn(self) -> list[str]:
        """All queues, each time another one first, so that a full one delays no other."""
        now = time.monotonic()
        busy_seconds, idle_seconds = _QUEUES_SECONDS
        if now - self._queues_read_at > (busy_seconds if self._is_busy(now) else idle_seconds):
            self._queues = await self._store.queues()
            self._queues_read_at = now
        self._turn = (self._turn + 1) % max(1, len(self._queues))
        return [*self._queues[self._turn :], *self._queues[: self._turn]]

    def _target_of(self, delivery: Delivery) -> Target | None:
        try:
            return self._checks.rules.check(delivery.target.url)
        except WebhookRefused:
            return None

    def _accept(self, held: Held, group: TaskGroup) -> float:
        """Lets a delivery wait for its host; returns for how many seconds it must be put off first,
        0 if it waits now."""
        if held.target is None:
            group.start_soon(self._refuse, held)
            return 0.0
        host = self._hosts.of(held.tenant, held.target)
        pause_seconds = self._hosts.pause_seconds(host, is_redelivered=held.is_redelivered)
        if not pause_seconds:
            self._hosts.add(host, held)
        return pause_seconds

    async def _give_back(self, deliveries: Sequence[Held], seconds: float) -> None:
        """Gives deliveries back, to be tried in `seconds` by any process."""
        self._held -= len(deliveries)
        if not deliveries:
            return
        due_ms = self._server_ms(deliveries[0]) + round(1000 * seconds)
        try:
            await self._outbox.postpone([held.delivery for held in deliveries], due_ms)
        except (RedisUnavailable, StorageFull):
            return  # they are due again when their lease ends

    # --- trying ------------------------------------------------------------------------------

    def _start(self, group: TaskGroup) -> None:
        """Starts as many tries as may run now."""
        while not self._closing.is_set() and (trial := self._hosts.next()):
            group.start_soon(self._deliver, trial, group)

    async def _deliver(self, trial: Trial, group: TaskGroup) -> None:
        """Tries a delivery and notes the outcome, then starts what may be tried next."""
        held = trial.held
        try:
            answer = await self._try(trial, group) if self._is_leased(held) else None
            if answer:
                self._hosts.note(trial.host, answer)
                await self._note(held, answer)
        except (RedisUnavailable, StorageFull):
            pass  # it is due again when its lease ends
        except Exception as error:
            self._log.unexpected("A webhook could not be sent.", error)
        finally:
            self._hosts.end(trial)
            self._held -= 1
        self._go_on(trial, group)

    def _is_overdue(self, trial: Trial, group: TaskGroup) -> None:
        self._hosts.is_overdue(trial)
        self._go_on(trial, group)

    def _go_on(self, trial: Trial, group: TaskGroup) -> None:
        """Gives back what would wait too long for the host of a try, and starts other tries."""
        if surplus := self._hosts.surplus_of(trial.host):
            seconds = self._hosts.pause_seconds(trial.host)
            group.start_soon(self._give_back, surplus, seconds)
        self._start(group)

    def _is_leased(self, held: Held) -> bool:
        """Whether there is time to try and to note a delivery before another process takes it."""
        return time.monotonic() - held.taken_at < _START_SHARE * self._lease_seconds

    async def _try(self, trial: Trial, group: TaskGroup) -> Answer | None:
        """The answer of the receiver; None if the delivery is gone."""
        held = trial.held
        assert held.target is not None
        assert self._poster is not None
        delivery = held.delivery
        keys = self._checks.keys_of(delivery.target.tenant, held.target.host)
        if self._checks.needs_secret and not keys:
            return Answer(0, "no_secret")
        body = delivery.body or await self._keep_body(held)
        if body is None:
            return None
        signed = signed_headers(keys, delivery.webhook_id, body, int(time.time()))
        most_seconds = SHORT_TRY_SECONDS if trial.is_short else math.inf
        loop = asyncio.get_running_loop()
        overdue = loop.call_later(OVERDUE_SECONDS, self._is_overdue, trial, group)
        try:
            headers = {**_HEADERS, **signed}
            return await self._poster.post(held.target, headers, body, most_seconds=most_seconds)
        finally:
            overdue.cancel()

    async def _keep_body(self, held: Held) -> bytes | None:
        """Makes the body and keeps it, so that each try sends the same; None if the delivery is
        gone."""
        body, shorter = self._bodies.of(held.delivery, self._server_ms(held))
        return await self._outbox.keep_body(held.delivery, body, shorter)

    async def _refuse(self, held: Held) -> None:
        """Notes a try that was not made, since the URL is refused by now."""
        try:
            await self._note(held, Answer(0, "url_refused"))
        except Exception as error:
            self._log.unexpected("A refused webhook could not be noted.", error)
        finally:
            self._held -= 1

    # --- noting ------------------------------------------------------------------------------

    async def _note(self, held: Held, answer: Answer) -> None:
        """Notes a try, again and again until the lease ends if Redis is away: a try that is not
        noted is made once more."""
        delivery = held.delivery
        follows = verdict(delivery.state.tries + 1, answer)
        self._figures.note(follows.outcome, answer)
        if follows.outcome == "given_up":
            self._report_given_up(held, answer)
        now_ms = self._server_ms(held)
        attempt = Attempt(
            now_ms - answer.duration_ms, answer.status, answer.failure, answer.duration_ms
        )
        next_ms = None if follows.outcome else now_ms + round(1000 * follows.pause_seconds)
        while True:
            try:
                await self._outbox.note(delivery, attempt, next_ms, follows.outcome)
                return
            except (RedisUnavailable, StorageFull):
                if time.monotonic() - held.taken_at > self._lease_seconds:
                    raise
                await pause_before_retry(self._closing)

    def _report_given_up(self, held: Held, answer: Answer) -> None:
        """Logs one line in 30 s for a host, without the rest of the URL, which may have a
        secret."""
        host = held.target.host if held.target else "a refused URL"
        if not self._log.may_write(host):
            return
        _log.warning(
            "The webhook %s to %s was given up: %s. `asyncinfer webhooks` lists such hosts, and "
            "sends again.",
            held.delivery.webhook_id,
            host,
            f"the last answer was {answer.status}" if answer.status else answer.failure,
            extra={"job_id": held.delivery.job_id},
        )

    def _server_ms(self, held: Held) -> int:
        """The time of Redis's clock, in ms since 1970."""
        taken_ms = held.delivery.until_ms - round(1000 * self._lease_seconds)
        return taken_ms + round(1000 * (time.monotonic() - held.taken_at))
