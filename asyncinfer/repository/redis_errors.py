"""What redis-py raises, as the errors of this package."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import redis.exceptions as redis_errors
from redis.asyncio import Redis

from asyncinfer.errors import (
    RedisRefused,
    RedisUnavailable,
    StorageFull,
    WritesRefused,
    WrongKeyType,
)

_PASSING: Final = ("BUSY", "UNBLOCKED")
"""Refusals for the state a server is in: a slow script, a fail-over."""


_NO_WRITES: Final = {
    "MISCONF": "it cannot save to its disk. Free space there; its log says more",
    "NOREPLICAS": "it has fewer replicas than its min-replicas-to-write. Start some",
    "READONLY": "it is a replica. That passes after a fail-over; else point REDIS_URL at the "
    "primary",
}
"""Refusals of every write, with what to do; nothing of the call was done."""


_NO_PRIMARY: Final = (redis_errors.ReadOnlyError, redis_errors.MasterDownError)


NO_REPLY: Final = (redis_errors.ConnectionError, redis_errors.TimeoutError, OSError)


FAILURES: Final = (*NO_REPLY, redis_errors.ResponseError)


WRONG_TYPE: Final = (
    "The key {} in Redis has another type than it should, so nothing is read from it. Rename or "
    "delete it."
)


@contextmanager
def translate_errors() -> Iterator[None]:
    """Turns what redis-py raises into our errors: StorageFull and RedisUnavailable's kinds."""
    try:
        yield
    except FAILURES as error:
        raise translation(error) from error


def translation(error: Exception) -> StorageFull | RedisUnavailable:
    """Our error for one of `FAILURES`."""
    if isinstance(error, redis_errors.OutOfMemoryError):
        return StorageFull(
            "Redis has reached its maxmemory, so new jobs are refused while those accepted still "
            "run. Retry later, or give Redis more memory."
        )
    if reason := why_no_writes(error):
        refused = WritesRefused(
            f"Redis takes no writes, since {reason}. Nothing was taken in; send it again then.",
            retry_after_seconds=1,
        )
        refused.is_disk_full = reason == _NO_WRITES["MISCONF"]
        return refused
    if not isinstance(error, redis_errors.ResponseError) or isinstance(error, _NO_PRIMARY):
        return RedisUnavailable(
            f"Redis does not answer ({type(error).__name__}). Retry in a moment.",
            retry_after_seconds=1,
        )
    if str(error).startswith(_PASSING):
        return RedisUnavailable(
            f"Redis cannot do this just now ({error}). Retry in a moment.",
            retry_after_seconds=1,
        )
    if str(error).startswith("WRONGTYPE"):
        return wrong_key_type()
    return RedisRefused(
        f"Redis refused a command ({error}). A key may have another type than it should.",
        retry_after_seconds=1,
    )


def why_no_writes(error: Exception) -> str | None:
    if isinstance(error, redis_errors.ReadOnlyError):
        # redis-py leaves out the code of the errors it has classes for.
        return _NO_WRITES["READONLY"]
    if not isinstance(error, redis_errors.ResponseError):
        return None
    return _NO_WRITES.get(str(error).partition(" ")[0])


def wrong_key_type(which: str = "") -> WrongKeyType:
    return WrongKeyType(
        f"A key in Redis has another type than it should{which}. Rename or delete it.",
        retry_after_seconds=1,
    )


async def failure_of(client: Redis, error: Exception) -> Exception:
    """`translation`, having left a server that has become a replica: behind one name may be
    another by now."""
    if isinstance(error, _NO_PRIMARY):
        await client.connection_pool.disconnect(inuse_connections=False)
    return translation(error)
