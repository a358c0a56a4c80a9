"""One worker: slots that claim, run and finish; cancel, time-out and drain."""

import asyncio
import contextlib
import logging
import os
import random
import secrets
import socket
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, Final

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
from asyncinfer.processes import tuning
from asyncinfer.repository.announcements import ANNOUNCE_SECONDS
from asyncinfer.repository.claims import ClaimedJob, Finished, Runs
from asyncinfer.repository.leases import Renewal
from asyncinfer.repository.reaper import reap_forever
from asyncinfer.repository.store import Store
from asyncinfer.worker import execution
from asyncinfer.worker.claiming.claims import Claims
from asyncinfer.worker.claiming.control_listener import Control
from asyncinfer.worker.held_claim import Held, Step
from asyncinfer.worker.lease_renewer import Renewer
from asyncinfer.worker.models.announcer import Announcer, Said, announce_forever
from asyncinfer.worker.models.folder_watcher import changes
from asyncinfer.worker.models.library import Library
from asyncinfer.worker.models.queues import Queues
from asyncinfer.worker.running.completion import Finishing
from asyncinfer.worker.running.deferral import LaterJobs, Postponing
from asyncinfer.worker.running.outcomes import Outcomes, released
from asyncinfer.worker.running.runner import Hung, Running
from asyncinfer.worker.running.timings import Paces

log = logging.getLogger(__name__)

EXIT_HUNG: Final = 70
"""A run would not stop: the process ends, so that its supervisor starts a fresh one."""

_FAREWELL_SECONDS: Final = 1.0

_ELSEWHERE_MS: Final = (20, 200)
"""How long a job waits that this worker could not run, so that it is not the first to see it."""

_UNLOADED_MS: Final = (100, 5000)
"""How long one waits for a version that is not loaded yet, at least, and at most the more such
jobs there are."""

_MOST_NAMED: Final = 20
"""Models that one line of the log names."""

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


