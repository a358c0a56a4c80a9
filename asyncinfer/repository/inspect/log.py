"""The logs of the queues: the status changes of all jobs, in order, from any place on."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from asyncinfer.errors import WrongKeyType
from asyncinfer.jobs import Status
from asyncinfer.repository import keys
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import StoredJob, parse_summary, summary_keys
from asyncinfer.untrusted import decoding

_MAX_NUMBER: Final = (1 << 63) - 1

_Number = Annotated[int, Meta(ge=0, le=_MAX_NUMBER)]
Place = tuple[_Number, _Number, _Number]
"""A place in a log: the ms and the number of an entry, and how many of its jobs come before."""

_STATUS_OF_FIELD: Final[dict[bytes, Status]] = {
    b"submitted": "pending",
    b"pending": "pending",
    b"processing": "processing",
    b"completed": "completed",
    b"failed": "failed",
    b"cancelled": "cancelled",
}
"""The status that a field of an entry means. An entry with `stranger` (an external job) has a
`processing` of the same job as well."""


class StatusChange(Struct, frozen=True, cache_hash=True):
    """A status change of a job."""

    queue: str
    place: Place
    job_id: str
    status: Status

    @property
    def after(self) -> Place:
        """The place right behind this change."""
        ms, number, passed = self.place
        return (ms, number, passed + 1)


class LogPage(Struct, frozen=True):
    """A part of a log."""

    changes: list[StatusChange]
    end: Place
    """Where the next page begins."""
    has_more: bool
    """Whether the log goes on, as far as is known."""


class LogTrimmed(Exception):
    """The log has been trimmed beyond the place to read from, or is another log."""


class Log:
    """Reads the logs, one for each queue."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def page(
        self, queue: str, start: Place, max_entries: int = 200, max_changes: int = 5000
    ) -> LogPage:
        """The changes from `start` on; raises LogTrimmed if some of them may be gone. A page ends
        with the entry that brings it to `max_changes`, since an entry may hold hundreds."""
        name = keys.log(queue)
        entries = await self._store.read(
            *("XRANGE", name, f"{start[0]}-{start[1]}", "+", "COUNT", max_entries), otherwise=()
        )
        if not entries:
            await self._check_clock(name, start)
            return LogPage([], start, has_more=False)
        # Checked after the read: if the log still reaches back now, nothing was missing before.
        await self._check_reach(name, start)
        changes: list[StatusChange] = []
        used = 0
        for entry_id, fields in entries:
            entry_changes = parse_changes(queue, entry_id, fields)
            changes += [change for change in entry_changes if change.place >= start]
            used += 1
            if len(changes) >= max_changes:
                break
        more = used < len(entries) or len(entries) == max_entries
        return LogPage(changes, _after(entries[used - 1][0]), more)

    async def has_all_after(self, queue: str, end: bytes) -> bool:
        """Whether the log still has all entries that came after this one."""
        name = keys.log(queue)
        if not await self._store.command("EXISTS", name):
            return end == b"0-0"
        info = await self._store.read("XINFO STREAM", name, otherwise=None)
        # A key of the wrong type has no entries that could be missed.
        return info is None or _reaches_back_to(info, _after(end))

    async def _check_reach(self, name: str, start: Place) -> None:
        info = await self._store.command("XINFO STREAM", name)
        if not _reaches_back_to(info, start):
            raise LogTrimmed

    async def _check_clock(self, name: str, start: Place) -> None:
        """Raises LogTrimmed for a place ahead of the log and of the server's clock: it belongs to
        another log, and the next entries of this one will come before it."""
        if start[0] <= await self._store.time_ms():
            return
        (last_id,) = await self.last_generated([name])
        if start > _after(last_id):
            raise LogTrimmed

    async def find_replaced(self, ends: Mapping[str, bytes]) -> set[str]:
        """The queues whose log is not the one that was read up to the given entries, {queue: entry
        id}: the log's newest entry and the server's clock are before them."""
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
        """The last id that each log has generated, even if that entry has been trimmed since."""
        last_ids = []
        for name in names:
            exists = await self._store.command("EXISTS", name)
            info = await self._store.read("XINFO STREAM", name, otherwise={}) if exists else {}
            last_ids.append(bytes(info.get("last-generated-id", b"0-0")))
        return last_ids

    async def last_entry_id(self, queue: str) -> bytes:
        """The id of the newest entry; `0-0` for an empty log."""
        entries = await self._store.read(*_read_newest(queue), otherwise=())
        return bytes(entries[0][0]) if entries else b"0-0"

    async def read_job_and_place(self, queue: str, job_id: str) -> tuple[StoredJob | None, Place]:
        """A job without its result, and the place in the log of the first change after this state:
        both are read in one transaction."""
        read_job = ("MGET", *summary_keys(job_id))
        try:
            entries, values = await self._store.transaction(_read_newest(queue), read_job)
        except WrongKeyType:
            entries, values = (), await self._store.command(*read_job)
        return parse_summary(job_id, values), _after(entries[0][0]) if entries else (0, 0, 0)


