"""The commands `serve` and `work` as processes of one test."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2

from tests.ports import free_port
from tests.process import REPOSITORY

from .harness import eventually_sync


class Services:
    """Starts commands with one environment and one log; `close` kills them all."""

    def __init__(self, log_path: Path, environ: dict[str, str]) -> None:
        self._log_path = log_path
        self._log = log_path.open("ab")
        self._environ = environ
        self.members: list[subprocess.Popen[bytes]] = []

    def work(self, *argv: str, tree: Path = REPOSITORY) -> subprocess.Popen[bytes]:
        """Starts a worker of the release whose source is in `tree`."""
        return self.start("work", *argv, tree=tree)

    def serve(self, *argv: str, tree: Path = REPOSITORY, api_key: str = "") -> str:
        """Starts an API and waits until it lists a model; returns its URL."""
        port = str(free_port())
        self.start("serve", "--port", port, *argv, tree=tree)
        url = f"http://127.0.0.1:{port}"
        eventually_sync(lambda: _lists_a_model(url, api_key), f"the API at {url} lists a model", 60)
        return url

    @property
    def log(self) -> str:
        return self._log_path.read_text()

    def close(self) -> None:
        for member in self.members:
            member.kill()
            member.wait()
        self._log.close()

    def start(self, *argv: str, tree: Path = REPOSITORY) -> subprocess.Popen[bytes]:
        """Starts a command and waits for nothing."""
        member = subprocess.Popen(
            [sys.executable, "-m", "asyncinfer", *argv],
            cwd=tree,
            env={**os.environ, **self._environ, "PYTHONPATH": str(tree)},
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self.members.append(member)
        return member


def _lists_a_model(url: str, api_key: str) -> bool:
    with contextlib.suppress(httpx2.TransportError):
        headers = {"x-api-key": api_key} if api_key else {}
        answer = httpx2.get(f"{url}/models", timeout=5, headers=headers)
        return answer.status_code == 200 and bool(answer.json()["models"])
    return False


@contextlib.contextmanager
def open_services(folder: Path, **environ: str) -> Iterator[Services]:
    """Kills the processes at the end; prints their log if the test failed."""
    path = folder / "services.log"
    services = Services(path, environ)
    try:
        yield services
    except BaseException:
        sys.stderr.write(path.read_text()[-8000:])
        raise
    finally:
        services.close()
