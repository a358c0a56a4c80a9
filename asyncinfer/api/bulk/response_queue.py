"""The bounded queue of responses between the reader and the writer of a bulk request."""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

from msgspec import Struct

_MAX_BYTES: Final = 16 << 20
"""Some 150,000 jobs: the most that a client may send before it reads a response."""

_JOB_BYTES: Final = 100


class Due(Struct, frozen=True):
    """A job to wait for, submitted by this line of the request."""

    line: int
    job_id: str


class ResponseBlock(Struct, frozen=True):
    """Consecutive responses: text of one or more lines, or a job whose result is not known yet."""

    answers: Sequence[bytes | Due]
    queue: str
    until: float
    """When to stop waiting for the jobs, by the monotonic clock."""

    def size_bytes(self) -> int:
        """Its size in memory, roughly."""
        return sum(
            len(answer) if isinstance(answer, bytes) else _JOB_BYTES for answer in self.answers
        )


class ResponseQueue:
    """Blocks in the order in which they are to be written; true while it holds any. One for each
    request, with one reader that adds and one writer that takes."""

    def __init__(self) -> None:
        self.popped_at = time.monotonic()
        """When the last block was written."""
        self._blocks: deque[tuple[ResponseBlock, int]] = deque()
        self._bytes = 0
        self._ended = False
        self._added = asyncio.Event()
        self._popped = asyncio.Event()

    def __bool__(self) -> bool:
        return self._bytes > 0

    def add(self, block: ResponseBlock) -> None:
        """Adds a block and wakes `peek`. Does not wait: call `wait_for_room` before."""
        size_bytes = block.size_bytes()
        self._blocks.append((block, size_bytes))
        self._bytes += size_bytes
        self._added.set()

    def end(self) -> None:
        """Declares that no more blocks will be added."""
        self._ended = True
        self._added.set()

    async def peek(self) -> ResponseBlock | None:
        """The block to write now, which stays until `pop`. Waits for a block; None once the queue
        has ended and is empty."""
        while not self._blocks:
            if self._ended:
                return None
            self._added.clear()
            await self._added.wait()
        return self._blocks[0][0]

    def pop(self) -> None:
        """Removes the block that `peek` returned, once it is written, and wakes `wait_for_room`."""
        self._bytes -= self._blocks.popleft()[1]
        self.popped_at = time.monotonic()
        self._popped.set()

    async def wait_for_room(self) -> None:
        """Returns once the queue holds at most 16 MiB; one block of any size may then be added."""
        while self._bytes > _MAX_BYTES:
            self._popped.clear()
            await self._popped.wait()
