"""Runs of commands, with their output and exit code."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from asyncinfer.cli import main


class CommandResult(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout, decoded."""
        return json.loads(self.out)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """stdout, decoded line by line."""
        return [json.loads(line) for line in self.out.splitlines()]


def run_command(*argv: str) -> CommandResult:
    """Runs a command in this process, with pipes as stdout and stderr."""
    out, err = io.BytesIO(), io.BytesIO()
    with (
        contextlib.redirect_stdout(io.TextIOWrapper(out, "utf-8", write_through=True)) as stdout,
        contextlib.redirect_stderr(io.TextIOWrapper(err, "utf-8", write_through=True)) as stderr,
    ):
        try:
            code = main(argv)
        except SystemExit as exit_error:
            code = int(exit_error.code or 0)
        stdout.flush()
        stderr.flush()
        return CommandResult(code, out.getvalue().decode(), err.getvalue().decode())


def run_in_shell(command: str, cwd: Path, stdin: bytes = b"") -> CommandResult:
    """Runs a command line in bash."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        input=stdin,
        capture_output=True,
        cwd=cwd,
        env={**os.environ, "PATH": path},
        check=False,
    )
    return CommandResult(done.returncode, done.stdout.decode(), done.stderr.decode())


def error_line(ran: CommandResult, code: int) -> str:
    """The line on stderr of a command that failed with `code` and printed nothing else."""
    assert ran.code == code, ran
    assert ran.out == ""
    (line,) = ran.err.splitlines()
    assert line.startswith("asyncinfer: ")
    return line
