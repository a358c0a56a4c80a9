"""How a Redis server is: what a doctor feels, and changes nothing."""

import time
from collections.abc import Mapping
from statistics import median
from typing import Any, Final

from msgspec import Struct

from asyncinfer.errors import RedisRefused, ServerRefused
from asyncinfer.repository.announcements import Announcements, serves, worker_says
from asyncinfer.repository.redis_errors import translate_errors
from asyncinfer.repository.store import Store

_CALLS: Final = 20


class Vitals(Struct, frozen=True, kw_only=True):
    server: str
    """Its name and version; a refusal of it says why it cannot keep jobs safe."""
    refusal: str
    round_trip_seconds: float
    """The median of some calls, one after another."""
    clock_ahead_seconds: float
    """Of ours."""
    is_replica: bool
    appends: bool
    """Whether each write goes to its append-only file."""
    appends_when: str
    """`always`, `everysec` or `no`; empty where CONFIG GET is forbidden."""
    snapshots: bool | None
    """Whether it saves now and then; None where CONFIG GET is forbidden."""
    write_error: str
    """What its disk refused last; empty when all is well."""
    used_bytes: int
    max_bytes: int
    """0: no limit."""
    machine_bytes: int
    default_model: str | None
    workers: int
    """That are alive and claim from our queues."""
    default_is_served: bool = True
    """By a living worker, or there is none."""
    model_dirs: tuple[tuple[str, str], ...] = ()
    """Of each living worker that says it, its host and the folder that it serves."""


async def vitals(store: Store) -> Vitals:
    """Raises RedisUnavailable, or ServerRefused by a server that lets us not in."""
    try:
        await store.check_server()
        refusal = ""
    except ServerRefused as error:
        refusal = error.detail
    with translate_errors():
        info: Mapping[str, Any] = await store.redis.info("everything")
    config = await _config(store)
    round_trip, ahead = await _times(store)
    workers = [worker_says(body) for body in (await Announcements(store).workers()).values()]
    default = await store.default_model()
    return Vitals(
        server=_name(info),
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
        default_is_served=default is None or any(serves(one, default) for one in workers),
        workers=len(workers),
        model_dirs=tuple(
            sorted({(one.host or "", one.model_dir) for one in workers if one.model_dir})
        ),
    )


async def _config(store: Store) -> dict[str, str]:
    """What managed services forbid to ask."""
    try:
        found = await store.command("CONFIG", "GET", "save", "appendfsync")
    except RedisRefused:
        return {}
    pairs = found.items() if isinstance(found, dict) else zip(found[::2], found[1::2], strict=True)
    return {_text(name): _text(value) for name, value in pairs}


async def _times(store: Store) -> tuple[float, float]:
    """A round trip, and how far our clock is ahead of the server's, in seconds."""
    trips = []
    for _ in range(_CALLS):
        started = time.perf_counter()
        # A server that takes no writes refuses PING too.
        await store.command("TIME")
        trips.append(time.perf_counter() - started)
    server_seconds = await store.time_ms() / 1000
    trip = median(trips)
    return trip, time.time() - trip / 2 - server_seconds


def _name(info: Mapping[str, Any]) -> str:
    valkey = info.get("valkey_version")
    return f"Valkey {valkey}" if valkey else f"Redis {info.get('redis_version', '?')}"


def _write_error(info: Mapping[str, Any]) -> str:
    names = ("aof_last_write_status", "aof_last_bgrewrite_status", "rdb_last_bgsave_status")
    return ", ".join(f"{name} is {info[name]}" for name in names if info.get(name, "ok") != "ok")


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
