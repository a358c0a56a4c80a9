"""Exit codes, and errors as lines on stderr that say what to do."""

from collections.abc import Iterator
from typing import Any, Final

from asyncinfer.cli.output import say_on_stderr
from asyncinfer.errors import AsyncinferError, RequestError, StartError

EXIT_FAILED: Final = 1
EXIT_CANNOT_START: Final = 2
EXIT_NO_SERVER: Final = 3
EXIT_TIMED_OUT: Final = 4
EXIT_INTERRUPTED: Final = 130
EXIT_BROKEN_PIPE: Final = 141
"""128 + 13: the code that a shell reports for a program that SIGPIPE ended."""

EXIT_CODES: Final = {
    0: "done",
    EXIT_FAILED: "a job, a row or a check failed, or there is no such job or model",
    EXIT_CANNOT_START: "wrong usage, setting or file, or the service cannot start",
    EXIT_NO_SERVER: "the server cannot be reached, is not ready, or refuses your API key",
    EXIT_TIMED_OUT: "--timeout passed before the end; jobs that were submitted go on",
    EXIT_INTERRUPTED: "interrupted with Ctrl-C",
}

_NO_SERVER_STATUS: Final = frozenset({401, 403, 429, 502, 503, 504})
_NO_SERVER_CODES: Final = frozenset({"connection_failed", "not_asyncinfer"})
_WRONG_USAGE_CODES: Final = frozenset({"wrong_address"})
_TIMED_OUT_CODES: Final = frozenset({"wait_timeout"})

_TERMINAL_WORDING: Final = {
    "Give the client one with api_key=, or set ASYNCINFER_API_KEY": "Set ASYNCINFER_API_KEY",
    "Give the client another key with api_key=, or set ASYNCINFER_API_KEY": (
        "Set ASYNCINFER_API_KEY to one that has it"
    ),
    "ca=, or ASYNCINFER_CA": "--ca, or ASYNCINFER_CA",
    "Client(url), or ASYNCINFER_URL": "--url, or ASYNCINFER_URL",
    "Give Client the": "Give --url the",
    "No model is the default; give model= one of:": (
        "No model is the default. Choose one with --model:"
    ),
    "give a dict with an array for each of": (
        "give a table with a column, or JSON objects with a key, for each of"
    ),
}
"""Remedies in errors of the Python client, and how a user of the command line applies them."""


def say_error(detail: str) -> None:
    """Writes `asyncinfer: ` and an error to stderr, as one line.

    Advice for Python users becomes advice for a shell.
    """
    say_on_stderr(f"asyncinfer: {in_terminal_words(detail)}")


def in_terminal_words(detail: str) -> str:
    """An error of the Python client, with advice for a shell."""
    for python_wording, wording in _TERMINAL_WORDING.items():
        detail = detail.replace(python_wording, wording)
    return detail


def report_error(error: AsyncinferError | BaseExceptionGroup[Any]) -> int:
    """Says each distinct detail of an error on stderr and returns the exit code.

    A group may hold several children's errors of one reason, which is said once. Raises the group
    again, and says nothing, if it holds another exception than StartErrors.
    """
    for detail in dict.fromkeys(details(error)):
        say_error(detail)
    return exit_code(error)


def details(error: AsyncinferError | BaseExceptionGroup[Any]) -> Iterator[str]:
    """The messages of an error, or of the StartErrors in a task group's error, with repeats.

    Raises the group again if it holds any other exception.
    """
    if isinstance(error, AsyncinferError):
        yield error.detail
        return
    for inner in error.exceptions:
        if not isinstance(inner, StartError | BaseExceptionGroup):
            raise error
        yield from details(inner)


def exit_code(error: AsyncinferError | BaseExceptionGroup[Any]) -> int:
    """The exit code of an error, one of EXIT_CODES: by its class, its code and its HTTP status."""
    if isinstance(error, StartError | BaseExceptionGroup) or error.code in _WRONG_USAGE_CODES:
        return EXIT_CANNOT_START
    if error.code in _TIMED_OUT_CODES:
        return EXIT_TIMED_OUT
    status = error.status if isinstance(error, RequestError) else 0
    if status in _NO_SERVER_STATUS or error.code in _NO_SERVER_CODES:
        return EXIT_NO_SERVER
    return EXIT_FAILED
