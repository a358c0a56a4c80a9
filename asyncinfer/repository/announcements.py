"""What workers announce in Redis: themselves, their models, versions and default versions."""

from collections.abc import Collection, Container, Iterable, Mapping
from typing import Annotated, Any, Final

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from asyncinfer.repository import keys
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Store, encode_args
from asyncinfer.schemas.operations import JobsDone
from asyncinfer.untrusted import decoding

ANNOUNCE_INTERVAL_SECONDS: Final = 3.0
_PACE_SECONDS: Final = 30 * 24 * 3600


class AnnouncedModels(Struct, frozen=True):
    """All announced models."""

    default_model: str | None
    models: dict[str, dict[str, bytes]]
    """{model: {version: signature as JSON}}."""
    default_versions: dict[str, str] = {}
    """{model: version}, only for models whose default version is not the highest."""


_Count = Annotated[int, Meta(ge=0, le=1 << 53)]


_Seconds = Annotated[float, Meta(ge=0, le=1e9)]


class WorkerAnnouncement(Struct, frozen=True):
    """What a live worker announces of itself and its models; an older release leaves fields out."""

    models: tuple[str, ...] = ()
    state: str = ""
    """`starting` (serves nothing yet and has models to load), `ready`, `draining` or `hung`."""
    loading: tuple[str, ...] = ()
    """Models in its folder that are not loaded yet; at most 10,000."""
    loading_versions: dict[str, tuple[str, ...]] = {}
    """{model: versions that are not loaded yet}, for its other models; at most 10,000."""
    model_dir: str | None = None
    """The folder or the single file it serves, as an absolute path."""
    versions: dict[str, dict[str, str]] = {}
    """{model: {version: sha256}} of what it serves."""
    served: dict[str, str] = {}
    """{model: version}, the version of jobs that request none."""
    problems: dict[str, dict[str, str]] = {}
    """{model: {version: why it is not served, or why an earlier state of its file is}}."""
    loaded: tuple[str, ...] = ()
    """`model/version` of what is in its memory, the least recently used first."""
    run_times: dict[str, dict[str, _Seconds]] = {}
    """{model: {rows of a run: measured seconds}}."""
    seconds_per_job: dict[str, _Seconds] = {}
    """{model: slot time that a job took lately}."""
    concurrency: _Count = 0
    """The number of its slots."""
    host: str | None = None
    pid: _Count | None = None
    busy: _Count | None = None
    """The number of slots that have a batch."""
    isolating: bool = False
    """It claims nothing until a job has ended that runs alone in it, or is about to."""
    started_ms: int | None = None
    jobs_done: JobsDone | None = None
    default_model: str | UnsetType | None = UNSET
    """The model whose queue is QUEUE_NAME itself; None if the worker knows that there is none."""


_read_worker = decoding.lenient_decoder(msgspec.json.Decoder(WorkerAnnouncement).decode)


def decode_worker_announcement(body: bytes) -> WorkerAnnouncement:
    """Decodes an announcement; an empty one if the bytes are corrupt."""
    return _read_worker(body) or WorkerAnnouncement()


def upcoming_models(worker: WorkerAnnouncement) -> set[str]:
    """Models whose jobs a worker will claim but does not claim yet: they lie in its folder, or are
    loaded and about to be announced. Empty for a worker that drains or hangs."""
    if worker.state not in ("starting", "ready"):
        return set()
    return {*worker.loading, *worker.versions} - {*worker.models}


def models_to_come(workers: Iterable[WorkerAnnouncement], announced: Container[str]) -> set[str]:
    """Models that will be served soon: `upcoming_models`, and those that a worker claims jobs of
    while the reader has not seen their announcement, which is written at the same time."""
    living = [worker for worker in workers if worker.state in ("starting", "ready")]
    upcoming = {model for worker in living for model in upcoming_models(worker)}
    claimed = {model for worker in living for model in worker.models}
    return upcoming | {model for model in claimed if model not in announced}


def serves_or_loads(worker: WorkerAnnouncement, model: str) -> bool:
    """Whether a worker claims the jobs of a model, or will once it has loaded the model."""
    return model in worker.models or model in worker.versions or model in worker.loading


