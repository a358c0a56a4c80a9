"""The course of a job as answers show it."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from msgspec import Struct, UnsetType

from asyncinfer.api.views import error_of
from asyncinfer.jobs import (
    PastDelivery,
    Record,
    created_ms,
    finished_ms,
    started_ms,
    with_lost_deliveries,
)
from asyncinfer.repository.inspect.history import JobHistory
from asyncinfer.repository.outbox import StoredDelivery
from asyncinfer.schemas.operations import public_worker_name
from asyncinfer.schemas.timeline import Timeline, TimelineEvent
from asyncinfer.untrusted import decoding

_LOST: Final = "worker_lost"
_MAX_COUNT: Final = 1 << 53
"""What other programs wrote to Redis may be larger, and JSON could not hold the next number."""


class _Moment(Struct, frozen=True):
    """An event before its time is compared with others; `at_ms` None: not known."""

    event: str
    at_ms: int | None
    clock: str = "redis"
    fields: dict[str, Any] = {}


def timeline_view(history: JobHistory) -> Timeline:
    """The timeline of the job's present round.

    Its times never go back, although several clocks made them. Those of a worker are counted from
    the claim, whose time is the server's, so that its clock does not matter. The submit has the
    time of an API, and counts as at the first later event if that clock is ahead.
    """
    stored, record = history.stored, history.stored.record
    past = with_lost_deliveries(record.past_deliveries if record else (), history.lost_deliveries)
    handed_back = sum(delivery.reason != _LOST for delivery in past)
    omitted = max(0, min(record.handed_back, _MAX_COUNT) - handed_back) if record else 0
    submitted_ms = record.created_ms if record else created_ms(stored.job_id)
    moments = [
        _Moment("submitted", submitted_ms, "api"),
        *_past_moments(past, omitted + 1, is_over=_end_fields(history)["code"] == _LOST),
        *_last_moments(history, omitted + len(past) + 1),
    ]
    events = _in_order([*moments, *_webhook_moments(history.webhook)])
    first_ms, last_ms = events[0].at_ms, events[len(moments) - 1].at_ms
    seconds = None if first_ms is None or last_ms is None else (last_ms - first_ms) / 1000
    return Timeline(
        job_id=stored.job_id,
        status=stored.status,
        round=stored.round,
        seconds=seconds,
        omitted=omitted,
        events=events,
    )


def _has_delivery(record: Record | None) -> bool:
    """Whether a worker has ended the job."""
    return record is not None and record.finished_ms is not None


def _past_moments(past: Sequence[PastDelivery], number: int, *, is_over: bool) -> Iterator[_Moment]:
    """The events of deliveries that did not end the job, the first of which has this number;
    `is_over`: with the last of them the job failed."""
    for delivery in past:
        worker = public_worker_name(delivery.worker)
        of_delivery = {"delivery": number, "worker": worker}
        yield _Moment("claimed", delivery.claimed_ms or None, fields=of_delivery)
        if delivery.reason == _LOST:
            yield _Moment(_LOST, delivery.ended_ms, fields=of_delivery)
            if not (is_over and delivery is past[-1]):
                yield _Moment("redelivered", delivery.ended_ms, fields={"delivery": number + 1})
        else:
            delay = {"delay_seconds": delivery.delay_ms / 1000} if delivery.delay_ms else {}
            fields = {**of_delivery, "reason": delivery.reason, **delay}
            yield _Moment("handed_back", delivery.ended_ms, fields=fields)
        number += 1


def _last_moments(history: JobHistory, number: int) -> Iterator[_Moment]:
    """The last events: the delivery under way or that ended the job, which has this number, and the
    end, or now."""
    stored, record = history.stored, history.stored.record
    if record and _has_delivery(record):
        yield from _delivery_moments(history, record, number)
    elif stored.has_ended:
        yield _Moment("finished", history.ended_ms, fields=_end_fields(history))
    else:
        if stored.status == "processing":
            worker = public_worker_name(history.worker) if history.worker else None
            yield _Moment("claimed", None, fields={"delivery": number, "worker": worker})
        yield _Moment("now", history.now_ms, fields={"status": stored.status})


def _delivery_moments(history: JobHistory, record: Record, number: int) -> Iterator[_Moment]:
    """The delivery in which a worker ended the job: its claim, its run, and the end."""
    delivery = record.delivery
    clock = "redis" if delivery else "worker"
    claimed_ms, ended_ms = started_ms(record) or 0, finished_ms(record) or 0
    worker = public_worker_name(record.worker) if record.worker else None
    of_delivery = {"delivery": number, "worker": worker}
    jobs = {"jobs": delivery.claimed_jobs} if delivery else {}
    yield _Moment("claimed", claimed_ms, clock, {**of_delivery, **jobs})
    if record.ran_version is not None:
        run = {
            "jobs": delivery.run_jobs if delivery else None,
            "rows": delivery.run_rows if delivery else None,
            "version": record.ran_version,
            "sha256": record.ran_sha256,
            "provider": delivery.provider if delivery else None,
        }
        run_ms = min(claimed_ms + delivery.run_after_ms, ended_ms) if delivery else None
        yield _Moment("running", run_ms, clock, {**of_delivery, **run})
    yield _Moment("finished", ended_ms, clock, _end_fields(history))


def _webhook_moments(deliveries: Sequence[StoredDelivery]) -> Iterator[_Moment]:
    """The attempts to deliver the job's webhook. The last one of a delivery says what became of it,
    or when the next one is due, as `GET /job/{id}/webhook` does: also where that was put off."""
    for delivery in deliveries:
        state, due_ms = delivery.state, delivery.due_ms or 0
        for attempt in state.attempts:
            fields: dict[str, Any] = {
                "http_status": attempt.status or None,
                "error": attempt.error or None,
                "duration_seconds": attempt.duration_ms / 1000,
            }
            if attempt is state.attempts[-1]:
                fields["reason"] = state.outcome
                if state.outcome is None and due_ms > attempt.at_ms:
                    fields["delay_seconds"] = (due_ms - attempt.at_ms) / 1000
            yield _Moment("webhook", attempt.at_ms, fields=fields)


def _end_fields(history: JobHistory) -> dict[str, Any]:
    """How the job ended: its status, and of a failed one the error's code."""
    error = error_of(history.stored)
    code = None if isinstance(error, UnsetType) else error.code
    return {"status": history.stored.status, "code": code}


def _in_order(moments: Sequence[_Moment]) -> list[TimelineEvent]:
    """The events with times that do not go back, and the seconds between them."""
    first_later_ms = next((at for m in moments[1:] if (at := _valid(m.at_ms)) is not None), None)
    events: list[TimelineEvent] = []
    last_ms: int | None = None
    for moment in moments:
        at_ms, seconds = _valid(moment.at_ms), None
        if at_ms is not None and not events and first_later_ms is not None:
            at_ms = min(at_ms, first_later_ms)
        if at_ms is not None and last_ms is not None:
            at_ms = max(at_ms, last_ms)
            seconds = (at_ms - last_ms) / 1000
        last_ms = last_ms if at_ms is None else at_ms
        events.append(
            TimelineEvent(
                event=moment.event,
                at=decoding.time(at_ms),
                at_ms=at_ms,
                seconds=seconds,
                clock=None if at_ms is None else moment.clock,
                **moment.fields,
            )
        )
    return events


def _valid(time_ms: int | None) -> int | None:
    """The time, or None if no program of ours can have written it."""
    return time_ms if time_ms is not None and 0 <= time_ms <= decoding.MAX_TIME_MS else None
