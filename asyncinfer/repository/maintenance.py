"""Maintenance of the queues: sweeps and repairs, by any process."""

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Final

from msgspec import Struct

from asyncinfer.errors import RedisRefused, StorageFull
from asyncinfer.jobs import read_record
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements
from asyncinfer.repository.failed_jobs import FailedJobs, read_failed_jobs
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Store, encode_args
from asyncinfer.untrusted import decoding

_log = LimitedLog(logging.getLogger(__name__))

_QUEUES_PER_SWEEP: Final = 32
_PAGE: Final = 1000
_REPAIRS_PER_CALL: Final = 100
_MAX_IDS_HELD: Final = 50_000
_OUT_OF_PLACE_TTL_MS: Final = 24 * 3600 * 1000


class SweepCounts(Struct):
    """What a sweep did, counted in jobs."""

    put_back: int = 0
    """Jobs of lost workers that wait again."""
    dead: int = 0
    """Jobs of lost workers that became dead letters."""
    promoted: int = 0
    """Delayed jobs that wait now."""
    expired: int = 0
    """Jobs that ended since their deadline passed."""
    ended: int = 0
    """Jobs of lost workers that ended: the dead letters, and cancelled jobs."""
    failed: list[FailedJobs] = []
    """The dead letters and the jobs that missed a deadline."""