class Worker:
    """Claims from its models' queues and runs what it claims, `concurrency` batches at once."""

    def __init__(
        self,
        store: Store,
        library: Library,
        default_model: str | None,
        config: WorkerConfig,
        on_step: Callable[[Step], None] = lambda _: None,
        *,
        default_is_set: bool = False,
    ) -> None:
        self.worker_id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self.hung = False
        self._store = store
        self._library = library
        self._config = config
        self._queues = Queues(
            store,
            library,
            default_model,
            max_batch=config.max_batch,
            default_is_set=default_is_set,
        )
        queues = self._queues.served()
        self._later = LaterJobs()
        self._unloaded = Postponing(*_UNLOADED_MS)
        self._paces = Paces()
        self._answered_at = time.monotonic()
        self._started_ms = time.time_ns() // 1_000_000
        runs = Runs(store, self.worker_id)
        self._loop = asyncio.get_running_loop()
        self._renewer = Renewer(store, self._renewed_in_thread)
        self._claims = Claims(
            store,
            runs,
            self._renewer,
            queues,
            max_batch=config.max_batch,
            brpop_timeout_seconds=config.brpop_timeout_seconds,
            on_step=on_step,
        )
        self._outcomes = Outcomes(store, self.worker_id, config.max_result_bytes)
        self._running = Running(
            library,
            self._outcomes,
            self._queues.model_of,
            concurrency=config.concurrency,
            prediction_timeout_seconds=config.prediction_timeout_seconds,
            hang_grace_seconds=config.hang_grace_seconds,
            on_step=on_step,
        )
        self._finishing = Finishing(
            runs, self._claims, self._outcomes, spawn=self._spawn, on_step=on_step
        )
        self._control = Control(store, queues, self._finishing.heard)
        self._announcer = Announcer(
            store, self.worker_id, library, self._queues, self._said, self._serve_queues
        )
        self._news = asyncio.Event()
        self._watched_enough = asyncio.Event()
        self._group: asyncio.TaskGroup
        library.on_change = self._models_changed
        library.on_confirmed = self._serve_queues
        self._serve_queues()

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
        self._running.close(wait=not self.hung)
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
            self._load,
            self._watch,
        ]

    async def _introduced(self) -> None:
        """Before anything is claimed: a file that another worker has otherwise must not be run."""
        with contextlib.suppress(RedisUnavailable, StorageFull):
            await self._announcer.announce()
            self._redis_answered()

    async def _load(self) -> None:
        """Loads what is in the folder at the start."""
        await self._library.describe()
        names = self._library.names
        if names:
            more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
            log.info("Serves %s%s.", ", ".join(names[:_MOST_NAMED]), more)
        # In a thread, since to give memory back takes a while.
        await asyncio.to_thread(tuning.settle)

    async def _watch(self) -> None:
        """Follows the model folder."""
        seen = changes(
            self._library.watched,
            rescan_seconds=self._config.rescan_seconds,
            stopping=self._watched_enough,
        )
        # A rescan that tries a large file must not keep the next from seeing what else changed.
        async with anyio.create_task_group() as rescans:
            async for _ in seen:
                rescans.start_soon(self._rescan)

    async def _rescan(self) -> None:
        try:
            await self._library.rescan()
        except Exception:
            log.exception("The model folder could not be followed.")

    def _models_changed(self) -> None:
        self._serve_queues()
        self._news.set()

    def _serve_queues(self) -> None:
        queues = self._queues.served()
        is_growing = bool(self._library.loading or self._library.unconfirmed)
        self._claims.serve(queues, is_growing=is_growing)
        self._control.serve(queues, is_growing=is_growing)

    def _said(self) -> Said:
        paces = self._paces.seconds_per_job()
        about = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started_ms": self._started_ms,
            "concurrency": self._config.concurrency,
            "busy": len(self._claims.held),
            "state": self._state(),
            "jobs_done": self._finishing.jobs_done(),
            "seconds_per_job": paces,
            "run_times": self._running.times.view(),
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
        if not self._library.served:
            return self._library.nothing_served() or "It loads its models; none is served yet."
        return None

    def counted(self) -> tuple[Mapping[str, Mapping[int, tuple[int, float]]], Mapping[str, int]]:
        """Runs by model and rows, and jobs by outcome."""
        return self._running.times.sums(), self._finishing.ended

    def _state(self) -> str:
        if self.hung:
            return "hung"
        if self._claims.draining.is_set():
            return "draining"
        return "starting" if self._library.loading and not self._library.served else "ready"

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
        self._running.give_up()
        self._finishing.give_up()
        for held in self._claims.held.values():
            if held.run:
                held.run.end("drain")
        _, stuck = await asyncio.wait(busy, timeout=self._config.hang_grace_seconds)
        if stuck:
            self.hung = True
            with anyio.move_on_after(_FAREWELL_SECONDS):
                async with anyio.create_task_group() as group:
                    for held in self._claims.held.values():
                        group.start_soon(self._finishing.release, held)
            for task in stuck:
                task.cancel()

    async def _slot(self) -> None:
        held: Held | None = None
        while held := held or await self._claims.next():
            held = await self._serve(held)

    # --- running -------------------------------------------------------------------------------

    async def _serve(self, held: Held) -> Held | None:
        """Runs a claim and finishes it; returns the next claim, when one came with it."""
        finished: list[Finished] = []
        try:
            prepared = await self._running.prepared(held.claim)
            finished += [await self._refused(held, job, error) for job, error in prepared.refused]
            if any(one.outcome == "released" for one in finished):
                await self._claims.shuffle(held.claim.queue)
            for batch in prepared.batches:
                finished += await self._running.run(held, batch)
        except Hung as hung:
            self._lose_slot()
            finished += self._running.after_hang(held, hung.run, finished)
        except Exception:
            log.exception("A claim could not be run; its jobs fail.")
            error = JobError("The worker failed in a way it did not expect; its log has more.")
            done = {one.job_id for one in finished}
            finished += [
                self._outcomes.failed(held, job, error)
                for job in held.open.values()
                if job.job_id not in done
            ]
        held.ran_at = time.monotonic()
        following = await self._finishing.finish(held, finished)
        self._note_pace(held)
        return following

    async def _refused(self, held: Held, job: ClaimedJob, error: AsyncinferError) -> Finished:
        """A job for what this worker lacks goes to one that has it: a new version does not come
        to all of them at once. One for what is not loaded yet comes back when it is."""
        if isinstance(error, LaterRecord):
            return self._later.released(job)
        model, version = execution.asked(job, self._queues.model_of(held.claim.queue))
        if isinstance(error, UnknownModel) and model:
            if self._library.loads_soon(model, version):
                return self._unloaded.released(job)
            if await self._is_elsewhere(model, version):
                return released([job], random.randrange(*_ELSEWHERE_MS))[0]
        return self._outcomes.failed(held, job, error)

    async def _is_elsewhere(self, model: str, version: str | None) -> bool:
        """True also while nobody can be asked: that is no reason to fail a job for good."""
        try:
            return await self._announcer.is_elsewhere(model, version)
        except RedisRefused:
            return False
        except RedisUnavailable:
            return True

    def _note_pace(self, held: Held) -> None:
        """A claim takes its slot until its outcomes are stored; an outage says nothing of it."""
        now = time.monotonic()
        storing_seconds = min(now - held.ran_at, _MOST_STORING_SECONDS)
        slot_seconds = held.ran_at - held.claimed_at + storing_seconds
        model = self._queues.model_of(held.claim.queue) or ""
        self._paces.note(model, slot_seconds, held.claim.count, at_seconds=now)

    def _renewed_in_thread(self, renewal: Renewal) -> None:
        self._loop.call_soon_threadsafe(self._finishing.renewed, renewal)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return self._group.create_task(work)

    def _lose_slot(self) -> None:
        log.error("A run would not stop; this worker finishes its other runs and exits.")
        self.hung = True
        self.drain()
