"""The reason why an answer does not come: when to ask for it, and when to report it again."""

import time
from collections.abc import Callable
from typing import Final

from msgspec import Struct

from asyncinfer.untrusted.printable import printable_line


class WaitingFor(Struct, frozen=True):
    """Why a job is not run now: a stable `code`, and a `message` for people with what to do.

    Codes of a server: no_worker, paused, starting, delayed, retry, storage_full, disk_full,
    redis_read_only, too_few_replicas; and of a job that is read alone, without a wait, worker_lost,
    no_free_slot and queue. While a request cannot be sent, the code is that of its error, such as
    queue_full.
    """

    code: str
    message: str


class Cadence(Struct, frozen=True, kw_only=True):
    """How soon a client says why no answer comes, and how often."""

    first_check_seconds: float = 2.0
    """The wait before the first request for a reason; a slow model alone may take as long."""
    max_check_seconds: float = 10.0
    """The longest time between two requests for a reason: one small request per client, not per
    job. The first ones come sooner, each after twice the time of the one before."""
    repeat_seconds: float = 30.0
    """The time from one line about a reason to the next line about the same reason."""


CADENCE: Final = Cadence()


class Notices:
    """Reports a reason when it is new, again after a while, and once that it is over.

    `say` writes a line; `now` is a clock in seconds, which tests replace.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        cadence: Cadence,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say = say
        self._again_seconds = cadence.repeat_seconds
        self._now = now
        self._code = ""
        self._due_at = 0.0

    def report(self, reason: WaitingFor | None, waits: str, goes_on: str) -> None:
        """Takes the present reason, None if nothing is wrong, and reports it if that is due.

        Call it as often as the reason is known anew. `waits` and `goes_on` begin the lines: `3 rows
        of iris wait`, and `iris goes on`.
        """
        if reason is None:
            self._report_end(goes_on)
        elif reason.code != self._code or self._now() >= self._due_at:
            self._code = reason.code
            self._due_at = self._now() + self._again_seconds
            self._say(printable_line(f"{waits}: {reason.message}"))

    def _report_end(self, goes_on: str) -> None:
        """Reports that nothing is wrong any more, if something was reported."""
        if self._code:
            self._code = ""
            self._say(printable_line(f"{goes_on}."))


class RetryNotices:
    """Reports why a request is sent again, once it has gone without an answer for a while."""

    def __init__(self, say: Callable[[str], None] | None, cadence: Cadence) -> None:
        """`say` None reports nothing."""
        self._notices = Notices(say or (lambda _: None), cadence)
        self._first_seconds = cadence.first_check_seconds

    def report(self, reason: WaitingFor, begun_at: float, pause_seconds: float) -> None:
        """Takes why a request of `begun_at` is sent again after a pause, and reports it if due."""
        if time.monotonic() + pause_seconds - begun_at >= self._first_seconds:
            self._notices.report(reason, "It is tried again", "")


class Silence:
    """The time without an answer, in which the reason is requested now and then.

    Wait `seconds()` for an answer; then request the reason and call `schedule_next`, unless
    `is_over`.
    """

    def __init__(self, until: float, cadence: Cadence) -> None:
        """The silence is over at `until`, on the monotonic clock."""
        self._until = until
        self._max_seconds = cadence.max_check_seconds
        self._pause_seconds = cadence.first_check_seconds
        self._next_at = time.monotonic() + self._pause_seconds

    @property
    def is_over(self) -> bool:
        """Whether the time is over, so that the wait must end."""
        return time.monotonic() >= self._until

    def seconds(self) -> float:
        """The seconds until the next request for a reason is due, or until the end; at least 0."""
        return max(0.0, min(self._next_at, self._until) - time.monotonic())

    def schedule_next(self) -> None:
        """Schedules the next request for a reason, after twice the last time."""
        self._pause_seconds = min(2 * self._pause_seconds, self._max_seconds)
        self._next_at = time.monotonic() + self._pause_seconds
