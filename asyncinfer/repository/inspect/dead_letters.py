"""Dead letters: jobs that failed for good, though another try may have helped."""

import heapq
import math
from collections.abc import AsyncIterator, Sequence
from typing import Final

from msgspec import Struct

from asyncinfer.errors import InvalidQuery
from asyncinfer.repository import keys
from asyncinfer.repository.inspect.cursors import decode_cursor, encode_cursor
from asyncinfer.repository.inspect.listing import Page
from asyncinfer.repository.inspect.selection import Filter
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import Stored, read_jobs
from asyncinfer.untrusted import decoding

_LETTERS_A_PAGE: Final = 200
_LETTERS_AT_ONCE: Final = 100
_MOST_LOOKED_AT: Final = 20_000


class _Place(Struct, frozen=True, array_like=True):
    """A letter: when it died, of which queue, which job."""

    at_ms: float
    queue: str
    job_id: str


class DeadLetters:
    """What `{Q}:dead` of each queue holds, told of as jobs."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def jobs(self, wanted: Filter, *, limit: int = 100, cursor: str | None = None) -> Page:
        """Those that `wanted` means, newest first; raises InvalidQuery for a bad cursor.

        As a listing of all jobs it may come back short, with a cursor to go on.
        """
        default = await self._store.default_model()
        queues = [keys.queue(self._store.n, wanted.model, default)] if wanted.model else None
        found: list[Stored] = []
        looked = 0
        async for letters in self._letters(
            queues or await self._store.queues(), _place(cursor), min(limit, _LETTERS_AT_ONCE)
        ):
            jobs = await read_jobs(self._store, [letter.job_id for letter in letters])
            for letter, job in zip(letters, jobs, strict=True):
                looked += 1
                if job and wanted.matches(job, default):
                    found.append(job)
                if len(found) == limit or looked == _MOST_LOOKED_AT:
                    return Page(tuple(found), encode_cursor(letter))
        return Page(tuple(found), None)

    async def _letters(
        self, queues: Sequence[str], after: _Place | None, at_once: int
    ) -> AsyncIterator[list[_Place]]:
        """Letters of all queues behind `after`, newest first, then by queue, then by id."""
        sources = [self._of(queue, after) for queue in queues]
        heads = [
            (-first.at_ms, first.queue, first, source)
            for source in sources
            if (first := await anext(source, None))
        ]
        heapq.heapify(heads)
        batch: list[_Place] = []
        while heads:
            _, queue, letter, source = heads[0]
            batch.append(letter)
            if following := await anext(source, None):
                heapq.heapreplace(heads, (-following.at_ms, queue, following, source))
            else:
                heapq.heappop(heads)
            if len(batch) == at_once or not heads:
                yield batch
                batch = []

    async def _of(self, queue: str, after: _Place | None) -> AsyncIterator[_Place]:
        """A queue's letters. Of one ms they come in the reverse order of their ids."""
        newest = "+inf"
        if after:
            newest = f"{'' if queue >= after.queue else '('}{after.at_ms!r}"
        skipped = 0
        while True:
            page = await self._store.look(
                *("ZRANGE", keys.dead(queue), newest, "-inf", "BYSCORE", "REV"),
                *("LIMIT", skipped, _LETTERS_A_PAGE, "WITHSCORES"),
                otherwise=(),
            )
            for raw, score in zip(page[::2], page[1::2], strict=True):
                letter = _letter(raw, score, queue)
                if letter and not _passed(letter, after):
                    yield letter
            if len(page) < 2 * _LETTERS_A_PAGE:
                return
            skipped += _LETTERS_A_PAGE


def _letter(raw: bytes, score: bytes, queue: str) -> _Place | None:
    """None for a stranger's id that no answer could name, and for a time that is infinite."""
    job_id, at_ms = decoding.name(raw), decoding.finite(score)
    return None if job_id is None or at_ms is None else _Place(at_ms, queue, job_id)


def _passed(letter: _Place, after: _Place | None) -> bool:
    return (
        after is not None
        and (letter.at_ms, letter.queue) == (after.at_ms, after.queue)
        and letter.job_id >= after.job_id
    )


def _place(cursor: str | None) -> _Place | None:
    if cursor is None:
        return None
    try:
        place = decode_cursor(cursor, _Place)
        if not math.isfinite(place.at_ms):
            raise ValueError(place)
    except ValueError as error:
        raise InvalidQuery(
            "`cursor` is not one that GET /jobs?dead=true gave; leave it out to start at the "
            "newest letter."
        ) from error
    return place
