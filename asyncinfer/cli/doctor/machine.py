"""What a doctor says of the machine: cores against threads, memory, disk, files, ports, keys."""

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from asyncinfer.cli.doctor.findings import Finding, ok, problem, warning
from asyncinfer.cli.output import counted, size
from asyncinfer.errors import KeyFileRefused
from asyncinfer.processes.cpus import cores
from asyncinfer.settings import Settings

_FEW_FILES: Final = 4096
_LITTLE_DISK_BYTES: Final = 1 << 30
_FULL_DISK_BYTES: Final = 16 << 20
"""Valkey fails to write, or to start, with less."""

_LITTLE_MEMORY_BYTES: Final = 400 << 20
"""API, worker and Valkey take 250 MiB before the first model."""

_CONNECT_SECONDS: Final = 0.5
_MOST_BROKEN_LINES: Final = 5


def examine_machine(chosen: Settings, data_dir: Path | None) -> Iterator[Finding]:
    """`data_dir` where the embedded Valkey writes; None with another Redis."""
    yield _threads(chosen)
    yield from _memory()
    yield from _open_files()
    if data_dir:
        yield _disk(data_dir)
    if chosen.api_keys:
        yield from _keys(chosen.api_keys)
    elif chosen.host not in ("127.0.0.1", "localhost", "::1"):
        mend = "asyncinfer keygen >> keys; export API_KEYS=keys"
        yield problem("API keys", f"none, and HOST {chosen.host} lets everyone in", mend)


def port_is_taken(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_SECONDS):
            return True
    except OSError:
        return False


def _threads(chosen: Settings) -> Finding:
    """`cores` counts what affinity and control group leave of the machine's."""
    ours, threads = cores(), chosen.concurrency or cores()
    each = max(1, ours // threads)
    batches = "1 batch" if threads == 1 else f"{threads} batches"
    found = f"{batches} side by side on {counted(ours, 'core')}, {counted(each, 'thread')} each"
    if (there := os.cpu_count() or ours) > ours:
        found += f" (the machine has {there}; affinity or control group leave {ours})"
    if threads > 2 * ours:
        return warning("cores", f"{found}: they wait for each other", f"CONCURRENCY={ours}")
    if chosen.api_processes > ours:
        mend = f"API_PROCESSES={ours}"
        return warning("cores", f"{found}; {chosen.api_processes} API processes are more", mend)
    return ok("cores", found)


def _memory(root: Path = Path("/")) -> Iterator[Finding]:
    limit = _cgroup_memory_bytes(root)
    if limit is None:
        return
    found = f"the control group allows {size(limit)}"
    if limit < _LITTLE_MEMORY_BYTES:
        mend = "give the container 512 MiB and what its models need"
        yield warning("memory", f"{found}: little for API, worker and models", mend)
    else:
        yield ok("memory", found)


def _cgroup_memory_bytes(root: Path) -> int | None:
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            given = (root / "sys/fs/cgroup" / name).read_text().strip()
        except OSError:
            continue
        if given.isdigit() and int(given) < 1 << 60:
            return int(given)
    return None


def _open_files() -> Iterator[Finding]:
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _FEW_FILES:
        most = "unlimited" if hard == resource.RLIM_INFINITY else hard
        found = f"{soft} files and connections may be open at once"
        yield warning("open files", found, f"ulimit -n {most}    # in the shell that starts it")


def _disk(data_dir: Path) -> Finding:
    folder = next(it for it in (data_dir, *data_dir.parents) if it.exists())
    if not os.access(folder, os.W_OK):
        return problem("DATA_DIR", f"{folder} cannot be written", "set DATA_DIR to one of yours")
    return room(data_dir, shutil.disk_usage(folder).free)


def room(data_dir: Path, free: int) -> Finding:
    if free < _FULL_DISK_BYTES:
        mend = "free the disk; the jobs go on by themselves then. Or set DATA_DIR to a larger one"
        return problem("DATA_DIR disk", f"{data_dir} has {size(free)} left: it is full", mend)
    if free < _LITTLE_DISK_BYTES:
        mend = "set DATA_DIR to a larger disk: a job takes about 1 KiB until it expires"
        return warning("DATA_DIR", f"{data_dir} has {size(free)} left", mend)
    return ok("DATA_DIR", f"{data_dir}, {size(free)} free")


def _keys(path: Path) -> Iterator[Finding]:
    from asyncinfer.api_keys import Keyring

    mend = f"asyncinfer keygen >> {path}"
    try:
        keyring = Keyring.load(path)
    except KeyFileRefused as error:
        yield problem("API keys", error.detail, mend)
        return
    for line in keyring.broken[:_MOST_BROKEN_LINES]:
        found = f"{path}, line {line.number} lets nobody in: {line.reason}"
        yield problem("API keys", found, f"correct or remove line {line.number} of {path}")
    if len(keyring):
        yield ok("API keys", f"{path} has {len(keyring)} keys")
    else:
        yield problem("API keys", f"{path} has no key, so nobody is let in", mend)
