"""Server-sent events (WHATWG HTML, 9.2): followed, and taken up again after a cut."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final
from urllib.parse import quote, urlencode

import msgspec
from msgspec import Struct

from asyncinfer.client._drivers import AsyncDriver, Driver
from asyncinfer.client._errors import error_of, lost, retry_after
from asyncinfer.client._flows import Server
from asyncinfer.client._wire import Lost, Request, Response

_SILENCE_SECONDS: Final = 45.0
"""A server sends a heartbeat every 15 s."""
_PAUSE_SECONDS: Final = 1.0
_LAST: Final = frozenset({"completed", "failed", "cancelled"})


class Event(Struct, frozen=True):
    """`name` is a job's new status, or snapshot, progress, done, gap; `data` what it says."""

    name: str
    data: Any
    id: str = ""


class Parser:
    """Lines into events; a stream may be cut anywhere, within a line too."""

    def __init__(self) -> None:
        self._rest = b""
        self._fields: dict[str, list[str]] = {}
        self.last_id = ""

    def feed(self, chunk: bytes) -> Iterator[Event]:
        *lines, self._rest = (self._rest + chunk).replace(b"\r\n", b"\n").split(b"\n")
        for line in lines:
            if line:
                self._take(line.decode())
            elif event := self._event():
                yield event

    def _take(self, line: str) -> None:
        name, _, value = line.partition(":")
        if name:
            self._fields.setdefault(name, []).append(value.removeprefix(" "))

    def _event(self) -> Event | None:
        fields, self._fields = self._fields, {}
        self.last_id = fields.get("id", [self.last_id])[-1]
        if "data" not in fields:
            return None
        text = "\n".join(fields["data"])
        name = fields.get("event", ["message"])[-1]
        return Event(name, msgspec.json.decode(text), self.last_id)


class Story:
    """What is followed, how far it was told, and whether it is over."""

    def __init__(self, server: Server, *, job_id: str | None = None, **query: str) -> None:
        self._server = server
        self._path = (
            f"/job/{quote(job_id, safe='')}/events" if job_id else f"/events?{urlencode(query)}"
        )
        self._is_job = job_id is not None
        self._last_id = ""
        self._losses = 0
        self.over = False

    def request(self) -> Request:
        headers = {**self._server.headers, "accept": "text/event-stream"}
        if self._last_id:
            headers["last-event-id"] = self._last_id
        return Request(
            method="GET", path=self._path, headers=headers, timeout_seconds=_SILENCE_SECONDS
        )

    def opened(self, told: Response | Lost) -> float | None:
        """None to read on, else after how many seconds to ask again; raises what is hopeless."""
        if isinstance(told, Response) and told.status == 200:
            return None
        if isinstance(told, Response) and told.status == 204:
            self.over = True
            return None
        if isinstance(told, Response) and told.status not in (429, 502, 503, 504):
            raise error_of(told, self._server.url)
        self._losses += 1
        if self._losses > self._server.retries or (isinstance(told, Lost) and told.stranger):
            if isinstance(told, Lost):
                raise lost(told.reason, self._server.url)
            raise error_of(told, self._server.url)
        asked = retry_after(told) if isinstance(told, Response) else None
        return asked or _PAUSE_SECONDS * random.uniform(0.5, 1.5) * 2**self._losses

    def told(self, event: Event) -> Event:
        self._last_id = event.id or self._last_id
        self._losses = 0
        status = event.data.get("status") if isinstance(event.data, dict) else None
        if self._is_job and (event.name in _LAST or status in _LAST):
            self.over = True
        return event


def follow(driver: Driver, story: Story) -> Iterator[Event]:
    while not story.over:
        with driver.stream(story.request()) as (told, chunks):
            pause = story.opened(told)
            if pause is None and not story.over:
                yield from _told(story, chunks)
        if not story.over:
            time.sleep(_PAUSE_SECONDS if pause is None else pause)


def _told(story: Story, chunks: Iterator[bytes]) -> Iterator[Event]:
    parser = Parser()
    for chunk in chunks:
        for event in parser.feed(chunk):
            yield story.told(event)
            if story.over:
                return


async def afollow(driver: AsyncDriver, story: Story) -> AsyncIterator[Event]:
    while not story.over:
        async with driver.stream(story.request()) as (told, chunks):
            pause = story.opened(told)
            if pause is None and not story.over:
                async for event in _atold(story, chunks):
                    yield event
        if not story.over:
            await asyncio.sleep(_PAUSE_SECONDS if pause is None else pause)


async def _atold(story: Story, chunks: AsyncIterator[bytes]) -> AsyncIterator[Event]:
    parser = Parser()
    async for chunk in chunks:
        for event in parser.feed(chunk):
            yield story.told(event)
            if story.over:
                return
