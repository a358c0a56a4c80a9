"""Dead letters: the listing of jobs that failed for good though another try might have helped."""

import sys
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Final

from msgspec import Meta, Struct

from asyncinfer.repository import keys
from asyncinfer.repository.inspect.cursors import encode_cursor, parse_cursor
from asyncinfer.repository.inspect.listing import Page, merge_sorted, newest_members
from asyncinfer.repository.inspect.selection import Filter
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import StoredJob, read_jobs
from asyncinfer.untrusted import decoding

_MAX_LETTERS_AT_ONCE: Final = 100
_MAX_LETTERS_READ: Final = 20_000


class _Letter(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A dead letter: when it was added, to which queue, and its job."""

    at_ms: Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
    queue: str
    job_id: str


class DeadLetters:
    """Lists the jobs in `{Q}:dead` of each queue."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def jobs(self, wanted: Filter, *, limit: int = 100, cursor: str | None = None) -> Page:
        """The dead letters that match a filter, newest first; raises InvalidQuery for a bad cursor.

        A page may have fewer jobs than `limit` and still a cursor: a call looks at 20,000 letters
        at most.
        """
        default = await self._store.default_model()
        found: list[StoredJob] = []
        read_count = 0
        async for letters in self._letters(
            await self._store.queues_of(wanted.model, default),
            parse_cursor(cursor, _Letter),
            min(limit, _MAX_LETTERS_AT_ONCE),
        ):
            jobs = await read_jobs(self._store, [letter.job_id for letter in letters])
            for letter, job in zip(letters, jobs, strict=True):
                read_count += 1
                if job and wanted.matches(job, default):
                    found.append(job)
                if len(found) == limit or read_count == _MAX_LETTERS_READ:
                    return Page(tuple(found), encode_cursor(letter))
        return Page(tuple(found), None)

    async def _letters(
        self, queues: Sequence[str], after: _Letter | None, at_once: int
    ) -> AsyncIterator[list[_Letter]]:
        """Pages of the letters of all queues behind `after`: newest first, then by queue, then by
        id."""
        sources = [self._letters_of(queue, after) for queue in queues]
        batch: list[_Letter] = []
        async for letter in merge_sorted(sources, lambda letter: (-letter.at_ms, letter.queue)):
            batch.append(letter)
            if len(batch) == at_once:
                yield batch
                batch = []
        if batch:
            yield batch

    async def _letters_of(self, queue: str, after: _Letter | None) -> AsyncIterator[_Letter]:
        """The letters of a queue, newest first; those of one ms in the reverse order of their
        ids."""
        newest = "+inf"
        if after:
            newest = f"{'' if queue >= after.queue else '('}{after.at_ms!r}"
        async for raw, score in newest_members(self._store, keys.dead(queue), newest):
            letter = _parse_letter(raw, score, queue)
            if letter and not _is_listed(letter, after):
                yield letter


def _parse_letter(raw: bytes, score: bytes, queue: str) -> _Letter | None:
    """None for an external id that is not text, since no response could name it, and for an
    infinite time."""
    job_id, at_ms = decoding.name(raw), decoding.finite(score)
    return None if job_id is None or at_ms is None else _Letter(at_ms, queue, job_id)


def _is_listed(letter: _Letter, after: _Letter | None) -> bool:
    """Whether a letter of the same ms and queue as the cursor's was on an earlier page."""
    return (
        after is not None
        and (letter.at_ms, letter.queue) == (after.at_ms, after.queue)
        and letter.job_id >= after.job_id
    )
