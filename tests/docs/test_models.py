"""The page on models, and the README's `model.toml`: their keys are those of the code."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import onnx

from asyncinfer.engine import Engine
from asyncinfer.models.config import ModelConfig
from asyncinfer.models.folder import scan
from tests.docs.markdown import page
from tests.zoo import mlp


def keys_of(defaults: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in defaults.items():
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_every_key_of_model_toml_is_in_the_table_with_its_default() -> None:
    shown = {
        key.strip("`"): None
        if default == "absent"
        else tomllib.loads(f"x = {default.strip('`')}")["x"]
        for key, default, _ in page("models.md").section("model.toml").rows()
        if key.startswith("`")
    }

    assert shown == dict(keys_of(msgspec.json.decode(msgspec.json.encode(ModelConfig()))))


def test_every_key_that_the_page_names_exists() -> None:
    known = dict(keys_of(msgspec.to_builtins(ModelConfig())))
    tables = {name.partition(".")[0] for name in known if "." in name}
    named = re.findall(rf"`((?:{'|'.join(tables)})\.\w+)", page("models.md").text)

    assert named
    assert set(named) <= known.keys()


def test_the_example_of_several_inputs_is_valid_toml() -> None:
    (text,) = page("models.md").texts("toml")
    assert tomllib.loads(text)["example"].keys() == {"age", "plan"}


def test_the_model_toml_of_the_readme_is_valid(folder: Path) -> None:
    (text,) = page("README.md").texts("toml")
    path = folder / "churn" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(mlp([3, 4, 2]), path)
    (folder / "churn" / "model.toml").write_text(text)

    (file,) = scan(folder)

    assert not file.problem
    assert Engine.load(file, intra_op_threads=1).signature.labels == ("stays", "leaves")
