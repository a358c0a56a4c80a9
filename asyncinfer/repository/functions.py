"""Calls of scripts: as functions of the library, or by EVALSHA where Redis refuses functions."""

import logging
from collections.abc import Generator, Sequence
from contextlib import suppress
from typing import Any, Final, TypeAlias

import redis.exceptions as redis_errors

from asyncinfer.jobs import now_ms
from asyncinfer.repository import keys
from asyncinfer.repository.redis_errors import is_transient, write_refusal
from asyncinfer.repository.scripts import Script, library

_log = logging.getLogger(__name__)

_UNKNOWN: Final = ("unknown command", "unknown subcommand")
_OURS: Final = ("'fcall'", "'function|load'")
"""As a refusal by the server's ACL names the commands, those inside a function apart."""

Call: TypeAlias = Generator[tuple[Any, ...], Any, Any]
"""The call of a script as a conversation with the server: it yields commands, and is sent each
reply or thrown each ResponseError. It returns the script's reply, or raises the last error."""


class Functions:
    """How one process calls scripts. The library is loaded when a call finds it missing: the server
    may be new, or have lost it. A server that refuses functions is not asked again; the scripts are
    called by EVALSHA then."""

    def __init__(self, queue_name: str) -> None:
        self._key = keys.libraries(queue_name)
        self.are_refused = False

    def call(self, verb: Script, names: Sequence[str], args: Sequence[Any]) -> Call:
        """Calls a script once; the library or the script is loaded first if the server lacks it."""
        keys_and_args = (len(names), *names, *args)
        if not self.are_refused:
            command = ("FCALL", verb.function, *keys_and_args)
            try:
                return (yield command)
            except redis_errors.ResponseError as error:
                if not _is_missing(error) and not self._note_refusal(error):
                    raise
            if not self.are_refused and (yield from self._load()):
                try:
                    return (yield command)
                except redis_errors.ResponseError as error:
                    # Another client may have removed it since.
                    if not _is_missing(error):
                        raise
        return (yield from _evaluate(verb, keys_and_args))

    def _load(self) -> Generator[tuple[Any, ...], Any, bool]:
        """Loads the library; returns whether the server has it then. It has not if it refuses
        functions, and while its memory is full: scripts run even then."""
        try:
            yield ("FUNCTION", "LOAD", library().text)
        except redis_errors.OutOfMemoryError:
            return False
        except redis_errors.ResponseError as error:
            if _is_loaded(error):
                return True
            if write_refusal(error) or is_transient(error):
                raise
            self._refuse(error)
            return False
        # A process that lives briefly names its library only here, and nobody else may know it.
        with suppress(redis_errors.ResponseError):
            yield ("HSET", self._key, library().name, now_ms())
        return True

    def _note_refusal(self, error: redis_errors.ResponseError) -> bool:
        """Whether an error means that the server refuses functions; notes that, if so."""
        text = str(error)
        is_forbidden = isinstance(error, redis_errors.NoPermissionError) and any(
            command in text for command in _OURS
        )
        if is_forbidden or text.startswith(_UNKNOWN):
            self._refuse(error)
        return self.are_refused

    def _refuse(self, error: redis_errors.ResponseError) -> None:
        # Several calls of this process may have been sent before the first refusal came.
        if not self.are_refused:
            _log.warning(
                "Redis refuses functions (%s), so that scripts are called by EVALSHA, which takes "
                "more of its CPU time. Allow this user FCALL and FUNCTION, then start again.",
                # An unknown command is quoted with its arguments, in which is what a job has.
                str(error).partition(", with args")[0],
            )
        self.are_refused = True


def _evaluate(verb: Script, keys_and_args: tuple[Any, ...]) -> Call:
    try:
        return (yield ("EVALSHA", verb.sha, *keys_and_args))
    except redis_errors.NoScriptError:
        return (yield ("EVAL", verb.text, *keys_and_args))


def _is_loaded(error: redis_errors.ResponseError) -> bool:
    """Whether a load was refused since another call has loaded the library in the meantime."""
    return str(error) == f"Library '{library().name}' already exists"


def _is_missing(error: redis_errors.ResponseError) -> bool:
    return str(error) == "Function not found"
