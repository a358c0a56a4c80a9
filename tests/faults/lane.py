"""One direction of a slow link: a rate that its connections share, and a latency."""

import asyncio
import math
from contextlib import suppress
from typing import Final

_LARGEST_PIECE_BYTES: Final = 1 << 16
_PIECE_SECONDS: Final = 0.002
"""How long the link is busy with a piece of one connection before the next one has its turn."""

_BURST_SECONDS: Final = 0.05
"""How much of its rate a link that was idle sends at once, so that a late timer costs no bytes."""

_SMALLEST_WINDOW_BYTES: Final = 256 << 10
_LARGEST_WINDOW_BYTES: Final = 4 << 20
"""About as many bytes as Linux lets one connection have under way."""


class Lane:
    """One direction of a link. Its connections share its rate, piece by piece in turn, and each
    byte arrives later by its latency. Both may be changed while bytes are under way."""

    def __init__(self) -> None:
        self.bytes_per_second = math.inf
        self.latency_seconds = 0.0
        self.bytes_sent = 0
        """All bytes that were sent since the start, whether they have arrived or not."""
        self._turn = asyncio.Lock()
        self._free_at = 0.0
        self._waiting: asyncio.Future[None] | None = None

    def limit_rate(self, bytes_per_second: float) -> None:
        """Sets the rate from now on; the piece that is being sent counts as sent."""
        self.bytes_per_second = bytes_per_second
        self._free_at = 0.0
        if self._waiting:
            _wake(self._waiting)

    @property
    def piece_bytes(self) -> int:
        """The most bytes of one connection in one turn."""
        return int(min(max(1, self.bytes_per_second * _PIECE_SECONDS), _LARGEST_PIECE_BYTES))

    @property
    def window_bytes(self) -> int:
        """How many bytes of one connection may be under way: what the link carries in the time of
        its latency, within bounds. Beyond it the sender waits, as for a receiver's window."""
        if not self.latency_seconds:
            return _SMALLEST_WINDOW_BYTES
        product = self.bytes_per_second * self.latency_seconds
        return int(min(max(_SMALLEST_WINDOW_BYTES, product), _LARGEST_WINDOW_BYTES))

    async def send(self, size: int) -> None:
        """Returns when the link has sent `size` more bytes."""
        async with self._turn:
            loop = asyncio.get_running_loop()
            idle_since = loop.time() - _BURST_SECONDS
            self._free_at = max(self._free_at, idle_since) + size / self.bytes_per_second
            if self._free_at > loop.time():
                self._waiting = loop.create_future()
                timer = loop.call_at(self._free_at, _wake, self._waiting)
                try:
                    await self._waiting
                finally:
                    timer.cancel()
            self.bytes_sent += size


def _wake(waiting: asyncio.Future[None]) -> None:
    with suppress(asyncio.InvalidStateError):
        waiting.set_result(None)


class Pipe:
    """The bytes of one connection that are under way on a lane; `deliver` must be running."""

    def __init__(self, lane: Lane, writer: asyncio.StreamWriter) -> None:
        self._lane = lane
        self._writer = writer
        self._under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        self._bytes_under_way = 0
        self._has_room = asyncio.Event()
        # So that `drain` returns only when the kernel has all.
        writer.transport.set_write_buffer_limits(0)

    async def send(self, data: bytes) -> None:
        """Returns when the link has sent the data, which arrives later by the latency."""
        loop = asyncio.get_running_loop()
        while data:
            while self._bytes_under_way >= self._lane.window_bytes:
                self._has_room.clear()
                await self._has_room.wait()
            size = self._lane.piece_bytes
            piece, data = data[:size], data[size:]
            await self._lane.send(len(piece))
            self._bytes_under_way += len(piece)
            self._under_way.put_nowait((loop.time() + self._lane.latency_seconds, piece))

    async def wait_until_delivered(self) -> None:
        """Returns when everything that was sent has arrived."""
        await self._under_way.join()

    async def deliver(self) -> None:
        """Writes what arrives, in the order in which it was sent; runs until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            arrives_at, piece = await self._under_way.get()
            if (seconds := arrives_at - loop.time()) > 0:
                await asyncio.sleep(seconds)
            self._writer.write(piece)
            await self._writer.drain()
            self._bytes_under_way -= len(piece)
            self._has_room.set()
            self._under_way.task_done()
