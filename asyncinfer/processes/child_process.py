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
"""How a child ends with its parent: Linux signals it; elsewhere a shell watches a pipe."""

DEFAULT_TIE: Final[Tie] = "kernel" if sys.platform == "linux" else "watchdog"

_PR_SET_PDEATHSIG: Final = 1

# The read fails when the pipe's last writer, the parent, is gone. A line read means that the child
# has ended by itself. `fd` is a free descriptor; POSIX shells take none above 9.
_WATCHDOG: Final = """
exec {fd}<&0 </dev/null
(read -r _ <&{fd} || {{ kill -s "$0" $$; {afterwards}; }}) >/dev/null 2>&1 &
exec "$@" {fd}<&-
"""


class Child:
    """A running child, made by `spawn` in a running event loop; a thread of its own waits for its
    end."""

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
    def is_alive(self) -> bool:
        """Whether the child has not ended yet, as far as the event loop knows."""
        return not self._ended.is_set()

    async def wait(self) -> int:
        """Waits for the end; returns the exit code, or the negated number of the signal that ended
        the child."""
        await self._ended.wait()
        return int(self._process.returncode)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal and returns at once; does nothing if the child has ended."""
        self._process.send_signal(number)

    async def stop(self, grace_seconds: float) -> int:
        """Sends SIGTERM, and SIGKILL if the child has not ended after `grace_seconds`; returns once
        it has ended, with the same value as `wait`."""
        self._process.terminate()
        with anyio.move_on_after(grace_seconds):
            return await self.wait()
        self._process.kill()
        return await self.wait()

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Waits in a thread for the child's end, then ends its watchdog and wakes those who
        `wait`."""
        self._process.wait()
        release_watchdog(self._lifeline)
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

    The child has a session of its own: a terminal's Ctrl-C reaches only its parent, which ends its
    children in order. `output` takes its stdout and stderr; None shares the parent's. It inherits
    the descriptors in `keep_fds`. Call it in a running event loop. Raises RuntimeError outside the
    main thread, and OSError if the command cannot be run.
    """
    # Linux sends the death signal already when the thread that forked ends.
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
        release_watchdog(tied.lifeline)
        raise
    return Child(process, tied.lifeline)


class TiedCommand(Struct, frozen=True):
    """How to start a child so that it ends with its parent."""

    argv: Sequence[str]
    stdin: IO[bytes]
    lifeline: IO[bytes]
    """The parent holds it open while the child runs."""
    before_exec: Callable[[], None] | None = None


def _by_kernel(argv: Sequence[str], death_signal: signal.Signals) -> TiedCommand:
    """The command itself, to which Linux sends `death_signal` when the thread that starts it ends.
    Linux only."""
    libc = ctypes.CDLL(None)  # before the fork: a forked child may not load libraries
    parent_pid = os.getpid()

    def before_exec() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(death_signal))
        if os.getppid() != parent_pid:  # the parent ended before prctl took effect
            os._exit(1)

    return TiedCommand(argv, open(os.devnull, "rb"), open(os.devnull, "wb"), before_exec)


def by_watchdog(
    argv: Sequence[str],
    death_signal: signal.Signals,
    keep_fds: Sequence[int] = (),
    *,
    afterwards: str = ":",
) -> TiedCommand:
    """A command with a shell beside it that sends `death_signal` to it when the parent ends.

    Works from any thread. The caller starts the command with `stdin`, closes that, and calls
    `release_watchdog` with `lifeline` once the command has ended. The command inherits `keep_fds`,
    which must leave a descriptor from 3 to 9 free. `afterwards` is a shell command that the
    watchdog runs after it has sent the signal, and only then.
    """
    free_fd = next(fd for fd in range(3, 10) if fd not in keep_fds)
    script = _WATCHDOG.format(fd=free_fd, afterwards=afterwards)
    name = death_signal.name.removeprefix("SIG")
    read_fd, write_fd = os.pipe()
    return TiedCommand(
        ("/bin/sh", "-c", script, name, *argv),
        open(read_fd, "rb", buffering=0),
        open(write_fd, "wb", buffering=0),
    )


def release_watchdog(lifeline: IO[bytes]) -> None:
    """Ends the watchdog of a child that has ended, whose pid may soon be another process's, and
    closes `lifeline`. Also right for a child that has no watchdog."""
    with contextlib.suppress(BrokenPipeError), lifeline:
        lifeline.write(b"\n")
