"""A running service for all tests of commands, and an environment that names it."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncinfer import settings
from asyncinfer.testing import Running, service

from .hostile_server import HostileServer, answers_of, hostile_server


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


@pytest.fixture(scope="session")
def real_answers(running: Running) -> dict[str, Any]:
    """The answers of a real service, by method and path."""
    return answers_of(running.url)


@pytest.fixture
def hostile(
    real_answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[HostileServer]:
    """A server that ASYNCINFER_URL names; its answers are good until a test changes them."""
    with hostile_server(copy.deepcopy(real_answers)) as server:
        monkeypatch.setenv("ASYNCINFER_URL", server.url)
        yield server
