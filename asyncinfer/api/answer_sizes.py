"""How many jobs a request of many lines waits for at a time, and reads in one call."""

from typing import Final

_FIRST_JOBS: Final = 4
_MOST_JOBS: Final = 64
_MOST_QUEUES: Final = 1000

_BYTES_AT_A_TIME: Final = 4 << 20
"""What their answers may have together, as far as those before them tell: forty results of 14 MB
held at once took 690 MiB."""


class AnswerSizes:
    """How large the answers of each queue's jobs were lately: so many are waited for at a time as
    fit into memory together."""

    def __init__(self) -> None:
        self._bytes: dict[str, float] = {}

    def fit(self, queue: str) -> int:
        if queue not in self._bytes:
            return _FIRST_JOBS
        return max(1, min(_MOST_JOBS, int(_BYTES_AT_A_TIME / self._bytes[queue])))

    def note(self, queue: str, jobs: int, size: int) -> None:
        """`jobs` answers had `size` bytes. One that is smaller than those before it counts little:
        a job that has not ended has no result in its answer."""
        if not jobs:
            return
        if len(self._bytes) >= _MOST_QUEUES:
            self._bytes.clear()
        self._bytes[queue] = max(size / jobs, 0.9 * self._bytes.get(queue, 0.0), 1.0)
