"""Operators that ONNX Runtime itself does not have, where they are allowed and where not."""

import msgspec
import onnx
import pytest
from onnx import TensorProto, helper

from asyncinfer.engine import Engine
from asyncinfer.errors import ModelRefused
from asyncinfer.models.folder import scan
from tests import zoo
from tests.faults.model_folder import Folder, Shop, serving

from .processes import OpenCrew

EXTENSIONS = '[session]\ncustom_ops = "onnxruntime-extensions"\n'


def upper() -> onnx.ModelProto:
    """`y` is `x` in capitals, by an operator of onnxruntime-extensions."""
    node = helper.make_node("StringUpper", ["x"], ["y"], domain="ai.onnx.contrib")
    x, y = (zoo.tensor(name, ("batch", 1), TensorProto.STRING) for name in "xy")
    model = zoo.model([node], [x], [y])
    model.opset_import.append(helper.make_opsetid("ai.onnx.contrib", 1))
    return model


async def upper_of(shop: Shop, text: str, name: str) -> object:
    stored = await shop.ended(await shop.submit(text, name=name))
    assert stored.status == "completed", stored.error
    assert stored.result is not None
    return msgspec.json.decode(stored.result)["outputs"][0]["data"]


@pytest.mark.soak
async def test_custom_operators_run_where_they_are_allowed_also_in_a_model_that_came_later(
    crew: OpenCrew, folder: Folder, shop: Shop
) -> None:
    folder.publish(upper(), 1, name="early", toml=EXTENSIONS)
    async with serving(crew, folder, shop, allow_custom_ops=True):
        assert await upper_of(shop, "shout", "early") == ["SHOUT"]
        folder.publish(upper(), 1, name="late", toml=EXTENSIONS)
        await shop.until_announced("1", name="late")
        assert await upper_of(shop, "whisper", "late") == ["WHISPER"]


async def test_where_they_are_not_allowed_a_model_is_refused_and_the_rest_is_served(
    crew: OpenCrew, folder: Folder, shop: Shop
) -> None:
    async with serving(crew, folder, shop):
        folder.publish(upper(), 1, name="late", toml=EXTENSIONS)
        await shop.until_refused("1", "set ALLOW_CUSTOM_OPS=true", name="late")
        assert await shop.ask(1) == 2


def test_a_model_that_does_not_say_so_is_refused_with_what_to_write(folder: Folder) -> None:
    folder.publish(upper(), 1, name="silent")
    (file,) = [one for one in scan(folder.path) if one.model == "silent"]
    with pytest.raises(ModelRefused, match=r"set session\.custom_ops = "):
        Engine.load(file, intra_op_threads=1, allow_custom_ops=True)
