"""What a webhook tells its receiver."""

from datetime import datetime
from typing import Any

from msgspec import UNSET, Struct, UnsetType

from asyncinfer.schemas.responses import Job


class ExpiredJob(Struct, frozen=True):
    """What is left to tell of a job that was deleted before its webhook was first tried."""

    job_id: str
    status: str
    expired: bool = True


class WebhookEvent(Struct, frozen=True, kw_only=True):
    """The body of a webhook."""

    type: str
    """`job.completed`, `job.failed` or `job.cancelled`."""
    timestamp: datetime
    """When it happened."""
    data: Job
    result_url: str | UnsetType = UNSET
    """Where the result is, if it is too large to be inside."""
    metadata: dict[str, Any]


class ExpiredEvent(Struct, frozen=True, kw_only=True):
    """The body of a webhook of a job that was deleted."""

    type: str
    timestamp: datetime
    """When it was first tried."""
    data: ExpiredJob
    metadata: dict[str, Any]


WEBHOOK_EVENTS = (WebhookEvent, ExpiredEvent)
"""All bodies of webhooks."""