def parse_changes(queue: str, entry_id: bytes, fields: dict[bytes, bytes]) -> list[StatusChange]:
    """The changes in an entry. A job whose id is not text is left out, but counts for the places of
    the others."""
    ms, number, index = _before(entry_id)
    changes = []
    for field, packed in fields.items():
        ids = decode_ids(packed)
        if status := _STATUS_OF_FIELD.get(field):
            changes += [
                StatusChange(queue, (ms, number, i), job_id, status)
                for i, job_id in enumerate(ids, index)
                if job_id
            ]
        index += len(ids)
    return changes


def entry_order(entry_id: bytes) -> tuple[int, int]:
    """A sort key that orders ids as the stream does."""
    ms, _, number = entry_id.partition(b"-")
    return int(ms), int(number or 0)


def first_ids(fields: dict[bytes, bytes]) -> list[str]:
    """The ids of jobs that first appear in an entry, the newest first; an external job appears when
    it is claimed."""
    ids = []
    for field in (b"submitted", b"stranger"):
        if packed := fields.get(field):
            ids += [job_id for job_id in decode_ids(packed) if job_id]
    return ids[::-1]


_decode_raw = decoding.lenient_decoder(msgspec.msgpack.Decoder(list[msgspec.Raw]).decode)
_decode_ids = decoding.lenient_decoder(msgspec.msgpack.Decoder(list[str]).decode)
_decode_id = decoding.lenient_decoder(msgspec.msgpack.Decoder(str).decode)


def decode_ids(packed: bytes) -> list[str | None]:
    """The ids in a field of an entry; None for each that is not text and so not possible in
    JSON."""
    ids = _decode_ids(packed)
    if ids is not None:
        return list(ids)
    return [_decode_id(bytes(raw_id)) for raw_id in _decode_raw(packed) or ()]


def _reaches_back_to(info: Mapping[str, Any], start: Place) -> bool:
    """Whether a log, as XINFO STREAM describes it, has all entries from `start` on."""
    first = info["first-entry"]
    if info["entries-added"] == info["length"] or first is None:
        return True
    return _before(first[0]) <= start


def _read_newest(queue: str) -> tuple[Any, ...]:
    return ("XREVRANGE", keys.log(queue), "+", "-", "COUNT", 1)


def _before(entry_id: bytes) -> Place:
    """The place right before an entry, within the bounds of a place: Redis allows larger numbers in
    ids that are not times."""
    ms, _, number = entry_id.partition(b"-")
    return (min(int(ms), _MAX_NUMBER), min(int(number), _MAX_NUMBER), 0)


def _after(entry_id: bytes) -> Place:
    ms, number, _ = _before(entry_id)
    return (ms, number + 1, 0) if number < _MAX_NUMBER else (min(ms + 1, _MAX_NUMBER), 0, 0)
