"""Checks of a Redis server."""

import shlex
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from asyncinfer.cli.addresses import shown_url
from asyncinfer.cli.doctor.findings import Finding, ok, problem, warning
from asyncinfer.cli.output import seconds, size
from asyncinfer.errors import AsyncinferError, PermissionDenied, ServerRefused, WritesRefused
from asyncinfer.repository.inspect.server_info import ServerInfo, read_server_info
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store

_SLOW_SECONDS: Final = 0.005
_TOO_SLOW_SECONDS: Final = 0.2
"""A submit makes several calls, each of which gives up after a second."""

_MAX_CLOCK_DIFFERENCE_SECONDS: Final = 2.0
_HIGH_MEMORY_SHARE: Final = 0.8
_MAX_WRONG_KEYS: Final = 3

_WITHOUT_WRITES: Final = tuple(refused.code for refused in WritesRefused.__subclasses__())
"""Codes of a server that takes no writes, those of workers that are alive among them."""


async def examine_redis(url: str, queue_name: str, model_dir: Path | None) -> list[Finding]:
    """Connects to the server at `url` and returns findings on it; a problem if it does not answer.

    `queue_name` is the setting QUEUE_NAME. `model_dir` is the folder or the one file of the models
    that `doctor` checks, or None.
    """
    shown = shown_url(url)
    try:
        async with Store.open(
            url, queue_name=queue_name, policy=Policy(), name="asyncinfer-doctor"
        ) as store:
            info = await read_server_info(store)
    except (ServerRefused, PermissionDenied) as error:
        what, _, remedy = error.detail.partition(". ")
        return [problem("Redis", f"{shown}: {what}", remedy.rstrip("."))]
    except AsyncinferError as error:
        mend = f"start it, or set REDIS_URL to one that answers: {_cli(shown)} PING"
        return [problem("Redis", f"{shown}: {error.detail}", mend)]
    return [*findings_of(info, shown), *_other_folder(info, model_dir)]


def _cli(url: str) -> str:
    """The start of a redis-cli command for a URL without password; for `unix://` its socket."""
    scheme, _, path = url.partition("://")
    return f"redis-cli -s {path}" if scheme == "unix" else f"redis-cli -u {url}"


def findings_of(info: ServerInfo, url: str) -> Iterator[Finding]:
    """Findings on a server: role, persistence, disk, memory, round trip, clock and workers.

    `url`, without a password, is shown in them and in the commands that fix them.
    """
    yield _server(info, url)
    if info.is_replica:
        yield problem(
            "Redis role",
            "it is a replica, which takes no writes (redis_read_only)",
            "point REDIS_URL at the primary, or at its sentinels: sentinel://host:26379/service",
        )
    yield _persistence(info, url)
    if info.write_error:
        mend = f"free its disk, then: {_cli(url)} BGSAVE"
        full = " (disk_full: it takes no jobs)" if info.no_jobs_code == "disk_full" else ""
        yield problem("Redis disk", f"{info.write_error}{full}", mend)
    yield from _refusal(info, url)
    yield from _wrong_keys(info)
    yield _memory(info, url)
    yield _round_trip(info.round_trip_seconds)
    yield _clock(info.clock_ahead_seconds)
    yield _workers(info)


def _server(info: ServerInfo, url: str) -> Finding:
    """Whether the server can be used: its version, and that it evicts nothing."""
    if "evicts" in info.refusal:
        mend = f"{_cli(url)} CONFIG SET maxmemory-policy noeviction"
        return problem("Redis", f"{info.server}: {info.refusal}", mend)
    if info.refusal:
        return problem("Redis", info.refusal, "unset REDIS_URL to use the embedded Valkey")
    return ok("Redis", f"{info.server} at {url}, evicts nothing")


def _persistence(info: ServerInfo, url: str) -> Finding:
    """Whether jobs outlive a restart of the server."""
    append = f"{_cli(url)} CONFIG SET appendonly yes (and `appendonly yes` in its file)"
    about = "Redis persistence"
    if info.appends and info.appends_when == "no":
        mend = f"{_cli(url)} CONFIG SET appendfsync everysec"
        return warning(about, "it appends, but lets the system decide when to write", mend)
    if info.appends:
        return ok(about, f"append-only file, fsync {info.appends_when or 'as it is set'}")
    if info.snapshots is False:
        return problem(about, "none: a restart of the server loses every job", append)
    some = "snapshots only" if info.snapshots else "no append-only file"
    return warning(about, f"{some}: a crash loses the jobs since the last one", append)


def _refusal(info: ServerInfo, url: str) -> Iterator[Finding]:
    """A problem if submits are refused for a reason that no other finding names."""
    if info.no_jobs_code == "too_few_replicas":
        mend = f"start a replica; or to do without: {_cli(url)} CONFIG SET min-replicas-to-write 0"
        yield problem("Redis jobs", f"{info.no_jobs_code}: {info.no_jobs}", mend)


