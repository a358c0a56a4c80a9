"""The lines of a worker's log on jobs that failed."""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

import msgspec

from asyncinfer.jobs import JobError, read_record
from asyncinfer.repository.claims import JobOutcome
from asyncinfer.schemas.operations import public_worker_name
from asyncinfer.untrusted.decoding import lenient_decoder

_log = logging.getLogger("asyncinfer.jobs")

_MAX_LINES: Final = 10
_WINDOW_SECONDS: Final = 1.0

_read_error = lenient_decoder(msgspec.json.Decoder(JobError).decode)


class FailedJobsLog:
    """Writes one line for each job that failed, at most ten a second, and then one with the number
    of the others. A line has no message of an error, which may repeat the input."""

    def __init__(self, worker_id: str, model_of: Callable[[str], str | None]) -> None:
        """`model_of` returns the model of a queue, for jobs without a record."""
        self._worker = public_worker_name(worker_id)
        self._model_of = model_of
        self._count = 0
        """Jobs that failed since the window began."""
        self._timer: asyncio.TimerHandle | None = None

    def note(self, queue: str, outcome: JobOutcome) -> None:
        """Notes a job of a queue that failed for good; call it in the event loop."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_WINDOW_SECONDS, self.flush)
        self._count += 1
        if self._count > _MAX_LINES:
            return
        record, error = read_record(outcome.meta), _read_error(outcome.body)
        fields = {
            "job_id": outcome.job_id,
            "request_id": (record and record.request_id) or "",
            "model": (record and record.model) or self._model_of(queue) or "",
            "code": error.code if error else "unknown",
            "worker": self._worker,
        }
        _log.warning(
            "Job %s failed: %s (model %s, request %s, worker %s).",
            *(fields[name] or "-" for name in ("job_id", "code", "model", "request_id", "worker")),
            extra=fields,
        )

    def flush(self) -> None:
        """Writes how many jobs failed without a line, if any, and begins a new window."""
        if (more := self._count - _MAX_LINES) > 0:
            _log.warning("%d more jobs failed within a second.", more)
        self._count = 0
        if self._timer:
            self._timer.cancel()
            self._timer = None
