"""An `asyncinfer serve` that ends with this process, and what it says."""

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
    """One `serve` with all that it starts. Works from any thread."""

    def __init__(self, words: Sequence[str], environ: Mapping[str, str], folder: Path) -> None:
        """`folder` is removed when this process is killed, and cannot do so itself."""
        tied = child_process.by_watchdog(
            (sys.executable, "-P", "-m", "asyncinfer", "serve", *words),
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
            child_process.release(self._lifeline)
            raise
        assert self._popen.stdout is not None
        self.log = Log(self._popen.stdout)

    def stop(self) -> None:
        self._popen.terminate()
        try:
            self._popen.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        child_process.release(self._lifeline)
        self.log.close()


class Log:
    """What a process says, line by line, until it and its children have ended."""

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

    def wait(self, is_it: Callable[[str], bool], seconds: float) -> None:
        """Until a line is it, the process has ended, or the time is out."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_ended or any(map(is_it, self._lines)), seconds)

    def close(self) -> None:
        self._reader.join(_STOP_SECONDS)

    def _read(self, stream: IO[bytes]) -> None:
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
    """A port that on Linux nobody else is given until the block ends, but who asks for it may.

    Bound and not listened on, it is free for who sets SO_REUSEADDR and names it, as a server does,
    while the kernel hands it out to no one. Elsewhere it can be taken before the service has it.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((_HOST, 0))
        port = int(held.getsockname()[1])
        if platform != "linux":
            held.close()
        yield port


def is_complaint(line: str) -> bool:
    """Whether it is how a command says that it cannot start."""
    return line.startswith("asyncinfer: ")


def is_welcome(line: str) -> bool:
    """Whether it is the last line of what `serve` says once it takes requests."""
    return line.startswith("  Stop ")
