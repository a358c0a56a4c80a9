"""Whether this process can use the server, and its user has all rights; asked at the start."""

from collections.abc import Iterator
from contextlib import contextmanager

from asyncinfer.errors import (
    PermissionDenied,
    RedisRefused,
    ServerRefused,
    StorageFull,
    WritesRefused,
)
from asyncinfer.repository.intake import submit_without_room
from asyncinfer.repository.store import Store


async def check_start(store: Store) -> str:
    """The server's name and version. Raises as `Store.check_server` and `check_rights` do, and
    ServerRefused in place of PermissionDenied."""
    with denial_as_start_error():
        server = await store.check_server()
    await check_rights(store)
    return server


async def check_rights(store: Store) -> None:
    """Raises ServerRefused if the server's ACL denies this user one of the rights on the page on
    security; RedisUnavailable if it does not answer. Changes nothing."""
    # A submit without room shows all but the rights to a transaction and to commands beside it.
    for call in (submit_without_room, _read_the_clock):
        try:
            with denial_as_start_error():
                await call(store)
        except (RedisRefused, WritesRefused, StorageFull):
            # Of the state of the server, not of the rights of the user.
            continue


@contextmanager
def denial_as_start_error() -> Iterator[None]:
    """Raises ServerRefused in place of PermissionDenied, for a process that has not started yet."""
    try:
        yield
    except PermissionDenied as error:
        raise ServerRefused(error.detail) from error


async def _read_the_clock(store: Store) -> None:
    await store.transaction(("TIME",))
