"""Jobs that nobody here can run yet, which go back to their queue for a while."""

import logging
import random
import time
from typing import Final

from asyncinfer.jobs import SCHEMA
from asyncinfer.repository.claims import ClaimedJob, Finished
from asyncinfer.worker.running.outcomes import released

log = logging.getLogger(__name__)

_WINDOW_SECONDS: Final = 60.0
_LEAST_MS: Final = 1000
_MOST_MS: Final = 60_000
_MOST_NAMED: Final = 8


class Postponing:
    """Releases them, each for longer the more there are: 100,000 jobs that nobody can run yet
    must not keep a worker from those it can."""

    def __init__(self, least_ms: int, most_ms: int) -> None:
        self._least_ms = least_ms
        self._most_ms = most_ms
        self._since = 0.0
        self._count = 0

    def released(self, job: ClaimedJob) -> Finished:
        now = time.monotonic()
        if now - self._since > _WINDOW_SECONDS:
            self._since, self._count = now, 0
        self._count += 1
        longest_ms = min(2 * self._least_ms + self._count, self._most_ms)
        return released([job], random.randint(self._least_ms, longest_ms))[0]


class LaterJobs:
    """Jobs of a later release wait for a worker of that release."""

    def __init__(self) -> None:
        self._named: set[int] = set()
        self._postponing = Postponing(_LEAST_MS, _MOST_MS)

    def released(self, job: ClaimedJob) -> Finished:
        self._name(job.later_schema)
        return self._postponing.released(job)

    def _name(self, schema: int) -> None:
        """Once for each schema; anyone may write any number there."""
        if schema in self._named or len(self._named) == _MOST_NAMED:
            return
        self._named.add(schema)
        log.warning(
            "Jobs with schema %d were written by a later release (this one knows up to %d) and "
            "wait for a worker of that release. Upgrade this worker.",
            schema,
            SCHEMA,
        )
