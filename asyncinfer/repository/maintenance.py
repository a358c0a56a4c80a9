"""What every process does for all: sweep, repair, announce."""

import logging
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from asyncinfer.errors import RedisRefused, StorageFull
from asyncinfer.jobs import read_record
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository import keys
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Store, encode_args
from asyncinfer.untrusted import decoding

_log = LimitedLog(logging.getLogger(__name__))

_QUEUES_A_SWEEP: Final = 32
_PAGE: Final = 1000
_REPAIRS_A_CALL: Final = 100
_HELD_IDS: Final = 50_000
_ODD_MS: Final = 24 * 3600 * 1000
_PACE_SECONDS: Final = 30 * 24 * 3600


class Swept(Struct):
    """What a sweep did, in jobs."""

    put_back: int = 0
    dead: int = 0
    promoted: int = 0
    expired: int = 0
    ended: int = 0
    more: bool = False


class Upkeep:
    """The verbs that any process may run, whoever runs them first."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def queues(self) -> list[str]:
        """Every queue there is, the default model's included; a name that is not ours is none."""
        n = self._store.n
        known = await self._store.look("SMEMBERS", keys.queues(n), otherwise=())
        names = filter(None, map(decoding.name, known))
        return sorted({n, *(name for name in names if name.startswith(f"{n}:"))})

    async def sweep(self) -> Swept:
        """One sweep of every queue not swept lately, on until nothing is left to do."""
        total = Swept()
        queues = await self.queues()
        for start in range(0, len(queues), _QUEUES_A_SWEEP):
            part = queues[start : start + _QUEUES_A_SWEEP]
            more = False
            while part:
                part = await self._sweep(part, total, more=more)
                more = True
        return total

    async def _sweep(self, queues: Sequence[str], total: Swept, *, more: bool) -> list[str]:
        """Sweeps queues once; returns those that have more."""
        policy = self._store.policy
        args = {
            **policy.ending(),
            "tick_ms": policy.tick_ms,
            "lease_ms": policy.lease_ms,
            "max_deliveries": policy.max_deliveries,
            "dead_letter_ms": policy.failed_ttl_seconds * 1000,
            "log_jobs": policy.log_jobs,
            "is_continued": more,
        }
        reply = await self._store.call(script("reap"), queues, [encode_args(args)])
        unfinished = []
        for queue, counts in zip(queues, reply, strict=True):
            if counts is None:
                continue
            if isinstance(counts, bytes):
                await self._tell_of_damage(queue, decoding.text(counts))
                continue
            total.put_back += counts[0]
            total.dead += counts[1]
            total.promoted += counts[2]
            total.expired += counts[3]
            total.ended += counts[4]
            if counts[5]:
                unfinished.append(queue)
        return unfinished

    async def _tell_of_damage(self, queue: str, reason: str) -> None:
        if _log.is_due(f"sweep {queue}"):
            if "WRONGTYPE" in reason:
                reason = (await self._store.damage([queue])).detail
            _log.warning(
                f"The queue {queue!r} is not swept, so that jobs of lost workers and delayed ones "
                f"wait in it: {reason}"
            )

    # --- repair ------------------------------------------------------------------------------

    async def repair(self, pause_seconds: float) -> int | None:
        """Puts back jobs found out of place twice, `pause_seconds` apart; None: not our turn.

        A stranger's living consumer looks out of place too, for as long as its job runs.
        """
        pause_ms = int(pause_seconds * 1000)
        gate = keys.repair_gate(self._store.n)
        try:
            if not await self._store.command("SET", gate, "1", "NX", "PX", pause_ms):
                return None
        except StorageFull:
            # Without the gate every process would repair; another time, then.
            return None
        back = 0
        held: dict[str, set[bytes]] = {queue: set() for queue in await self.queues()}
        async for statuses in self._unfinished():
            for job_id, queue in await self._queues_of(statuses):
                held.setdefault(queue, set()).add(job_id)
            if sum(map(len, held.values())) >= _HELD_IDS:
                back += await self._repair_held(held, pause_ms)
                held = {}
        return back + await self._repair_held(held, pause_ms)

    async def _unfinished(self) -> AsyncIterator[list[bytes]]:
        """Pages of ids whose status is pending or processing."""
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

    async def _queues_of(self, job_ids: Sequence[bytes]) -> list[tuple[bytes, str]]:
        """Each job with the queue that its own record names."""
        if not job_ids:
            return []
        metas = await self._store.command("MGET", *(b"job:%b:meta" % one for one in job_ids))
        return [
            (job_id, _queue_in(meta) or self._store.n)
            for job_id, meta in zip(job_ids, metas, strict=True)
        ]

    async def _repair_held(self, held: Mapping[str, set[bytes]], pause_ms: int) -> int:
        back = 0
        # A queue that nobody serves any more is listed by nobody else.
        await self.announce_queues([one for one in held if one.startswith(f"{self._store.n}:")])
        for queue, ids in held.items():
            try:
                back += await self._repair_queue(queue, ids, pause_ms)
            except RedisRefused as error:
                _log.warning(f"The queue {queue!r} is not repaired: {error.detail}")
        return back

    async def _repair_queue(self, queue: str, ids: set[bytes], pause_ms: int) -> int:
        ids -= await self._in_place(queue, ids)
        ids |= await self._facts_without_job(queue)
        # Newest first: the last one put back is the next to be served.
        ordered = sorted(ids, reverse=True)
        args = encode_args({"pause_ms": pause_ms, "ttl_ms": _ODD_MS})
        names = [queue, keys.out_of_place(self._store.n)]
        back = 0
        for start in range(0, len(ordered), _REPAIRS_A_CALL):
            part = ordered[start : start + _REPAIRS_A_CALL]
            back += (await self._store.call(script("repair"), names, [args, *part]))[0]
        return back

    async def _in_place(self, queue: str, ids: set[bytes]) -> set[bytes]:
        """Which of `ids` are in a list, delayed, or in a claim that has a lease."""
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
                one
                for one, lease, score in zip(part, leases, scores, strict=True)
                if lease is not None or score is not None
            }
        return found

    async def _facts_without_job(self, queue: str) -> set[bytes]:
        """Ids with facts: those of jobs that ended elsewhere must not stay for ever."""
        found: set[bytes] = set()
        cursor = 0
        while True:
            reply = await self._store.command("HSCAN", keys.facts(queue), cursor, "COUNT", _PAGE)
            cursor, ids = int(reply[0]), list(reply[1])
            if ids:
                names = [b"job:%b:status" % one for one in ids]
                statuses = await self._store.command("MGET", *names)
                found |= {
                    one
                    for one, status in zip(ids, statuses, strict=True)
                    if status not in (b"pending", b"processing")
                }
            if cursor == 0:
                return found

    # --- announcements -----------------------------------------------------------------------

    async def announce_queues(self, queues: Collection[str]) -> None:
        """Lists queues in the set of all queues, which sweeps, repairs and listings go through."""
        await self._add_missing(keys.queues(self._store.n), queues)

    async def announce_model_names(self, names: Collection[str]) -> None:
        """Lists models in the set of all models; the versions are announced one by one."""
        await self._add_missing(keys.models(self._store.n), names)

    async def _add_missing(self, key: str, names: Collection[str]) -> None:
        """Reads before it writes: nearly always all are there, and a write is replicated."""
        if names:
            all_known = [1] * len(names)
            known = await self._store.look("SMISMEMBER", key, *names, otherwise=all_known)
            if missing := [name for name, is_in in zip(names, known, strict=True) if not is_in]:
                await self._store.command("SADD", key, *missing)

    async def queues_with_jobs(self, queues: Sequence[str]) -> set[str]:
        """Those of `queues` in which a job waits, is delayed or runs."""
        if not queues:
            return set()
        counts = await self._store.together(*(("EXISTS", *_job_keys(one)) for one in queues))
        return {queue for queue, count in zip(queues, counts, strict=True) if count}

    async def announce_models(self, signatures: Mapping[str, Mapping[str, bytes]]) -> None:
        """Says which models there are: {model: {version: signature as JSON}}. Kept for good."""
        n = self._store.n
        if not signatures:
            return
        await self._store.command("SADD", keys.models(n), *signatures)
        for name, versions in signatures.items():
            fields = [part for pair in versions.items() for part in pair]
            await self._store.command("HSET", keys.model(n, name), *fields)

    async def announced_versions(self, model: str) -> dict[str, bytes]:
        """{version: signature as JSON}, from whichever workers."""
        found = await self._store.look("HGETALL", keys.model(self._store.n, model), otherwise={})
        named = ((decoding.name(version), body) for version, body in found.items())
        return {version: body for version, body in named if version is not None}

    async def default_versions(self) -> dict[str, str]:
        """By model, the version that answers where it is not the highest."""
        key = keys.default_versions(self._store.n)
        found = await self._store.look("HGETALL", key, otherwise={})
        named = ((decoding.name(one), decoding.name(other)) for one, other in found.items())
        return {model: version for model, version in named if model and version}

    async def is_announced(self, model: str, version: str) -> bool:
        """Whether any worker has announced this version, and none has retracted it since."""
        key = keys.model(self._store.n, model)
        return bool(await self._store.look("HEXISTS", key, version, otherwise=0))

    async def announce_first(self, model: str, version: str, body: bytes) -> bytes:
        """Announces a version unless it is announced; returns what is announced now."""
        n = self._store.n
        await self._store.command("SADD", keys.models(n), model)
        await self._store.command("HSETNX", keys.model(n, model), version, body)
        found = await self._store.command("HGET", keys.model(n, model), version)
        return bytes(found or body)

    async def retract_version(self, model: str, version: str) -> None:
        """Its file is gone everywhere; a model without a version is none."""
        n = self._store.n
        if not await self._store.command("HDEL", keys.model(n, model), version):
            return
        if not await self._store.command("EXISTS", keys.model(n, model)):
            await self._store.command("SREM", keys.models(n), model)
            await self._store.command("HDEL", keys.default_versions(n), model)

    async def is_empty(self, queue: str) -> bool:
        """Whether no job waits there or is run; delayed ones do not count."""
        lists = [await self._store.command("LLEN", name) for name in keys.waiting(queue)]
        return not any(lists) and not await self._store.command("HLEN", keys.running(queue))

    async def announce_default_versions(self, wanted: Mapping[str, str | None]) -> None:
        """Which version answers where it is not the highest (None: it is)."""
        name = keys.default_versions(self._store.n)
        known = await self.default_versions()
        for model, version in wanted.items():
            if version is None and model in known:
                await self._store.command("HDEL", name, model)
            elif version is not None and known.get(model) != version:
                await self._store.command("HSET", name, model, version)

    async def announce_worker(
        self, worker_id: str, about: Mapping[str, Any], ttl_seconds: float
    ) -> None:
        """Says that a worker lives; forgotten by itself after `ttl_seconds`."""
        n = self._store.n
        ttl_ms = int(ttl_seconds * 1000)
        body = msgspec.json.encode(about)
        await self._store.command("SET", keys.worker(n, worker_id), body, "PX", ttl_ms)
        seconds, _ = await self._store.command("TIME")
        await self._store.command("ZADD", keys.workers(n), int(seconds), worker_id)
        await self._store.command(
            "ZREMRANGEBYSCORE", keys.workers(n), "-inf", int(seconds - 2 * ttl_seconds - 1)
        )

    async def announce_paces(self, seconds_per_job: Mapping[str, float]) -> None:
        """Keeps the latest by model: what waits while no worker lives is counted in it too."""
        for model, seconds in seconds_per_job.items():
            name = keys.pace(self._store.n, model)
            await self._store.command("SET", name, seconds, "EX", _PACE_SECONDS)

    async def retract_worker(self, worker_id: str) -> None:
        await self._store.command("DEL", keys.worker(self._store.n, worker_id))
        await self._store.command("ZREM", keys.workers(self._store.n), worker_id)


def _job_keys(queue: str) -> tuple[str, ...]:
    """The keys of a queue, one of which exists while any job is in it."""
    return (*keys.waiting(queue), keys.delayed(queue), keys.leases(queue))


def _queue_in(meta: bytes | None) -> str | None:
    record = read_record(meta)
    return record.queue if record else None
