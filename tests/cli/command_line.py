"""What a command says, and how it ends."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from asyncinfer.cli import main


class Told(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


def told(*argv: str) -> Told:
    """In this process, as into a pipe."""
    out, err = io.BytesIO(), io.BytesIO()
    with (
        contextlib.redirect_stdout(io.TextIOWrapper(out, "utf-8", write_through=True)) as shown,
        contextlib.redirect_stderr(io.TextIOWrapper(err, "utf-8", write_through=True)) as said,
    ):
        try:
            code = main(argv)
        except SystemExit as ended:
            code = int(ended.code or 0)
        shown.flush()
        said.flush()
        return Told(code, out.getvalue().decode(), err.getvalue().decode())


def piped(command: str, cwd: Path, stdin: bytes = b"") -> Told:
    """In a shell."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        input=stdin,
        capture_output=True,
        cwd=cwd,
        env={**os.environ, "PATH": path},
        check=False,
    )
    return Told(done.returncode, done.stdout.decode(), done.stderr.decode())


def complaint(ran: Told, code: int) -> str:
    """The one line on stderr of a command that failed; nothing else was said."""
    assert ran.code == code, ran
    assert ran.out == ""
    (line,) = ran.err.splitlines()
    assert line.startswith("asyncinfer: ")
    return line
