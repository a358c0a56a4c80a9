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

FROM_THE_CATALOGUE = (
    "overridable",
    "several",
    "half",
    "int64",
    "lstm_step",
    "text",
    "embedding",
    "bytes",
    "bf16",
)


def doubled() -> onnx.ModelProto:
    """A model that batches, and whose output is NaN where its input is."""
    x, y = (zoo.tensor(name, ["batch", 3]) for name in "xy")
    return zoo.model([helper.make_node("Add", ["x", "x"], ["y"])], [x], [y])


def unnamed(operator: str) -> onnx.ModelProto:
    """A model whose dimensions have no names, as of skl2onnx, and which does not batch."""
    mixes = operator == "Softmax"
    node = helper.make_node(operator, ["x"], ["y"])
    node.attribute.extend([helper.make_attribute("axis", 0)] if mixes else [])
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, 3])
    datatype = onnx.TensorProto.FLOAT if mixes else onnx.TensorProto.BOOL
    y = helper.make_tensor_value_info("y", datatype, [None, 3])
    return zoo.model([node], [x], [y])


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
    zoo.place(folder, "mixing", unnamed("Softmax"))
    zoo.place(folder, "infinite", unnamed("IsInf"))
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
