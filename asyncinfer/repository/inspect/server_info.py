"""Facts about the Redis server: version, speed, clock, persistence and memory; for `doctor`."""

import time
from collections.abc import Mapping
from statistics import median
from typing import Any, Final

from msgspec import Struct

from asyncinfer.errors import RedisRefused, ServerRefused
from asyncinfer.repository.announcements import Announcements, serves_or_loads
from asyncinfer.repository.intake import why_no_jobs
from asyncinfer.repository.rights import check_rights, denial_as_start_error
from asyncinfer.repository.store import Refused, Store, check_info, is_sentinel, server_name

_CALLS: Final = 20


class ServerInfo(Struct, frozen=True, kw_only=True):
    """The state of a Redis server."""

    server: str
    """Its name and version."""
    refusal: str
    """Why the server cannot keep jobs safe; empty if it can."""
    round_trip_seconds: float
    """The median of 20 calls, one after another."""
    clock_ahead_seconds: float
    """How far this machine's clock is ahead of the server's."""
    is_replica: bool
    appends: bool
    """Whether the server writes each change to its append-only file."""
    appends_when: str
    """`always`, `everysec` or `no`; empty if CONFIG GET is forbidden."""
    snapshots: bool | None
    """Whether the server saves snapshots; None if CONFIG GET is forbidden."""
    write_error: str
    """Which of its last writes to disk failed; empty if none did."""
    used_bytes: int
    max_bytes: int
    """Its maxmemory; 0: no limit."""
    machine_bytes: int
    default_model: str | None
    workers: int
    """The number of live workers."""
    default_is_served: bool = True
    """A live worker serves the default model, or there is no default model."""
    model_dirs: tuple[tuple[str, str], ...] = ()
    """(host, folder that it serves) of each live worker that announces a folder."""
    no_jobs_code: str = ""
    """The code with which a submit is refused; empty if none is."""
    no_jobs: str = ""
    """Why a submit is refused."""
    wrong_keys: tuple[str, ...] = ()
    """Each key of a queue that has another type than it should, with both types."""


async def read_server_info(store: Store) -> ServerInfo:
    """Reads the state of the server; raises RedisUnavailable, and ServerRefused if this user may
    not read it, or it is a sentinel."""
    with denial_as_start_error():
        info = await store.read_info()
    if is_sentinel(info):
        check_info(info)
    await check_rights(store)
    try:
        check_info(info)
        refusal = ""
    except ServerRefused as error:
        refusal = error.detail
    config = await _config(store)
    round_trip, ahead = await _times(store)
    workers = (await Announcements(store).read_workers()).values()
    default = await store.default_model()
    no_jobs = await _why_no_jobs(store)
    return ServerInfo(
        server=server_name(info),
        refusal=refusal,
        round_trip_seconds=round_trip,
        clock_ahead_seconds=ahead,
        is_replica=info.get("role") == "slave",
        appends=bool(int(info.get("aof_enabled", 0))),
        appends_when=config.get("appendfsync", ""),
        snapshots=bool(config["save"]) if "save" in config else None,
        write_error=_write_error(info),
        used_bytes=int(info.get("used_memory", 0)),
        max_bytes=int(info.get("maxmemory", 0)),
        machine_bytes=int(info.get("total_system_memory", 0)),
        default_model=default,
        default_is_served=default is None
        or any(serves_or_loads(worker, default) for worker in workers),
        workers=len(workers),
        no_jobs_code=no_jobs.code if no_jobs else "",
        no_jobs=no_jobs.detail if no_jobs else "",
        wrong_keys=tuple(await store.wrong_keys(await store.queues())),
        model_dirs=tuple(
            sorted(
                {(worker.host or "", worker.model_dir) for worker in workers if worker.model_dir}
            )
        ),
    )


async def _why_no_jobs(store: Store) -> Refused | None:
    """Why Redis takes no jobs; None also if that cannot be found out."""
    try:
        return await why_no_jobs(store)
    except RedisRefused:
        return None


async def _config(store: Store) -> dict[str, str]:
    """Settings of the server; empty if CONFIG GET is forbidden, as with managed services."""
    try:
        reply = await store.command("CONFIG", "GET", "save", "appendfsync")
    except RedisRefused:
        return {}
    pairs = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
    return {_text(name): _text(value) for name, value in pairs}


async def _times(store: Store) -> tuple[float, float]:
    """The median round trip, and how far this machine's clock is ahead of the server's, in
    seconds."""
    trips = []
    for _ in range(_CALLS):
        started = time.perf_counter()
        # A server that takes no writes refuses PING too.
        await store.command("TIME")
        trips.append(time.perf_counter() - started)
    server_seconds = await store.time_ms() / 1000
    trip = median(trips)
    return trip, time.time() - trip / 2 - server_seconds


def _write_error(info: Mapping[str, Any]) -> str:
    names = ("aof_last_write_status", "aof_last_bgrewrite_status", "rdb_last_bgsave_status")
    return ", ".join(f"{name} is {info[name]}" for name in names if info.get(name, "ok") != "ok")


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
