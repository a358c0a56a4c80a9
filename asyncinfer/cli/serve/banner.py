"""What `asyncinfer serve` tells a person once it takes requests."""

import json
import shlex
from collections.abc import Sequence
from typing import Any, Final

from msgspec import Struct

from asyncinfer import __version__
from asyncinfer.cli.addresses import api_url

_WAIT_SECONDS: Final = 10


class Welcome(Struct, frozen=True, kw_only=True):
    host: str
    port: int
    redis: str
    """Which server, and where its data is."""
    models: Sequence[str]
    """Served from here; none when workers elsewhere serve them."""
    model_dir: str | None = None
    """Where they are; None when only workers elsewhere serve."""
    refused: Sequence[str] = ()
    """Broken at a glance; a worker may refuse more of them once it has opened their files."""
    default_model: str | None
    example: Any
    """Works as `data` of the default model; None when there is none to show."""
    needs_key: bool
    note: str = ""
    """What else a person is to know."""

    def text(self) -> str:
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
        if self.model_dir is None and not self.models:
            return "those of workers elsewhere; start one: asyncinfer work"
        if not (self.models or self.refused):
            return f"none yet; put an ONNX file into {self.model_dir}"
        marked = (f"{it} (default)" if it == self.default_model else it for it in self.models)
        served = ", ".join(marked) or "none"
        if not self.refused:
            return served
        return f"{served}; not {', '.join(self.refused)}: {self._url}/models says why"

    def _curl(self) -> str:
        key = ' -H "x-api-key: $API_KEY"' if self.needs_key else ""
        if self.example is None:
            return f"curl{key} {self._url}/models"
        body = shlex.quote(json.dumps({"data": self.example}))
        return (
            f"curl{key} -H 'content-type: application/json' -H 'Prefer: wait={_WAIT_SECONDS}' "
            f"-d {body} {self._url}/predict"
        )
