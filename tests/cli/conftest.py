"""A running service for all tests of commands, and an environment that names it."""

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncinfer import settings
from asyncinfer.testing import Running, service
from tests.faults.harness import eventually_sync

IRIS = [[5.1, 3.5, 1.4, 0.2]]


@pytest.fixture(scope="session")
def running() -> Iterator[Running]:
    with service() as running:
        yield running


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for knob in settings.knobs():
        monkeypatch.delenv(knob.variable, raising=False)
    for name in ("ASYNCINFER_URL", "ASYNCINFER_API_KEY", "FORCE_COLOR", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))


@pytest.fixture
def url(running: Running, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ASYNCINFER_URL", running.url)
    return running.url


@pytest.fixture
def data_dir(running: Running) -> Path:
    """Where the service's embedded Valkey is."""
    match = re.search("embedded; its data in (.+)", running.log)
    assert match
    return Path(match[1])


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    path = tmp_path / "flowers.csv"
    path.write_text("a,b,c,d\n5.1,3.5,1.4,0.2\n6.7,3.0,5.2,2.3\n5.7,2.8,4.1,1.3\n")
    return path


def submit(url: str, model: str = "iris", data: Any = None) -> str:
    """Submits a job and returns its id."""
    body = json.dumps({"data": data or (IRIS if model == "iris" else [[0.0] * 64])}).encode()
    request = urllib.request.Request(
        f"{url}/predict/{model}", body, {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=5) as answer:
        job_id: str = json.load(answer)["job_id"]
    return job_id


def wait_until_ended(url: str, job_id: str) -> str:
    """Waits until a job has ended, and returns its id."""

    def has_ended() -> bool:
        with urllib.request.urlopen(f"{url}/job/{job_id}?wait=5", timeout=10) as answer:
            return json.load(answer)["status"] not in ("pending", "processing")

    eventually_sync(has_ended, "the job has ended")
    return job_id
