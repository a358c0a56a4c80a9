"""A circuit breaker for calls to Redis."""

import time
from typing import Final

_OPEN_SECONDS: Final = 1.0


class CircuitBreaker:
    """Open for a second after a call failed: while Redis is silent, each call takes its full
    timeout. Its user calls `open` after a failure and checks `is_open` before a call."""

    def __init__(self) -> None:
        self._open_until = 0.0

    @property
    def is_open(self) -> bool:
        """Whether calls should fail at once instead of being tried."""
        return time.monotonic() < self._open_until

    def open(self) -> None:
        """Makes `is_open` true for a second."""
        self._open_until = time.monotonic() + _OPEN_SECONDS
