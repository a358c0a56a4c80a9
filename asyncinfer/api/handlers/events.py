"""The routes that stream changes of jobs as server-sent events (WHATWG HTML, 9.2)."""

import random
import time
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any, Final

from msgspec import Struct

from asyncinfer.api.handlers.event_sources import (
    EventSource,
    GroupEventSource,
    JobEventSource,
    JobsEventSource,
)
from asyncinfer.api.http.messages import Reply, Request, Stream
from asyncinfer.api.job_lookup import find_job
from asyncinfer.api.live.event_text import encode_event
from asyncinfer.api.live.position import Position, decode_position
from asyncinfer.api.live.shared_reads import Topic
from asyncinfer.api.live.wait import wait_for_disconnect
from asyncinfer.api.services import Services
from asyncinfer.errors import RedisUnavailable, TooManyStreams
from asyncinfer.repository.inspect.log import LogTrimmed
from asyncinfer.repository.stored_jobs import queue_of
from asyncinfer.schemas.requests import EventsQuery, JobEventsQuery

_OPENING: Final = b"retry: 1000\n\n"
_COMMENT: Final = b":\n\n"
_OUTAGE_PAUSE_SECONDS: Final = 0.5
_RETRY_AFTER_SECONDS: Final = 5
_HEADERS: Final = ((b"x-accel-buffering", b"no"),)
"""Else nginx would collect events before it passes them on."""


class Missed(Struct, frozen=True):
    """The data of a `gap`."""

    detail: str = "Changes were missed, since the log no longer has them; a snapshot follows."


async def follow_job(services: Services, request: Request[JobEventsQuery]) -> Reply | Stream:
    """Streams a job's changes until it has ended.

    Replies 204 if the client's position says that it has already seen the end. Raises JobNotFound
    or JobExpired, InvalidQuery for an invalid position, TooManyStreams and RedisUnavailable.
    """
    stored = await find_job(services, request)
    position = _requested_position(request)
    if position and position.ended and stored.has_ended and position.ended == stored.round:
        # Everything was sent, and a 204 keeps a browser's EventSource from reconnecting.
        return Reply(204, b"")
    queue = queue_of(services.store, stored)
    topic = Topic(request.tenant, job_id=stored.job_id, queue=queue)
    return _stream(services, request, JobEventSource(services, topic, queue), position)


async def follow_jobs(services: Services, request: Request[EventsQuery]) -> Reply | Stream:
    """Streams changes of the caller's jobs (all, or those of a group or model) as they come.

    Ends when the client disconnects or the API stops. Raises RedisUnavailable before the stream
    begins, TooManyStreams, InvalidQuery for an invalid position, and as `Catalog.find` does.
    """
    query = request.query
    queue = (await services.catalog.find(query.model)).queue if query.model is not None else None
    position = _requested_position(request)
    # If Redis is away, an error status is clearer than a silent stream.
    await services.store.time_ms()
    topic = Topic(request.tenant, group=query.group, queue=queue)
    if query.group is None:
        return _stream(services, request, JobsEventSource(services, topic, query.model), position)
    done = position is not None and position.ended > 0
    return _stream(
        services, request, GroupEventSource(services, topic, query.group, done), position
    )


def _stream(
    services: Services, request: Request[Any], source: EventSource, position: Position | None
) -> Stream:
    """The answer of a source; raises TooManyStreams. Without a position (None) it begins with a
    snapshot."""
    if services.feed.count >= services.config.max_streams:
        raise TooManyStreams(
            f"This server sends {services.config.max_streams} event streams already. Close those "
            "you do not read, follow a group instead of its jobs, or start more API processes.",
            retry_after_seconds=_RETRY_AFTER_SECONDS,
        )
    chunks = _chunks(services, request, source, position)
    return Stream(chunks, b"text/event-stream", headers=_HEADERS)


async def _chunks(
    services: Services, request: Request[Any], source: EventSource, position: Position | None
) -> AsyncGenerator[bytes, None]:
    """Yields the bytes of a stream: events, a comment after each time of silence, and empty chunks
    that only wait for the client. Ends when the client has disconnected, the feed is closed or the
    source is over. A gap in the log or an outage of Redis does not end it."""
    heartbeat_seconds = services.config.heartbeat_seconds
    is_begun = position is not None
    gone = partial(wait_for_disconnect, request)
    with services.feed.follow(source.topic, position or Position(0), gone) as follower:
        yield _OPENING
        sent_at = time.monotonic()
        while not (follower.closed or source.is_over):
            due = min(source.due_seconds(follower), sent_at + heartbeat_seconds - time.monotonic())
            chunk = b""
            try:
                if not is_begun:
                    chunk = await source.snapshot(follower)
                    is_begun = True
                else:
                    chunk = await source.next_events(
                        follower, await follower.next_changes(max(due, 0.0))
                    )
            except LogTrimmed:
                chunk, is_begun = encode_event("gap", Missed()), False
            except RedisUnavailable:
                await follower.pause(_OUTAGE_PAUSE_SECONDS * random.uniform(0.5, 1.5))
            if not chunk and time.monotonic() - sent_at >= heartbeat_seconds:
                chunk = _COMMENT
            if chunk:
                yield chunk
                sent_at = time.monotonic()
                # Sends nothing, and returns once the client has taken enough of the chunk: nothing
                # more is read and encoded for a client that does not read.
                yield b""


def _requested_position(request: Request[Any]) -> Position | None:
    """The position from the header, else from the query, else None: an EventSource that reconnects
    sends the header beside the query it began with. Raises InvalidQuery."""
    text = request.header(b"last-event-id") or request.query.last_event_id
    return decode_position(text) if text else None
