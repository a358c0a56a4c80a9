"""A worker: slots that claim, run and finish jobs, and the background tasks beside them."""

import asyncio
import contextlib
import logging
import os
import random
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio
import msgspec

from asyncinfer.errors import (
    AsyncinferError,
    JobError,
    LaterRecord,
    RedisRefused,
    RedisUnavailable,
    StorageFull,
    UnknownModel,
)
from asyncinfer.jobs import now_ms
from asyncinfer.processes import tuning
from asyncinfer.repository.announcements import ANNOUNCE_INTERVAL_SECONDS
from asyncinfer.repository.claims import ClaimedJob, JobOutcome, QueueConsumer
from asyncinfer.repository.failed_jobs import FailedJobs
from asyncinfer.repository.failed_jobs_log import FailedJobsLog
from asyncinfer.repository.leases import Renewal
from asyncinfer.repository.reaper import reap_forever
from asyncinfer.repository.store import Store
from asyncinfer.worker import execution
from asyncinfer.worker.claiming.claim_waiter import ClaimWaiter
from asyncinfer.worker.claiming.claims import Claimer
from asyncinfer.worker.claiming.control_listener import ControlListener
from asyncinfer.worker.figures import WorkerFigures
from asyncinfer.worker.held_claim import HeldClaim, HeldClaims, Step
from asyncinfer.worker.lease_renewer import LeaseRenewer
from asyncinfer.worker.models.announcer import Announcer, WorkerStatus, announce_forever
from asyncinfer.worker.models.folder_watcher import folder_changes
from asyncinfer.worker.models.library import Library
from asyncinfer.worker.models.queues import Queues
from asyncinfer.worker.output_sizes import OutputSizes
from asyncinfer.worker.running.completion import Finisher
from asyncinfer.worker.running.deferral import Deferrer, LaterReleaseDeferrer
from asyncinfer.worker.running.outcomes import OutcomeBuilder
from asyncinfer.worker.running.runner import BatchRunner, RunHung
from asyncinfer.worker.running.spans import JobSpans
from asyncinfer.worker.running.timings import JobTimes

if TYPE_CHECKING:
    from asyncinfer.telemetry.tracing import Tracing

_log = logging.getLogger(__name__)

EXIT_HUNG: Final = 70
"""Exit code after a run that did not stop: the supervisor then starts a new process."""

_LAST_CALLS_SECONDS: Final = 1.0
"""For what a worker still tells Redis when it ends; leases do the rest if Redis is away."""

_ELSEWHERE_DELAY_MS: Final = (20, 200)
"""Delay before a job this worker cannot serve becomes visible again, so that another worker
claims it: a random time between these."""

_UNLOADED_DELAY_MS: Final = (100, 5000)
"""Shortest and longest delay of a job for a version that is not loaded yet; the more such jobs
there are, the longer."""

_MAX_NAMED: Final = 20
"""The most models that one line of the log names."""

