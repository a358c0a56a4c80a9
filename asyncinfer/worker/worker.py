"""One worker: slots that claim, run and finish; cancel, time-out and drain."""

import asyncio
import contextlib
import logging
import os
import random
import secrets
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

import anyio
import msgspec

from asyncinfer import batching, execution, jobs, keys
from asyncinfer.engine import Engine, Stopped
from asyncinfer.errors import (
    AsyncinferError,
    JobError,
    ModelFailed,
    OutOfMemory,
    PredictionTimeout,
    RedisRefused,
    RedisUnavailable,
    ResultTooLarge,
    StorageFull,
    UnknownModel,
)
from asyncinfer.execution import Asked, Batch, Prepared
from asyncinfer.models import Signature
from asyncinfer.repository.run import (
    Claimed,
    ClaimedJob,
    ClaimRequest,
    Finished,
    Renewal,
    Runs,
    error_body,
)
from asyncinfer.repository.store import Store
from asyncinfer.upkeep import ANNOUNCE_SECONDS, Renewer, announce_forever, reap_forever
from asyncinfer.worker.announcing import Announcer, Said
from asyncinfer.worker.claims import Claims, Held, Run, Step
from asyncinfer.worker.control import Control
from asyncinfer.worker.gathering import Sharing
from asyncinfer.worker.library import Library
from asyncinfer.worker.pace import Paces, RunTimes
from asyncinfer.worker.watch import changes

log = logging.getLogger(__name__)

EXIT_HUNG: Final = 70
"""A run would not stop: the process ends, so that its supervisor starts a fresh one."""

_FAREWELL_SECONDS: Final = 1.0
_LITTLE_BYTES: Final = 8192

_ELSEWHERE_MS: Final = (20, 200)
"""How long a job waits that this worker could not run, so that it is not the first to see it."""

