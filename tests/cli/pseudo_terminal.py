"""Runs of commands on a pseudo-terminal."""

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SECONDS = 20.0


class Screen(NamedTuple):
    code: int
    text: str


def at_a_terminal(
    argv: Sequence[str], columns: int, typed: str = "", until: str = "", cwd: Path | None = None
) -> Screen:
    """Runs a command on a terminal of `columns`; `typed` is typed once `until` is shown."""
    terminal, child_terminal = pty.openpty()
    _resize(child_terminal, columns)
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "24"}
    with subprocess.Popen(
        [sys.executable, "-m", "asyncinfer", *argv],
        stdin=child_terminal,
        stdout=child_terminal,
        stderr=child_terminal,
        env=environ,
        cwd=cwd,
        start_new_session=True,
        preexec_fn=_take_terminal,
    ) as process:
        os.close(child_terminal)
        text = ""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            chunk = _read(terminal)
            if chunk is None:
                break
            text += chunk
            if typed and until in text:
                os.write(terminal, typed.encode())
                typed = ""
        else:
            process.kill()
        os.close(terminal)
        return Screen(process.wait(SECONDS), text)


def _read(terminal: int) -> str | None:
    """What was written within 0.2 s; None once no process has the terminal open."""
    if not select.select([terminal], [], [], 0.2)[0]:
        return ""
    try:
        return os.read(terminal, 65536).decode(errors="replace")
    except OSError:
        return None


def _take_terminal() -> None:
    """Makes it the controlling terminal, so that Ctrl-C reaches the program."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _resize(terminal: int, columns: int) -> None:
    import fcntl
    import struct
    import termios

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
