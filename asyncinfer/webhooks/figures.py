"""What one process counts of the webhooks that it sends."""

from typing import Final

from asyncinfer.monitoring.counts import Counts, Histograms
from asyncinfer.monitoring.histogram import SECONDS
from asyncinfer.webhooks.answers import Answer

TRY_LABELS: Final = ("outcome", "reason")
RETRY: Final = "retry"
"""The outcome of a try that another one follows."""


class WebhookFigures:
    """Tries by outcome, and how long they took."""

    def __init__(self) -> None:
        self.tries = Counts()
        """By `TRY_LABELS`: what follows from the try, and its status or why there was no answer."""
        self.try_seconds = Histograms(SECONDS)
        """By the outcome."""

    def note(self, outcome: str | None, answer: Answer) -> None:
        """Counts a try; an outcome of None is `RETRY`."""
        outcome = outcome or RETRY
        # Bounded: an HTTP status has three digits.
        self.tries.add((outcome, str(answer.status) if answer.status else answer.failure))
        self.try_seconds.observe((outcome,), answer.duration_ms / 1000)
