"""A client of server-sent events that parses them as the standard says (WHATWG HTML, 9.2.6)."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import httpx2
import msgspec

from tests.faults.harness import wait_for_next_millisecond

_SECONDS = 20.0


class Event(NamedTuple):
    name: str
    data: dict[str, Any]
    id: str
    """The id of this event, or of the last event that had one."""


class EventStream:
    """One stream; `last_id` is what an EventSource would send to continue it."""

    def __init__(self, reply: httpx2.Response, last_id: str = "") -> None:
        self.last_id = last_id
        self.comments = 0
        self._lines = reply.aiter_lines()

    async def next_event(self) -> Event | None:
        """The next event; None if the stream ended."""
        name, data = "message", ""
        async with asyncio.timeout(_SECONDS):
            async for line in self._lines:
                field, _, value = line.partition(":")
                value = value.removeprefix(" ")
                if not line and data:
                    return Event(name, msgspec.json.decode(data), self.last_id)
                if field == "event":
                    name = value
                elif field == "data":
                    data += value
                elif field == "id":
                    self.last_id = value
                elif line.startswith(":"):
                    self.comments += 1
        return None

    async def wait_for_event(self, *names: str) -> Event:
        """The next event with one of these names (any if none are given); skips other events."""
        while event := await self.next_event():
            if not names or event.name in names:
                return event
        raise AssertionError(f"the stream ended before {names}")

    async def remaining_events(self) -> list[Event]:
        events = []
        while event := await self.next_event():
            events.append(event)
        return events

    async def wait_for_comment(self) -> None:
        """Returns after the next comment; fails if an event comes before it."""
        async with asyncio.timeout(_SECONDS):
            async for line in self._lines:
                if line.startswith(":"):
                    self.comments += 1
                    return
                assert not line.startswith(("event", "data")), line


@asynccontextmanager
async def open_event_stream(
    client: httpx2.AsyncClient, path: str, last_id: str = ""
) -> AsyncIterator[EventStream]:
    """A stream that begins. Changes of the millisecond in which it begins may be in its snapshot
    and follow it too; those that were made before this call only precede it."""
    wait_for_next_millisecond()
    headers = {"last-event-id": last_id} if last_id else {}
    async with client.stream("GET", path, headers=headers) as reply:
        if reply.status_code != 200:
            await reply.aread()
        assert reply.status_code == 200, reply.text
        assert reply.headers["content-type"] == "text/event-stream"
        assert reply.headers["cache-control"] == "no-store"
        yield EventStream(reply, last_id)
