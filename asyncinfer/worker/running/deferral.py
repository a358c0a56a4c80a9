"""Deferral of jobs that this worker cannot run yet: they go back to their queue with a delay."""

import logging
import random
import time
from typing import Final

from asyncinfer.jobs import SCHEMA
from asyncinfer.repository.claims import ClaimedJob, JobOutcome

_log = logging.getLogger(__name__)

_WINDOW_SECONDS: Final = 60.0
_MIN_MS: Final = 1000
_MAX_MS: Final = 60_000
_MAX_NAMED: Final = 8


class Deferrer:
    """Defers jobs, for longer the more of them there are in a minute: 100,000 jobs that no worker
    can run yet must not keep this one from the jobs that it can run."""

    def __init__(self, min_ms: int, max_ms: int) -> None:
        """Delays are at least `min_ms` and at most `max_ms` milliseconds."""
        self._min_ms = min_ms
        self._max_ms = max_ms
        self._window_began_at = 0.0
        self._count = 0

    def next_delay_ms(self) -> int:
        """Counts a job, and returns its random delay in ms. The longest delay grows by 1 ms with
        each job in a minute."""
        now = time.monotonic()
        if now - self._window_began_at > _WINDOW_SECONDS:
            self._window_began_at, self._count = now, 0
        self._count += 1
        max_delay_ms = min(2 * self._min_ms + self._count, self._max_ms)
        return random.randint(self._min_ms, max_delay_ms)


class LaterReleaseDeferrer:
    """Defers jobs that a later release wrote, until a worker of that release claims them."""

    def __init__(self) -> None:
        self._named_schemas: set[int] = set()
        self._deferrer = Deferrer(_MIN_MS, _MAX_MS)

    def defer(self, job: ClaimedJob) -> JobOutcome:
        """Returns the outcome that puts the job back into its queue as it is, with a delay of 1 to
        60 s. Logs what to do about such jobs, once per schema, for a few schemas only, since anyone
        may write any number there."""
        schema = job.later_schema
        if schema not in self._named_schemas and len(self._named_schemas) < _MAX_NAMED:
            self._named_schemas.add(schema)
            _log.warning(
                "Jobs with schema %d were written by a later release (this one knows up to %d) and "
                "wait for a worker of that release. Upgrade this worker.",
                schema,
                SCHEMA,
            )
        delay_ms = self._deferrer.next_delay_ms()
        return JobOutcome(job.job_id, "released", meta=job.meta, delay_ms=delay_ms)
