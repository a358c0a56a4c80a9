"""The model folder of a service under test, from files, bytes and `onnx.ModelProto`s."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from asyncinfer.errors import ModelRefused, StartError
from asyncinfer.models import onnx_file
from asyncinfer.models.folder import NAME_RULE, find_model_dir, is_valid_name, scan, version_order
from asyncinfer.testing.settings import Model


def model_dir(
    folder: Path, model: Model | None, name: str | None, named: Mapping[str, Model] | None
) -> Path:
    """The folder to serve: `model` itself if it is a folder of models, else one made in `folder`.

    `name` is the name of `model`, by default that of its file, else "model". With neither `model`
    nor `named` (models by name) it is the folder of the shipped models. Raises StartError, or
    ModelRefused for a model that is not there or has an invalid name.
    """
    if named is not None:
        return _create_folder(folder / "model", named)
    if model is None:
        return find_model_dir(None, cwd=folder)
    if isinstance(model, str | os.PathLike):
        path = Path(model).absolute()
        if path.is_dir() and not _is_one_model(path):
            return path
        return _create_folder(folder / "model", {name or _name_of(path): path})
    return _create_folder(folder / "model", {name or "model": model})


def names_in(folder: Path) -> set[str]:
    """Names of the models in a folder, also of broken ones; raises StartError if there are none."""
    names = {file.model for file in scan(folder)}
    if not names:
        raise StartError(
            f"There is no model in {folder}. Put an ONNX file there, as <name>/1/model.onnx or "
            "<name>.onnx."
        )
    return names


def _create_folder(folder: Path, named: Mapping[str, Model]) -> Path:
    """Makes a folder of models and returns it; raises StartError if `named` is empty, ModelRefused
    for a bad name or a model that is not there."""
    if not named:
        raise StartError("`models` names no model; leave it out to serve the shipped ones.")
    for name, model in named.items():
        if not is_valid_name(name):
            raise ModelRefused(
                f"{name!r} cannot name a model: {NAME_RULE}. Give it one by `name=`."
            )
        _create_model(folder / name, model)
    return folder


def _create_model(target: Path, model: Model) -> None:
    """Makes `target`, the folder of one model, from content, or as a copy of what is at a path: a
    folder whole, a file as version 1 with the weights beside it. Raises ModelRefused if nothing is
    there."""
    if not isinstance(model, str | os.PathLike):
        content = model if isinstance(model, bytes) else model.SerializeToString()
        _first_version(target).write_bytes(content)
        return
    path = Path(model).absolute()
    if path.is_dir():
        shutil.copytree(path, target)
    elif path.is_file():
        file = _first_version(target)
        shutil.copyfile(path, file)
        _copy_weights(path, file.parent)
    else:
        raise ModelRefused(f"There is no model {path}: give an ONNX file, or a folder of one.")


def _copy_weights(path: Path, folder: Path) -> None:
    """Copies the files of weights beside a model, and skips those that are missing or lie
    elsewhere.

    The worker refuses a model whose weights are missing or may not be read.
    """
    try:
        locations = onnx_file.weights_locations(path)
    except ValueError:
        return
    for location in locations:
        source = path.parent / location
        if source.is_file() and ".." not in Path(location).parts and source != Path(location):
            (folder / location).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / location)


def _first_version(target: Path) -> Path:
    """Makes the folder of version 1 in `target` and returns the path for its file, which is not
    made."""
    folder = target / "1"
    folder.mkdir(parents=True)
    return folder / "model.onnx"


def _name_of(path: Path) -> str:
    """The name of a model by its path: of its folder, also for a file
    `<name>/<version>/model.onnx`; else of the file, without its suffix."""
    if path.is_dir():
        return path.name
    is_version = path.name == "model.onnx" and version_order(path.parent.name) >= 0
    return path.parent.parent.name if is_version else path.stem


def _is_one_model(folder: Path) -> bool:
    """Whether a folder has a file `<version>/model.onnx`, and so is one model and no folder of
    models."""
    return any(version_order(entry.parent.name) >= 0 for entry in folder.glob("*/model.onnx"))
