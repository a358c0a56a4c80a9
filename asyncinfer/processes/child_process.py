"""Child processes that never outlive their parent."""

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Final, Literal

import anyio
from msgspec import Struct

Tie = Literal["kernel", "watchdog"]
"""How a child learns of its parent's end: Linux tells it, elsewhere a pipe's end does."""

DEFAULT_TIE: Final[Tie] = "kernel" if sys.platform == "linux" else "watchdog"

_PR_SET_PDEATHSIG: Final = 1

# The read fails when the pipe's last writer, our parent, is gone; a line says that all is well.
# `fd` is a free descriptor; POSIX shells take none above 9.
_WATCHDOG: Final = """
exec {fd}<&0 </dev/null
(read -r _ <&{fd} || {{ kill -s "$0" $$; {afterwards}; }}) >/dev/null 2>&1 &
exec "$@" {fd}<&-
"""


class Child:
    """A running child; made by `spawn`."""

    def __init__(self, process: subprocess.Popen[bytes], lifeline: IO[bytes]) -> None:
        self._process = process
        self._lifeline = lifeline
        self._ended = asyncio.Event()
        threading.Thread(
            target=self._watch,
            args=(asyncio.get_running_loop(),),
            name=f"child-{process.pid}",
            daemon=True,
        ).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return not self._ended.is_set()

    async def wait(self) -> int:
        """Its exit code; the number of the signal that ended it, negated."""
        await self._ended.wait()
        return int(self._process.returncode)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def stop(self, grace_seconds: float) -> int:
        """Asks it to end (SIGTERM) and after the grace ends it (SIGKILL)."""
        self._process.terminate()
        with anyio.move_on_after(grace_seconds):
            return await self.wait()
        self._process.kill()
        return await self.wait()

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        self._process.wait()
        release(self._lifeline)
        with contextlib.suppress(RuntimeError):  # the loop may be closed by now
            loop.call_soon_threadsafe(self._ended.set)


def spawn(
    argv: Sequence[str],
    *,
    death_signal: signal.Signals,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    output: IO[bytes] | None = None,
    keep_fds: Sequence[int] = (),
    tie: Tie = DEFAULT_TIE,
) -> Child:
    """Starts a child that gets `death_signal` when this process ends, however it ends.

    It has a session of its own: a terminal's Ctrl-C reaches its parent alone, which ends its
    children in order. `output` takes its stdout and stderr; None shares ours.
    """
    # Linux sends the death signal when the thread that forked ends, not only the process.
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("spawn children from the main thread, or they die with this one")
    tied = (
        _by_kernel(argv, death_signal)
        if tie == "kernel"
        else by_watchdog(argv, death_signal, keep_fds)
    )
    try:
        with tied.stdin:
            process = subprocess.Popen(
                tied.argv,
                stdin=tied.stdin,
                stdout=output,
                stderr=output,
                env=env,
                cwd=cwd,
                pass_fds=keep_fds,
                start_new_session=True,
                preexec_fn=tied.before_exec,
            )
    except OSError:
        release(tied.lifeline)
        raise
    return Child(process, tied.lifeline)


class Tied(Struct, frozen=True):
    """How to start a child so that it is tied to us."""

    argv: Sequence[str]
    stdin: IO[bytes]
    lifeline: IO[bytes]
    """Held open while the child runs."""
    before_exec: Callable[[], None] | None = None


def _by_kernel(argv: Sequence[str], death_signal: signal.Signals) -> Tied:
    libc = ctypes.CDLL(None)  # before the fork: a forked child may not load libraries
    parent_pid = os.getpid()

    def before_exec() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(death_signal))
        if os.getppid() != parent_pid:  # it ended before the kernel was told
            os._exit(1)

    return Tied(argv, open(os.devnull, "rb"), open(os.devnull, "wb"), before_exec)


def by_watchdog(
    argv: Sequence[str],
    death_signal: signal.Signals,
    keep_fds: Sequence[int] = (),
    *,
    afterwards: str = ":",
) -> Tied:
    """Works from any thread; `afterwards` is a shell command, run once the signal is sent."""
    free_fd = next(fd for fd in range(3, 10) if fd not in keep_fds)
    script = _WATCHDOG.format(fd=free_fd, afterwards=afterwards)
    name = death_signal.name.removeprefix("SIG")
    read_fd, write_fd = os.pipe()
    return Tied(
        ("/bin/sh", "-c", script, name, *argv),
        open(read_fd, "rb", buffering=0),
        open(write_fd, "wb", buffering=0),
    )


def release(lifeline: IO[bytes]) -> None:
    """Lets the watchdog go: its child has ended, and the pid may soon be another's."""
    with contextlib.suppress(BrokenPipeError), lifeline:
        lifeline.write(b"\n")
