"""An overview of all queues, workers and the memory of Redis, for metrics."""

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from asyncinfer.errors import PermissionDenied, ServerRefused
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import Announcements, WorkerAnnouncement
from asyncinfer.repository.inspect.queue_load import (
    QueueLoad,
    combine_load,
    read_depths,
    workers_and_paces,
)
from asyncinfer.repository.intake import why_no_jobs
from asyncinfer.repository.store import Store, check_info


class ModelLoad(Struct, frozen=True):
    """A queue with its model and its load."""

    queue: str
    model: str | None
    """None for the queue of the default model while there is none."""
    is_announced: bool
    """Whether workers have announced the model, and no one has withdrawn it."""
    load: QueueLoad


class Loads(Struct, frozen=True):
    """The loads of all queues, and the live workers."""

    queues: tuple[ModelLoad, ...]
    workers: tuple[WorkerAnnouncement, ...]


class Memory(Struct, frozen=True):
    """The memory of Redis."""

    used_bytes: int
    max_bytes: int
    """Its maxmemory; 0: no limit."""


class Overview(Struct, frozen=True):
    """What Redis holds, at one moment."""

    loads: Loads | None
    """None: Redis denies to read them."""
    memory: Memory | None
    """None: Redis denies to read it."""
    is_accepting: bool
    """Whether it takes new jobs, and is known to keep them safe."""


async def read_overview(store: Store) -> Overview:
    """Reads the overview with 6 calls and one for each 40 queues. Raises RedisUnavailable."""
    info = await _allowed_info(store)
    return Overview(
        await _allowed_loads(store),
        memory=None if info is None else _memory(info),
        is_accepting=info is not None and await _is_accepting(store, info),
    )


async def _allowed_info(store: Store) -> Mapping[str, Any] | None:
    """What `read_overview` needs of INFO; None if Redis denies it."""
    try:
        info: Mapping[str, Any] = await store.command("INFO", "server", "memory", "cluster")
    except PermissionDenied:
        return None
    return info


def _memory(info: Mapping[str, Any]) -> Memory:
    return Memory(int(info.get("used_memory", 0)), int(info.get("maxmemory", 0)))


async def _allowed_loads(store: Store) -> Loads | None:
    """As `read_loads`; None if Redis denies it."""
    try:
        return await read_loads(store)
    except PermissionDenied:
        return None


async def _is_accepting(store: Store, info: Mapping[str, Any]) -> bool:
    """Whether a server, by its `info` and by its answer to a submit, takes new jobs."""
    try:
        check_info(info)
    except ServerRefused as refusal:
        store.warn_of_unsafe_server(refusal)
        return False
    return await why_no_jobs(store) is None


async def read_loads(store: Store) -> Loads:
    """The loads of all queues, by name; leaves out a queue with a key of the wrong type, and one
    without jobs whose model is not announced any more."""
    queues = await store.queues()
    default = await store.default_model()
    announced = await Announcements(store).read_queues(default)
    models = [keys.model_of(store.queue_name, queue, default) for queue in queues]
    read = await read_depths(store, queues)
    workers, paces = await workers_and_paces(
        store, read.worker_ids, [model or "" for model in models]
    )
    found = [
        ModelLoad(queue, model, queue in announced, combine_load(model or "", depth, workers, pace))
        for queue, model, depth, pace in zip(queues, models, read.depths, paces, strict=True)
        if depth is not None
    ]
    return Loads(tuple(filter(_is_shown, found)), tuple(workers))


def _is_shown(found: ModelLoad) -> bool:
    return found.is_announced or not found.load.depth.is_at_rest
