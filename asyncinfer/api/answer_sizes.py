"""Recent sizes of jobs' answers, which decide how many jobs are read at a time."""

from typing import Final

_FIRST_JOBS: Final = 1
"""Five streams that began with four results of 12 MB each took 300 MiB more."""

_MAX_JOBS: Final = 64
_MAX_QUEUES: Final = 1000

_BYTES_AT_A_TIME: Final = 4 << 20
"""What the answers of these jobs may have together, judging by earlier ones: forty results of 14 MB
held at once took 690 MiB."""


class AnswerSizes:
    """How large the answers of each queue's jobs were lately, in this API process."""

    def __init__(self) -> None:
        self._bytes: dict[str, float] = {}

    def fit(self, queue: str) -> int:
        """How many jobs of the queue, from 1 to 64, have answers that probably fit into memory
        together; 1 if none of its answers was noted."""
        if queue not in self._bytes:
            return _FIRST_JOBS
        return max(1, min(_MAX_JOBS, int(_BYTES_AT_A_TIME / self._bytes[queue])))

    def note(self, queue: str, jobs: int, size_bytes: int) -> None:
        """Records that the answers of `jobs` jobs had `size_bytes` together; does nothing for no
        jobs. An answer smaller than earlier ones lowers the estimate by at most a tenth: a job that
        has not ended has no result in its answer."""
        if not jobs:
            return
        if len(self._bytes) >= _MAX_QUEUES:
            self._bytes.clear()
        self._bytes[queue] = max(size_bytes / jobs, 0.9 * self._bytes.get(queue, 0.0), 1.0)
