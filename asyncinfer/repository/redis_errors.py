"""Translation of redis-py's exceptions into the errors of this package."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import redis.exceptions as redis_errors

from asyncinfer.errors import (
    DiskFull,
    PermissionDenied,
    ReadOnlyReplica,
    RedisRefused,
    RedisUnavailable,
    StorageFull,
    TooFewReplicas,
    WritesRefused,
    WrongKeyType,
)
from asyncinfer.processes.limited_log import LimitedLog

_TRANSIENT_CODES: Final = ("BUSY", "UNBLOCKED")
"""Codes of refusals that pass by themselves: a slow script, a fail-over."""

_WRITE_REFUSALS: Final[dict[str, type[WritesRefused]]] = {
    "MISCONF": DiskFull,
    "NOREPLICAS": TooFewReplicas,
    "READONLY": ReadOnlyReplica,
}
"""Codes by which a server refuses every write; the call did nothing."""

_NOT_PRIMARY_ERRORS: Final = (redis_errors.ReadOnlyError, redis_errors.MasterDownError)

NO_REPLY_ERRORS: Final = (redis_errors.ConnectionError, redis_errors.TimeoutError, OSError)

CALL_ERRORS: Final = (*NO_REPLY_ERRORS, redis_errors.ResponseError)

WRONG_TYPE_WARNING: Final = (
    "The key {} in Redis has another type than it should, so nothing is read from it. Rename or "
    "delete it."
)


_CLASSES: Final[dict[str, type[Exception]]] = {
    "ERR": redis_errors.ResponseError,
    "LOADING": redis_errors.BusyLoadingError,
    "MASTERDOWN": redis_errors.MasterDownError,
    "NOAUTH": redis_errors.AuthenticationError,
    "NOPERM": redis_errors.NoPermissionError,
    "NOSCRIPT": redis_errors.NoScriptError,
    "OOM": redis_errors.OutOfMemoryError,
    "READONLY": redis_errors.ReadOnlyError,
    "WRONGPASS": redis_errors.AuthenticationError,
}
"""redis-py's classes by the code of an error; their messages are without it, as redis-py's are."""


def error_of_reply(text: str) -> Exception:
    """redis-py's exception for an error reply."""
    code, _, message = text.partition(" ")
    if message == "max number of clients reached":
        return redis_errors.MaxConnectionsError(message)
    kind = _CLASSES.get(code)
    return kind(message) if kind else redis_errors.ResponseError(text)


@contextmanager
def translate_errors() -> Iterator[None]:
    """Raises exceptions of redis-py as StorageFull or a kind of RedisUnavailable."""
    try:
        yield
    except CALL_ERRORS as error:
        raise translate(error) from error


def translate(error: Exception) -> StorageFull | RedisUnavailable:
    """The package's error for one of `CALL_ERRORS`."""
    if isinstance(error, redis_errors.OutOfMemoryError):
        return StorageFull(
            "Redis has reached its maxmemory, so new jobs are refused while those accepted still "
            "run; nothing was taken in. Retry later, or raise maxmemory (of the embedded Valkey: "
            "EMBEDDED_MAXMEMORY)."
        )
    if kind := write_refusal(error):
        return kind(
            f"Redis takes no writes, since {kind.reason}. Nothing was taken in; send the request "
            "again then.",
            retry_after_seconds=1,
        )
    if not isinstance(error, redis_errors.ResponseError) or isinstance(error, _NOT_PRIMARY_ERRORS):
        return RedisUnavailable(
            f"Redis does not answer ({type(error).__name__}). Retry in a moment.",
            retry_after_seconds=1,
        )
    if is_transient(error):
        return RedisUnavailable(
            f"Redis cannot do this just now ({error}). Retry in a moment.", retry_after_seconds=1
        )
    if str(error).startswith("WRONGTYPE"):
        return wrong_type_error()
    if isinstance(error, redis_errors.NoPermissionError):
        return PermissionDenied(
            f"The Redis user may not do this ({error}). Give it the permission; the page on "
            "security lists what it needs.",
            retry_after_seconds=1,
        )
    return RedisRefused(
        f"Redis refused a command ({error}). A key may have another type than it should.",
        retry_after_seconds=1,
    )


def log_refused(log: LimitedLog, role: str, error: RedisUnavailable) -> None:
    """Logs what Redis refuses a role of this process. The store reports outages and refused writes,
    once for all roles."""
    if isinstance(error, RedisRefused):
        log.warning(f"{role}: {error.detail}")


def is_transient(error: Exception) -> bool:
    """Whether a refusal passes by itself, so that the call can be sent again in a moment."""
    return isinstance(error, _NOT_PRIMARY_ERRORS) or str(error).startswith(_TRANSIENT_CODES)


def write_refusal(error: Exception) -> type[WritesRefused] | None:
    """The error of a server that refuses all writes; None for any other error."""
    if isinstance(error, redis_errors.ReadOnlyError):
        # redis-py strips the code from errors for which it has classes.
        return _WRITE_REFUSALS["READONLY"]
    if not isinstance(error, redis_errors.ResponseError):
        return None
    return _WRITE_REFUSALS.get(str(error).partition(" ")[0])


def wrong_type_error(which: str = "") -> WrongKeyType:
    """`which` continues the sentence with the keys."""
    return WrongKeyType(
        f"A key in Redis has another type than it should{which}. Rename or delete it.",
        retry_after_seconds=1,
    )


def is_not_primary(error: Exception) -> bool:
    """Whether the server has become a replica: its address may lead to another server by now."""
    return isinstance(error, _NOT_PRIMARY_ERRORS)
