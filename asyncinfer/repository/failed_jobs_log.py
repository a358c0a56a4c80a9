"""The lines of a process's log on jobs that failed."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from asyncinfer.errors import RedisUnavailable
from asyncinfer.jobs import JobError, id_bytes, read_record
from asyncinfer.monitoring.counts import OTHER, Counts
from asyncinfer.repository import keys
from asyncinfer.repository.claims import JobOutcome
from asyncinfer.repository.failed_jobs import FailedJob, FailedJobs
from asyncinfer.repository.store import Store
from asyncinfer.schemas.operations import public_worker_name
from asyncinfer.untrusted.decoding import lenient_decoder
from asyncinfer.untrusted.printable import printable_name

_log = logging.getLogger("asyncinfer.jobs")

_MAX_LINES: Final = 10
_WINDOW_SECONDS: Final = 1.0
_MAX_ID_CHARACTERS: Final = 128

_read_error = lenient_decoder(msgspec.json.Decoder(JobError).decode)


class FailedJobsLog:
    """Writes one line for each job that failed, at most ten a second, and then one with the number
    of the others. A line has no message of an error, which may repeat the input. There is one per
    process; call its methods in the event loop."""

    def __init__(
        self,
        store: Store,
        model_of: Callable[[str], str | None],
        counts: Counts,
        worker_id: str = "",
    ) -> None:
        """`model_of` returns the model of a queue, for jobs without a record. Jobs that scripts
        failed are added to `counts`, by model, outcome and code of the error. `worker_id` is empty
        in a process that runs no jobs."""
        self._store = store
        self._model_of = model_of
        self._counts = counts
        self._worker_id = worker_id
        self._lines = 0
        """Jobs with a line since the window began."""
        self._silent = 0
        """Jobs without one since then."""
        self._timer: asyncio.TimerHandle | None = None

    def note_outcome(self, queue: str, outcome: JobOutcome) -> None:
        """Notes a job of a queue that this process ran, and that failed for good."""
        if self._add(1):
            error = _read_error(outcome.body)
            code = error.code if error else "unknown"
            self._write(queue, outcome.job_id, code, outcome.meta, self._worker_id)

    async def note_failed_by_script(self, failed: Sequence[FailedJobs]) -> None:
        """Notes and counts jobs that scripts failed. Reads the records of those that get a line, in
        one call; while Redis is away the lines do without."""
        named: list[tuple[str, FailedJob]] = []
        for jobs in failed:
            model = self._model_of(jobs.queue) or OTHER
            for code, number in jobs.counts.items():
                outcome = "dead" if code == "worker_lost" else "failed"
                self._counts.add((model, outcome, code), number)
            lines = self._add(jobs.total, len(jobs.named))
            named += [(jobs.queue, job) for job in jobs.named[:lines]]
        if not named:
            return
        names = [id_bytes(keys.meta(job.job_id)) for _, job in named]
        try:
            metas = await self._store.command("MGET", *names)
        except RedisUnavailable:
            metas = [None] * len(names)
        for (queue, job), meta in zip(named, metas, strict=True):
            self._write(queue, job.job_id, job.code, meta, job.token.rpartition(":")[0])

    def _add(self, jobs: int, named: int = 1) -> int:
        """Adds jobs to those of the window, and returns how many of the `named` ones get a line."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_WINDOW_SECONDS, self.flush)
        lines = min(named, max(0, _MAX_LINES - self._lines))
        self._lines += lines
        self._silent += jobs - lines
        return lines

    def _write(
        self, queue: str, job_id: str, code: str, meta: bytes | None, worker_id: str
    ) -> None:
        """Writes the line of a job. Another program may have made its id of any bytes."""
        record = read_record(meta)
        fields = {
            "job_id": printable_name(job_id, _MAX_ID_CHARACTERS),
            "request_id": (record and record.request_id) or "",
            "model": (record and record.model) or self._model_of(queue) or "",
            "code": code,
            "worker": public_worker_name(worker_id) if worker_id else "",
        }
        _log.warning(
            "Job %s failed: %s (model %s, request %s, worker %s).",
            *(fields[name] or "-" for name in ("job_id", "code", "model", "request_id", "worker")),
            extra=fields,
        )

    def flush(self) -> None:
        """Writes how many jobs failed without a line, if any, and begins a new window."""
        if self._silent:
            _log.warning("%d more jobs failed within a second.", self._silent)
        self._lines = self._silent = 0
        if self._timer:
            self._timer.cancel()
            self._timer = None
