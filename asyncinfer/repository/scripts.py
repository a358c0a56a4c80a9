"""The Lua scripts, assembled from the parts that each includes.

`python -m asyncinfer.repository.scripts` lists the scripts with their SHA-1; with the name of one
it prints the text that Redis runs.
"""

import hashlib
import sys
from collections.abc import Sequence
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
    "announce",
)

_INCLUDE: Final = "-- include: "


class Script(Struct, frozen=True):
    """A script's whole text and its SHA-1, by which Redis knows it."""

    text: str
    sha: str


@cache
def script(name: str) -> Script:
    text = _assembled(name, set())
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def _assembled(name: str, included: set[str]) -> str:
    """The text of a file with each include line replaced by the parts it names.

    Each part comes once, behind the parts that it includes itself. The parts are small because
    Redis creates every function again for every call: to create those of all parts took a call
    longer than its commands.
    """
    lines = []
    for line in _source(name).splitlines(keepends=True):
        if not line.startswith(_INCLUDE):
            lines.append(line)
            continue
        for part in line.removeprefix(_INCLUDE).split():
            if part not in included:
                included.add(part)
                lines.append(f"\n{_assembled(f'_{part}', included)}")
    return "".join(lines)


def _source(name: str) -> str:
    return (files("asyncinfer.repository") / "lua" / f"{name}.lua").read_text()


def main(arguments: Sequence[str]) -> int:
    if not arguments:
        sys.stdout.writelines(f"{script(name).sha}  {name}\n" for name in NAMES)
        return 0
    if len(arguments) > 1 or arguments[0] not in NAMES:
        sys.stderr.write(
            f"There is no script {' '.join(arguments)!r}. The scripts are: {', '.join(NAMES)}.\n"
        )
        return 2
    sys.stdout.write(script(arguments[0]).text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
