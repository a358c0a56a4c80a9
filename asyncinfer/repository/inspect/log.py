"""What the logs tell: each change of each job, in order, from any place on."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from asyncinfer.errors import WrongKeyType
from asyncinfer.jobs import Status
from asyncinfer.repository import keys
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import Stored, parse_summary, summary_keys
from asyncinfer.untrusted import decoding

_MOST: Final = (1 << 63) - 1

_Part = Annotated[int, Meta(ge=0, le=_MOST)]
Place = tuple[_Part, _Part, _Part]
"""Somewhere in a log: an entry's ms and number, and how many of its jobs are before."""

_SAYS: Final[dict[bytes, Status]] = {
    b"submitted": "pending",
    b"pending": "pending",
    b"processing": "processing",
    b"completed": "completed",
    b"failed": "failed",
    b"cancelled": "cancelled",
}
"""What a word of an entry means; `stranger` stands beside a `processing` of the same job."""


class Change(Struct, frozen=True, cache_hash=True):
    """A job that has come to a status."""

    queue: str
    place: Place
    job_id: str
    status: Status

    @property
    def after(self) -> Place:
        ms, number, passed = self.place
        return (ms, number, passed + 1)


class LogPage(Struct, frozen=True):
    """Changes from one place of a log to another; `end` is where the next page begins."""

    changes: list[Change]
    end: Place
    more: bool


class LogTrimmed(Exception):
    """The log no longer reaches back to where it should be read from."""


class Log:
    """Reads the logs; each queue has its own."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def page(
        self, queue: str, start: Place, most_entries: int = 200, most_changes: int = 5000
    ) -> LogPage:
        """The changes from `start` on; raises LogTrimmed when some of them may be gone. A page ends
        with the entry that makes it `most_changes` long, since an entry may tell of hundreds."""
        name = keys.log(queue)
        entries = await self._store.look(
            *("XRANGE", name, f"{start[0]}-{start[1]}", "+", "COUNT", most_entries),
            otherwise=(),
        )
        if not entries:
            await self._check_clock(name, start)
            return LogPage([], start, more=False)
        # Asked for afterwards: what was there to be read a moment ago has not been cut before.
        await self._check_reach(name, start)
        changes: list[Change] = []
        used = 0
        for entry_id, fields in entries:
            changes += [one for one in changes_in(queue, entry_id, fields) if one.place >= start]
            used += 1
            if len(changes) >= most_changes:
                break
        more = used < len(entries) or len(entries) == most_entries
        return LogPage(changes, _after(entries[used - 1][0]), more)

    async def reaches(self, queue: str, end: bytes) -> bool:
        """Whether the log still has all that came after this entry."""
        name = keys.log(queue)
        if not await self._store.command("EXISTS", name):
            return end == b"0-0"
        about = await self._store.look("XINFO STREAM", name, otherwise=None)
        # A key of another type has nothing that could be missed.
        return about is None or _reaches(about, _after(end))

    async def _check_reach(self, name: str, start: Place) -> None:
        about = await self._store.command("XINFO STREAM", name)
        if not _reaches(about, start):
            raise LogTrimmed

    async def _check_clock(self, name: str, start: Place) -> None:
        """Raises LogTrimmed for a place that is ahead of the log and of the server's clock: it is
        of another log, and the next entries of this one come before it."""
        if start[0] <= await self._store.time_ms():
            return
        (ends,) = await self.last_generated([name])
        if start > _after(ends):
            raise LogTrimmed

    async def replaced(self, ends: Mapping[str, bytes]) -> set[str]:
        """The queues whose log is another than the one that was read to these entries: its
        newest entry and the server's clock are before them."""
        if not ends or max(map(entry_order, ends.values()))[0] <= await self._store.time_ms():
            return set()
        names = [keys.log(queue) for queue in ends]
        newest = await self.last_generated(names)
        return {
            queue
            for (queue, end), last in zip(ends.items(), newest, strict=True)
            if entry_order(last) < entry_order(end)
        }

    async def last_generated(self, names: Sequence[str]) -> list[bytes]:
        """The newest id that each log has given, also where that entry was cut since."""
        newest = []
        for name in names:
            there = await self._store.command("EXISTS", name)
            about = await self._store.look("XINFO STREAM", name, otherwise={}) if there else {}
            newest.append(bytes(about.get("last-generated-id", b"0-0")))
        return newest

    async def last(self, queue: str) -> bytes:
        """The id of the newest entry."""
        entries = await self._store.look(*_newest(queue), otherwise=())
        return bytes(entries[0][0]) if entries else b"0-0"

    async def moment(self, queue: str, job_id: str) -> tuple[Stored | None, Place]:
        """A job without its result, and where the log tells what comes after exactly this."""
        ask = ("MGET", *summary_keys(job_id))
        try:
            entries, found = await self._store.together(_newest(queue), ask)
        except WrongKeyType:
            entries, found = (), await self._store.command(*ask)
        return parse_summary(job_id, found), _after(entries[0][0]) if entries else (0, 0, 0)


def changes_in(queue: str, entry_id: bytes, fields: dict[bytes, bytes]) -> list[Change]:
    """What one entry tells. A job whose id is no text has no name here, and keeps its place."""
    ms, number, passed = _before(entry_id)
    changes = []
    for word, packed in fields.items():
        ids = ids_in(packed)
        if status := _SAYS.get(word):
            changes += [
                Change(queue, (ms, number, i), job_id, status)
                for i, job_id in enumerate(ids, passed)
                if job_id
            ]
        passed += len(ids)
    return changes


def entry_order(entry_id: bytes) -> tuple[int, int]:
    """Sorts ids of a stream as the stream does."""
    ms, _, number = entry_id.partition(b"-")
    return int(ms), int(number or 0)


def appearing(fields: dict[bytes, bytes]) -> list[str]:
    """The ids that an entry names for the first time; a stranger's appears when claimed."""
    ids = []
    for field in (b"submitted", b"stranger"):
        if packed := fields.get(field):
            ids += [one for one in ids_in(packed) if one]
    return ids[::-1]


_raw_ids = decoding.reader(msgspec.msgpack.Decoder(list[msgspec.Raw]).decode)
_ids = decoding.reader(msgspec.msgpack.Decoder(list[str]).decode)
_id = decoding.reader(msgspec.msgpack.Decoder(str).decode)


def ids_in(packed: bytes) -> list[str | None]:
    """The ids of an entry's word; None for each that is not text, which JSON cannot name."""
    ids = _ids(packed)
    return list(ids) if ids is not None else [_id(bytes(one)) for one in _raw_ids(packed) or ()]


def _reaches(about: Mapping[str, Any], start: Place) -> bool:
    """Whether a log, as XINFO STREAM describes it, has all entries from `start` on."""
    first = about["first-entry"]
    if about["entries-added"] == about["length"] or first is None:
        return True
    return _before(first[0]) <= start


def _newest(queue: str) -> tuple[Any, ...]:
    return ("XREVRANGE", keys.log(queue), "+", "-", "COUNT", 1)


def _before(entry_id: bytes) -> Place:
    """Redis allows twice what a position can hold, in entries whose ids are no times."""
    ms, _, number = entry_id.partition(b"-")
    return (min(int(ms), _MOST), min(int(number), _MOST), 0)


def _after(entry_id: bytes) -> Place:
    ms, number, _ = _before(entry_id)
    return (ms, number + 1, 0) if number < _MOST else (min(ms + 1, _MOST), 0, 0)
