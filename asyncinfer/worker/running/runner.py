"""Runs what was claimed: a batch in a thread, stopped when too slow, split when it fails."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

from asyncinfer.engine import Engine, Stopped
from asyncinfer.errors import ModelFailed, OutOfMemory, PredictionTimeout, UnknownModel
from asyncinfer.repository.claims import Claim, ClaimedJob, Finished
from asyncinfer.timeouts import settled
from asyncinfer.worker import execution
from asyncinfer.worker.execution import Asked, Batch, Prepared
from asyncinfer.worker.held_claim import Held, Run, Step
from asyncinfer.worker.models.library import Library
from asyncinfer.worker.running.outcomes import Outcomes, released, suspects
from asyncinfer.worker.running.timings import RunTimes

_LITTLE_BYTES: Final = 8192


class Hung(Exception):
    """A run did not stop within its grace; its thread is lost."""

    def __init__(self, run: Run) -> None:
        super().__init__("a run did not stop")
        self.run = run


class Running:
    """The threads of one worker, and what runs in them."""

    def __init__(
        self,
        library: Library,
        outcomes: Outcomes,
        model_of: Callable[[str], str | None],
        *,
        concurrency: int,
        prediction_timeout_seconds: float,
        hang_grace_seconds: float,
        on_step: Callable[[Step], None],
    ) -> None:
        self.times = RunTimes()
        self._library = library
        self._outcomes = outcomes
        self._model_of = model_of
        self._prediction_timeout_seconds = prediction_timeout_seconds
        self._hang_grace_seconds = hang_grace_seconds
        self._on_step = on_step
        self._given_up = False
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="slot")

    def give_up(self) -> None:
        """What did not run yet is handed back instead."""
        self._given_up = True

    def close(self, *, wait: bool) -> None:
        self._threads.shutdown(wait=wait)

    async def prepared(self, claim: Claim) -> Prepared:
        """The batches that a claim's jobs make, and the jobs that cannot run."""
        claimed, meant = claim.jobs, self._model_of(claim.queue)
        engine_of = await self._engines_of(claimed, meant)
        prepare = partial(execution.prepare, claimed, engine_of, meant)
        # The way to a thread and back costs more than to decode a little.
        if sum(len(job.data) for job in claimed) <= _LITTLE_BYTES:
            return prepare()
        return await asyncio.get_running_loop().run_in_executor(self._threads, prepare)

    async def _engines_of(
        self, claimed: Sequence[ClaimedJob], meant: str | None
    ) -> Callable[[Asked], Engine]:
        """The engines that jobs ask for, loaded where need be; held here, whatever is evicted."""
        found: dict[Asked, Engine | UnknownModel] = {}
        for model, version in {execution.asked(job, meant) for job in claimed}:
            try:
                found[model, version] = await self._library.fetch(model, version)
            except UnknownModel as error:
                found[model, version] = error

        def engine_of(asked: Asked) -> Engine:
            engine = found[asked]
            if isinstance(engine, UnknownModel):
                raise engine
            return engine

        return engine_of

    async def run(self, held: Held, batch: Batch) -> list[Finished]:
        """Runs a batch; one that fails is split until the culprit is alone. Raises Hung."""
        run = Run(batch)
        run.wanted &= held.open.keys()
        if not run.wanted:
            return []
        if self._given_up:
            return released(_left(held, batch))
        held.run = run
        try:
            began_at = time.monotonic()
            bodies = await self._supervised(run)
            self._note_run_time(batch, time.monotonic() - began_at)
        except Stopped:
            return self._stopped(held, run)
        except (ModelFailed, OutOfMemory) as error:
            if len(batch.jobs) == 1:
                return [self._outcomes.failed(held, batch.jobs[0], error)]
            first, second = batch.halves()
            return await self.run(held, first) + await self.run(held, second)
        finally:
            held.run = None
        return [
            self._outcomes.completed(held, job, body, batch.engine.signature)
            for job, body in zip(batch.jobs, bodies, strict=True)
        ]

    def after_hang(self, held: Held, run: Run, finished: Sequence[Finished]) -> list[Finished]:
        """What becomes of the rest of a claim whose run would not stop."""
        settled = {one.job_id for one in finished} | {job.job_id for job in run.batch.jobs}
        others = [job for job in held.open.values() if job.job_id not in settled]
        return self._stopped(held, run) + released(others)

    async def _supervised(self, run: Run) -> list[bytes]:
        """The run in its thread: stopped after PREDICTION_TIMEOUT, lost after a grace."""
        future = asyncio.get_running_loop().run_in_executor(
            self._threads, execution.run, run.batch, run.stop
        )
        self._on_step("running")
        done = await settled(future, self._timeout_seconds(run.batch))
        if not done:
            run.end("timeout")
            done = await settled(future, self._hang_grace_seconds)
        if not done:
            future.add_done_callback(lambda late: late.exception())
            raise Hung(run)
        return future.result()

    def _stopped(self, held: Held, run: Run) -> list[Finished]:
        """A stopped run says nothing about which of several jobs was too slow: each is suspect."""
        left = _left(held, run.batch)
        if run.why == "drain":
            return released(left)
        if len(run.batch.jobs) > 1:
            return suspects(left)
        return [self._outcomes.failed(held, job, self._too_slow(run.batch)) for job in left]

    def _timeout_seconds(self, batch: Batch) -> float:
        return batch.engine.timeout_seconds or self._prediction_timeout_seconds

    def _too_slow(self, batch: Batch) -> PredictionTimeout:
        return PredictionTimeout(
            f"The run took longer than {self._timeout_seconds(batch):g} s and was stopped. Send "
            "fewer rows, or raise PREDICTION_TIMEOUT or the model's limits.timeout_seconds."
        )

    def _note_run_time(self, batch: Batch, seconds: float) -> None:
        self.times.note(batch.engine.signature.model, sum(batch.rows), seconds)


def _left(held: Held, batch: Batch) -> list[ClaimedJob]:
    """Those that have not ended otherwise meanwhile."""
    return [job for job in batch.jobs if job.job_id in held.open]
