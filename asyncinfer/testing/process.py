"""An `asyncinfer serve` process that ends with this one, and its output."""

import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from asyncinfer.processes import child_process

_STOP_SECONDS: Final = 10.0
_LINES_KEPT: Final = 5000
_HOST: Final = "127.0.0.1"


class Process:
    """An `asyncinfer serve` with its child processes, which ends with this process at the latest;
    usable from any thread."""

    def __init__(self, arguments: Sequence[str], environ: Mapping[str, str], folder: Path) -> None:
        """Starts it with `arguments` after `serve` and returns at once. If this process is killed,
        the watchdog kills it and removes `folder`."""
        tied = child_process.by_watchdog(
            (sys.executable, "-P", "-m", "asyncinfer", "serve", *arguments),
            signal.SIGKILL,
            afterwards=f"rm -rf -- {shlex.quote(str(folder))}",
        )
        self._lifeline = tied.lifeline
        try:
            with tied.stdin:
                self._popen = subprocess.Popen(
                    tied.argv,
                    stdin=tied.stdin,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env=environ,
                    start_new_session=True,
                )
        except BaseException:
            child_process.release_watchdog(self._lifeline)
            raise
        assert self._popen.stdout is not None
        self.log = ProcessOutput(self._popen.stdout)

    def stop(self) -> None:
        """Terminates it, kills it after 10 s, and waits until it and its output have ended."""
        self._popen.terminate()
        try:
            self._popen.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        child_process.release_watchdog(self._lifeline)
        self.log.close()


class ProcessOutput:
    """The last lines of a process's output, read until the process and its children have ended."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._has_ended = False
        self._changed = threading.Condition()
        self._reader = threading.Thread(
            target=self._read, args=(stream,), name="asyncinfer-testing-log", daemon=True
        )
        self._reader.start()

    @property
    def lines(self) -> list[str]:
        with self._changed:
            return list(self._lines)

    @property
    def has_ended(self) -> bool:
        return self._has_ended

    def wait(self, is_match: Callable[[str], bool], seconds: float) -> None:
        """Waits until a line matches, the process has ended or `seconds` are over; returns nothing
        in each case, also at once if a line that is still kept matches."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._has_ended or any(map(is_match, self._lines)), seconds
            )

    def close(self) -> None:
        """Waits until the output has ended, at most 10 s. Call it once the process is stopped."""
        self._reader.join(_STOP_SECONDS)

    def _read(self, stream: IO[bytes]) -> None:
        """Reads the output to its end, in a thread."""
        with stream:
            for line in stream:
                with self._changed:
                    self._lines.append(line.decode(errors="replace").rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()


@contextmanager
def free_port(platform: str = sys.platform) -> Iterator[int]:
    """A port for one server, which on Linux the kernel gives to nobody else until the block ends.

    The port is bound but not listened on: a server that names it and sets SO_REUSEADDR can have it,
    and the kernel does not hand it out. On other systems it may be taken before the server starts.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((_HOST, 0))
        port = int(held.getsockname()[1])
        if platform != "linux":
            held.close()
        yield port


def is_start_error(line: str) -> bool:
    """Whether a line says why a command could not start."""
    return line.startswith("asyncinfer: ")


def is_banner_end(line: str) -> bool:
    """Whether a line is the end of the banner that `serve` prints once it takes requests."""
    return line.startswith("  Stop ")
