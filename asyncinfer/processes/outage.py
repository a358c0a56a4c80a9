"""The lines of a log on a Redis that does not answer, or that refuses to take jobs."""

import logging
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Final

_log = logging.getLogger("asyncinfer.redis")

_REPEAT_SECONDS: Final = 30.0
_SETTLE_SECONDS: Final = 1.0
"""An outage is over when calls have succeeded for so long: during a restart of Redis, or with some
connections refused, single calls succeed between failures."""

_MAX_SETTLE_SECONDS: Final = 30.0
_NO_REPLY: Final = "Redis does not answer"
"""How the reason begins while nothing more is known of the cause."""

_MAX_CAUSES: Final = 10

_RETRY_ADVICE: Final = " Retry in a moment."
"""The end of messages that are also answers to clients; a process retries by itself."""


class Outage:
    """Reports the outages of one Redis for all parts of a process: one line when an outage begins,
    one every 30 s, one at once for a cause that is found later, such as a login that is refused,
    and one at its end, with its length.

    Every call to Redis is noted by `answered` or `failed`, also from other threads.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._settle_seconds = _SETTLE_SECONDS
        self._lock = threading.Lock()
        self._began_at: float | None = None
        self._back_at: float | None = None
        """When Redis first answered since the last failure."""
        self._failed_at = self._logged_at = self._ended_at = -_MAX_SETTLE_SECONDS
        self._answered_at: float | None = None
        self._causes: set[str] = set()
        """The causes that were logged in this outage."""

    @property
    def silent_seconds(self) -> float:
        """For how long Redis has not answered: 0 unless the last call failed, infinite if no call
        has ever succeeded."""
        if self._answered_at is None:
            return float("inf")
        if self._failed_at <= self._answered_at:
            return 0.0
        return self._clock() - self._answered_at

    def answered(self) -> None:
        """Notes that Redis has answered a call, also if it refused it."""
        self._answered_at = now = self._clock()
        if self._began_at is not None:
            with self._lock:
                self._end_if_settled(now)

    def _end_if_settled(self, now: float) -> None:
        """Ends the outage if there is one and nothing has failed for a while."""
        if self._began_at is None:
            return
        self._back_at = self._back_at or now
        if now - self._failed_at < self._settle_seconds:
            return
        _log.info("Redis answers again after %.1f s.", self._back_at - self._began_at)
        self._began_at, self._ended_at = None, now

    def failed(self, detail: str) -> None:
        """Notes that a call got no answer; `detail` says why, and is logged."""
        now, reason = self._clock(), detail.removesuffix(_RETRY_ADVICE)
        with self._lock:
            self._failed_at, self._back_at = now, None
            if self._began_at is None:
                # Where outages follow each other, each lasts longer, so that lines stay few.
                is_next = now - self._ended_at < _MAX_SETTLE_SECONDS
                self._settle_seconds = (
                    min(2 * self._settle_seconds, _MAX_SETTLE_SECONDS)
                    if is_next
                    else _SETTLE_SECONDS
                )
                self._began_at = self._logged_at = now
                self._causes = {reason}
                _log.warning("%s It is asked again until it answers.", reason)
            elif now - self._logged_at >= _REPEAT_SECONDS or self._is_new_cause(reason):
                self._logged_at = now
                self._causes.add(reason)
                _log.warning("Redis has not answered for %.0f s. %s", now - self._began_at, reason)

    def _is_new_cause(self, reason: str) -> bool:
        """Whether this says more than that no reply came, and was not logged in this outage."""
        is_new = not reason.startswith(_NO_REPLY) and reason not in self._causes
        return is_new and len(self._causes) < _MAX_CAUSES


class Refusal:
    """Reports that Redis refuses to take jobs: one line when that begins, with its remedy, and one
    when Redis takes them again. For one Redis and all parts of a process."""

    def __init__(self) -> None:
        self._code = ""
        self._began_at = 0.0
        self._lock = threading.Lock()

    @property
    def is_active(self) -> bool:
        """Whether the last word of Redis was a refusal."""
        return bool(self._code)

    def refused(self, code: str, detail: str) -> None:
        """Notes a refusal; it is logged if it is the first of its code since Redis took jobs."""
        with self._lock:
            if code == self._code:
                return
            self._began_at = self._began_at if self._code else time.monotonic()
            self._code = code
            _log.warning("%s: %s", code, detail)

    def ended(self) -> None:
        """Notes that Redis takes jobs."""
        if not self._code:
            return
        with self._lock:
            seconds = time.monotonic() - self._began_at
            code, self._code = self._code, ""
        if code:
            _log.info("Redis takes jobs again after %.1f s (%s).", seconds, code)


class RedisReport:
    """What a process reports of one Redis."""

    def __init__(self) -> None:
        self.outage = Outage()
        self.refusal = Refusal()


@lru_cache(maxsize=16)
def report_of(redis_url: str) -> RedisReport:
    """The report of a Redis in this process; the same for each call with its URL."""
    return RedisReport()
