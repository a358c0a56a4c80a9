"""The answers between the one who reads requests and the one who writes: in order, bounded."""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

from msgspec import Struct

_MOST_BYTES: Final = 16 << 20
"""Some 150,000 jobs; a client that sends all before it reads an answer has to stay below."""

_JOB_BYTES: Final = 100


class Due(Struct, frozen=True):
    """A job that is to be waited for, asked on a line of the request."""

    line: int
    job_id: str


class Block(Struct, frozen=True):
    """The next answers: text that may hold several lines, or a job whose line is yet to come."""

    answers: Sequence[bytes | Due]
    queue: str
    until: float
    """When jobs are no longer waited for, by the monotonic clock."""

    def size(self) -> int:
        return sum(len(one) if isinstance(one, bytes) else _JOB_BYTES for one in self.answers)


class Owed:
    def __init__(self) -> None:
        self.settled_at = time.monotonic()
        """When the last block was written."""
        self._blocks: deque[tuple[Block, int]] = deque()
        self._bytes = 0
        self._ended = False
        self._added = asyncio.Event()
        self._settled = asyncio.Event()

    def __bool__(self) -> bool:
        return self._bytes > 0

    def add(self, block: Block) -> None:
        size = block.size()
        self._blocks.append((block, size))
        self._bytes += size
        self._added.set()

    def end(self) -> None:
        """Nothing will be added any more."""
        self._ended = True
        self._added.set()

    async def next(self) -> Block | None:
        """The block to write now, until `settle` says that it was; None at the end."""
        while not self._blocks:
            if self._ended:
                return None
            self._added.clear()
            await self._added.wait()
        return self._blocks[0][0]

    def settle(self) -> None:
        self._bytes -= self._blocks.popleft()[1]
        self.settled_at = time.monotonic()
        self._settled.set()

    async def room(self) -> None:
        """Returns when another block may be added."""
        while self._bytes > _MOST_BYTES:
            self._settled.clear()
            await self._settled.wait()
