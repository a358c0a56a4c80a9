"""When a webhook is tried again, and when it is given up."""

import random
from typing import Final

from msgspec import Struct

from asyncinfer.repository.deliveries import Outcome
from asyncinfer.webhooks.answers import Answer

PAUSES_SECONDS: Final = (5.0, 300.0, 1800.0, 7200.0, 18_000.0, 36_000.0, 50_400.0)
"""The pauses after the first try and each later one: 5 s, 5 and 30 min, 2, 5, 10 and 14 h."""

MAX_TRIES: Final = len(PAUSES_SECONDS) + 1
MAX_RETRY_AFTER_SECONDS: Final = 3600.0
_JITTER: Final = 0.1
_GONE: Final = 410


class Verdict(Struct, frozen=True):
    """What follows from a try: an outcome, or another try after a pause."""

    outcome: Outcome | None
    """None if it is tried again."""
    pause_seconds: float = 0.0


def verdict(tries: int, answer: Answer, jitter: float | None = None) -> Verdict:
    """What follows from the answer to the last of `tries` tries (from 1).

    Any 2xx is success, 410 ends the delivery, and everything else is tried again: after the pause
    of the schedule, or the receiver's Retry-After if that is longer, up to an hour. `jitter`,
    from -1 to 1, shifts the pause by a tenth at most; None takes a random one.
    """
    if 200 <= answer.status < 300:
        return Verdict("delivered")
    if answer.status == _GONE:
        return Verdict("gone")
    if tries >= MAX_TRIES:
        return Verdict("given_up")
    shift = random.uniform(-1, 1) if jitter is None else jitter
    pause_seconds = PAUSES_SECONDS[tries - 1] * (1 + _JITTER * shift)
    requested_seconds = min(answer.retry_after_seconds, MAX_RETRY_AFTER_SECONDS)
    return Verdict(None, max(pause_seconds, requested_seconds))
