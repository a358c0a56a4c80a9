"""Translation of redis-py's exceptions into the errors of this package."""

import re
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
from asyncinfer.tls_errors import TlsFault, TlsProblem, tls_fault

_TRANSIENT_CODES: Final = ("BUSY", "UNBLOCKED")
"""Codes of refusals that pass by themselves: a slow script, a fail-over."""

_WRITE_REFUSALS: Final[dict[str, type[WritesRefused]]] = {
    "MISCONF": DiskFull,
    "NOREPLICAS": TooFewReplicas,
    "READONLY": ReadOnlyReplica,
}
"""Codes by which a server refuses every write; the call did nothing."""

_NOT_PRIMARY_ERRORS: Final = (redis_errors.ReadOnlyError, redis_errors.MasterDownError)

NO_REPLY_ERRORS: Final = (
    redis_errors.ConnectionError,
    redis_errors.TimeoutError,
    OSError,
    redis_errors.InvalidResponse,  # another program than Redis answers
)

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
        return RedisUnavailable(_why_unavailable(error), retry_after_seconds=1)
    if is_transient(error):
        return RedisUnavailable(
            f"Redis cannot do this just now ({error}). Retry in a moment.", retry_after_seconds=1
        )
    if str(error).startswith("WRONGTYPE"):
        return wrong_type_error()
    if refusal := acl_refusal(error):
        denied = PermissionDenied(f"{refusal}.", retry_after_seconds=1)
        denied.may_have_run = _denied_command(error) not in _SCRIPT_CALLS
        return denied
    return RedisRefused(
        f"Redis refused a command ({error}). A key may have another type than it should.",
        retry_after_seconds=1,
    )


def log_refused(log: LimitedLog, role: str, error: RedisUnavailable) -> None:
    """Logs what Redis refuses a role of this process. The store reports outages and refused writes,
    once for all roles."""
    if isinstance(error, RedisRefused):
        log.warning(f"{role}: {error.detail}")


def _why_unavailable(error: Exception) -> str:
    """Without the address of the server, since any client of the API may read it."""
    if isinstance(error, redis_errors.AuthenticationError):
        return "Redis refuses the login of this service."
    if fault := tls_fault(error):
        return f"Redis cannot be reached: {fault}."
    if isinstance(error, redis_errors.InvalidResponse):
        return "Redis cannot be reached: another program answers at its address."
    return f"Redis does not answer ({type(error).__name__}). Retry in a moment."


def server_refusal(error: Exception, database: int) -> str | None:
    """Why the server refuses this user, or the database, with the remedy; None for an error that
    may pass."""
    if isinstance(error, redis_errors.AuthenticationError):
        return login_refusal(error)
    if "DB index is out of range" in str(error):
        return (
            f"This server has no database {database}. Give REDIS_URL one that it has, or raise "
            "`databases` in its configuration"
        )
    return acl_refusal(error)


def login_refusal(error: Exception, *, is_sentinel: bool = False) -> str:
    """Why a server or sentinel lets nobody in, with the remedy."""
    reason = str(error).partition(". ")[0].rstrip(".")
    if is_sentinel:
        return (
            f"it refuses the login ({reason}). Give its user and password as the options "
            "sentinel_username and sentinel_password of REDIS_URL"
        )
    return (
        f"Redis refuses the login ({reason}). Put user and password into REDIS_URL: "
        "redis://user:password@host:6379, or redis://:password@host:6379 without a user"
    )


_TLS_REMEDIES: Final = {
    TlsProblem.UNTRUSTED: "Name the CA that signed it in REDIS_URL: ?ssl_ca_certs=/path/to/ca.pem",
    TlsProblem.EXPIRED: "Renew it on the server",
    TlsProblem.NOT_YET_VALID: "Compare the clocks of both machines",
    TlsProblem.OTHER_NAME: "Use a name that it has, or have it issued for this one",
    TlsProblem.NO_TLS: "Use redis://, or give its TLS port",
    TlsProblem.CERTIFICATE_WANTED: "Give ssl_certfile and ssl_keyfile in REDIS_URL, signed by a CA "
    "that it trusts",
    TlsProblem.OTHER: "Compare the TLS versions and ciphers of both sides",
}


def tls_refusal(fault: TlsFault) -> str:
    """Why TLS to a server failed, with the remedy."""
    return f"{fault}. {_TLS_REMEDIES[fault.problem]}"


_DENIED_COMMAND: Final = re.compile(r"o permissions to run the '([^']+)' command")
_DENIED_KEY: Final = ("o permissions to access", "can't access at least one of the keys")
_DENIED_IN_SCRIPT: Final = "can't run this command or subcommand"

_RIGHTS: Final = {
    **dict.fromkeys(("eval", "evalsha", "fcall", "function"), "+@scripting"),
    **dict.fromkeys(("multi", "exec"), "+@transaction"),
    **dict.fromkeys(("client", "select"), "+@connection"),
    "info": "+info",
    "time": "+time",
    "config": "+config|get",
}
"""The right of the page on security by command; of all others it is `_KEY_RIGHTS`."""

_KEY_RIGHTS: Final = "+@read +@write"

_SCRIPT_RIGHTS: Final = f"{_KEY_RIGHTS} +time"
"""Of the commands inside of scripts; Redis does not say which of them it denies."""

_SCRIPT_CALLS: Final = ("eval", "evalsha", "fcall", "function|load")


def acl_refusal(error: Exception) -> str | None:
    """Which right the ACL of the server's user lacks, and how to give it; None for any other
    error. The words are those of Redis 7 and of Valkey, also for commands inside of scripts."""
    text = str(error)
    if command := _denied_command(error):
        right = _RIGHTS.get(command.partition("|")[0], _KEY_RIGHTS)
        what = f"to run {command.upper().replace('|', ' ')}"
    elif any(words in text for words in _DENIED_KEY):
        right = "~job:* ~QUEUE_NAME* ~{QUEUE_NAME* (with your QUEUE_NAME)"
        what = "to use a key that asyncinfer needs"
    elif _DENIED_IN_SCRIPT in text:
        right, what = _SCRIPT_RIGHTS, "to run a command that a script needs"
    elif isinstance(error, redis_errors.NoPermissionError):
        right, what = "the rights that it needs", f"that ({text})"
    else:
        return None
    return (
        f"The Redis user has no permission {what} (NOPERM). Give it {right} with ACL SETUSER; "
        "docs/security.md has all rights"
    )


def _denied_command(error: Exception) -> str:
    """The command that the ACL denies, in lower case; empty if the error names none."""
    found = _DENIED_COMMAND.search(str(error))
    return found[1].lower() if found else ""


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
