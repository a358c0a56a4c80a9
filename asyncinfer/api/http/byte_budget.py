"""A byte budget for the large bodies that an API process holds at a time."""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from asyncinfer.errors import TooManyDownloads, TooManyUploads
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.timeouts import done_within

SMALL_BODY_BYTES: Final = 64 << 10
"""Bodies of up to this size reserve nothing: so much of any body may wait in its connection, and
the number of connections has a limit."""

_GRACE_SECONDS: Final = 1.0
_MAX_WAITING: Final = 64
"""Each of them has up to 320 KiB of its body in its connection already: 64 KiB and one read."""

_log = LimitedLog(logging.getLogger(__name__))


class Reservation:
    """The bytes that one body may take of the budget, until `release`."""

    __slots__ = ("_admitted_at", "_budget", "_on_end", "_received_bytes", "is_ended", "size_bytes")

    def __init__(self, budget: "ByteBudget", size_bytes: int, on_end: Callable[[], None]) -> None:
        self._budget = budget
        self._on_end = on_end
        self._admitted_at = 0.0
        self._received_bytes = 0
        self.size_bytes = size_bytes
        self.is_ended = False
        """Whether it was ended for others, since its body came too slowly."""

    def received(self, total_bytes: int) -> None:
        """Notes how many bytes of the body have been received. Fewer than before mean that another
        body began in its place, whose time begins too."""
        if total_bytes < self._received_bytes:
            self._admitted_at = self._budget.now()
        self._received_bytes = total_bytes

    def complete(self) -> None:
        """Notes that the whole body was received: it is not ended any more, and takes its real size
        only."""
        self._budget.complete(self, self._received_bytes)

    def release(self) -> None:
        """Gives the bytes back. May be called twice."""
        self._budget.release(self)

    # --- called by the budget -------------------------------------------------------------

    def admit(self, now: float) -> None:
        """Starts the time in which the body must be received."""
        self._admitted_at = now

    def behind_at(self, body_seconds: float) -> float:
        """When the body will be behind the pace at which it would be received within
        `body_seconds`, if nothing more of it comes."""
        share = self._received_bytes / self.size_bytes
        return self._admitted_at + _GRACE_SECONDS + share * body_seconds

    def end(self) -> None:
        """Makes the reader of the body stop."""
        self.is_ended = True
        self._on_end()


