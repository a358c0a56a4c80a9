"""The timeline of a job, as a client returns it."""

from collections.abc import Iterator

from msgspec import Struct

from asyncinfer.client import _display
from asyncinfer.schemas.timeline import TimelineEvent


class Timeline(Struct, frozen=True, kw_only=True):
    """What has happened to a job in its present round; a notebook shows it as a picture.

    `events` are in order, and iterating the timeline yields them. Each has `event` (submitted,
    claimed, running, handed_back, worker_lost, redelivered, finished, webhook; now, for a job that
    has not ended), `at` (with time zone), `at_ms` and `seconds` since the one before, all None
    where they are not known, and what applies of `clock`, `delivery`, `worker`, `jobs`, `rows`,
    `version`, `sha256`, `provider`, `reason`, `delay_seconds`, `status`, `code`, `http_status`,
    `error` and `duration_seconds`.

    `seconds` is from the submit to the end, or to now, and `omitted` is how many early deliveries
    are not listed.

    >>> job = client.submit([[5.1, 3.5, 1.4, 0.2]], "iris").wait()
    >>> [event.event for event in job.timeline()]
    ['submitted', 'claimed', 'running', 'finished']
    """

    job_id: str
    status: str
    round: int = 1
    seconds: float | None = None
    omitted: int = 0
    events: tuple[TimelineEvent, ...] = ()

    def __iter__(self) -> Iterator[TimelineEvent]:
        return iter(self.events)

    def __len__(self) -> int:
        return len(self.events)

    def _repr_html_(self) -> str:
        """The picture that a notebook shows."""
        return _display.timeline_card(self.job_id, self.status, self.events)
