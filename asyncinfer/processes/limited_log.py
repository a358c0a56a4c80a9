"""A logger that writes the same line at most once in 30 s."""

import logging
import time
from typing import Final

_PAUSE_SECONDS: Final = 30.0
_MAX_CAUSES: Final = 256


class LimitedLog:
    """Writes each line at most once in `pause_seconds`: every call meets a damaged key again. For
    use in one process; after 256 different lines all may be written again."""

    def __init__(self, logger: logging.Logger, pause_seconds: float = _PAUSE_SECONDS) -> None:
        self._logger = logger
        self._pause_seconds = pause_seconds
        self._written: dict[str, float] = {}

    def warning(self, cause: str) -> None:
        """Logs the line `cause`, unless it was logged less than `pause_seconds` ago."""
        if self.may_write(cause):
            self._logger.warning("%s", cause)

    def error(self, cause: str) -> None:
        """Logs the line `cause`, unless it was logged less than `pause_seconds` ago."""
        if self.may_write(cause):
            self._logger.error("%s", cause)

    def unexpected(self, what: str, error: BaseException) -> None:
        """Logs the line `what` as an error with the exception's traceback, at most once in
        `pause_seconds` for each type of exception."""
        if self.may_write(f"{what} {type(error).__name__}"):
            self._logger.error("%s", what, exc_info=error)

    def may_write(self, cause: str) -> bool:
        """Whether a line of this cause may be written now. If True, it counts as written: the next
        call returns False until `pause_seconds` are over."""
        now = time.monotonic()
        if now - self._written.get(cause, -self._pause_seconds) < self._pause_seconds:
            return False
        if len(self._written) >= _MAX_CAUSES:
            self._written.clear()
        self._written[cause] = now
        return True
