"""Log lines that come at most once in a while, however often there is cause."""

import logging
import time
from typing import Final

_PAUSE_SECONDS: Final = 30.0
_MOST_CAUSES: Final = 256


class LimitedLog:
    """Writes each line at most once in `pause_seconds`: a damaged key is met on every call."""

    def __init__(self, logger: logging.Logger, pause_seconds: float = _PAUSE_SECONDS) -> None:
        self._logger = logger
        self._pause_seconds = pause_seconds
        self._written: dict[str, float] = {}

    def warning(self, cause: str) -> None:
        if self.is_due(cause):
            self._logger.warning("%s", cause)

    def error(self, cause: str) -> None:
        if self.is_due(cause):
            self._logger.error("%s", cause)

    def unexpected(self, what: str, error: BaseException) -> None:
        """A fault that nothing foresaw, with its traceback."""
        if self.is_due(f"{what} {type(error).__name__}"):
            self._logger.error("%s", what, exc_info=error)

    def is_due(self, cause: str) -> bool:
        """Whether a line of this cause may be written now; then the next may not for a while."""
        now = time.monotonic()
        if now - self._written.get(cause, -self._pause_seconds) < self._pause_seconds:
            return False
        if len(self._written) >= _MOST_CAUSES:
            self._written.clear()
        self._written[cause] = now
        return True