class Announcements:
    """Writes and reads what workers announce."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def announce_queues(self, queues: Collection[str]) -> None:
        """Lists queues in the set of all queues, which sweeps, repairs and listings go through."""
        await self._add_missing(keys.queues(self._store.queue_name), queues)

    async def announce_model_names(self, names: Collection[str]) -> None:
        """Lists models in the set of all models; the versions are announced one by one."""
        await self._add_missing(keys.models(self._store.queue_name), names)

    async def _add_missing(self, key: str, names: Collection[str]) -> None:
        """Reads before it writes: nearly always all are there, and a write is replicated."""
        if names:
            all_known = [1] * len(names)
            known = await self._store.read("SMISMEMBER", key, *names, otherwise=all_known)
            if missing := [name for name, is_in in zip(names, known, strict=True) if not is_in]:
                await self._store.command("SADD", key, *missing)

    async def announce_models(self, signatures: Mapping[str, Mapping[str, bytes]]) -> None:
        """Announces models: {model: {version: signature as JSON}}. They stay until retracted."""
        n = self._store.queue_name
        if not signatures:
            return
        await self._store.command("SADD", keys.models(n), *signatures)
        for name, versions in signatures.items():
            fields = [part for pair in versions.items() for part in pair]
            await self._store.command("HSET", keys.model(n, name), *fields)

    async def read_versions(self, model: str) -> dict[str, bytes]:
        """{version: signature as JSON}, announced by any worker; empty for an unknown model."""
        reply = await self._store.read(
            "HGETALL", keys.model(self._store.queue_name, model), otherwise={}
        )
        fields = ((decoding.name(version), body) for version, body in reply.items())
        return {version: body for version, body in fields if version is not None}

    async def read_default_versions(self) -> dict[str, str]:
        """{model: version}, only for models whose default version is not the highest."""
        key = keys.default_versions(self._store.queue_name)
        reply = await self._store.read("HGETALL", key, otherwise={})
        fields = (
            (decoding.name(model), decoding.name(version)) for model, version in reply.items()
        )
        return {model: version for model, version in fields if model and version}

    async def is_announced(self, model: str, version: str) -> bool:
        """Whether this version is announced, by any worker."""
        key = keys.model(self._store.queue_name, model)
        return bool(await self._store.read("HEXISTS", key, version, otherwise=0))

    async def announce_if_absent(self, model: str, version: str, body: bytes) -> bytes:
        """Announces a version unless it is announced; returns the signature announced now."""
        n = self._store.queue_name
        await self._store.command("SADD", keys.models(n), model)
        await self._store.command("HSETNX", keys.model(n, model), version, body)
        stored = await self._store.command("HGET", keys.model(n, model), version)
        return bytes(stored or body)

    async def retract_version(self, model: str, version: str) -> None:
        """Removes a version that no worker has any more, and the model with its last version."""
        n = self._store.queue_name
        if not await self._store.command("HDEL", keys.model(n, model), version):
            return
        if not await self._store.command("EXISTS", keys.model(n, model)):
            await self._store.command("SREM", keys.models(n), model)
            await self._store.command("HDEL", keys.default_versions(n), model)

    async def announce_default_versions(self, wanted: Mapping[str, str | None]) -> None:
        """Announces the default version of each model; None: it is the highest version."""
        name = keys.default_versions(self._store.queue_name)
        known = await self.read_default_versions()
        for model, version in wanted.items():
            if version is None and model in known:
                await self._store.command("HDEL", name, model)
            elif version is not None and known.get(model) != version:
                await self._store.command("HSET", name, model, version)

    async def announce_worker(
        self, worker_id: str, about: Mapping[str, Any], ttl_seconds: float
    ) -> None:
        """Announces a live worker, also with full memory; the announcement expires after
        `ttl_seconds`."""
        n = self._store.queue_name
        names = [keys.worker(n, worker_id), keys.workers(n)]
        args = encode_args({"worker": worker_id, "ttl_ms": int(ttl_seconds * 1000)})
        await self._store.call(script("announce"), names, [args, msgspec.json.encode(about)])

    async def announce_paces(self, seconds_per_job: Mapping[str, float]) -> None:
        """Stores the slot time of a job by model, for 30 days: the backlog of a queue is estimated
        from it even while no worker is alive."""
        for model, seconds in seconds_per_job.items():
            name = keys.pace(self._store.queue_name, model)
            await self._store.command("SET", name, seconds, "EX", _PACE_SECONDS)

    async def retract_worker(self, worker_id: str) -> None:
        """Removes a worker's announcement at once, as it ends."""
        await self._store.command("DEL", keys.worker(self._store.queue_name, worker_id))
        await self._store.command("ZREM", keys.workers(self._store.queue_name), worker_id)

    async def read_model_names(self) -> list[str]:
        """The models that workers have announced."""
        known = await self._store.read(
            "SMEMBERS", keys.models(self._store.queue_name), otherwise=()
        )
        return sorted(filter(None, map(decoding.name, known)))

    async def read_queues(self, default_model: str | None) -> set[str]:
        """The queues of the announced models, and that of the default model."""
        n = self._store.queue_name
        return {n, *(keys.queue(n, name, default_model) for name in await self.read_model_names())}

    async def read_models(self) -> AnnouncedModels:
        """All announced models with their versions and defaults: two commands and one a model."""
        names = await self.read_model_names()
        models = {name: await self.read_versions(name) for name in names}
        default_versions = await self.read_default_versions()
        return AnnouncedModels(await self._store.default_model(), models, default_versions)

    async def read_workers(self) -> dict[str, WorkerAnnouncement]:
        """The live workers by id, and what each announces."""
        n = self._store.queue_name
        reply = await self._store.read("ZRANGE", keys.workers(n), 0, -1, otherwise=())
        ids = [name for raw_id in reply if (name := decoding.name(raw_id)) is not None]
        if not ids:
            return {}
        bodies = await self._store.command("MGET", *(keys.worker(n, name) for name in ids))
        return {
            name: decode_worker_announcement(body)
            for name, body in zip(ids, bodies, strict=True)
            if body
        }