_MOST_STORING_SECONDS: Final = 1.0
_SILENT_SECONDS: Final = 3 * ANNOUNCE_SECONDS
"""After so long without an answer from Redis, it counts as away."""


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How a worker works."""

    concurrency: int
    max_batch: int = 128
    max_result_bytes: int = 16 << 20
    brpop_timeout_seconds: float = 1.0
    prediction_timeout_seconds: float = 10.0
    hang_grace_seconds: float = 1.0
    drain_timeout_seconds: float = 20.0
    rescan_seconds: float = 10.0


class Hung(Exception):
    """A run did not stop within its grace; its thread is lost."""

    def __init__(self, run: Run) -> None:
        super().__init__("a run did not stop")
        self.run = run


class Worker:
    """Claims from its models' queues and runs what it claims, `concurrency` batches at once."""

    def __init__(
        self,
        store: Store,
        library: Library,
        default_model: str | None,
        config: WorkerConfig,
        on_step: Callable[[Step], None] = lambda _: None,
    ) -> None:
        self.worker_id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self.hung = False
        self._store = store
        self._library = library
        self._default_model = default_model
        self._config = config
        self._on_step = on_step
        queues = self._queues()
        self._paces = Paces()
        self.run_times = RunTimes()
        self._answered_at = time.monotonic()
        self._runs = Runs(store, self.worker_id)
        self._control = Control(store, queues, self._heard)
        self._threads = ThreadPoolExecutor(config.concurrency, thread_name_prefix="slot")
        self._loop = asyncio.get_running_loop()
        self._renewer = Renewer(store, self._renewed_in_thread)
        self._claims = Claims(
            store,
            self._runs,
            self._renewer,
            queues,
            max_batch=config.max_batch,
            brpop_timeout_seconds=config.brpop_timeout_seconds,
            on_step=on_step,
        )
        self._announcer = Announcer(store, self.worker_id, library, default_model, self._said)
        self._news = asyncio.Event()
        self._watched_enough = asyncio.Event()
        self._given_up = False
        self._group: asyncio.TaskGroup
        library.on_change = self._models_changed

    # --- the process ---------------------------------------------------------------------------

    async def run(self) -> int:
        """Works until drained; returns the exit code."""
        self._renewer.start()
        # anyio's group, since redis-py may swallow a cancellation and anyio's comes again.
        async with anyio.create_task_group() as background:
            for role in self._roles():
                background.start_soon(role)
            try:
                async with asyncio.TaskGroup() as self._group:
                    await self._introduced()
                    create = self._group.create_task
                    slots = [create(self._slot()) for _ in range(self._config.concurrency)]
                    await self._slots_done(slots)
            finally:
                self._watched_enough.set()
            await self._control.close()
            background.cancel_scope.cancel()
        await self._renewer.close()
        with contextlib.suppress(RedisUnavailable, StorageFull, TimeoutError):
            async with asyncio.timeout(_FAREWELL_SECONDS):
                await self._announcer.retract()
        self._library.close()
        self._threads.shutdown(wait=not self.hung)
        return EXIT_HUNG if self.hung else 0

    def _roles(self) -> list[Callable[[], Coroutine[Any, Any, None]]]:
        announce = partial(
            announce_forever, self._announcer.announce, self._news, self._redis_answered
        )
        return [
            partial(reap_forever, self._store),
            announce,
            self._renewer.beat,
            self._control.listen,
            self._claims.gathering.listen,
            self._library.describe,
            self._watch,
        ]

    async def _introduced(self) -> None:
        """Before anything is claimed: a file that another worker has otherwise must not be run."""
        with contextlib.suppress(RedisUnavailable, StorageFull):
            await self._announcer.announce()
            self._redis_answered()

    async def _watch(self) -> None:
        """Follows the model folder."""
        seen = changes(
            self._library.watched,
            rescan_seconds=self._config.rescan_seconds,
            stopping=self._watched_enough,
        )
        async for _ in seen:
            try:
                await self._library.rescan()
            except Exception:
                log.exception("The model folder could not be followed.")

    def _queues(self) -> dict[str, Sharing]:
        """The queues of the models served, and how their jobs share runs."""
        return {
            keys.queue(self._store.n, model, self._default_model): self._sharing(version.signature)
            for model, version in sorted(self._library.served.items())
            if version.signature
        }

    def _sharing(self, signature: Signature) -> Sharing:
        most = self._config.max_batch
        full_jobs = min(signature.max_batch_jobs or most, most)
        return Sharing(signature.batched, signature.max_wait_ms / 1000, full_jobs)

    def _models_changed(self) -> None:
        queues = self._queues()
        self._claims.serve(queues)
        self._control.serve(queues)
        self._news.set()

    def _said(self) -> Said:
        paces = self._paces.seconds_per_job()
        about = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "concurrency": self._config.concurrency,
            "state": self._state(),
            "seconds_per_job": paces,
            "run_times": self.run_times.view(),
        }
        return Said(about, paces)

    def _redis_answered(self) -> None:
        self._answered_at = time.monotonic()

    def unready(self) -> str | None:
        """Why it can claim nothing just now; None when it can."""
        if self.hung:
            return "A run would not stop; this worker ends, to be started afresh."
        if self._claims.draining.is_set():
            return "It drains: what runs is finished, nothing more is claimed."
        silent_seconds = time.monotonic() - self._answered_at
        if silent_seconds > _SILENT_SECONDS:
            return f"Redis has not answered for {silent_seconds:.0f} s."
        return None

    def _state(self) -> str:
        if self.hung:
            return "hung"
        return "draining" if self._claims.draining.is_set() else "ready"

    def drain(self) -> None:
        """Claims no more; `run` returns when what runs has finished or been released."""
        if not self._claims.draining.is_set():
            # At once: a slot that finishes meanwhile must not claim.
            self._claims.draining.set()
            self._group.create_task(self._claims.drain())

    async def _slots_done(self, slots: Sequence[asyncio.Task[None]]) -> None:
        await self._claims.draining.wait()
        _, busy = await asyncio.wait(slots, timeout=self._config.drain_timeout_seconds)
        if busy:
            await self._cut(busy)

    async def _cut(self, busy: set[asyncio.Task[None]]) -> None:
        """The drain took too long: stops the runs and hands their jobs back."""
        self._given_up = True
        for held in self._claims.held.values():
            if held.run:
                held.run.end("drain")
        _, stuck = await asyncio.wait(busy, timeout=self._config.hang_grace_seconds)
        if stuck:
            self.hung = True
            with anyio.move_on_after(_FAREWELL_SECONDS):
                async with anyio.create_task_group() as group:
                    for held in self._claims.held.values():
                        group.start_soon(self._release, held)
            for task in stuck:
                task.cancel()

    async def _release(self, held: Held) -> None:
        """Hands back what is open. A claim with nothing open is being finished, or was tried to
        be: what that did not store comes back by its lease, which must not go before."""
        released = [Finished(one.job_id, "released", meta=one.meta) for one in held.open.values()]
        if released:
            held.open.clear()
            with contextlib.suppress(RedisUnavailable):
                await self._runs.finish(held.claim, released, last=not held.early)

    async def _slot(self) -> None:
        held: Held | None = None
        while held := held or await self._claims.next():
            held = await self._serve(held)

    # --- running -------------------------------------------------------------------------------

    async def _serve(self, held: Held) -> Held | None:
        """Runs a claim and finishes it; returns the next claim, when one came with it."""
        finished: list[Finished] = []
        try:
            prepared = await self._prepared(held.claim.jobs)
            finished += [await self._refused(held, job, error) for job, error in prepared.refused]
            for batch in prepared.batches:
                finished += await self._run(held, batch)
        except Hung as hung:
            self._lose_slot()
            finished += self._hung_jobs(held, hung.run, finished)
        except Exception:
            log.exception("A claim could not be run; its jobs fail.")
            error = JobError("The worker failed in a way it did not expect; its log has more.")
            done = {one.job_id for one in finished}
            finished += [
                self._failed(held, job, error)
                for job in held.open.values()
                if job.job_id not in done
            ]
        held.ran_at = time.monotonic()
        following = await self._finish(held, finished)
        self._note_pace(held)
        return following

    async def _refused(self, held: Held, job: ClaimedJob, error: AsyncinferError) -> Finished:
        """A job for what this worker lacks goes to one that has it: a new version does not come
        to all of them at once."""
        model, version = execution.asked(job, self._default_model)
        if isinstance(error, UnknownModel) and model is not None:
            with contextlib.suppress(RedisUnavailable):
                if await self._announcer.is_elsewhere(model, version):
                    await self._claims.shuffle(held.claim.queue)
                    delay_ms = random.randrange(*_ELSEWHERE_MS)
                    return Finished(job.job_id, "released", meta=job.meta, delay_ms=delay_ms)
        return self._failed(held, job, error)

    def _note_pace(self, held: Held) -> None:
        """A claim takes its slot until its outcomes are stored; an outage says nothing of it."""
        now = time.monotonic()
        storing_seconds = min(now - held.ran_at, _MOST_STORING_SECONDS)
        slot_seconds = held.ran_at - held.claimed_at + storing_seconds
        model = keys.model_of(self._store.n, held.claim.queue, self._default_model) or ""
        self._paces.note(model, slot_seconds, len(held.claim.jobs), at_seconds=now)

    def _note_run_time(self, batch: Batch, seconds: float) -> None:
        rows = sum(batching.rows_of(feeds, batch.engine.plan) for feeds in batch.inputs)
        self.run_times.note(batch.engine.signature.model, rows, seconds)

    async def _prepared(self, claimed: Sequence[ClaimedJob]) -> Prepared:
        engine_of = await self._engines_of(claimed)
        prepare = partial(execution.prepare, claimed, engine_of, self._default_model)
        # The way to a thread and back costs more than to decode a little.
        if sum(len(job.data) for job in claimed) <= _LITTLE_BYTES:
            return prepare()
        return await self._loop.run_in_executor(self._threads, prepare)

    async def _engines_of(self, claimed: Sequence[ClaimedJob]) -> Callable[[Asked], Engine]:
        """The engines that jobs ask for, loaded where need be; held here, whatever is evicted."""
        found: dict[Asked, Engine | UnknownModel] = {}
        for model, version in {execution.asked(job, self._default_model) for job in claimed}:
            try:
                found[model, version] = self._library.ready(
                    model, version
                ) or await self._library.fetch(model, version)
            except UnknownModel as error:
                found[model, version] = error

        def engine_of(asked: Asked) -> Engine:
            engine = found[asked]
            if isinstance(engine, UnknownModel):
                raise engine
            return engine

        return engine_of

    async def _run(self, held: Held, batch: Batch) -> list[Finished]:
        """Runs a batch; one that fails is split until the culprit is alone."""
        run = Run(batch)
        run.wanted &= held.open.keys()
        if not run.wanted:
            return []
        if self._given_up:
            return self._handed_back(held, batch)
        held.run = run
        try:
            began_at = time.monotonic()
            bodies = await self._supervised(run)
            self._note_run_time(batch, time.monotonic() - began_at)
        except Stopped:
            return self._stopped(held, run)
        except (ModelFailed, OutOfMemory) as error:
            if len(batch.jobs) == 1:
                return [self._failed(held, batch.jobs[0], error)]
            first, second = batch.halves()
            return await self._run(held, first) + await self._run(held, second)
        finally:
            held.run = None
        return [
            self._completed(held, job, body, batch.engine.signature)
            for job, body in zip(batch.jobs, bodies, strict=True)
        ]

    def _completed(self, held: Held, job: ClaimedJob, body: bytes, ran: Signature) -> Finished:
        if len(body) <= self._config.max_result_bytes:
            return self._ended(held, job, "completed", body, ran)
        error = ResultTooLarge(
            f"The result has {len(body)} bytes; {self._config.max_result_bytes} are kept "
            "for one job. Send fewer rows a job."
        )
        return self._failed(held, job, error)

    async def _supervised(self, run: Run) -> list[bytes]:
        """The run in its thread: stopped after PREDICTION_TIMEOUT, lost after a grace."""
        future = asyncio.get_running_loop().run_in_executor(
            self._threads, execution.run, run.batch, run.stop
        )
        self._on_step("running")
        done, _ = await asyncio.wait({future}, timeout=self._timeout_seconds(run.batch))
        if not done:
            run.end("timeout")
            done, _ = await asyncio.wait({future}, timeout=self._config.hang_grace_seconds)
        if not done:
            future.add_done_callback(lambda late: late.exception())
            raise Hung(run)
        return future.result()

    def _stopped(self, held: Held, run: Run) -> list[Finished]:
        """A stopped run says nothing about which of several jobs was too slow: each is suspect."""
        left = [job for job in run.batch.jobs if job.job_id in held.open]
        if run.why == "drain":
            return self._handed_back(held, run.batch)
        if len(run.batch.jobs) == 1:
            return [self._failed(held, job, self._too_slow(run.batch)) for job in left]
        return [Finished(job.job_id, "suspect", meta=job.meta) for job in left]

    def _handed_back(self, held: Held, batch: Batch) -> list[Finished]:
        left = [job for job in batch.jobs if job.job_id in held.open]
        return [Finished(job.job_id, "released", meta=job.meta) for job in left]

    def _hung_jobs(self, held: Held, run: Run, finished: Sequence[Finished]) -> list[Finished]:
        """What becomes of a claim whose run would not stop."""
        settled = {one.job_id for one in finished} | {job.job_id for job in run.batch.jobs}
        return self._stopped(held, run) + [
            Finished(job.job_id, "released", meta=job.meta)
            for job in held.open.values()
            if job.job_id not in settled
        ]

    def _timeout_seconds(self, batch: Batch) -> float:
        return batch.engine.timeout_seconds or self._config.prediction_timeout_seconds

    def _too_slow(self, batch: Batch) -> PredictionTimeout:
        return PredictionTimeout(
            f"The run took longer than {self._timeout_seconds(batch):g} s and was stopped. Send "
            "fewer rows, or raise PREDICTION_TIMEOUT or the model's limits.timeout_seconds."
        )

    def _lose_slot(self) -> None:
        log.error("A run would not stop; this worker finishes its other runs and exits.")
        self.hung = True
        self.drain()

    # --- finishing -----------------------------------------------------------------------------

    async def _finish(self, held: Held, finished: Sequence[Finished]) -> Held | None:
        while held.early:
            await asyncio.wait(held.early)
        outcomes = [one for one in finished if one.job_id in held.open]
        held.open.clear()
        self._on_step("finishing")
        return await self._claims.finish(
            held,
            lambda following: self._stored(held, outcomes, last=True, following=following),
        )

    async def _stored(
        self,
        held: Held,
        finished: Sequence[Finished],
        *,
        last: bool,
        following: ClaimRequest | None = None,
    ) -> Claimed:
        """Stores outcomes, however long Redis is away; what they are stays in memory until then."""
        while True:
            try:
                verdicts, claimed = await self._runs.finish(
                    held.claim, finished, last=last, following=following
                )
            except RedisRefused as error:
                # The same call again would be refused again. What rides on it may be to blame;
                # what is not stored comes back by its lease.
                log.error("Finishing: %s", error.detail)
                if following is None:
                    return Claimed(None)
                following = None
            except RedisUnavailable as error:
                if self._given_up:
                    return Claimed(None)
                log.warning("Finishing: %s", error.detail)
                await asyncio.sleep(random.uniform(0.1, 0.5))
            else:
                if stale := verdicts.count("stale"):
                    log.warning("%d results came too late: their jobs had been taken.", stale)
                return claimed

    def _failed(self, held: Held, job: ClaimedJob, error: AsyncinferError) -> Finished:
        """A job that cannot be done; a lack of memory is worth another try, later."""
        body = error_body(error.code, error.detail)
        if not isinstance(error, OutOfMemory):
            return self._ended(held, job, "failed", body)
        errors = (job.record.errors if job.record else 0) + 1
        if jobs.retry_or_dead(errors, self._store.policy.max_errors) == "dead" or not job.record:
            return self._ended(held, job, "dead", body)
        record = msgspec.structs.replace(job.record, errors=errors)
        meta = jobs.encode_record(record, jobs.record_seq(job.meta))
        return Finished(job.job_id, "retry", meta=meta, delay_ms=jobs.backoff_ms(errors))

    def _ended(
        self,
        held: Held,
        job: ClaimedJob,
        outcome: jobs.Outcome,
        body: bytes = b"",
        ran: Signature | None = None,
    ) -> Finished:
        meta = b""
        if job.record:
            record = msgspec.structs.replace(
                job.record,
                started_ms=held.started_ms,
                finished_ms=_now_ms(),
                worker=self.worker_id,
                claim=held.claim.token,
                ran_version=ran.version if ran else None,
                ran_sha256=ran.sha256 if ran else None,
            )
            meta = jobs.encode_record(record, jobs.record_seq(job.meta))
        return Finished(job.job_id, outcome, body, meta)

    # --- cancel and deadlines ------------------------------------------------------------------

    def _heard(self, what: str, job_id: str) -> None:
        for held in list(self._claims.held.values()):
            if job := held.open.get(job_id):
                if what == "cancel":
                    self._end_early(held, job, self._ended(held, job, "cancelled"))
                elif what == "expire":
                    body = error_body("expired", "The deadline passed while the job ran.")
                    self._end_early(held, job, self._ended(held, job, "failed", body))

    def _renewed_in_thread(self, renewal: Renewal) -> None:
        self._loop.call_soon_threadsafe(self._renewed, renewal)

    def _renewed(self, renewal: Renewal) -> None:
        for job_id in renewal.cancelled:
            self._heard("cancel", job_id)
        for job_id in renewal.expired:
            self._heard("expire", job_id)
        for token in renewal.lost:
            # A claim whose finish is under way has nothing open, and its loss means nothing.
            held = self._claims.held.get(token)
            if held and held.open:
                log.warning("A lease was lost; %d jobs go to others.", len(held.open))
                self._renewer.let_go(token)

    def _end_early(self, held: Held, job: ClaimedJob, outcome: Finished) -> None:
        """Ends one job of a claim now; the others run on."""
        del held.open[job.job_id]
        if held.run:
            held.run.abandon(job.job_id)
        task = self._group.create_task(self._store_early(held, outcome))
        held.early.add(task)
        task.add_done_callback(held.early.discard)

    async def _store_early(self, held: Held, outcome: Finished) -> None:
        await self._stored(held, [outcome], last=False)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
