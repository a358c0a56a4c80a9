"""The audit log: a listing of the audit entries, by action and tenant."""

import sys
from collections.abc import AsyncIterator
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from asyncinfer.repository import keys
from asyncinfer.repository.audit import StoredEntry
from asyncinfer.repository.inspect.cursors import encode_cursor, parse_cursor
from asyncinfer.repository.inspect.listing import merge_sorted, newest_members
from asyncinfer.repository.store import Store
from asyncinfer.schemas.operations import AuditEntry, AuditList
from asyncinfer.untrusted import decoding

_MAX_ENTRIES_READ: Final = 20_000
_MAX_TIME: Final = sys.float_info.max

_decode = decoding.lenient_decoder(msgspec.json.Decoder(StoredEntry).decode)


class _Place(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The place of an entry: its time, which of the sorted sets has it, and its id."""

    at_ms: Annotated[float, Meta(ge=-_MAX_TIME, le=_MAX_TIME)]
    source: Annotated[int, Meta(ge=0, le=1)]
    entry_id: str


class AuditLog:
    """Reads the entries that `AuditEntries` adds."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def page(
        self,
        *,
        action: str | None = None,
        tenant: str | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> AuditList:
        """The entries that match, newest first; raises InvalidQuery for a bad cursor.

        `tenant` selects what its keys did and what was done to its jobs alone. A page may have
        fewer entries than `limit` and still a cursor: a call reads 20,000 at most.
        """
        after = parse_cursor(cursor, _Place)
        sources = [
            self._entries(name, source, after)
            for source, name in enumerate(keys.audit(self._store.queue_name))
        ]
        found: list[AuditEntry] = []
        unreadable = read_count = 0
        async for at_ms, source, stored in merge_sorted(sources, lambda item: (-item[0], item[1])):
            read_count += 1
            entry = _entry(stored, at_ms)
            if stored is None or entry is None:
                unreadable += 1
            elif action in (None, entry.action) and _concerns(entry, tenant):
                found.append(entry)
            if len(found) == limit or read_count == _MAX_ENTRIES_READ:
                place = _Place(at_ms, source, stored.id if stored else "")
                return AuditList(found, unreadable, encode_cursor(place))
        return AuditList(found, unreadable, None)

    async def _entries(
        self, name: str, source: int, after: _Place | None
    ) -> AsyncIterator[tuple[float, int, StoredEntry | None]]:
        """The time, the source and the entry of each member behind `after`, newest first; None for
        a member that is no entry."""
        newest = "+inf"
        if after:
            newest = f"{'' if source >= after.source else '('}{after.at_ms!r}"
        async for member, score in newest_members(self._store, name, newest):
            at_ms = max(-_MAX_TIME, min(float(score), _MAX_TIME))
            stored = _decode(member)
            if stored is None or not _is_listed(at_ms, source, stored, after):
                yield at_ms, source, stored


def _is_listed(at_ms: float, source: int, stored: StoredEntry, after: _Place | None) -> bool:
    """Whether an entry of the same time as the cursor's was on an earlier page."""
    return (
        after is not None
        and (at_ms, source) == (after.at_ms, after.source)
        and stored.id >= after.entry_id
    )


def _entry(stored: StoredEntry | None, at_ms: float) -> AuditEntry | None:
    """The entry as answers show it; None for none, and for a time that RFC 3339 cannot express."""
    at = decoding.time(at_ms)
    if stored is None or at is None:
        return None
    return AuditEntry(
        at=at,
        action=stored.action,
        tenant=stored.tenant,
        key=stored.key,
        filter=dict(stored.filter),
        jobs=stored.jobs,
        outcome=stored.outcome,
    )


def _concerns(entry: AuditEntry, tenant: str | None) -> bool:
    """Whether a key of the tenant did it, or it was done to the tenant's jobs alone."""
    return tenant is None or tenant in (entry.tenant, entry.filter.get("tenant"))