class ByteBudget:
    """Admits large bodies while their sizes fit into `max_bytes`, and lets others wait. If others
    wait, a body that comes so slowly that it would miss its deadline is ended, the slowest first.
    An API process has one for the bodies of requests and one for those of answers."""

    def __init__(
        self,
        max_bytes: int,
        *,
        body_seconds: float,
        wait_seconds: float,
        error: type[TooManyUploads | TooManyDownloads] = TooManyUploads,
    ) -> None:
        """`body_seconds` is how long a body may take, `wait_seconds` how long it may wait for room;
        `error` is raised if there is none then."""
        self._max_bytes = max_bytes
        self._error_class = error
        self._body_seconds = body_seconds
        self._wait_seconds = wait_seconds
        self._held: set[Reservation] = set()
        self._receiving: set[Reservation] = set()
        """Those in `_held` whose body is not complete."""
        self._waiting: dict[Reservation, asyncio.Future[None]] = {}
        """Those not admitted yet, in the order in which they came."""
        self._timer: asyncio.TimerHandle | None = None
        """Fires when the slowest body is behind, while others wait."""
        self.taken_bytes = 0
        """Bytes of all reservations."""

    def now(self) -> float:
        """The loop's clock."""
        return asyncio.get_running_loop().time()

    def try_reserve(self, size_bytes: int) -> Reservation | None:
        """Reserves room for a body that is complete; None if there is no room at once."""
        reservation = Reservation(self, size_bytes, _ignore)
        if self._waiting or not self._fits(reservation):
            return None
        self._admit(reservation)
        self._receiving.discard(reservation)
        return reservation

    async def reserve_complete(self, size_bytes: int) -> Reservation:
        """`reserve` for a body that is not received: it is not ended for others."""
        reservation = await self.reserve(size_bytes, _ignore)
        self._receiving.discard(reservation)
        return reservation

    async def reserve(self, size_bytes: int, on_end: Callable[[], None]) -> Reservation:
        """Reserves room for a body, after waiting for it for a while; raises TooManyUploads if
        there is none then, or if 64 others wait. `on_end` is called if the reservation is ended
        before its body is complete."""
        reservation = Reservation(self, size_bytes, on_end)
        if not self._waiting and self._fits(reservation):
            self._admit(reservation)
        else:
            await self._wait(reservation)
        return reservation

    def too_slow_error(self) -> TooManyUploads | TooManyDownloads:
        """Makes the error of a body whose reservation was ended."""
        return self._error("This body came too slowly while others waited for its room.")

    def complete(self, reservation: Reservation, size_bytes: int) -> None:
        """See `Reservation.complete`; does nothing after its end."""
        if reservation in self._held:
            self.taken_bytes += size_bytes - reservation.size_bytes
            reservation.size_bytes = size_bytes
            self._receiving.discard(reservation)
            self._admit_waiting()

    def release(self, reservation: Reservation) -> None:
        """See `Reservation.release`."""
        self._waiting.pop(reservation, None)
        if reservation in self._held:
            self._held.discard(reservation)
            self._receiving.discard(reservation)
            self.taken_bytes -= reservation.size_bytes
        self._admit_waiting()

    def _fits(self, reservation: Reservation) -> bool:
        taken_bytes = self.taken_bytes + reservation.size_bytes
        return taken_bytes <= self._max_bytes or not self._held

    def _admit(self, reservation: Reservation) -> None:
        self.taken_bytes += reservation.size_bytes
        self._held.add(reservation)
        self._receiving.add(reservation)
        reservation.admit(self.now())

    async def _wait(self, reservation: Reservation) -> None:
        """Returns once the reservation is admitted; raises TooManyUploads."""
        if len(self._waiting) >= _MAX_WAITING:
            raise self._error(f"{_MAX_WAITING} others wait already.")
        turn = self._waiting[reservation] = asyncio.get_running_loop().create_future()
        self._admit_waiting()
        try:
            await done_within(turn, self._wait_seconds)
        except BaseException:
            reservation.release()
            raise
        if not turn.done():
            reservation.release()
            raise self._error(f"None had room for this one within {self._wait_seconds:g} s.")

    def _admit_waiting(self) -> None:
        """Admits those that wait, in their order, as far as they fit. Ends slow bodies for them,
        and sets the timer for when the next one will be slow."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        while self._waiting:
            reservation, turn = next(iter(self._waiting.items()))
            if self._fits(reservation):
                del self._waiting[reservation]
                self._admit(reservation)
                turn.set_result(None)
            elif not self._end_slowest():
                return

    def _end_slowest(self) -> bool:
        """Ends the body that is furthest behind and returns True. If none is behind, sets the timer
        and returns False."""
        if not self._receiving:
            return False
        slowest = min(self._receiving, key=self._behind_at)
        if (at := self._behind_at(slowest)) > self.now():
            self._timer = asyncio.get_running_loop().call_at(at, self._admit_waiting)
            return False
        self._held.discard(slowest)
        self._receiving.discard(slowest)
        self.taken_bytes -= slowest.size_bytes
        slowest.end()
        return True

    def _behind_at(self, reservation: Reservation) -> float:
        return reservation.behind_at(self._body_seconds)

    def _error(self, reason: str) -> TooManyUploads | TooManyDownloads:
        """Makes the error; logs that bodies are refused."""
        _log.warning(
            f"{self._error_class.title}: some are refused, since MAX_INFLIGHT_BYTES is "
            f"{self._max_bytes}."
        )
        return self._error_class(
            f"The API holds up to {self._max_bytes} bytes of them at a time. {reason} Send the "
            "request again.",
            retry_after_seconds=1,
            # The rest of a body that is refused is not read as a request.
            headers=[("connection", "close")] if self._error_class is TooManyUploads else (),
        )


def _ignore() -> None:
    """Called if a reservation is ended that nobody reads."""
