"""Why an answer does not come: when to ask for the reason, and when to say it again."""

import time
from collections.abc import Callable
from typing import Final

from msgspec import Struct


class WaitingFor(Struct, frozen=True):
    """Why a job is not run now: a `code` such as no_worker or paused, and a `message` for people
    with what to do."""

    code: str
    message: str


class Cadence(Struct, frozen=True):
    """How soon a wait is explained, and how often."""

    after_seconds: float = 2.0
    """So long without an answer is no more than a slow model."""
    look_seconds: float = 10.0
    """The most from one look for the reason to the next, which is a small request of a client, not
    of a job. The first ones come sooner, each after twice the time of the one before."""
    again_seconds: float = 30.0
    """From one line about a reason to the next about the same."""


CADENCE: Final = Cadence()


class Notices:
    """Says a reason when it is new, again after a while, and once that it is over."""

    def __init__(
        self,
        say: Callable[[str], None],
        cadence: Cadence = CADENCE,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say = say
        self._again_seconds = cadence.again_seconds
        self._now = now
        self._code = ""
        self._due_at = 0.0

    def hear(self, reason: WaitingFor | None, waits: str, goes_on: str) -> None:
        """None: nothing is wrong. The words are as `3 rows of iris wait` and `iris goes on`."""
        if reason is None:
            self._hear_nothing(goes_on)
        elif reason.code != self._code or self._now() >= self._due_at:
            self._code = reason.code
            self._due_at = self._now() + self._again_seconds
            self._say(f"{waits}: {reason.message}")

    def _hear_nothing(self, goes_on: str) -> None:
        if self._code:
            self._code = ""
            self._say(f"{goes_on}.")


class Silence:
    """The time between two answers, in which a reason is looked for now and then."""

    def __init__(
        self,
        until: float,
        cadence: Cadence = CADENCE,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`until` on the clock `now`: nothing is waited for after that."""
        self._until = until
        self._cadence = cadence
        self._now = now
        self._pause_seconds = cadence.after_seconds
        self._look_at = now() + self._pause_seconds

    @property
    def is_over(self) -> bool:
        return self._now() >= self._until

    def seconds(self) -> float:
        """How long to wait before the next look, or before the end."""
        return max(0.0, min(self._look_at, self._until) - self._now())

    def looked(self) -> None:
        self._pause_seconds = min(2 * self._pause_seconds, self._cadence.look_seconds)
        self._look_at = self._now() + self._pause_seconds
