"""Whether this process can use the server, and its user has all rights; asked at the start."""

from asyncinfer.errors import (
    PermissionDenied,
    RedisRefused,
    ServerRefused,
    StorageFull,
    WritesRefused,
)
from asyncinfer.repository import keys
from asyncinfer.repository.intake import submit_without_room
from asyncinfer.repository.store import Store


async def check_start(store: Store) -> str:
    """The server's name and version. Raises as `Store.check_server` and `check_rights` do."""
    server = await store.check_server()
    await check_rights(store)
    return server


async def check_rights(store: Store) -> None:
    """Raises ServerRefused if the server's ACL denies this user one of the rights on the page on
    security; RedisUnavailable if it does not answer. Changes nothing."""
    # Without room a submit ends before its first write, and needs neither transaction nor clock.
    for call in (submit_without_room, _write_nothing):
        try:
            await call(store)
        except PermissionDenied as error:
            raise ServerRefused(error.detail) from error
        except (RedisRefused, WritesRefused, StorageFull):
            # Of the state of the server, not of the rights of the user.
            continue


async def _write_nothing(store: Store) -> None:
    await store.transaction(("SREM", keys.queues(store.queue_name), ""), ("TIME",))
