"""`asyncinfer serve` as a process of its own, and the requests that tests send to it."""

import json
import shlex
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from asyncinfer import __version__
from tests.faults.harness import eventually_sync
from tests.process import REPOSITORY, Parent, parent, processes

REFUSED: Final = 2


class Serve:
    """A running `asyncinfer serve`; `welcome` is its start banner, by the word of each line."""

    def __init__(self, process: Parent, welcome: dict[str, str]) -> None:
        self.process = process
        self.curl = shlex.split(welcome["Try"])
        self.welcome = welcome

    def get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(self.welcome["URL"] + path, timeout=5) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def paste(self) -> dict[str, Any]:
        """Runs the curl line of the banner; returns the JSON that it prints."""
        done = subprocess.run(self.curl, capture_output=True, check=True)
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def children(self) -> list[int]:
        return [
            process.pid for process in processes() if process.parent == self.process.process.pid
        ]


def free_port() -> int:
    """A port that was free a moment ago; another process may take it meanwhile."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def serving(*argv: str, cwd: Path = REPOSITORY, **environ: str) -> Iterator[Serve]:
    """Starts `serve` on a free port and waits for its banner; kills it at the end."""
    port = str(free_port())
    with parent("-m", "asyncinfer", "serve", "--port", port, *argv, cwd=cwd, **environ) as process:
        assert process.says() == f"asyncinfer {__version__}"
        lines = [process.says() for _ in range(5)]
        yield Serve(process, dict(line.split(maxsplit=1) for line in lines))


def answer_of(serve: Serve) -> dict[str, Any]:
    """Runs the curl line of the banner until its job is completed; returns its last output."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    answers: list[dict[str, Any]] = []

    def answered() -> bool:
        answers.append(serve.paste())
        return answers[-1].get("status") == "completed"

    eventually_sync(answered, "the curl line prints a result")
    return answers[-1]
