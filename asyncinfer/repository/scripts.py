"""The Lua scripts, assembled with their preludes."""

import hashlib
from functools import cache
from importlib.resources import files
from typing import Final

from msgspec import Struct

NAMES: Final = (
    "submit",
    "claim",
    "finish",
    "renew",
    "cancel",
    "retry",
    "pause",
    "purge",
    "reap",
    "repair",
    "watch",
    "gauge",
    "tally",
    "forget",
)
_CLAIMING: Final = frozenset({"claim", "finish"})


class Script(Struct, frozen=True):
    """A script's whole text and its SHA-1, by which Redis knows it."""

    text: str
    sha: str


@cache
def script(name: str) -> Script:
    shebang, body = _source(name).split("\n", 1)
    preludes = [_source("_job")] + ([_source("_claim")] if name in _CLAIMING else [])
    text = "\n".join([shebang, *preludes, body])
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def _source(name: str) -> str:
    return (files("asyncinfer") / "lua" / f"{name}.lua").read_text()
