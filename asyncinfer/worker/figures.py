"""What one worker counts of its runs, its jobs and its models."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import msgspec
from msgspec import Struct

from asyncinfer.engine import Engine
from asyncinfer.models.folder import ModelFile
from asyncinfer.models.signature import Signature
from asyncinfer.monitoring.counts import OTHER, Counts, Histograms, Labels
from asyncinfer.monitoring.histogram import ROWS, SECONDS, WAIT_SECONDS, Histogram
from asyncinfer.repository.claims import ClaimedJob, JobOutcome
from asyncinfer.repository.inspect.queue_load import waits_since_ms
from asyncinfer.untrusted import decoding

Load: TypeAlias = Callable[[ModelFile], Engine]


class WorkerMetrics(Struct, frozen=True, kw_only=True):
    """The figures of one worker at one moment, which nothing changes any more but the histograms'
    values."""

    served: Sequence[Signature]
    refused: Sequence[tuple[str, str]]
    """(model, version) of each problem; the version is OF_ALL_VERSIONS if it is one of a whole
    model."""
    loaded: int
    """How many engines are in memory."""
    loaded_bytes: int
    """The size of their files."""
    slots: int
    busy: int
    counts: Mapping[str, Mapping[Labels, float]]
    """By name without `_total`."""
    histograms: Mapping[str, Mapping[Labels, Histogram]]


class _Error(Struct, frozen=True):
    """The code of a failed job's error."""

    code: str = OTHER


_read_error = decoding.lenient_decoder(msgspec.json.Decoder(_Error).decode)


class WorkerFigures:
    """Counts and histograms by model, since the start of the process. Its methods are called in
    the event loop, except those of loads."""

    def __init__(self) -> None:
        self.run_seconds = Histograms(SECONDS)
        self.run_rows = Histograms(ROWS)
        self.wait_seconds = Histograms(WAIT_SECONDS)
        self.outcomes = Counts()
        """By model, outcome and code of the error, empty without one."""
        self.loads = Counts()
        """By model and outcome."""
        self.load_seconds = Histograms(SECONDS)
        self.probe_seconds = Histograms(SECONDS)

    def counts(self) -> dict[str, Mapping[Labels, float]]:
        """By name without `_total`; copies."""
        return {
            "asyncinfer_jobs": dict(self.outcomes),
            "asyncinfer_model_loads": dict(self.loads),
        }

    def histograms(self) -> dict[str, Mapping[Labels, Histogram]]:
        """By name; copies of the tables, with the histograms that are still counting."""
        return {
            "asyncinfer_run_seconds": dict(self.run_seconds),
            "asyncinfer_run_rows": dict(self.run_rows),
            "asyncinfer_job_wait_seconds": dict(self.wait_seconds),
            "asyncinfer_model_load_seconds": dict(self.load_seconds),
            "asyncinfer_model_probe_seconds": dict(self.probe_seconds),
        }

    def claimed(self, model: str | None, jobs: Sequence[ClaimedJob], at_ms: int) -> None:
        """Counts how long jobs of a claim have waited, up to `at_ms` in Unix time. The clocks of
        two machines may differ by more than that."""
        since_ms = [waits_since_ms(job.record) for job in jobs if job.record]
        waits = [(at_ms - since) / 1000 if since < at_ms else 0.0 for since in since_ms]
        self.wait_seconds.of((model or OTHER,)).observe_all(waits)

    def ran(self, model: str, rows: int, seconds: float) -> None:
        """Counts a run that gave results."""
        self.run_seconds.observe((model,), seconds)
        self.run_rows.observe((model,), rows)

    def stored(
        self, model: str | None, outcomes: Sequence[JobOutcome], verdicts: Sequence[str]
    ) -> None:
        """Counts what Redis did with the outcomes of jobs: the verdict of each, in order."""
        name = model or OTHER
        completed = verdicts.count("completed")
        if completed:
            self.outcomes.add((name, "completed", ""), completed)
        if completed == len(verdicts):
            return
        for outcome, verdict in zip(outcomes, verdicts, strict=True):
            # An earlier try of the same call stored it, whose reply was lost.
            ended_as = outcome.outcome if verdict == "already" else verdict
            if verdict != "completed":
                self.outcomes.add((name, ended_as, _code_of(outcome)))

    def measured(self, load: Load) -> Load:
        """`load` with its calls counted, by what came of them, and with the time that they took.
        For one thread."""

        def measured_load(file: ModelFile) -> Engine:
            started_at = time.perf_counter()
            try:
                engine = load(file)
            except Exception:
                self.loads.add((file.model, "refused"))
                raise
            self.loads.add((file.model, "loaded"))
            self.load_seconds.observe((file.model,), time.perf_counter() - started_at)
            self.probe_seconds.observe((file.model,), engine.probe_seconds)
            return engine

        return measured_load


def _code_of(outcome: JobOutcome) -> str:
    """The code of the error of a job that failed; empty for any other."""
    if outcome.outcome not in ("failed", "dead"):
        return ""
    return (_read_error(outcome.body) or _Error()).code
