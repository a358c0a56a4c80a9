"""The model folder of a service under test, from files, bytes and `onnx.ModelProto`s."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from asyncinfer.errors import ModelRefused, StartError
from asyncinfer.models import onnx_file
from asyncinfer.models.folder import NAME_RULE, find_model_dir, scan, valid_name, version_order
from asyncinfer.testing.settings import Model


def model_dir(
    folder: Path, model: Model | None, name: str | None, named: Mapping[str, Model] | None
) -> Path:
    """The folder to serve, made in `folder` unless it is there already; raises StartError."""
    if named is not None:
        return _placed(folder / "model", named)
    if model is None:
        return find_model_dir(None, cwd=folder)
    if isinstance(model, str | os.PathLike):
        path = Path(model).absolute()
        if path.is_dir() and not _is_one_model(path):
            return path
        return _placed(folder / "model", {name or _name_of(path): path})
    return _placed(folder / "model", {name or "model": model})


def names_in(folder: Path) -> set[str]:
    """Of the models in a folder, those that cannot be served included; raises StartError."""
    names = {file.model for file in scan(folder)}
    if not names:
        raise StartError(
            f"There is no model in {folder}. Put an ONNX file there, as <name>/1/model.onnx or "
            "<name>.onnx."
        )
    return names


def _placed(folder: Path, named: Mapping[str, Model]) -> Path:
    if not named:
        raise StartError("`models` names no model; leave it out to serve the shipped ones.")
    for name, model in named.items():
        if not valid_name(name):
            raise ModelRefused(
                f"{name!r} cannot name a model: {NAME_RULE}. Give it one by `name=`."
            )
        _place(folder / name, model)
    return folder


def _place(home: Path, model: Model) -> None:
    if isinstance(model, str | os.PathLike):
        _place_path(home, Path(model).absolute())
        return
    content = model if isinstance(model, bytes) else model.SerializeToString()
    _first_version(home).write_bytes(content)


def _place_path(home: Path, path: Path) -> None:
    if path.is_dir():
        shutil.copytree(path, home)
    elif path.is_file():
        file = _first_version(home)
        shutil.copyfile(path, file)
        _copy_weights(path, file.parent)
    else:
        raise ModelRefused(f"There is no model {path}: give an ONNX file, or a folder of one.")


def _copy_weights(path: Path, folder: Path) -> None:
    """What lies beside it. What is missing or may not be read is for the worker to refuse."""
    try:
        locations = onnx_file.weights_files(path)
    except ValueError:
        return
    for location in locations:
        source = path.parent / location
        if source.is_file() and ".." not in Path(location).parts and source != Path(location):
            (folder / location).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / location)


def _first_version(home: Path) -> Path:
    folder = home / "1"
    folder.mkdir(parents=True)
    return folder / "model.onnx"


def _name_of(path: Path) -> str:
    if path.is_dir():
        return path.name
    is_version = path.name == "model.onnx" and version_order(path.parent.name) >= 0
    return path.parent.parent.name if is_version else path.stem


def _is_one_model(folder: Path) -> bool:
    return any(version_order(entry.parent.name) >= 0 for entry in folder.glob("*/model.onnx"))
