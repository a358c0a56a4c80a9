"""A `serve` in a process of its own, and what a test asks of it."""

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
    """`asyncinfer serve`, up."""

    def __init__(self, process: Parent, welcome: dict[str, str]) -> None:
        self.process = process
        self.curl = shlex.split(welcome["Try"])
        self.welcome = welcome

    def get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(self.welcome["URL"] + path, timeout=5) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def paste(self) -> dict[str, Any]:
        """What the curl line answers."""
        done = subprocess.run(self.curl, capture_output=True, check=True)
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def children(self) -> list[int]:
        return [it.pid for it in processes() if it.parent == self.process.process.pid]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def serving(*argv: str, cwd: Path = REPOSITORY, **environ: str) -> Iterator[Serve]:
    port = str(free_port())
    with parent("-m", "asyncinfer", "serve", "--port", port, *argv, cwd=cwd, **environ) as it:
        assert it.says() == f"asyncinfer {__version__}"
        lines = [it.says() for _ in range(5)]
        yield Serve(it, dict(line.split(maxsplit=1) for line in lines))


def answer_of(serve: Serve) -> dict[str, Any]:
    """What the pasted curl line answers, once a worker has come."""
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    answers: list[dict[str, Any]] = []

    def answered() -> bool:
        answers.append(serve.paste())
        return answers[-1].get("status") == "completed"

    eventually_sync(answered, "the pasted line is answered with a result")
    return answers[-1]
