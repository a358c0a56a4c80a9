"""Python programs that run as processes of a test, and a list of all running processes."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.checkout import REPOSITORY as REPOSITORY


class PythonProcess:
    """A Python program in a session of its own, whose output a test reads line by line.

    `before` is called in the new process before the program runs.
    """

    def __init__(
        self,
        argv: Sequence[str],
        environ: Mapping[str, str],
        cwd: Path,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.environ = environ
        # Unbuffered, `print` writes a text and its line end apart, and those of two processes mix.
        own = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        self.process = subprocess.Popen(
            [sys.executable, *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env={**own, **environ},
            start_new_session=True,
            preexec_fn=before,
        )

    def read_line(self) -> str:
        """Returns the next line of stdout; fails the test if the process has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"it ended: {self.read_stderr()}"
        return line.rstrip("\n")

    def read_stderr(self) -> str:
        """Returns all of stderr; waits until the process has ended."""
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def signal_group(self, number: signal.Signals) -> None:
        """Signals the process and its children, as a terminal does for Ctrl-C."""
        os.killpg(self.process.pid, number)

    def close(self) -> None:
        self.kill()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


@contextmanager
def python_process(*argv: str, cwd: Path = REPOSITORY, **environ: str) -> Iterator[PythonProcess]:
    """Runs `python *argv` and kills it at the end; `environ` is added to our environment."""
    process = PythonProcess(argv, environ, cwd)
    try:
        yield process
    finally:
        process.close()


class ProcessInfo(NamedTuple):
    pid: int
    state: str
    parent_pid: int
    group_id: int


def running_processes() -> Iterator[ProcessInfo]:
    """All running processes, without those that have ended and were not reaped yet."""
    rows = _proc_rows() if Path("/proc/self/stat").exists() else _ps_rows()
    for pid, state, parent_pid, group in rows:
        if not state.startswith("Z"):
            yield ProcessInfo(int(pid), state, int(parent_pid), int(group))


def _proc_rows() -> Iterator[list[str]]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # The program's name, in parentheses, may contain spaces and parentheses.
            yield [path.parent.name, *path.read_text().rpartition(")")[2].split()[:3]]


def _ps_rows() -> Iterator[list[str]]:
    ps = ["ps", "-A", "-o", "pid=,stat=,ppid=,pgid="]
    shown = subprocess.run(ps, capture_output=True, text=True, check=True)
    yield from map(str.split, shown.stdout.splitlines())


def is_gone(pid: int) -> bool:
    return all(process.pid != pid for process in running_processes())
