"""A service with models, and clients of it, for the tests of this folder."""

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import onnx
import pytest
from onnx import helper

from asyncinfer.client import AsyncClient, Client
from asyncinfer.testing import Running, service
from tests import zoo
from tests.zoo.catalogue import ENTRIES

FROM_THE_CATALOGUE = ("several", "half", "int64", "lstm_step", "text", "embedding", "bytes", "bf16")


def doubled() -> onnx.ModelProto:
    """A model that batches, and whose output is NaN where its input is."""
    x, y = (zoo.tensor(name, ["batch", 3]) for name in "xy")
    return zoo.model([helper.make_node("Add", ["x", "x"], ["y"])], [x], [y])


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, shipped_models: Path) -> Path:
    """The shipped models, and those of the zoo that a client treats differently."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("iris", "digits"):
        shutil.copytree(shipped_models / name, folder / name)
    for name in FROM_THE_CATALOGUE:
        ENTRIES[name].place(folder)
    zoo.place(folder, "mean", zoo.minus_mean())
    zoo.place(folder, "picky", zoo.picky())
    zoo.place(folder, "slow", zoo.slow())
    zoo.place(folder, "slow_alone", zoo.slow(), toml="[batching]\nenabled = false\n")
    zoo.place(folder, "doubled", doubled())
    return folder


@pytest.fixture(scope="session")
def running(model_folder: Path) -> Iterator[Running]:
    with service(model_folder) as started:
        yield started


@pytest.fixture
def client(running: Running) -> Iterator[Client]:
    with Client(running.url) as connected:
        yield connected


@pytest.fixture
async def aclient(running: Running) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(running.url) as connected:
        yield connected
