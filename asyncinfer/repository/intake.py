"""Calls of the script `submit`: with new jobs, or to find out whether Redis takes any."""

from collections.abc import Sequence
from typing import Any

from asyncinfer.errors import PermissionDenied, StorageFull, WritesRefused
from asyncinfer.repository import keys
from asyncinfer.repository.link import BeforeSend
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Refused, Store, encode_args


async def call_submit(
    store: Store, queue: str, args: Sequence[Any], before_send: BeforeSend = lambda: None
) -> Any:
    """Calls the script on one queue, and returns its reply. Raises as `Store.call`; notes a denied
    permission, for `why_no_jobs`."""
    try:
        return await _submit(store, queue, args, before_send)
    except PermissionDenied as error:
        store.note_denied_submit(error)
        raise


async def why_no_jobs(store: Store) -> Refused | None:
    """Why the server takes no new jobs now, None if it does. Raises RedisUnavailable, or another
    kind of it."""
    try:
        await submit_without_room(store)
    except PermissionDenied as error:
        store.note_denied_submit(error)
        return error
    except (StorageFull, WritesRefused) as error:
        return error
    # A permission that only a job needs is found missing by real submits alone.
    if store.denied_submit is None and store.report:
        store.report.refusal.ended()
    return store.denied_submit


async def submit_without_room(store: Store) -> None:
    """Submits a job to a queue without room, which writes nothing; but the server refuses the
    script as it refuses that of any other submit. Raises as `Store.call`."""
    limits = encode_args({**store.policy.capacity_arguments(), "max_queue": 0})
    # No model has this name, so the queue has no keys.
    queue = keys.queue(store.queue_name, "-", None)
    await _submit(store, queue, [limits, "probe", b"", b"", b""])


async def _submit(
    store: Store, queue: str, args: Sequence[Any], before_send: BeforeSend = lambda: None
) -> Any:
    names = [queue, keys.queues(store.queue_name)]
    return await store.call(script("submit"), names, args, before_send)
