"""What a webhook tells its receiver."""

from datetime import datetime
from typing import Any, Final, Literal

from msgspec import UNSET, Struct, UnsetType

from asyncinfer.schemas.responses import Job


class ExpiredJob(Struct, frozen=True):
    """What is left to tell of a job that is not kept any more."""

    job_id: str
    status: str
    """How it ended."""
    expired: bool = True


class RetriedJob(Struct, frozen=True):
    """What is left to tell of a round of a job that has begun a later one."""

    job_id: str
    status: str
    """How the round ended."""
    round: int
    retried: bool = True


class WebhookEvent(Struct, frozen=True, kw_only=True):
    """The body of a webhook of a job."""

    type: str
    """`job.completed`, `job.failed` or `job.cancelled`."""
    timestamp: datetime
    """When it happened."""
    data: Job
    result_url: str | UnsetType = UNSET
    """Where the result is, if it is too large to be inside."""
    metadata: dict[str, Any]


class ExpiredEvent(Struct, frozen=True, kw_only=True):
    """The body of a webhook of a job that is not kept any more."""

    type: str
    timestamp: datetime
    """When it ended."""
    data: ExpiredJob
    metadata: dict[str, Any]


class RetriedEvent(Struct, frozen=True, kw_only=True):
    """The body of a webhook of a job that was retried before the webhook was first tried."""

    type: str
    timestamp: datetime
    """When the round ended."""
    data: RetriedJob
    metadata: dict[str, Any]


class EndedCounts(Struct, frozen=True, kw_only=True):
    """How the jobs of a group ended."""

    completed: int
    failed: int
    cancelled: int
    expired: int
    """Jobs that had ended and were no longer kept when they were looked at."""


class EndedGroup(Struct, frozen=True, kw_only=True):
    group: str
    jobs: int
    counts: EndedCounts
    closed_at: datetime
    ended_at: datetime


class GroupEvent(Struct, frozen=True, kw_only=True):
    """The body of the webhook of a group all of whose jobs have ended."""

    type: Literal["group.ended"] = "group.ended"
    timestamp: datetime
    """When it was found that all have ended."""
    data: EndedGroup
    metadata: dict[str, Any]


JOB_EVENTS: Final = (WebhookEvent, ExpiredEvent, RetriedEvent)
"""The bodies of webhooks of jobs."""
