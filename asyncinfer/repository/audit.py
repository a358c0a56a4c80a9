"""The audit entries in Redis: what was done to many jobs, to models and across tenants."""

from collections.abc import Mapping
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from asyncinfer.jobs import new_id
from asyncinfer.repository import keys
from asyncinfer.repository.store import Store

DONE: Final = "done"
BROKEN_OFF: Final = "broken_off"

_MAX_ENTRIES: Final = 10_000
_MAX_AGE_SECONDS: Final = 90 * 24 * 3600
_MAX_CHARACTERS: Final = 128

_Text = Annotated[str, Meta(max_length=_MAX_CHARACTERS)]
_Number = Annotated[int, Meta(ge=0, le=1 << 53)]


class StoredEntry(Struct, frozen=True, kw_only=True):
    """A member of the sorted sets, whose score is the time."""

    # The first field: entries of the same time are in the order of their ids.
    id: _Text
    action: _Text
    tenant: _Text | None = None
    key: _Text | None = None
    filter: Annotated[dict[_Text, _Text | _Number | bool], Meta(max_length=16)] = {}
    jobs: _Number | None = None
    outcome: _Text = DONE


class AuditEntries:
    """Adds entries; `inspect.audit_log` reads them."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def add(
        self,
        action: str,
        criteria: Mapping[str, str | int | bool],
        *,
        by: tuple[str, str | None] | None = None,
        jobs: int | None = None,
        outcome: str = DONE,
        of_tenants: bool = False,
    ) -> None:
        """Adds an entry once, also if its call is sent again, and removes what exceeds the bounds.

        `by` is the tenant that acted and the shown part of its key. `of_tenants` puts it with those
        that tenants can make, who cannot push out the others. Raises RedisUnavailable and
        StorageFull.
        """
        # By the server's clock, since entries are removed by their age; in microseconds, since
        # several may be added in one ms.
        seconds, micros = await self._store.command("TIME")
        at_ms = int(seconds) * 1000 + int(micros) / 1000
        entry = StoredEntry(
            id=new_id(int(at_ms)),
            action=action,
            tenant=by and by[0],
            key=by and by[1],
            filter={name: shortened(value) for name, value in criteria.items()},
            jobs=jobs,
            outcome=outcome,
        )
        name = keys.audit(self._store.queue_name)[of_tenants]
        await self._store.transaction(
            ("ZADD", name, repr(at_ms), msgspec.json.encode(entry)),
            ("ZREMRANGEBYRANK", name, 0, -_MAX_ENTRIES - 1),
            ("ZREMRANGEBYSCORE", name, "-inf", repr(at_ms - _MAX_AGE_SECONDS * 1000)),
            ("EXPIRE", name, _MAX_AGE_SECONDS),
        )


def shortened(value: str | int | bool) -> str | int | bool:
    """The value; a string without what exceeds 128 characters."""
    return value[:_MAX_CHARACTERS] if isinstance(value, str) else value
