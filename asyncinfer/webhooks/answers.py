"""What came of one try to send a webhook."""

import math
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final, Literal

from msgspec import Struct

TRY_SECONDS: Final = 15.0
"""The longest time of a try, all together."""

Failure = Literal[
    "",
    "url_refused",
    "address_refused",
    "no_secret",
    "name_not_resolved",
    "connection_failed",
    "tls_failed",
    "timeout",
    "no_valid_answer",
]
"""Why there was no answer; empty if there was one."""

_BLAMELESS: Final = frozenset({"url_refused", "address_refused", "no_secret"})


class Answer(Struct, frozen=True):
    """The answer of a receiver, or why there is none."""

    status: int
    """The HTTP status; 0 without an answer."""
    failure: Failure = ""
    duration_ms: int = 0
    retry_after_seconds: float = 0.0

    @property
    def blames_host(self) -> bool:
        """Whether the host itself is in trouble: it does not answer, or says that it cannot."""
        if self.status:
            return self.status >= 500 or self.status == 429
        return self.failure not in _BLAMELESS


def retry_after_seconds(value: str, now_seconds: float) -> float:
    """The seconds of a Retry-After header, a number or a date (RFC 9110, 10.2.3), at the time
    `now_seconds` since 1970; 0 if it is in the past or cannot be read."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        at = parsedate_to_datetime(value)
        if at.tzinfo is None:
            at = at.replace(tzinfo=UTC)
        seconds = (at - datetime.fromtimestamp(now_seconds, UTC)).total_seconds()
    except (ValueError, OverflowError):
        return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
