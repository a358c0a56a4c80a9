"""What a doctor says of a Redis server."""

import shlex
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from asyncinfer.cli.addresses import shown_url
from asyncinfer.cli.doctor.findings import Finding, ok, problem, warning
from asyncinfer.cli.output import seconds, size
from asyncinfer.errors import AsyncinferError
from asyncinfer.repository.inspect.server_info import Vitals, vitals
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store

_SLOW_SECONDS: Final = 0.005
_TOO_SLOW_SECONDS: Final = 0.2
"""A call has a second in all, and a submit makes some."""

_CLOCK_SECONDS: Final = 2.0
_FULL: Final = 0.8


async def examine_redis(url: str, queue_name: str, model_dir: Path | None) -> list[Finding]:
    """`model_dir`: the folder that is examined, or the one file."""
    shown = shown_url(url)
    try:
        async with Store.open(
            url, queue_name=queue_name, policy=Policy(), name="asyncinfer-doctor"
        ) as store:
            found = await vitals(store)
    except AsyncinferError as error:
        mend = f"start it, or set REDIS_URL to one that answers: {_cli(shown)} PING"
        return [problem("Redis", f"{shown}: {error.detail}", mend)]
    return [*findings_of(found, shown), *_other_folder(found, model_dir)]


def _cli(url: str) -> str:
    scheme, _, path = url.partition("://")
    return f"redis-cli -s {path}" if scheme == "unix" else f"redis-cli -u {url}"


def findings_of(found: Vitals, url: str) -> Iterator[Finding]:
    yield _server(found, url)
    if found.is_replica:
        yield problem(
            "Redis role",
            "it is a replica, which takes no writes",
            "point REDIS_URL at the primary, or at its sentinels: sentinel://host:26379/service",
        )
    yield _persistence(found, url)
    if found.write_error:
        mend = f"free its disk, then: {_cli(url)} BGSAVE"
        yield problem("Redis disk", found.write_error, mend)
    yield _memory(found, url)
    yield _round_trip(found.round_trip_seconds)
    yield _clock(found.clock_ahead_seconds)
    yield _workers(found)


def _server(found: Vitals, url: str) -> Finding:
    if "evicts" in found.refusal:
        mend = f"{_cli(url)} CONFIG SET maxmemory-policy noeviction"
        return problem("Redis", f"{found.server}: {found.refusal}", mend)
    if found.refusal:
        return problem("Redis", found.refusal, "unset REDIS_URL to use the embedded Valkey")
    return ok("Redis", f"{found.server} at {url}, evicts nothing")


def _persistence(found: Vitals, url: str) -> Finding:
    append = f"{_cli(url)} CONFIG SET appendonly yes (and `appendonly yes` in its file)"
    about = "Redis persistence"
    if found.appends and found.appends_when == "no":
        mend = f"{_cli(url)} CONFIG SET appendfsync everysec"
        return warning(about, "it appends, and leaves it to the system when to write", mend)
    if found.appends:
        return ok(about, f"append-only file, fsync {found.appends_when or 'as it is set'}")
    if found.snapshots is False:
        return problem(about, "none: a restart of the server loses every job", append)
    some = "snapshots only" if found.snapshots else "no append-only file"
    return warning(about, f"{some}: a crash loses the jobs since the last one", append)


def _memory(found: Vitals, url: str) -> Finding:
    about = "Redis memory"
    limit = found.max_bytes or found.machine_bytes
    used = (
        f"{size(found.used_bytes)} of {size(limit)} {'' if found.max_bytes else 'in its machine'}"
    )
    if limit and found.used_bytes > _FULL * limit:
        mend = f"{_cli(url)} CONFIG SET maxmemory {2 * limit}, or lower JOB_TTL"
        return problem(about, f"{used}: full memory refuses submits", mend)
    if not found.max_bytes:
        return ok(about, f"{used}, no maxmemory: MAX_QUEUE_BYTES and JOB_TTL bound it")
    return ok(about, used)


def _round_trip(trip: float) -> Finding:
    about = "Redis round trip"
    mend = "bring Redis nearer (same zone), or look at its CPU: redis-cli --latency"
    if trip > _TOO_SLOW_SECONDS:
        return problem(about, f"{seconds(trip)}: calls give up after 1 s", mend)
    if trip > _SLOW_SECONDS:
        return warning(about, f"{seconds(trip)}: every job pays a few of these", mend)
    return ok(about, f"{seconds(trip)}")


def _clock(ahead: float) -> Finding:
    about = "clock"
    if abs(ahead) > _CLOCK_SECONDS:
        how = "ahead of" if ahead > 0 else "behind"
        mend = "timedatectl set-ntp true    # on both machines"
        return warning(about, f"ours is {seconds(abs(ahead))} {how} the Redis server's", mend)
    return ok(about, "ours agrees with the Redis server's to " + str(seconds(abs(ahead))))


def _workers(found: Vitals) -> Finding:
    default = (
        f"the default model is {found.default_model}"
        if found.default_model
        else "no model is the default"
    )
    if not found.workers:
        return warning("workers", f"none is alive: jobs wait; {default}", "asyncinfer work")
    if not found.default_is_served:
        mend = "asyncinfer work, with a MODEL_DIR that has it; or start with another DEFAULT_MODEL"
        return warning("workers", f"{found.workers} alive; {default}, which none of them has", mend)
    return ok("workers", f"{found.workers} alive; {default}")


def _other_folder(found: Vitals, model_dir: Path | None) -> Iterator[Finding]:
    """What is examined here may be other models than those that are served."""
    served = {folder for _, folder in found.model_dirs}
    if model_dir is None or not served or str(model_dir) in served:
        return
    host, folder = next(
        (one for one in found.model_dirs if one[0] == socket.gethostname()), found.model_dirs[0]
    )
    flag = "--model" if folder.endswith(".onnx") else "--model-dir"
    where = "on this machine" if host == socket.gethostname() else f"on {host}"
    yield warning(
        "model folder",
        f"{model_dir} is examined here, and the worker {where} serves {folder}",
        f"asyncinfer doctor {flag} {shlex.quote(folder)}",
    )
