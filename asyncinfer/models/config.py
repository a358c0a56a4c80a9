"""`model.toml`: settings of a model that its ONNX file does not have."""

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

import msgspec
from msgspec import Meta, Struct

from asyncinfer.errors import ModelRefused
from asyncinfer.tensors.missing_values import as_nonfinite_words
from asyncinfer.untrusted import file_access
from asyncinfer.untrusted.expectations import problem_of
from asyncinfer.untrusted.file_access import UnreadableFile

Scores = Literal["logits", "probabilities"]
GraphOptimization = Literal["disabled", "basic", "extended", "all"]

_MAX_FILE_BYTES: Final = 4 << 20


class Batching(Struct, frozen=True, forbid_unknown_fields=True):
    """The table `batching` of a model.toml."""

    enabled: bool | None = None
    """Forces batching on or off; None leaves it to the probe at load."""
    max_jobs: Annotated[int, Meta(ge=1)] | None = None
    max_rows: Annotated[int, Meta(ge=1)] | None = None
    axis: Annotated[int, Meta(ge=0, le=31)] | None = None
    """The axis of the rows in every input where it is dynamic; None: found by name and probe."""
    max_wait_ms: Annotated[float, Meta(ge=0, le=60_000)] = 0.0
    pad: bool = False
    """Whether jobs of different sizes share a run, with smaller ones padded with zeros."""


class Limits(Struct, frozen=True, forbid_unknown_fields=True):
    """The table `limits` of a model.toml."""

    timeout_seconds: Annotated[float, Meta(gt=0)] | None = None
    max_rows_per_job: Annotated[int, Meta(ge=1)] | None = None


class SessionOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """The table `session` of a model.toml."""

    intra_op_threads: Annotated[int, Meta(ge=1, le=1024)] | None = None
    providers: Annotated[tuple[str, ...], Meta(min_length=1)] | None = None
    """Execution providers, the preferred one first; None: the CPU."""
    graph_optimization: GraphOptimization = "all"
    custom_ops: str | None = None
    """"onnxruntime-extensions", or a library within the model's own folder."""
    devices: tuple[Annotated[int, Meta(ge=0)], ...] = ()
    """Numbers of the accelerators that runs are spread over; empty: the first one."""


class ModelConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The content of a model.toml; every default stands for a key that is left out."""

    labels: tuple[str, ...] = ()
    description: str = ""
    example: Any = None
    """A value for the only input, or a table of values by input name."""
    batching: Batching = Batching()
    limits: Limits = Limits()
    session: SessionOptions = SessionOptions()
    outputs: tuple[str, ...] = ()
    """The outputs to keep, in this order; empty: all."""
    scores: Scores = "probabilities"
    """What the scores of a labelled classifier are; logits are shown as their softmax."""
    score_output: str | None = None
    """The output with a column per label; None: found at load."""
    class_output: str | None = None
    """The output that has the class of each row; None: found at load."""
    classes: tuple[int | str, ...] = ()
    """The value in `class_output` for each column of the scores; empty: found at load."""
    default_version: Annotated[int, Meta(ge=0)] | None = None
    pinned: bool = False
    """Never unloaded to make room for another model."""


def read_file(path: Path, shown: str) -> ModelConfig:
    """The config in a file; raises ModelRefused if it is unreadable or has a fault.

    `shown` is the file's name in messages. A labels file beside it is read too.
    """
    try:
        toml = file_access.read(path, _MAX_FILE_BYTES)
    except UnreadableFile as error:
        raise ModelRefused(f"{shown}: {error.reason}") from error
    return read_config(toml, shown, path.parent)


def read_config(toml: bytes, shown: str, folder: Path | None = None) -> ModelConfig:
    """The config in the text of a model.toml.

    Raises ModelRefused, which names the file as `shown`, the key and the most similar known key.
    `folder` is the folder of its labels file; without it, `labels` must be a list. Labels in a file
    are read, and NaN and infinities in the example become words.
    """
    try:
        table = tomllib.loads(file_access.text(toml))
        unknown = next(_unknown_keys(table, ModelConfig, ""), None)
        if unknown is not None:
            raise ModelRefused(f"{shown}: {unknown}")
        if folder is not None and isinstance(table.get("labels"), str):
            table["labels"] = _labels_in(folder, table["labels"], shown)
        if "example" in table:
            # TOML has nan and inf, but examples are shown as JSON.
            table["example"] = as_nonfinite_words(table["example"])
        return msgspec.convert(table, ModelConfig)
    except UnreadableFile as error:
        raise ModelRefused(f"{shown}: {error.reason}") from error
    except msgspec.ValidationError as error:
        raise ModelRefused(f"{shown}: {_problem(error)}") from error
    except (ValueError, RecursionError) as error:  # bad TOML
        raise ModelRefused(f"{shown}: {error}") from error


def _problem(error: msgspec.ValidationError) -> str:
    """The key that is wrong, and what is allowed there."""
    problem = problem_of(error, ModelConfig)
    if problem.missing is not None:
        return f"key `{'.'.join((*problem.steps, problem.missing))}` is missing"
    return f"key `{'.'.join(problem.steps)}`: {problem.detail.replace('an object', 'a table')}"


_NOT_LABELS: Final = frozenset({".yaml", ".yml", ".toml", ".pbtxt", ".xml"})
"""Suffixes of files whose lines are not labels."""


def _labels_in(folder: Path, name: str, shown: str) -> list[str]:
    """The labels in a file: a line each, or those of a JSON file.

    Raises ModelRefused if it is unreadable, else ValueError. `folder` is that of the model.toml,
    and `shown` the model.toml's name in messages. Empty lines at the end are left out.
    """
    path = folder / name
    if path.name != name or name in (".", "..") or path.is_symlink():
        raise ValueError(f"labels: {name!r} is not the name of a file beside model.toml")
    if not os.path.lexists(path):
        raise ValueError(f"labels: there is no file {name} beside model.toml")
    try:
        text = file_access.text(file_access.read(path, _MAX_FILE_BYTES))
    except UnreadableFile as error:
        beside = shown.rpartition("/")[0]
        raise ModelRefused(f"{beside}/{name}: {error.reason}".removeprefix("/")) from error
    if path.suffix.lower() == ".json":
        return _labels_of_json(text, name)
    if path.suffix.lower() in _NOT_LABELS:
        raise ValueError(f"labels: {name} has no label per line; give a text file, or a list")
    # Not `splitlines`, which ends a line at U+2028 and other characters that a label may hold.
    labels = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    while labels and not labels[-1].strip():
        labels.pop()
    return labels


def _labels_of_json(text: str, name: str) -> list[str]:
    """The labels by column in a JSON list, or in `id2label` of a Hugging Face config.json.

    Raises ValueError if there are none, or not one for each column from 0.
    """
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
    """Yields a text for each key that the struct does not have, also in inner tables.

    `prefix` is the path of the table, which ends with a dot, or "".
    """
    known = {field.name: field.type for field in msgspec.structs.fields(struct)}
    for key, value in table.items():
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
            yield f"unknown key `{prefix}{key}`; the nearest known one is `{prefix}{nearest}`"
        elif isinstance(value, dict) and _is_table(known[key]):
            yield from _unknown_keys(value, known[key], f"{prefix}{key}.")


def _is_table(kind: Any) -> bool:
    """Whether the type of a field is a struct, so that its value is a table."""
    return not get_args(kind) and isinstance(kind, type) and issubclass(kind, Struct)