class Maintenance:
    """Sweeps and repairs the queues; of many processes that try at the same time one does it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._announcements = Announcements(store)

    async def sweep(self) -> SweepCounts:
        """Sweeps every queue that is due, until nothing is left to do; returns what was done."""
        total = SweepCounts()
        queues = await self._store.queues()
        for start in range(0, len(queues), _QUEUES_PER_SWEEP):
            part = queues[start : start + _QUEUES_PER_SWEEP]
            more = False
            while part:
                part = await self._sweep(part, total, more=more)
                more = True
        return total

    async def _sweep(self, queues: Sequence[str], total: SweepCounts, *, more: bool) -> list[str]:
        """Sweeps queues once and adds to `total`; returns the queues that need another sweep."""
        policy = self._store.policy
        args = {
            **policy.end_arguments(),
            "tick_ms": policy.tick_ms,
            "lease_ms": policy.lease_ms,
            "max_deliveries": policy.max_deliveries,
            "dead_letter_ms": policy.failed_ttl_seconds * 1000,
            "log_jobs": policy.max_log_jobs,
            "is_continued": more,
        }
        reply = await self._store.call(script("reap"), queues, [encode_args(args)])
        unfinished = []
        for queue, counts in zip(queues, reply, strict=True):
            if counts is None:
                continue
            if isinstance(counts, bytes):
                await self._log_damage(queue, decoding.text(counts))
                continue
            total.put_back += counts[0]
            total.dead += counts[1]
            total.promoted += counts[2]
            total.expired += counts[3]
            total.ended += counts[4]
            if counts[6]:
                total.failed.append(read_failed_jobs(counts[6]))
            if counts[5]:
                unfinished.append(queue)
        return unfinished

    async def _log_damage(self, queue: str, reason: str) -> None:
        if _log.may_write(f"sweep {queue}"):
            if "WRONGTYPE" in reason:
                reason = (await self._store.wrong_keys_error([queue])).detail
            _log.warning(
                f"The queue {queue!r} is not swept, so that jobs of lost workers and delayed ones "
                f"wait in it: {reason}"
            )

    # --- repair ------------------------------------------------------------------------------

    async def repair(self, pause_seconds: float) -> int | None:
        """Puts back jobs that were out of place in two repairs, `pause_seconds` apart, and removes
        facts of jobs that have ended. Returns how many jobs it put back, or None if another
        process has repaired within `pause_seconds`.

        The job of a live external consumer is out of place as well, as long as it runs.
        """
        pause_ms = int(pause_seconds * 1000)
        gate = keys.repair_gate(self._store.queue_name)
        try:
            if not await self._store.command("SET", gate, "1", "NX", "PX", pause_ms):
                return None
        except StorageFull:
            # Without the gate every process would repair; the next repair may find it free.
            return None
        restored = 0
        ids: dict[str | None, set[bytes]] = {queue: set() for queue in await self._store.queues()}
        async for page in self._unfinished_ids():
            for job_id, queue in await self._queues_of(page):
                ids.setdefault(queue, set()).add(job_id)
            if sum(map(len, ids.values())) >= _MAX_IDS_HELD:
                restored += await self._repair_queues(ids, pause_ms)
                ids = {}
        return restored + await self._repair_queues(ids, pause_ms)

    async def _unfinished_ids(self) -> AsyncIterator[list[bytes]]:
        """Pages of the ids of all jobs whose status is pending or processing."""
        cursor = 0
        while True:
            reply = await self._store.command(
                "SCAN", cursor, "MATCH", keys.status("*"), "COUNT", _PAGE
            )
            cursor, names = int(reply[0]), reply[1]
            if names:
                statuses = await self._store.command("MGET", *names)
                yield [
                    name[len("job:") : -len(":status")]
                    for name, status in zip(names, statuses, strict=True)
                    if status in (b"pending", b"processing")
                ]
            if cursor == 0:
                return

    async def _queues_of(self, job_ids: Sequence[bytes]) -> list[tuple[bytes, str | None]]:
        """Each job with the queue in its record; None for an external job, which has no record."""
        if not job_ids:
            return []
        metas = await self._store.command("MGET", *(b"job:%b:meta" % job_id for job_id in job_ids))
        return [(job_id, _queue_in(meta)) for job_id, meta in zip(job_ids, metas, strict=True)]

    async def _repair_queues(self, ids: Mapping[str | None, set[bytes]], pause_ms: int) -> int:
        """Repairs queues, given the unfinished jobs of each; those of None are external jobs, of
        which the ones that are in no queue go to the default queue. Returns how many jobs it put
        back."""
        restored, default_queue = 0, self._store.queue_name
        by_queue = {queue: queue_ids for queue, queue_ids in ids.items() if queue is not None}
        # Nothing else lists a queue that no worker serves any more.
        await self._announcements.announce_queues(
            [queue for queue in by_queue if queue.startswith(f"{default_queue}:")]
        )
        lost = await self._lost_external_ids(ids.get(None, set()))
        by_queue[default_queue] = by_queue.get(default_queue, set()) | lost
        for queue, queue_ids in by_queue.items():
            try:
                restored += await self._repair_queue(queue, queue_ids, pause_ms)
                await self._settle_webhooks(queue)
            except RedisRefused as error:
                _log.warning(f"The queue {queue!r} is not repaired: {error.detail}")
        return restored

    async def _lost_external_ids(self, ids: set[bytes]) -> set[bytes]:
        """The external jobs that are in place in no queue; none if a queue cannot be read. An
        external program may have pushed a job into the queue of any model: in another it would run
        on the wrong one."""
        try:
            for queue in await self._store.queues() if ids else ():
                if not ids:
                    break
                ids = ids - await self._in_place(queue, ids)
        except RedisRefused as error:
            _log.warning(f"External jobs are not repaired: {error.detail}")
            return set()
        return ids

    async def _repair_queue(self, queue: str, ids: set[bytes], pause_ms: int) -> int:
        ids -= await self._in_place(queue, ids)
        ids |= await self._facts_without_job(queue)
        # Newest first: the job put back last is served next.
        ordered = sorted(ids, reverse=True)
        args = encode_args({"pause_ms": pause_ms, "ttl_ms": _OUT_OF_PLACE_TTL_MS})
        names = [queue, keys.out_of_place(self._store.queue_name)]
        restored = 0
        for start in range(0, len(ordered), _REPAIRS_PER_CALL):
            part = ordered[start : start + _REPAIRS_PER_CALL]
            restored += (await self._store.call(script("repair"), names, [args, *part]))[0]
        return restored

    async def _settle_webhooks(self, queue: str) -> None:
        """Gives back what is reserved for webhooks of jobs that are gone, or ended unseen."""
        cursor, released = "0", 0
        while True:
            args = {"cursor": cursor, "failed_ttl_seconds": self._store.policy.failed_ttl_seconds}
            reply = await self._store.call(script("settle"), [queue], [encode_args(args)])
            cursor, released = decoding.text(reply[0]), released + reply[1]
            if cursor == "0":
                break
        if released:
            _log.warning(
                f"{released} jobs of the queue {queue!r} had a webhook and are gone or ended "
                "elsewhere: their ends are not told."
            )

    async def _in_place(self, queue: str, ids: set[bytes]) -> set[bytes]:
        """The subset of `ids` that wait in a list, are delayed, or are in a claim with a lease."""
        found: set[bytes] = set()
        for waiting in keys.waiting(queue):
            start = 0
            while page := await self._store.command("LRANGE", waiting, start, start + _PAGE - 1):
                found |= ids.intersection(page)
                start += len(page)
        left = list(ids - found)
        for start in range(0, len(left), _PAGE):
            part = left[start : start + _PAGE]
            tokens = await self._store.command("HMGET", keys.running(queue), *part)
            leases = await self._store.command(
                "ZMSCORE", keys.leases(queue), *(token or b"" for token in tokens)
            )
            scores = await self._store.command("ZMSCORE", keys.delayed(queue), *part)
            found |= {
                job_id
                for job_id, lease, score in zip(part, leases, scores, strict=True)
                if lease is not None or score is not None
            }
        return found

    async def _facts_without_job(self, queue: str) -> set[bytes]:
        """Ids that have facts though their jobs are not unfinished: facts of jobs that ended
        without a script must not stay for ever."""
        found: set[bytes] = set()
        cursor = 0
        while True:
            reply = await self._store.command("HSCAN", keys.facts(queue), cursor, "COUNT", _PAGE)
            cursor, ids = int(reply[0]), list(reply[1])
            if ids:
                names = [b"job:%b:status" % job_id for job_id in ids]
                statuses = await self._store.command("MGET", *names)
                found |= {
                    job_id
                    for job_id, status in zip(ids, statuses, strict=True)
                    if status not in (b"pending", b"processing")
                }
            if cursor == 0:
                return found


def _queue_in(meta: bytes | None) -> str | None:
    record = read_record(meta)
    return record.queue if record else None
