"""The bodies of webhooks, which tell receivers of the ends of jobs."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final
from urllib.parse import quote

import msgspec
from msgspec import UNSET, Raw

from asyncinfer.repository.deliveries import MAX_BODY_BYTES
from asyncinfer.repository.outbox import Delivery
from asyncinfer.repository.stored_jobs import StoredJob
from asyncinfer.schemas.responses import Job
from asyncinfer.schemas.webhooks import (
    ExpiredEvent,
    ExpiredJob,
    RetriedEvent,
    RetriedJob,
    WebhookEvent,
)

MAX_RESULT_BYTES: Final = 20 << 10
"""The largest result that is inside; of a larger one its URL is."""

_encode = msgspec.json.Encoder().encode


class Bodies:
    """Makes the bodies of webhooks."""

    def __init__(self, view: Callable[[StoredJob], Job], public_url: str | None) -> None:
        """`view` shapes a job as `GET /job` shows it. `public_url` is where clients reach the API,
        without a slash at its end; None gives results a path alone."""
        self._view = view
        self._public_url = public_url or ""

    def of(self, delivery: Delivery, now_ms: int) -> tuple[bytes, bytes]:
        """The body for a delivery, and a shorter one for where that has no room: without the
        result. Of a job that is gone or was retried it has the id and the status alone. `now_ms`
        is the time of an end whose own is not known."""
        at = _at(delivery.state.ended_ms or now_ms)
        if delivery.job is None:
            body = self._without_job(delivery, at)
            return body, body
        view = self._view(delivery.job)
        shorter = self._with_job(delivery, msgspec.structs.replace(view, result=UNSET), at)
        if len(shorter) > MAX_BODY_BYTES:
            shorter = self._without_job(delivery, at)
        # The result of a completed job is none if it was too large to be read.
        is_inside = view.status != "completed" or 0 < _size_bytes(view.result) <= MAX_RESULT_BYTES
        body = self._with_job(delivery, view, at) if is_inside else shorter
        return (body if len(body) <= MAX_BODY_BYTES else shorter), shorter

    def _with_job(self, delivery: Delivery, view: Job, at: datetime) -> bytes:
        has_result_elsewhere = view.result is UNSET and view.status == "completed"
        event = WebhookEvent(
            type=f"job.{delivery.event}",
            timestamp=view.finished_at if isinstance(view.finished_at, datetime) else at,
            data=view,
            result_url=self._result_url(view.job_id) if has_result_elsewhere else UNSET,
            metadata=delivery.target.metadata,
        )
        return _encode(event)

    def _without_job(self, delivery: Delivery, at: datetime) -> bytes:
        job_id, status, metadata = delivery.job_id, delivery.event, delivery.target.metadata
        event_type = f"job.{status}"
        if delivery.is_retried:
            retried = RetriedJob(job_id, status, delivery.round)
            return _encode(
                RetriedEvent(type=event_type, timestamp=at, data=retried, metadata=metadata)
            )
        expired = ExpiredJob(job_id, status)
        return _encode(ExpiredEvent(type=event_type, timestamp=at, data=expired, metadata=metadata))

    def _result_url(self, job_id: str) -> str:
        return f"{self._public_url}/job/{quote(job_id, safe='')}/result"


def _size_bytes(result: object) -> int:
    """The size of a result as JSON; 0 without one."""
    return len(bytes(result)) if isinstance(result, Raw) else 0


def _at(ms: int) -> datetime:
    return datetime.fromtimestamp(ms / 1000, UTC)
