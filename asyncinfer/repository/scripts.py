"""The Lua scripts, assembled with their preludes."""

import hashlib
import re
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
    "default",
    "retract",
)
_CLAIMING: Final = frozenset({"claim", "finish"})

_DEFINITION: Final = re.compile(
    r"(?:^--[^\n]*\n)*^local (?:function (\w+)\(|(\w+) = \{$).*?^(?:end|\})\n\n?",
    re.MULTILINE | re.DOTALL,
)


class Script(Struct, frozen=True):
    """A script's whole text and its SHA-1, by which Redis knows it."""

    text: str
    sha: str


@cache
def script(name: str) -> Script:
    shebang, body = _source(name).split("\n", 1)
    prelude = _source("_job") + (_source("_claim") if name in _CLAIMING else "")
    text = "\n".join([shebang, _used(prelude, body), body])
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def _used(prelude: str, body: str) -> str:
    """The prelude without what a script does not use: Redis makes each function anew for every
    call, and to make all of them took a call longer than its commands."""
    text = body
    for found in reversed(list(_DEFINITION.finditer(prelude))):
        if re.search(rf"\b{found[1] or found[2]}\b", text):
            text = found[0] + text
        else:
            prelude = prelude[: found.start()] + prelude[found.end() :]
    return prelude


def _source(name: str) -> str:
    return (files("asyncinfer.repository") / "lua" / f"{name}.lua").read_text()
