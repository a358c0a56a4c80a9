"""The start banner of `asyncinfer serve`."""

import json
import shlex
from collections.abc import Sequence
from typing import Any, Final

from msgspec import Struct

from asyncinfer import __version__
from asyncinfer.cli.addresses import api_url

_WAIT_SECONDS: Final = 10


class Banner(Struct, frozen=True, kw_only=True):
    """What the banner shows. asyncinfer.testing waits for its line that begins with `  Stop `."""

    host: str
    port: int
    redis: str
    """The server's name and version, and its address or data folder."""
    models: Sequence[str]
    """The models of this process's own worker; empty if only workers elsewhere serve."""
    model_dir: str | None = None
    """Their folder; None if only workers elsewhere serve."""
    refused: Sequence[str] = ()
    """Models whose files are visibly broken; a worker that opens the files may refuse more."""
    default_model: str | None
    example: Any
    """Valid `data` for the default model; None if none is known."""
    needs_key: bool
    note: str = ""
    """A remark on the default model; empty if there is none."""

    def text(self) -> str:
        """The lines of the banner, each with its line end."""
        return (
            f"asyncinfer {__version__}\n"
            f"  URL      {self._url}\n"
            f"  Redis    {self.redis}\n"
            f"  Models   {self._models()}\n"
            f"  Try      {self._curl()}\n"
            f"  Stop     Ctrl-C; jobs are kept\n"
            + (f"  Note     {self.note}\n" if self.note else "")
        )

    @property
    def _url(self) -> str:
        return api_url(self.host, self.port)

    def _models(self) -> str:
        """The line of the models: those served, those refused, or what to do if there are none."""
        if self.model_dir is None and not self.models:
            return "those of workers elsewhere; start one: asyncinfer work"
        if not (self.models or self.refused):
            return f"none yet; put an ONNX file into {self.model_dir}"
        marked = (
            f"{model} (default)" if model == self.default_model else model for model in self.models
        )
        served = ", ".join(marked) or "none"
        if not self.refused:
            return served
        return f"{served}; not {', '.join(self.refused)}: {self._url}/models says why"

    def _curl(self) -> str:
        """A curl command that works: a prediction of the example, else the list of models."""
        key = ' -H "x-api-key: $API_KEY"' if self.needs_key else ""
        if self.example is None:
            return f"curl{key} {self._url}/models"
        body = shlex.quote(json.dumps({"data": self.example}))
        return (
            f"curl{key} -H 'content-type: application/json' -H 'Prefer: wait={_WAIT_SECONDS}' "
            f"-d {body} {self._url}/predict"
        )
