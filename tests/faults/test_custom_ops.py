"""Operators that ONNX Runtime does not have, in services that allow them and in others."""

import msgspec
import onnx
import pytest
from onnx import TensorProto, helper

from asyncinfer.engine import Engine
from asyncinfer.errors import ModelRefused
from asyncinfer.models.folder import scan
from tests import zoo
from tests.faults.model_folder import ModelClient, ModelFolder, serving

from .processes import OpenWorkers

EXTENSIONS = '[session]\ncustom_ops = "onnxruntime-extensions"\n'


def upper() -> onnx.ModelProto:
    """A model whose `y` is `x` in capitals, by an operator of onnxruntime-extensions."""
    node = helper.make_node("StringUpper", ["x"], ["y"], domain="ai.onnx.contrib")
    x, y = (zoo.tensor(name, ("batch", 1), TensorProto.STRING) for name in "xy")
    model = zoo.model([node], [x], [y])
    model.opset_import.append(helper.make_opsetid("ai.onnx.contrib", 1))
    return model


async def upper_of(model_client: ModelClient, text: str, name: str) -> object:
    stored = await model_client.wait_for_end(await model_client.submit(text, name=name))
    assert stored.status == "completed", stored.error
    assert stored.result is not None
    return msgspec.json.decode(stored.result)["outputs"][0]["data"]


@pytest.mark.soak
async def test_allowed_custom_operators_run_also_in_a_model_that_is_added_later(
    open_workers: OpenWorkers, folder: ModelFolder, model_client: ModelClient
) -> None:
    folder.publish(upper(), 1, name="early", toml=EXTENSIONS)
    async with serving(open_workers, folder, model_client, allow_custom_ops=True):
        assert await upper_of(model_client, "shout", "early") == ["SHOUT"]
        folder.publish(upper(), 1, name="late", toml=EXTENSIONS)
        await model_client.wait_until_announced("1", name="late")
        assert await upper_of(model_client, "whisper", "late") == ["WHISPER"]


@pytest.mark.soak
async def test_a_model_with_custom_operators_that_are_not_allowed_is_refused_alone(
    open_workers: OpenWorkers, folder: ModelFolder, model_client: ModelClient
) -> None:
    async with serving(open_workers, folder, model_client):
        folder.publish(upper(), 1, name="late", toml=EXTENSIONS)
        await model_client.wait_until_refused("1", "set ALLOW_CUSTOM_OPS=true", name="late")
        assert await model_client.predict(1) == 2


def test_a_model_that_does_not_declare_custom_operators_is_refused_with_the_line_to_write(
    folder: ModelFolder,
) -> None:
    folder.publish(upper(), 1, name="silent")
    (file,) = [file for file in scan(folder.path) if file.model == "silent"]
    with pytest.raises(ModelRefused, match=r"set session\.custom_ops = "):
        Engine.load(file, intra_op_threads=1, allow_custom_ops=True)
