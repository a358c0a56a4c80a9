"""Checks of the machine: cores and threads, memory, open files, disk, API keys."""

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from asyncinfer.cli.addresses import is_loopback
from asyncinfer.cli.doctor.findings import Finding, ok, problem, warning
from asyncinfer.cli.output import counted, size
from asyncinfer.errors import KeyFileRefused
from asyncinfer.processes import memory
from asyncinfer.processes.cpus import usable_cores
from asyncinfer.settings import Settings

_MIN_OPEN_FILES: Final = 4096
_LOW_DISK_BYTES: Final = 1 << 30
_FULL_DISK_BYTES: Final = 16 << 20
"""With less free Valkey cannot write or start."""

_MIN_MEMORY_BYTES: Final = 400 << 20
"""API, worker and Valkey take 250 MiB before the first model is loaded."""

_HIGH_MEMORY_SHARE: Final = 0.75
"""What the embedded Valkey may take at most: API, worker and models need the rest."""

_CONNECT_SECONDS: Final = 0.5
_MAX_BROKEN_LINES: Final = 5


def examine_machine(settings: Settings, data_dir: Path | None) -> Iterator[Finding]:
    """Checks cores, memory, open files, disk and API keys of this machine.

    `data_dir` is the folder of the embedded Valkey; None with a Redis of the user's.
    """
    yield _threads(settings)
    yield from _memory()
    yield from _open_files()
    if data_dir:
        yield from _embedded_maxmemory(settings.embedded_maxmemory)
        yield _disk(data_dir)
    if settings.api_keys:
        yield from _keys(settings.api_keys)
    elif not is_loopback(settings.host):
        mend = "asyncinfer keygen >> keys; export API_KEYS=keys"
        yield problem("API keys", f"none, and HOST {settings.host} lets everyone in", mend)


def port_is_taken(host: str, port: int) -> bool:
    """Whether something accepts a TCP connection there within half a second; raises nothing."""
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_SECONDS):
            return True
    except OSError:
        return False


def _threads(settings: Settings) -> Finding:
    """Compares CONCURRENCY with the cores that affinity and control group leave."""
    usable, threads = usable_cores(), settings.concurrency or usable_cores()
    threads_each = max(1, usable // threads)
    batches = "1 batch" if threads == 1 else f"{threads} batches"
    found = (
        f"{batches} at once on {counted(usable, 'core')}, {counted(threads_each, 'thread')} each"
    )
    if (total := os.cpu_count() or usable) > usable:
        found += f" (the machine has {total}; affinity or control group leave {usable})"
    if threads > 2 * usable:
        return warning("cores", f"{found}: they wait for each other", f"CONCURRENCY={usable}")
    if settings.api_processes > usable:
        mend = f"API_PROCESSES={usable}"
        return warning("cores", f"{found}, but {settings.api_processes} API processes", mend)
    return ok("cores", found)


def _memory() -> Iterator[Finding]:
    """A finding on the memory limit of the control group; none if there is no limit."""
    limit = memory.group_limit_bytes()
    if limit is None:
        return
    found = f"the control group allows {size(limit)}"
    if limit < _MIN_MEMORY_BYTES:
        mend = "give the container 512 MiB plus what its models need"
        yield warning("memory", f"{found}: too little for API, worker and models", mend)
    else:
        yield ok("memory", found)


def _embedded_maxmemory(max_bytes: int | None) -> Iterator[Finding]:
    """A warning if the embedded Valkey may take nearly all memory; else nothing."""
    usable = memory.usable_bytes()
    if max_bytes and max_bytes > _HIGH_MEMORY_SHARE * usable:
        found = (
            f"{size(max_bytes)} of the {size(usable)} that there are: the system kills Valkey "
            "before that refuses submits"
        )
        mend = f"EMBEDDED_MAXMEMORY={usable // 4}, or unset it"
        yield warning("EMBEDDED_MAXMEMORY", found, mend)


def _open_files() -> Iterator[Finding]:
    """A warning if few files may be open at once; else nothing."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _MIN_OPEN_FILES:
        maximum = "unlimited" if hard == resource.RLIM_INFINITY else hard
        found = f"only {soft} files and connections may be open at once"
        yield warning("open files", found, f"ulimit -n {maximum}    # in the shell that starts it")


def _disk(data_dir: Path) -> Finding:
    """A finding on the folder of the embedded Valkey, which need not exist yet."""
    folder = next(path for path in (data_dir, *data_dir.parents) if path.exists())
    if not os.access(folder, os.W_OK):
        return problem("DATA_DIR", f"{folder} is not writable", "set DATA_DIR to a folder of yours")
    return free_space_finding(data_dir, shutil.disk_usage(folder).free)


def free_space_finding(data_dir: Path, free_bytes: int) -> Finding:
    """A problem if the disk is full, a warning if it is nearly full."""
    if free_bytes < _FULL_DISK_BYTES:
        mend = "free the disk: then the jobs go on by themselves; or set DATA_DIR to a larger disk"
        return problem("DATA_DIR disk", f"{data_dir} has {size(free_bytes)} left: it is full", mend)
    if free_bytes < _LOW_DISK_BYTES:
        mend = "set DATA_DIR to a larger disk: a job takes about 1 KiB until it expires"
        return warning("DATA_DIR", f"{data_dir} has {size(free_bytes)} left", mend)
    return ok("DATA_DIR", f"{data_dir}, {size(free_bytes)} free")


def _keys(path: Path) -> Iterator[Finding]:
    """Findings on the file of API keys: each line that cannot be used, and the number of keys."""
    from asyncinfer.api_keys import Keyring

    mend = f"asyncinfer keygen >> {path}"
    try:
        keyring = Keyring.load(path)
    except KeyFileRefused as error:
        yield problem("API keys", error.detail, mend)
        return
    for line in keyring.broken[:_MAX_BROKEN_LINES]:
        found = f"{path}, line {line.number} lets nobody in: {line.reason}"
        yield problem("API keys", found, f"correct or remove line {line.number} of {path}")
    if len(keyring):
        yield ok("API keys", f"{path} has {len(keyring)} keys")
    else:
        yield problem("API keys", f"{path} has no key, so nobody is let in", mend)
