"""Streams of events: followed, and resumed at the last event after a cut."""

import atexit
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing
from functools import partial
from typing import Final
from urllib.parse import urlencode

from asyncinfer import jobs
from asyncinfer.client._drivers import AsyncDriver, Driver, close_stream
from asyncinfer.client._errors import connection_failed_error, error_of_response
from asyncinfer.client._protocol import Event, Lost, Request, Response
from asyncinfer.client._requests import (
    RETRYABLE_STATUSES,
    RemoteServer,
    is_final_loss,
    path_part,
    seconds_before_retry,
)

_SILENCE_SECONDS: Final = 45.0
"""The longest silence of a stream; a server sends a comment every 15 s."""
_PAUSE_SECONDS: Final = 0.5


class EventSubscription:
    """The events of a job or of a group: where to read them, and how far they were read.

    `follow` sends its `request`, gives every reply to `handle`, and does so again after
    `pause_seconds` until `is_over`.
    """

    def __init__(self, server: RemoteServer, *, job_id: str | None = None, **query: str) -> None:
        """The events of a job, or of all jobs that match `query`, such as `group`."""
        self._server = server
        self._path = f"/job/{path_part(job_id)}/events" if job_id else f"/events?{urlencode(query)}"
        self._is_job = job_id is not None
        self._last_id = ""
        self._failures = 0
        self.is_over = False
        self.pause_seconds = _PAUSE_SECONDS
        """The pause before the next request, after a stream was cut."""

    def request(self) -> Request:
        """The request for the events after the last one that was read; at first, for all."""
        headers = {**self._server.headers, "accept": "text/event-stream"}
        if self._last_id:
            headers["last-event-id"] = self._last_id
        return Request(
            method="GET", path=self._path, headers=headers, timeout_seconds=_SILENCE_SECONDS
        )

    def handle(self, reply: Response | Lost | Event) -> Event | None:
        """Takes a reply of the stream; returns an event to pass on, or None if there is none in it.

        Sets `is_over` once no event can follow. Raises the error of a stream that cannot be
        resumed: the one that a response stands for, or ConnectionFailed after all retries.
        """
        if isinstance(reply, Event):
            return self._handle_event(reply)
        if isinstance(reply, Response) and reply.status in (200, 204):
            # 204: all events had been sent before the cut.
            self.is_over = reply.status == 204
        elif isinstance(reply, Response) and reply.status not in RETRYABLE_STATUSES:
            raise error_of_response(reply, self._server.url)
        else:
            self._handle_failure(reply)
        return None

    def _handle_event(self, event: Event) -> Event:
        """Notes how far the stream was read, and whether the event shows that the job has ended."""
        self._last_id = event.id or self._last_id
        self._failures = 0
        self.pause_seconds = _PAUSE_SECONDS
        status = event.data.get("status") if isinstance(event.data, dict) else None
        self.is_over = self._is_job and status in jobs.TERMINAL
        return event

    def _handle_failure(self, reply: Response | Lost) -> None:
        """Counts a failure and sets the pause before the next request; raises it if it is final."""
        self._failures += 1
        if is_final_loss(reply, self._failures) or self._failures > self._server.retries:
            if isinstance(reply, Lost):
                raise connection_failed_error(reply, self._server.url)
            raise error_of_response(reply, self._server.url)
        self.pause_seconds = seconds_before_retry(self._failures, reply)


def follow(driver: Driver, subscription: EventSubscription) -> Iterator[Event]:
    """Yields the events until the job has ended; those of a group until the loop is left.

    Blocks between events, and resumes a stream that was cut. Raises as `EventSubscription.handle`.
    """
    while not subscription.is_over:
        with closing(driver.events(subscription.request())) as stream:
            close_at_exit = partial(close_stream, stream)
            atexit.register(close_at_exit)
            driver.open_streams.add(stream)
            try:
                for reply in stream:
                    if event := subscription.handle(reply):
                        yield event
                    if subscription.is_over:
                        return
            finally:
                driver.open_streams.discard(stream)
                atexit.unregister(close_at_exit)
        time.sleep(subscription.pause_seconds)


async def follow_async(
    driver: AsyncDriver, subscription: EventSubscription
) -> AsyncIterator[Event]:
    """The same as `follow` in an event loop."""
    import asyncio

    while not subscription.is_over:
        async with aclosing(driver.events(subscription.request())) as stream:
            driver.open_streams.add(stream)
            try:
                async for reply in stream:
                    if event := subscription.handle(reply):
                        yield event
                    if subscription.is_over:
                        return
            finally:
                driver.open_streams.discard(stream)
        await asyncio.sleep(subscription.pause_seconds)
