"""Changes as they happen, from server-sent events: followed, and taken up again after a cut."""

import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing
from typing import Final
from urllib.parse import urlencode

from asyncinfer.client._drivers import AsyncDriver, Driver
from asyncinfer.client._errors import error_of, lost, retry_after
from asyncinfer.client._protocol import Event, Lost, Request, Response
from asyncinfer.client._requests import AGAIN, Server, is_hopeless, path_part

_SILENCE_SECONDS: Final = 45.0
"""A server sends a comment every 15 s."""
_PAUSE_SECONDS: Final = 0.5
_LAST: Final = frozenset({"completed", "failed", "cancelled"})


class Story:
    """What is followed, how far it was told, and whether it is over."""

    def __init__(self, server: Server, *, job_id: str | None = None, **query: str) -> None:
        self._server = server
        self._path = f"/job/{path_part(job_id)}/events" if job_id else f"/events?{urlencode(query)}"
        self._is_job = job_id is not None
        self._last_id = ""
        self._losses = 0
        self.over = False
        self.pause_seconds = _PAUSE_SECONDS

    def request(self) -> Request:
        headers = {**self._server.headers, "accept": "text/event-stream"}
        if self._last_id:
            headers["last-event-id"] = self._last_id
        return Request(
            method="GET", path=self._path, headers=headers, timeout_seconds=_SILENCE_SECONDS
        )

    def take(self, told: Response | Lost | Event) -> Event | None:
        """What there is to pass on; raises what is hopeless."""
        if isinstance(told, Event):
            return self._event(told)
        if isinstance(told, Response) and told.status in (200, 204):
            # 204: all was told before the cut.
            self.over = told.status == 204
        elif isinstance(told, Response) and told.status not in AGAIN:
            raise error_of(told, self._server.url)
        else:
            self._lose(told)
        return None

    def _event(self, event: Event) -> Event:
        self._last_id = event.id or self._last_id
        self._losses = 0
        self.pause_seconds = _PAUSE_SECONDS
        status = event.data.get("status") if isinstance(event.data, dict) else None
        self.over = self._is_job and status in _LAST
        return event

    def _lose(self, told: Response | Lost) -> None:
        self._losses += 1
        if is_hopeless(told, self._losses) or self._losses > self._server.retries:
            if isinstance(told, Lost):
                raise lost(told.reason, self._server.url)
            raise error_of(told, self._server.url)
        asked = retry_after(told) if isinstance(told, Response) else None
        self.pause_seconds = asked or _PAUSE_SECONDS * 3**self._losses * random.uniform(0.5, 1.0)


def follow(driver: Driver, story: Story) -> Iterator[Event]:
    while not story.over:
        with closing(driver.events(story.request())) as stream:
            for told in stream:
                if event := story.take(told):
                    yield event
                if story.over:
                    return
        time.sleep(story.pause_seconds)


async def afollow(driver: AsyncDriver, story: Story) -> AsyncIterator[Event]:
    import asyncio

    while not story.over:
        async with aclosing(driver.events(story.request())) as stream:
            async for told in stream:
                if event := story.take(told):
                    yield event
                if story.over:
                    return
        await asyncio.sleep(story.pause_seconds)