def _wrong_keys(info: ServerInfo) -> Iterator[Finding]:
    """A problem if another program has written to keys of queues: their jobs cannot move."""
    if info.wrong_keys:
        more = len(info.wrong_keys) - _MAX_WRONG_KEYS
        shown = "; ".join(info.wrong_keys[:_MAX_WRONG_KEYS])
        found = f"{shown}; and {more} more" if more > 0 else shown
        yield problem("Redis keys", found, "rename or delete what another program wrote there")


def _memory(info: ServerInfo, url: str) -> Finding:
    """A problem if more than 80 % of its maxmemory is used; a warning if it has none."""
    about = "Redis memory"
    if not info.max_bytes:
        return _unlimited_memory(info, url)
    used = f"{size(info.used_bytes)} of {size(info.max_bytes)}, its maxmemory"
    if info.used_bytes > _HIGH_MEMORY_SHARE * info.max_bytes:
        mend = f"{_cli(url)} CONFIG SET maxmemory {2 * info.max_bytes}, or lower JOB_TTL"
        now = " (storage_full: it does now)" if info.no_jobs_code == "storage_full" else ""
        return problem(about, f"{used}: full memory refuses submits{now}", mend)
    return ok(about, used)


def _unlimited_memory(info: ServerInfo, url: str) -> Finding:
    """A warning on a server without maxmemory, a problem if its machine's memory is nearly full."""
    machine = info.machine_bytes
    used = f"{size(info.used_bytes)} of {size(machine)} in its machine, and it has no maxmemory"
    if machine and info.used_bytes > _HIGH_MEMORY_SHARE * machine:
        mend = "lower JOB_TTL, or give its machine more memory; then set its maxmemory"
        return problem("Redis memory", f"{used}: the system kills it when that is full", mend)
    found = f"{used}: MAX_QUEUE_BYTES and MAX_KEPT_BYTES limit each queue, but nothing limits all"
    mend = f"{_cli(url)} CONFIG SET maxmemory {machine // 2 or '2gb'} (and in its file)"
    return warning("Redis memory", found, mend)


def _round_trip(trip: float) -> Finding:
    """A verdict on the seconds that a call takes."""
    about = "Redis round trip"
    mend = "run Redis nearer (same zone), or check its CPU: redis-cli --latency"
    if trip > _TOO_SLOW_SECONDS:
        return problem(about, f"{seconds(trip)}: calls give up after 1 s", mend)
    if trip > _SLOW_SECONDS:
        return warning(about, f"{seconds(trip)}: every job takes several", mend)
    return ok(about, f"{seconds(trip)}")


def _clock(ahead: float) -> Finding:
    """A verdict on the clocks; `ahead` is in seconds, negative if this machine's is behind."""
    about = "clock"
    if abs(ahead) > _MAX_CLOCK_DIFFERENCE_SECONDS:
        how = "ahead of" if ahead > 0 else "behind"
        mend = "timedatectl set-ntp true    # on both machines"
        return warning(
            about, f"this machine's is {seconds(abs(ahead))} {how} the Redis server's", mend
        )
    return ok(about, f"within {seconds(abs(ahead))} of the Redis server's")


def _workers(info: ServerInfo) -> Finding:
    """A warning if no worker lives, or none has the default model."""
    default = (
        f"the default model is {info.default_model}"
        if info.default_model
        else "no model is the default"
    )
    if not info.workers and info.no_jobs_code in _WITHOUT_WRITES:
        found = f"none can announce itself while Redis takes no writes; {default}"
        return warning("workers", found, "mend Redis first: those that run appear 3 s later")
    if not info.workers:
        return warning("workers", f"none is alive, so jobs wait; {default}", "asyncinfer work")
    if not info.default_is_served:
        mend = "asyncinfer work, with a MODEL_DIR that has it; or start with another DEFAULT_MODEL"
        return warning("workers", f"{info.workers} alive; {default}, which none of them has", mend)
    return ok("workers", f"{info.workers} alive; {default}")


def _other_folder(info: ServerInfo, model_dir: Path | None) -> Iterator[Finding]:
    """Warns if the models that are checked are not those that a worker serves."""
    served = {folder for _, folder in info.model_dirs}
    if model_dir is None or not served or str(model_dir) in served:
        return
    host, folder = next(
        (entry for entry in info.model_dirs if entry[0] == socket.gethostname()), info.model_dirs[0]
    )
    flag = "--model" if folder.endswith(".onnx") else "--model-dir"
    where = "on this machine" if host == socket.gethostname() else f"on {host}"
    yield warning(
        "model folder",
        f"{model_dir} is examined here, and the worker {where} serves {folder}",
        f"asyncinfer doctor {flag} {shlex.quote(folder)}",
    )
