"""The bodies of webhooks: what a receiver is told of a job's end."""

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
from asyncinfer.schemas.webhooks import ExpiredEvent, ExpiredJob, WebhookEvent

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
        result. A job that is gone has only its id and status, and the time `now_ms`."""
        if delivery.job is None:
            body = self._expired(delivery, now_ms)
            return body, body
        view = self._view(delivery.job)
        shorter = self._told(delivery, msgspec.structs.replace(view, result=UNSET), now_ms)
        if len(shorter) > MAX_BODY_BYTES:
            shorter = self._expired(delivery, now_ms)
        # The result of a completed job is none if it was too large to be read.
        is_inside = view.status != "completed" or 0 < _size(view.result) <= MAX_RESULT_BYTES
        body = self._told(delivery, view, now_ms) if is_inside else shorter
        return (body if len(body) <= MAX_BODY_BYTES else shorter), shorter

    def _told(self, delivery: Delivery, view: Job, now_ms: int) -> bytes:
        has_result_elsewhere = view.result is UNSET and view.status == "completed"
        event = WebhookEvent(
            type=f"job.{delivery.event}",
            timestamp=view.finished_at if isinstance(view.finished_at, datetime) else _at(now_ms),
            data=view,
            result_url=self._result_url(view.job_id) if has_result_elsewhere else UNSET,
            metadata=delivery.target.metadata,
        )
        return _encode(event)

    def _expired(self, delivery: Delivery, now_ms: int) -> bytes:
        event = ExpiredEvent(
            type=f"job.{delivery.event}",
            timestamp=_at(now_ms),
            data=ExpiredJob(delivery.job_id, delivery.event),
            metadata=delivery.target.metadata,
        )
        return _encode(event)

    def _result_url(self, job_id: str) -> str:
        return f"{self._public_url}/job/{quote(job_id, safe='')}/result"


def _size(result: object) -> int:
    """The bytes of a result as JSON; 0 without one."""
    return len(bytes(result)) if isinstance(result, Raw) else 0


def _at(ms: int) -> datetime:
    return datetime.fromtimestamp(ms / 1000, UTC)
