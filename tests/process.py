"""Processes that have children of their own, to be killed under test."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

REPOSITORY: Final = Path(__file__).parents[1]


class Parent:
    """A Python program in a session of its own, which tells its story line by line.

    `before` is called in the process that becomes it.
    """

    def __init__(
        self,
        argv: Sequence[str],
        environ: Mapping[str, str],
        cwd: Path,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.environ = environ
        self.process = subprocess.Popen(
            [sys.executable, *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env={**os.environ, **environ},
            start_new_session=True,
            preexec_fn=before,
        )

    def says(self) -> str:
        """Its next line on stdout."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"it ended: {self.complaints()}"
        return line.rstrip("\n")

    def complaints(self) -> str:
        """All of its stderr; waits for its end."""
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def signal_group(self, number: signal.Signals) -> None:
        """As a terminal does for Ctrl-C."""
        os.killpg(self.process.pid, number)

    def close(self) -> None:
        self.kill()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


@contextmanager
def parent(*argv: str, cwd: Path = REPOSITORY, **environ: str) -> Iterator[Parent]:
    it = Parent(argv, environ, cwd)
    try:
        yield it
    finally:
        it.close()


class Process(NamedTuple):
    pid: int
    state: str
    parent: int
    group: int


def processes() -> Iterator[Process]:
    """All that run; those that have ended and were not reaped yet do not."""
    rows = _proc_rows() if Path("/proc/self/stat").exists() else _ps_rows()
    for pid, state, parent_pid, group in rows:
        if not state.startswith("Z"):
            yield Process(int(pid), state, int(parent_pid), int(group))


def _proc_rows() -> Iterator[list[str]]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # The name, in parentheses, may hold anything.
            yield [path.parent.name, *path.read_text().rpartition(")")[2].split()[:3]]


def _ps_rows() -> Iterator[list[str]]:
    ps = ["ps", "-A", "-o", "pid=,stat=,ppid=,pgid="]
    shown = subprocess.run(ps, capture_output=True, text=True, check=True)
    yield from map(str.split, shown.stdout.splitlines())


def is_gone(pid: int) -> bool:
    return all(it.pid != pid for it in processes())