_MAX_STORING_SECONDS: Final = 1.0
_SILENT_SECONDS: Final = 3 * ANNOUNCE_INTERVAL_SECONDS
"""After this time without an answer from Redis, the worker is not ready."""


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a worker that do not depend on where its models and its Redis are."""

    concurrency: int
    """How many batches run at once."""
    max_batch: int = 128
    """The most jobs of one claim."""
    max_result_bytes: int = 16 << 20
    """The largest result of one job; a job with a larger one fails."""
    brpop_timeout_seconds: float = 1.0
    """How long an idle worker waits on the doorbell until it claims in any case."""
    prediction_timeout_seconds: float = 10.0
    """How long one run may take, unless `model.toml` says otherwise."""
    hang_grace_seconds: float = 1.0
    """How long a run that was stopped may go on until it counts as hung."""
    drain_timeout_seconds: float = 20.0
    """How long runs may go on after a drain began until they are stopped."""
    rescan_seconds: float = 10.0
    """How often the model folder is read if the system reports no change."""


class Worker:
    """Claims from its models' queues and runs what it claims, `concurrency` batches at once. There
    is one per process; create it in the event loop, and call `run` once."""

    def __init__(
        self,
        store: Store,
        library: Library,
        default_model: str | None,
        config: WorkerConfig,
        on_step: Callable[[Step], None] = lambda _: None,
        *,
        default_is_set: bool = False,
        tracing: "Tracing | None" = None,
        figures: WorkerFigures | None = None,
    ) -> None:
        """`default_model` None: it is not known yet. `default_is_set`: whether it was configured
        for this worker. `tracing` None: no spans are made. `figures` are those that already count
        its loads. Takes over the callbacks of the library, which must be open."""
        self.figures = figures or WorkerFigures()
        self.worker_id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self.is_hung = False
        """Whether a run did not stop, so that its thread is lost and the process must end."""
        self._store = store
        self._library = library
        self._table = library.table
        self._config = config
        self._queues = Queues(
            store,
            self._table,
            default_model,
            max_batch=config.max_batch,
            default_is_set=default_is_set,
        )
        self._later_deferrer = LaterReleaseDeferrer()
        self._unloaded_deferrer = Deferrer(*_UNLOADED_DELAY_MS)
        self._job_times = JobTimes()
        self._answered_at = time.monotonic()
        self._refusal = ""
        """What Redis refused in the last round of announcements; empty if it did not answer."""
        self._started_ms = now_ms()
        self._spans = JobSpans(tracing, self.worker_id) if tracing else None
        consumer = QueueConsumer(store, self.worker_id)
        self._loop = asyncio.get_running_loop()
        self._renewer = LeaseRenewer(store, self._on_renewal)
        self._held = HeldClaims(self._renewer)
        self._waiter = ClaimWaiter(
            store,
            consumer,
            self._held,
            brpop_timeout_seconds=config.brpop_timeout_seconds,
            on_step=on_step,
        )
        self._failed_jobs = FailedJobsLog(
            store, self._queues.model_of, self.figures.outcomes, self.worker_id
        )
        # Batching adds nothing to the memory that the result of a single job may take.
        output_sizes = OutputSizes(config.max_result_bytes)
        self._claimer = Claimer(
            consumer,
            self._held,
            self._waiter,
            output_sizes,
            max_batch=config.max_batch,
            on_step=on_step,
            on_failed=self._note_failed_by_claim,
        )
        self._builder = OutcomeBuilder(store, self.worker_id, config.max_result_bytes)
        self.runner = BatchRunner(
            library,
            self._builder,
            self._queues.model_of,
            output_sizes,
            concurrency=config.concurrency,
            prediction_timeout_seconds=config.prediction_timeout_seconds,
            hang_grace_seconds=config.hang_grace_seconds,
            on_step=on_step,
            figures=self.figures,
            spans=self._spans,
        )
        self.finisher = Finisher(
            consumer,
            self._held,
            self._claimer,
            self._builder,
            # In the group, so that `run` waits for it.
            start_task=lambda work: self._group.create_task(work),
            failed_jobs=self._failed_jobs,
            on_step=on_step,
            on_stored=self._count_stored,
            spans=self._spans,
        )
        self._control_listener = ControlListener(store, self._on_control_message)
        self._announcer = Announcer(
            store, self.worker_id, library, self._queues, self._status, self._serve_queues
        )
        self._announce_soon = asyncio.Event()
        self._watch_stopped = asyncio.Event()
        self._group: asyncio.TaskGroup
        library.on_change = self._models_changed
        library.on_served = self._serve_queues
        self._serve_queues()

    # --- the process ---------------------------------------------------------------------------

    async def run(self) -> int:
        """Works until it is drained; then retracts its announcement and closes the library. Returns
        the exit code: 0, or EXIT_HUNG after a run that did not stop, whose thread still runs."""
        self._renewer.start()
        # anyio's group, since redis-py may swallow a cancellation and anyio's comes again.
        async with anyio.create_task_group() as background:
            for role in self._roles():
                background.start_soon(role)
            try:
                async with asyncio.TaskGroup() as self._group:
                    await self._announce_before_claiming()
                    create = self._group.create_task
                    slots = [create(self._run_slot()) for _ in range(self._config.concurrency)]
                    await self._wait_for_slots(slots)
            finally:
                self._watch_stopped.set()
            await self._control_listener.close()
            background.cancel_scope.cancel()
        self._failed_jobs.flush()
        await self._renewer.close()
        with contextlib.suppress(RedisUnavailable, StorageFull, TimeoutError):
            async with asyncio.timeout(_LAST_CALLS_SECONDS):
                await self._announcer.retract()
        self._library.cache.close()
        self.runner.close(wait=not self.is_hung)
        return EXIT_HUNG if self.is_hung else 0

    def _roles(self) -> list[Callable[[], Coroutine[Any, Any, None]]]:
        """The functions that run in the background beside the slots, until they are cancelled."""
        announce = partial(
            announce_forever,
            self._announcer.announce,
            self._announce_soon,
            self._redis_answered,
            self._redis_failed,
        )
        return [
            partial(reap_forever, self._store, self._failed_jobs),
            announce,
            self._renewer.beat,
            self._control_listener.listen,
            self._waiter.windows.listen,
            self._load,
            self._watch,
        ]

    async def _announce_before_claiming(self) -> None:
        """Announces once, to learn which files conflict with those of other workers: these must not
        be run. An unreachable or full Redis does not stop the start."""
        with contextlib.suppress(RedisUnavailable, StorageFull):
            await self._announcer.announce()
            self._redis_answered()

    async def _load(self) -> None:
        """Loads the models that are in the folder at the start; returns when all were tried, and
        logs which can be served."""
        await self._library.load_untried()
        names = self._table.names
        if names:
            more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
            _log.info("Serves %s%s.", ", ".join(names[:_MAX_NAMED]), more)
        # In a thread, since giving memory back takes a while.
        await asyncio.to_thread(tuning.tune_for_serving)

    async def _watch(self) -> None:
        """Rescans the model folder at each change, until `run` has drained. Rescans may overlap."""
        events = folder_changes(
            self._library.source.watched_folder,
            rescan_seconds=self._config.rescan_seconds,
            stopping=self._watch_stopped,
        )
        # A rescan that tries a large file must not keep the next from seeing what else changed.
        async with anyio.create_task_group() as rescans:
            async for _ in events:
                rescans.start_soon(self._rescan)

    async def _rescan(self) -> None:
        """Rescans the model folder; an unexpected error is logged and does not end the worker."""
        try:
            await self._library.rescan()
        except Exception:
            _log.exception("The model folder could not be followed.")

    def _models_changed(self) -> None:
        """Claims from the queues of the models that are served now, and has them announced soon."""
        self._serve_queues()
        self._announce_soon.set()

    def _serve_queues(self) -> None:
        """Passes the queues of the served models to the claim waiter and the control listener, with
        whether more are about to come."""
        queues = self._queues.served()
        is_growing = bool(self._table.loading or self._table.unannounced_labels)
        self._waiter.serve(queues, is_growing=is_growing)
        self._control_listener.serve(queues, is_growing=is_growing)

    def _status(self) -> WorkerStatus:
        """The changing part of this worker's announcement."""
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started_ms": self._started_ms,
            "concurrency": self._config.concurrency,
            "busy": self.busy_slots,
            "isolating": self._held.is_isolating,
            "state": self._state(),
            "jobs_done": self.finisher.jobs_done(),
            "seconds_per_job": self._job_times.seconds_per_job(),
            "run_times": self.runner.times.view(),
        }

    def _on_control_message(self, kind: str, job_id: str) -> None:
        """Looks after a job that may have to be stopped; other messages are not for workers that
        hold jobs."""
        if kind in ("cancel", "expire"):
            self._held.check_job(job_id)

    @property
    def busy_slots(self) -> int:
        """How many slots have a claim."""
        return len(self._held.by_token)

    def _redis_answered(self) -> None:
        """Notes for `why_not_ready` that Redis has answered now."""
        self._answered_at = time.monotonic()

    def _redis_failed(self, error: RedisUnavailable) -> None:
        """Notes for `why_not_ready` what Redis has refused now; nothing if it did not answer."""
        self._refusal = "" if type(error) is RedisUnavailable else error.detail

    def why_not_ready(self) -> str | None:
        """Why the worker can claim nothing now, as a sentence; None when it can."""
        if self.is_hung:
            return "A run would not stop; this worker ends, to be started afresh."
        if self._waiter.draining.is_set():
            return "It drains: jobs under way are finished, and no more are claimed."
        silent_seconds = time.monotonic() - self._answered_at
        if silent_seconds > _SILENT_SECONDS:
            if self._refusal:
                return f"For {silent_seconds:.0f} s Redis has refused this worker: {self._refusal}"
            return f"Redis has not answered for {silent_seconds:.0f} s."
        if not self._table.served:
            reason = self._table.why_nothing_is_served()
            return reason or "It loads its models; none is served yet."
        return None

    def _state(self) -> str:
        """The state as announced: hung, draining, starting or ready."""
        if self.is_hung:
            return "hung"
        if self._waiter.draining.is_set():
            return "draining"
        return "starting" if self._table.loading and not self._table.served else "ready"

    def begin_drain(self) -> None:
        """Stops claiming and returns at once; does nothing if it drains already. `run` returns when
        all claimed jobs have finished or been released, which DRAIN_TIMEOUT limits. Call it only
        while `run` is under way."""
        if not self._waiter.draining.is_set():
            # Set at once, since a slot that finishes before the task runs must not claim.
            self._waiter.draining.set()
            self._group.create_task(self._waiter.drain())

    async def _wait_for_slots(self, slots: Sequence[asyncio.Task[None]]) -> None:
        """Waits until the worker drains and its slots have ended; stops runs that take longer than
        DRAIN_TIMEOUT."""
        await self._waiter.draining.wait()
        _, busy = await asyncio.wait(slots, timeout=self._config.drain_timeout_seconds)
        if busy:
            await self._stop_runs(busy)

    async def _stop_runs(self, busy: set[asyncio.Task[None]]) -> None:
        """Stops the runs of these slots, since the drain took too long, and releases their jobs.
        Sets `is_hung` if a run does not stop within the grace period, and cancels its slot."""
        self.runner.give_up()
        self.finisher.give_up()
        for held in self._held.by_token.values():
            if held.run:
                held.run.stop_for("drain")
        _, stuck = await asyncio.wait(busy, timeout=self._config.hang_grace_seconds)
        if stuck:
            _log.error("A run would not stop; this worker exits with code %d.", EXIT_HUNG)
            self.is_hung = True
            with anyio.move_on_after(_LAST_CALLS_SECONDS):
                async with anyio.create_task_group() as group:
                    for held in self._held.by_token.values():
                        group.start_soon(self.finisher.release, held)
            for task in stuck:
                task.cancel()

    async def _run_slot(self) -> None:
        """Claims and runs until draining, then returns."""
        held: HeldClaim | None = None
        while held := held or await self._claimer.next():
            held = await self._run_claim(held)

    # --- running -------------------------------------------------------------------------------

    async def _run_claim(self, held: HeldClaim) -> HeldClaim | None:
        """Runs a claim and stores its outcomes; returns the next claim, if one came with the reply.

        Never raises for a job: an unexpected error fails the jobs that have no outcome yet.
        """
        finished: list[JobOutcome] = []
        if self._spans:
            self._spans.claimed(held)
        try:
            prepared = await self.runner.prepare(held.claim)
            model = self._queues.model_of(held.claim.queue)
            self.figures.claimed(model, held.claim.jobs, held.started_ms)
            finished += [
                await self._outcome_of_refused(held, job, error) for job, error in prepared.refused
            ]
            if any(outcome.outcome == "released" for outcome in finished):
                await self._waiter.ring_for_another_worker(held.claim.queue)
            waiting = deque(prepared.batches)
            while waiting:
                finished = await self.finisher.store_large(held, finished)
                finished += await self.runner.run_next(held, waiting)
        except RunHung as hung:
            self._begin_drain_after_hang(self._queues.model_of(held.claim.queue))
            finished += self.runner.after_hang(held, hung.run, finished)
        except Exception:
            _log.exception("A claim could not be run; its jobs fail.")
            error = JobError("The worker failed in a way it did not expect; its log has more.")
            ended_ids = {outcome.job_id for outcome in finished}
            finished += [
                self._builder.failed(held, job, error)
                for job in held.open_jobs.values()
                if job.job_id not in ended_ids
            ]
        held.run_ended_at = time.monotonic()
        following = await self.finisher.finish(held, finished)
        self._note_seconds_per_job(held)
        return following

    async def _outcome_of_refused(
        self, held: HeldClaim, job: ClaimedJob, error: AsyncinferError
    ) -> JobOutcome:
        """The outcome of a job that this worker cannot run; stores nothing. Released with a delay
        if its version is not loaded yet, or another worker has it (a new version does not come to
        all workers at once) or a later release wrote it; else failed."""
        if isinstance(error, LaterRecord):
            return self._later_deferrer.defer(job)
        model, version = execution.requested_model(job, self._queues.model_of(held.claim.queue))
        if isinstance(error, UnknownModel) and model:
            if self._table.will_load(model, version):
                delay_ms = self._unloaded_deferrer.next_delay_ms()
            elif await self._is_elsewhere(model, version):
                delay_ms = random.randrange(*_ELSEWHERE_DELAY_MS)
            else:
                return self._builder.failed(held, job, error)
            return self._builder.released(held, [job], "not_loaded", delay_ms)[0]
        return self._builder.failed(held, job, error)

    async def _is_elsewhere(self, model: str, version: str | None) -> bool:
        """Whether another worker has the version. True also while Redis is away, since that is no
        reason to fail a job for good; False if Redis refuses the call."""
        try:
            return await self._announcer.is_elsewhere(model, version)
        except RedisRefused:
            return False
        except RedisUnavailable:
            return True

    def _count_stored(
        self, held: HeldClaim, outcomes: Sequence[JobOutcome], verdicts: Sequence[str]
    ) -> None:
        """Counts outcomes of jobs, which Redis has stored or discarded."""
        self.figures.stored(self._queues.model_of(held.claim.queue), outcomes, verdicts)

    def _note_failed_by_claim(self, failed: Sequence[FailedJobs]) -> None:
        """Has jobs that a claim ended as failed counted and logged, beside the claim's run."""
        self._group.create_task(self._failed_jobs.note_failed_by_script(failed))

    def _note_seconds_per_job(self, held: HeldClaim) -> None:
        """Notes how long the claim occupied its slot, up to now, when its outcomes are stored. Time
        beyond a second for storing is left out, since it was an outage of Redis."""
        now = time.monotonic()
        storing_seconds = min(now - held.run_ended_at, _MAX_STORING_SECONDS)
        slot_seconds = held.run_ended_at - held.claimed_at + storing_seconds
        model = self._queues.model_of(held.claim.queue) or ""
        self._job_times.add(model, slot_seconds, held.claim.count, at_seconds=now)

    def _on_renewal(self, renewal: Renewal) -> None:
        """Called in the renewal thread; passes the renewal on to the event loop."""
        self._loop.call_soon_threadsafe(self.finisher.apply_renewal, renewal)

    def _begin_drain_after_hang(self, model: str | None) -> None:
        """Marks the worker as hung, since a thread is lost, and starts draining; returns at once.
        `run` returns EXIT_HUNG when the other runs have finished."""
        _log.error(
            "A run of %s would not stop; this worker finishes its other runs and exits with code "
            "%d.",
            model or "a model",
            EXIT_HUNG,
        )
        self.is_hung = True
        self.begin_drain()
