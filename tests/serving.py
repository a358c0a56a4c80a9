"""`asyncinfer serve` as a process of its own, and the requests that tests send to it."""

import json
import shlex
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from asyncinfer import __version__
from tests.faults.harness import eventually_sync
from tests.ports import free_port
from tests.process import REPOSITORY, PythonProcess, python_process, running_processes

EXIT_REFUSED: Final = 2


class ServeProcess:
    """A running `asyncinfer serve`; `banner` is what it prints at its start, by the word of each
    line."""

    def __init__(self, process: PythonProcess, banner: dict[str, str]) -> None:
        self.process = process
        self.curl_argv = shlex.split(banner["Try"])
        self.banner = banner

    def get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(self.banner["URL"] + path, timeout=5) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def run_curl_line(self) -> dict[str, Any]:
        """Runs the curl line of the banner; returns the JSON that it prints."""
        done = subprocess.run(self.curl_argv, capture_output=True, check=True)
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def child_pids(self) -> list[int]:
        return [
            process.pid
            for process in running_processes()
            if process.parent_pid == self.process.process.pid
        ]


@contextmanager
def running_serve(*argv: str, cwd: Path = REPOSITORY, **environ: str) -> Iterator[ServeProcess]:
    """Starts `serve` on a free port and waits for its banner; kills it at the end."""
    port = str(free_port())
    with python_process(
        "-m", "asyncinfer", "serve", "--port", port, *argv, cwd=cwd, **environ
    ) as process:
        assert process.read_line() == f"asyncinfer {__version__}"
        lines = [process.read_line() for _ in range(5)]
        yield ServeProcess(process, dict(line.split(maxsplit=1) for line in lines))


def wait_for_result(serve: ServeProcess) -> dict[str, Any]:
    """Runs the curl line of the banner until its job is completed; returns its last output.

    The test needs curl.
    """
    answers: list[dict[str, Any]] = []

    def answered() -> bool:
        answers.append(serve.run_curl_line())
        return answers[-1].get("status") == "completed"

    eventually_sync(answered, "the curl line prints a result")
    return answers[-1]
