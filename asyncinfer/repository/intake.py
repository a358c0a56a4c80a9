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
    """Calls the script on one queue, and returns its reply. Raises as `Store.call`."""
    names = [queue, keys.queues(store.queue_name)]
    return await store.call(script("submit"), names, args, before_send)


async def why_no_jobs(store: Store) -> Refused | None:
    """Why the server takes no new jobs now, None if it does. Raises RedisUnavailable, or another
    kind of it."""
    try:
        await submit_without_room(store)
    except PermissionDenied as error:
        if store.report:
            store.report.refusal.refused(error.code, error.detail)
        return error
    except (StorageFull, WritesRefused) as error:
        return error
    if store.report:
        store.report.refusal.ended()
    return None


async def submit_without_room(store: Store) -> None:
    """Submits a job to a queue without room, which writes nothing; but the server refuses the
    script as it refuses that of any other submit, also if it denies this user a command or a key
    that only a job with options needs. Raises as `Store.call`."""
    n = store.queue_name
    limits = {**store.policy.capacity_arguments(), "max_queue": 0, "default_queue": n}
    # No model has this name, so the queue has no keys.
    queue = keys.queue(n, "-", None)
    await call_submit(store, queue, [encode_args(limits), "probe", b"", b"", b""])
