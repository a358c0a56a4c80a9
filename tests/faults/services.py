"""The commands themselves, `serve` and `work`, as processes of one test."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2

from tests.process import REPOSITORY
from tests.serving import free_port

from .harness import eventually_sync


class Services:
    """Starts commands that share an environment; all write to one log, and all end together."""

    def __init__(self, log_path: Path, environ: dict[str, str]) -> None:
        self._log_path = log_path
        self._log = log_path.open("ab")
        self._environ = environ
        self._members: list[subprocess.Popen[bytes]] = []

    def work(self, *argv: str, tree: Path = REPOSITORY) -> subprocess.Popen[bytes]:
        """A worker of the release whose source is in `tree`."""
        return self._start("work", *argv, tree=tree)

    def serve(self, *argv: str, tree: Path = REPOSITORY) -> str:
        """An API that knows a model; its URL."""
        port = str(free_port())
        self._start("serve", "--port", port, *argv, tree=tree)
        url = f"http://127.0.0.1:{port}"
        eventually_sync(lambda: _knows_a_model(url), f"the API at {url} knows a model", 20)
        return url

    @property
    def log(self) -> str:
        return self._log_path.read_text()

    def close(self) -> None:
        for member in self._members:
            member.kill()
            member.wait()
        self._log.close()

    def _start(self, *argv: str, tree: Path) -> subprocess.Popen[bytes]:
        member = subprocess.Popen(
            [sys.executable, "-m", "asyncinfer", *argv],
            cwd=tree,
            env={**os.environ, **self._environ, "PYTHONPATH": str(tree)},
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self._members.append(member)
        return member


def _knows_a_model(url: str) -> bool:
    with contextlib.suppress(httpx2.TransportError):
        answer = httpx2.get(f"{url}/models", timeout=5)
        return answer.status_code == 200 and bool(answer.json()["models"])
    return False


@contextlib.contextmanager
def open_services(folder: Path, **environ: str) -> Iterator[Services]:
    path = folder / "services.log"
    it = Services(path, environ)
    try:
        yield it
    except BaseException:
        sys.stderr.write(path.read_text()[-8000:])
        raise
    finally:
        it.close()
