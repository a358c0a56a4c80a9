"""Every failure as one line that says what to do, and an exit code."""

from collections.abc import Iterator
from typing import Any, Final

from asyncinfer.cli.output import say_aside
from asyncinfer.errors import AsyncinferError, RequestError, StartError

EXIT_FAILED: Final = 1
EXIT_CANNOT_START: Final = 2
EXIT_NO_SERVER: Final = 3
EXIT_TIMED_OUT: Final = 4
EXIT_INTERRUPTED: Final = 130
EXIT_NOBODY_READS: Final = 141
"""As of a program that SIGPIPE ended."""

EXIT_CODES: Final = {
    0: "done",
    EXIT_FAILED: "something failed: a job, some rows, a check, or there is no such job or model",
    EXIT_CANNOT_START: "wrong usage, a wrong setting or file, or it cannot start",
    EXIT_NO_SERVER: "the server cannot be reached, is not ready, or does not let you in",
    EXIT_TIMED_OUT: "--timeout passed before the end; jobs that were sent go on",
    EXIT_INTERRUPTED: "interrupted with Ctrl-C",
}

_NO_SERVER_STATUS: Final = frozenset({401, 403, 429, 502, 503, 504})
_NO_SERVER_CODES: Final = frozenset({"connection_failed", "not_asyncinfer"})
_WRONG_USAGE_CODES: Final = frozenset({"wrong_address"})
_TIMED_OUT_CODES: Final = frozenset({"wait_timeout"})

_AT_A_TERMINAL: Final = {
    "Give the client one with api_key=, or set ASYNCINFER_API_KEY": "Set ASYNCINFER_API_KEY",
    "Give the client another key with api_key=, or set ASYNCINFER_API_KEY": (
        "Set ASYNCINFER_API_KEY to one that has it"
    ),
    "Client(url), or ASYNCINFER_URL": "--url, or ASYNCINFER_URL",
    "Give Client the": "Give --url the",
    "No model is the default; give model= one of:": (
        "No model is the default. Choose one with --model:"
    ),
    "give a dict with an array for each of": (
        "give a table with a column, or JSON objects with a key, for each of"
    ),
}
"""How the remedies of the Python client are called here."""


def complain(detail: str) -> None:
    for there, here in _AT_A_TERMINAL.items():
        detail = detail.replace(there, here)
    say_aside(f"asyncinfer: {detail}")


def refused(error: AsyncinferError | BaseExceptionGroup[Any]) -> int:
    """Several children may be refused at once, for one reason."""
    for detail in dict.fromkeys(details(error)):
        complain(detail)
    return exit_code(error)


def details(error: AsyncinferError | BaseExceptionGroup[Any]) -> Iterator[str]:
    """Task groups wrap what stops a start; raises the group again when it holds anything else."""
    if isinstance(error, AsyncinferError):
        yield error.detail
        return
    for one in error.exceptions:
        if not isinstance(one, StartError | BaseExceptionGroup):
            raise error
        yield from details(one)


def exit_code(error: AsyncinferError | BaseExceptionGroup[Any]) -> int:
    if isinstance(error, StartError | BaseExceptionGroup) or error.code in _WRONG_USAGE_CODES:
        return EXIT_CANNOT_START
    if error.code in _TIMED_OUT_CODES:
        return EXIT_TIMED_OUT
    status = error.status if isinstance(error, RequestError) else 0
    if status in _NO_SERVER_STATUS or error.code in _NO_SERVER_CODES:
        return EXIT_NO_SERVER
    return EXIT_FAILED
