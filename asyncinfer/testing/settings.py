"""What a test asks for: models, and settings by keyword, as environment variables."""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

from asyncinfer import settings
from asyncinfer.errors import InvalidSetting


class Serializable(Protocol):
    """An `onnx.ModelProto`; the `onnx` package itself is not needed."""

    def SerializeToString(self) -> bytes: ...


Model: TypeAlias = str | os.PathLike[str] | bytes | Serializable
"""A file, a folder with versions (`1/model.onnx`), or what such a file holds."""

_OURS: Final = frozenset(
    {"data_dir", "host", "port", "model", "model_dir", "models", "redis_host", "redis_port"}
)
_DEFAULTS: Final = {"drain_timeout": 0}
"""What still runs when a test ends is of no use to anybody."""


def variables(given: Mapping[str, Any]) -> dict[str, str]:
    """As environment variables; raises InvalidSetting for a name or value that cannot be."""
    allowed = [knob.name for knob in settings.knobs() if knob.name not in _OURS]
    for name in given:
        if name not in allowed:
            raise InvalidSetting(_unknown(name, allowed))
    wanted = {**_DEFAULTS, **given}
    found = {name.upper(): _text(value) for name, value in wanted.items()}
    settings.read(found, {})
    return {variable: text for variable, text in found.items() if text}


def environment(environ: Mapping[str, str], chosen: Mapping[str, str]) -> dict[str, str]:
    """A REDIS_URL or another setting of this process's environment never reaches a test."""
    knobs = {knob.variable for knob in settings.knobs()}
    return {name: value for name, value in environ.items() if name not in knobs} | dict(chosen)


def _text(value: Any) -> str:
    if isinstance(value, os.PathLike):
        value = Path(value).absolute()
    return settings.text(tuple(value) if isinstance(value, list | set | frozenset) else value)


def _unknown(name: str, allowed: list[str]) -> str:
    if name in _OURS:
        return f"service() sets {name} itself; leave it out."
    near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.0)
    return f"service() has no setting {name!r}. Did you mean {near[0]!r}?"
