"""Running batches in threads: stopped when too slow, split in two when they fail."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

from asyncinfer.engine import Engine, Stopped
from asyncinfer.errors import ModelFailed, OutOfMemory, PredictionTimeout, UnknownModel
from asyncinfer.repository.claims import Claim, ClaimedJob, JobOutcome
from asyncinfer.timeouts import done_within
from asyncinfer.worker import execution
from asyncinfer.worker.execution import Batch, ModelRef, Prepared
from asyncinfer.worker.figures import WorkerFigures
from asyncinfer.worker.held_claim import BatchRun, HeldClaim, Step
from asyncinfer.worker.models.library import Library
from asyncinfer.worker.output_sizes import OutputSizes
from asyncinfer.worker.running.outcomes import OutcomeBuilder
from asyncinfer.worker.running.spans import JobSpans
from asyncinfer.worker.running.timings import RunTimes

_LITTLE_BYTES: Final = 8192
"""Inputs of a claim up to this size together are decoded in the event loop."""

_UNTRACED: Final = contextlib.nullcontext()


class RunHung(Exception):
    """A run did not stop within its grace; its thread is lost. `run` is the run, whose jobs have no
    outcome yet."""

    def __init__(self, run: BatchRun) -> None:
        super().__init__("a run did not stop")
        self.run = run


class BatchRunner:
    """Prepares and runs the batches of one worker in its threads, one per slot. Its methods are
    called in the event loop."""

    def __init__(
        self,
        library: Library,
        builder: OutcomeBuilder,
        model_of: Callable[[str], str | None],
        output_sizes: OutputSizes,
        *,
        concurrency: int,
        prediction_timeout_seconds: float,
        hang_grace_seconds: float,
        on_step: Callable[[Step], None],
        figures: WorkerFigures,
        spans: JobSpans | None = None,
    ) -> None:
        """`model_of` gives the model of jobs in a queue that name none, None if there is none;
        `output_sizes` bounds the results of a run; `concurrency` is the number of threads; `spans`
        None: no run is traced."""
        self.times = RunTimes()
        """How long the runs took that gave results."""
        self._library = library
        self._builder = builder
        self._model_of = model_of
        self._output_sizes = output_sizes
        self._prediction_timeout_seconds = prediction_timeout_seconds
        self._hang_grace_seconds = hang_grace_seconds
        self._on_step = on_step
        self._figures = figures
        self._spans = spans
        self._given_up = False
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="slot")

    def give_up(self) -> None:
        """From now on releases batches instead of running them; runs under way go on."""
        self._given_up = True

    def close(self, *, wait: bool) -> None:
        """Ends the threads. With `wait` it blocks until all are idle, so pass False where one is
        stuck in a run."""
        self._threads.shutdown(wait=wait)

    async def prepare(self, claim: Claim) -> Prepared:
        """Loads engines that are not loaded, checks a claim's jobs and groups them into batches.
        Raises nothing for a job: the reply has those that cannot run."""
        claimed, queue_model = claim.jobs, self._model_of(claim.queue)
        engine_of = await self._engines_of(claimed, queue_model)
        prepare = partial(execution.prepare, claimed, engine_of, queue_model)
        # The way to a thread and back costs more than to decode a little.
        if sum(len(job.data) for job in claimed) <= _LITTLE_BYTES:
            return prepare()
        return await asyncio.get_running_loop().run_in_executor(self._threads, prepare)

    async def _engines_of(
        self, claimed: Sequence[ClaimedJob], queue_model: str | None
    ) -> Callable[[ModelRef], Engine]:
        """Fetches the engine of each model version that the jobs name, and returns a function that
        gives it or raises UnknownModel. That keeps the engines even if the cache drops them."""
        engines: dict[ModelRef, Engine | UnknownModel] = {}
        for model, version in {execution.requested_model(job, queue_model) for job in claimed}:
            try:
                engines[model, version] = await self._library.fetch(model, version)
            except UnknownModel as error:
                engines[model, version] = error

        def engine_of(requested: ModelRef) -> Engine:
            engine = engines[requested]
            if isinstance(engine, UnknownModel):
                raise engine
            return engine

        return engine_of

    async def run_next(self, held: HeldClaim, waiting: deque[Batch]) -> list[JobOutcome]:
        """Runs the first of the waiting batches of a claim, or as many of its jobs as give results
        of a bounded size; the others wait on in its place. Returns the outcomes of the jobs that
        ran, which are not stored; raises RunHung.

        A batch that fails waits again in two halves, until the job that fails is alone. Jobs that
        were cancelled or expired before the run began may have no outcome here; the run is skipped
        if all were. Those that ended during the run have one, which the finisher leaves out.
        """
        first = waiting.popleft()
        signature, input_bytes = first.engine.signature, first.row_input_bytes
        max_rows = self._output_sizes.fitting_rows(signature, input_bytes)
        batch, *others = first.split_to_rows(max_rows)
        waiting.extendleft(others)
        run = BatchRun(batch, held.delivery_of_run(batch))
        run.wanted_ids &= held.open_jobs.keys()
        if not run.wanted_ids:
            return []
        if self._given_up:
            return self._builder.released(held, _open_jobs_of(held, batch), "stopping")
        held.run = run
        try:
            started_at = time.monotonic()
            with self._spans.run(held, run) if self._spans else _UNTRACED:
                bodies = await self._run_in_thread(run)
            seconds = time.monotonic() - started_at
        except Stopped:
            return self._outcomes_of_stopped(held, run)
        except (ModelFailed, OutOfMemory) as error:
            if len(batch.jobs) == 1:
                return [self._builder.failed(held, batch.jobs[0], error, run)]
            waiting.extendleft(reversed(batch.halves()))
            return []
        finally:
            held.run = None
        rows = sum(batch.rows)
        self.times.add(signature.model, rows, seconds)
        self._figures.ran(signature.model, rows, seconds)
        done, *unrendered = batch.split(len(bodies))
        waiting.extendleft(unrendered)
        self._output_sizes.note_run(
            held.claim.queue,
            signature,
            input_bytes,
            jobs=len(bodies),
            rows=sum(done.rows),
            size_bytes=sum(map(len, bodies)),
        )
        return [
            self._builder.completed(held, job, body, run)
            for job, body in zip(done.jobs, bodies, strict=True)
        ]

    def after_hang(
        self, held: HeldClaim, run: BatchRun, finished: Sequence[JobOutcome]
    ) -> list[JobOutcome]:
        """The outcomes of the jobs of a claim whose run did not stop: those of its batch, and those
        that did not run. `finished` are the outcomes so far that are not stored; they are not
        repeated."""
        known_ids = {outcome.job_id for outcome in finished}
        known_ids |= {job.job_id for job in run.batch.jobs}
        others = [job for job in held.open_jobs.values() if job.job_id not in known_ids]
        released = self._builder.released(held, others, "stopping")
        return self._outcomes_of_stopped(held, run) + released

    async def _run_in_thread(self, run: BatchRun) -> list[bytes]:
        """Runs a batch in a thread and returns results as `execution.run` does; waits for the end
        of the run. Stops it after the model's own time limit, else PREDICTION_TIMEOUT, and raises
        RunHung if it then does not end within the grace period.

        Raises Stopped if it was stopped for any reason, ModelFailed and OutOfMemory.
        """
        work = partial(execution.run, run.batch, run.stop, self._output_sizes.max_bytes)
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        self._on_step("running")
        done = await done_within(future, self._timeout_seconds(run.batch))
        if not done:
            run.stop_for("timeout")
            done = await done_within(future, self._hang_grace_seconds)
        if not done:
            # Asked for, so that asyncio does not log it as never retrieved.
            future.add_done_callback(lambda ended: ended.exception())
            raise RunHung(run)
        return future.result()

    def _outcomes_of_stopped(self, held: HeldClaim, run: BatchRun) -> list[JobOutcome]:
        """The outcomes of the jobs of a stopped run that were not cancelled or expired: released
        when draining; suspects if there were several, since which of them was too slow is unknown;
        else failed."""
        unended = _open_jobs_of(held, run.batch)
        if run.stop_reason == "drain":
            return self._builder.released(held, unended, "stopping")
        if len(run.batch.jobs) > 1:
            return self._builder.suspects(held, unended)
        error = self._timeout_error(run.batch)
        return [self._builder.failed(held, job, error, run) for job in unended]

    def _timeout_seconds(self, batch: Batch) -> float:
        """How long a run may take: as `model.toml` says, else PREDICTION_TIMEOUT."""
        return batch.engine.timeout_seconds or self._prediction_timeout_seconds

    def _timeout_error(self, batch: Batch) -> PredictionTimeout:
        """The error of a job that ran alone and took too long."""
        return PredictionTimeout(
            f"The run took longer than {self._timeout_seconds(batch):g} s and was stopped. Send "
            "fewer rows, or raise PREDICTION_TIMEOUT or the model's limits.timeout_seconds."
        )


def _open_jobs_of(held: HeldClaim, batch: Batch) -> list[ClaimedJob]:
    """The jobs of a batch that were not cancelled and have not expired meanwhile."""
    return [job for job in batch.jobs if job.job_id in held.open_jobs]
