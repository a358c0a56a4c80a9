"""Settings of a service under test, from keywords to environment variables."""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

from asyncinfer import settings
from asyncinfer.errors import InvalidSetting


class Serializable(Protocol):
    """An `onnx.ModelProto`; this way the `onnx` package is not needed."""

    def SerializeToString(self) -> bytes: ...


Model: TypeAlias = str | os.PathLike[str] | bytes | Serializable
"""An ONNX file, a folder with versions (`1/model.onnx`), or the content of a file."""

_RESERVED: Final = frozenset(
    {"data_dir", "host", "port", "model", "model_dir", "models", "redis_host", "redis_port"}
)
_DEFAULTS: Final = {"drain_timeout": 0}
"""Nobody needs the results of jobs that still run when a test ends."""


def variables(values: Mapping[str, Any]) -> dict[str, str]:
    """The environment variables of settings, as text by variable; settings with an empty value are
    left out. Raises InvalidSetting for an invalid name or value."""
    allowed = [knob.name for knob in settings.knobs() if knob.name not in _RESERVED]
    for name in values:
        if name not in allowed:
            raise InvalidSetting(_invalid_name_text(name, allowed))
    texts = {name.upper(): _text(value) for name, value in {**_DEFAULTS, **values}.items()}
    settings.read(texts, {})
    return {variable: text for variable, text in texts.items() if text}


def environment(environ: Mapping[str, str], variables: Mapping[str, str]) -> dict[str, str]:
    """`environ` with these variables instead of its own settings.

    So a REDIS_URL or another setting of this process never reaches a test.
    """
    knobs = {knob.variable for knob in settings.knobs()}
    return {name: value for name, value in environ.items() if name not in knobs} | dict(variables)


def _text(value: Any) -> str:
    """A setting's value as the text of its environment variable; a path becomes absolute."""
    if isinstance(value, os.PathLike):
        value = Path(value).absolute()
    return settings.text(tuple(value) if isinstance(value, list | set | frozenset) else value)


def _invalid_name_text(name: str, allowed: list[str]) -> str:
    """The message for a name that is no setting of `service`, with the most similar one in
    `allowed`."""
    if name in _RESERVED:
        return f"service() sets {name} itself; leave it out."
    matches = difflib.get_close_matches(name, allowed, n=1, cutoff=0.0)
    return f"service() has no setting {name!r}. Did you mean {matches[0]!r}?"
