"""`model.toml`: what the ONNX file cannot say, and what its operator wants."""

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

import msgspec
from msgspec import Meta, Struct

from asyncinfer.errors import ModelRefused
from asyncinfer.tensors.missing_values import in_words
from asyncinfer.untrusted import file_access
from asyncinfer.untrusted.file_access import Unreadable

Scores = Literal["logits", "probabilities"]
GraphOptimization = Literal["disabled", "basic", "extended", "all"]

_LONGEST_FILE_BYTES: Final = 4 << 20


class Batching(Struct, frozen=True, forbid_unknown_fields=True):
    enabled: bool | None = None
    """Forces batching on or off; None leaves it to the probe at load."""
    max_jobs: Annotated[int, Meta(ge=1)] | None = None
    max_rows: Annotated[int, Meta(ge=1)] | None = None
    axis: Annotated[int, Meta(ge=0, le=31)] | None = None
    """The axis of every open dimension that counts rows; None: found by its name."""
    max_wait_ms: Annotated[float, Meta(ge=0, le=60_000)] = 0.0
    pad: bool = False
    """Whether jobs of different sizes share a run, the smaller ones filled up with zeros."""


class Limits(Struct, frozen=True, forbid_unknown_fields=True):
    timeout_seconds: Annotated[float, Meta(gt=0)] | None = None
    max_rows_per_job: Annotated[int, Meta(ge=1)] | None = None


class SessionOptions(Struct, frozen=True, forbid_unknown_fields=True):
    intra_op_threads: Annotated[int, Meta(ge=1, le=1024)] | None = None
    providers: Annotated[tuple[str, ...], Meta(min_length=1)] | None = None
    """Execution providers, the preferred one first; None: the CPU."""
    graph_optimization: GraphOptimization = "all"
    custom_ops: str | None = None
    """"onnxruntime-extensions", or a library within the model's own folder."""
    devices: tuple[Annotated[int, Meta(ge=0)], ...] = ()
    """Numbers of the accelerators to spread runs over; none means the first."""


class ModelConfig(Struct, frozen=True, forbid_unknown_fields=True):
    labels: tuple[str, ...] = ()
    description: str = ""
    example: Any = None
    """A value for the only input, or a table: name of an input -> value."""
    batching: Batching = Batching()
    limits: Limits = Limits()
    session: SessionOptions = SessionOptions()
    outputs: tuple[str, ...] = ()
    """The outputs to keep, in this order; none means all."""
    scores: Scores = "probabilities"
    """What the scores of a labelled classifier are; of logits the softmax is shown."""
    score_output: str | None = None
    """The output whose columns the labels name; None: found at load."""
    class_output: str | None = None
    """The output that is the class of a row; None: found at load."""
    classes: tuple[int | str, ...] = ()
    """What the class output calls the class of each column; none: found at load."""
    default_version: Annotated[int, Meta(ge=0)] | None = None
    pinned: bool = False
    """Never put out of memory for another model."""


def read_file(path: Path, shown: str) -> ModelConfig:
    """Raises ModelRefused as `read_config` does, and where the file cannot be read."""
    try:
        toml = file_access.read(path, _LONGEST_FILE_BYTES)
    except Unreadable as error:
        raise ModelRefused(f"{shown}: {error.words}") from error
    return read_config(toml, shown, path.parent)


def read_config(toml: bytes, shown: str, folder: Path | None = None) -> ModelConfig:
    """Raises ModelRefused that names the file `shown`, the key, and the nearest known one.

    `folder` is where a labels file lies.
    """
    try:
        table = tomllib.loads(file_access.text(toml))
        unknown = next(_unknown_keys(table, ModelConfig, ""), None)
        if unknown is not None:
            raise ModelRefused(f"{shown}: {unknown}")
        if folder is not None and isinstance(table.get("labels"), str):
            table["labels"] = _labels_in(folder, table["labels"], shown)
        if "example" in table:
            # TOML has nan and inf; what is shown of the example is JSON.
            table["example"] = in_words(table["example"])
        return msgspec.convert(table, ModelConfig)
    except Unreadable as error:
        raise ModelRefused(f"{shown}: {error.words}") from error
    except (ValueError, RecursionError) as error:  # bad TOML, msgspec.ValidationError
        raise ModelRefused(f"{shown}: {error}") from error


_NO_LINES: Final = frozenset({".yaml", ".yml", ".toml", ".pbtxt", ".xml"})
"""Endings of files whose lines are no labels."""


def _labels_in(folder: Path, name: str, shown: str) -> list[str]:
    """Raises ModelRefused that names the labels file where that is at fault."""
    path = folder / name
    if path.name != name or name in (".", "..") or path.is_symlink():
        raise ValueError(f"labels: {name!r} is no name of a file beside model.toml")
    if not os.path.lexists(path):
        raise ValueError(f"labels: there is no file {name} beside model.toml")
    try:
        text = file_access.text(file_access.read(path, _LONGEST_FILE_BYTES))
    except Unreadable as error:
        beside = shown.rpartition("/")[0]
        raise ModelRefused(f"{beside}/{name}: {error.words}".removeprefix("/")) from error
    if path.suffix.lower() == ".json":
        return _labels_of_json(text, name)
    if path.suffix.lower() in _NO_LINES:
        raise ValueError(f"labels: {name} has no label a line; give a text file, or a list")
    # Not `splitlines`, which ends a line at U+2028 and other characters that a label may hold.
    labels = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    while labels and not labels[-1].strip():
        labels.pop()
    return labels


def _labels_of_json(text: str, name: str) -> list[str]:
    """Of a list of labels, or of the `id2label` of a config.json from Hugging Face."""
    try:
        found = msgspec.json.decode(text)
        table = found.get("id2label", found) if isinstance(found, dict) else dict(enumerate(found))
        by_column = {int(column): label for column, label in table.items()}
        labels = [by_column[column] for column in range(len(table))]
        return msgspec.convert(labels, list[str])
    except (msgspec.MsgspecError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"labels: {name} is neither a list of strings nor has it `id2label`, an object with a "
            "string for each column from 0"
        ) from error
    except RecursionError as error:
        raise ValueError(f"labels: {name} is nested too deep") from error


def _unknown_keys(table: Mapping[str, Any], struct: type[Struct], prefix: str) -> Iterator[str]:
    known = {field.name: field.type for field in msgspec.structs.fields(struct)}
    for key, value in table.items():
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
            yield f"unknown key `{prefix}{key}`; the nearest known one is `{prefix}{nearest}`"
        elif isinstance(value, dict) and _is_table(known[key]):
            yield from _unknown_keys(value, known[key], f"{prefix}{key}.")


def _is_table(kind: Any) -> bool:
    return not get_args(kind) and isinstance(kind, type) and issubclass(kind, Struct)
