"""The Lua scripts, assembled from the parts that each includes, and the library of all of them.

Redis runs them as functions of the library, or each as a script where it refuses functions.
`python -m asyncinfer.repository.scripts` lists the library and the scripts with their SHA-1; with
the name of one (`library`, `claim`, ...) it prints the text that Redis runs.
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
    "cancel_queue",
    "reap",
    "repair",
    "watch",
    "keep_inbox",
    "gauge",
    "tally",
    "look",
    "forget",
    "close_group",
    "count_ended",
    "end_group",
    "default",
    "retract",
    "announce",
    "take",
    "keep",
    "note",
    "redeliver",
    "add",
    "settle",
)

LIBRARY_PREFIX: Final = "asyncinfer_"
"""The name of each release's library begins with it; a hash of its text follows."""

_INCLUDE: Final = "-- include: "
_HASH_DIGITS: Final = 16
_LIBRARY: Final = "library"


class Script(Struct, frozen=True):
    """A script as Redis knows it."""

    function: str
    """Its name in the library."""
    text: str
    """All of it, for a server that refuses functions."""
    sha: str
    """The SHA-1 of the text."""


class Library(Struct, frozen=True):
    """The functions of all scripts. Two releases side by side do not share one, since its name has
    a hash of its text."""

    name: str
    text: str


@cache
def script(name: str) -> Script:
    text = _expanded(_source(name), set())
    sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
    return Script(_function_name(library().name, name), text, sha)


@cache
def library() -> Library:
    digest = hashlib.sha256(_library_text("").encode()).hexdigest()[:_HASH_DIGITS]
    name = f"{LIBRARY_PREFIX}{digest}"
    return Library(name, _library_text(name))


def _library_text(name: str) -> str:
    """The library under a name: each part once, then each script as a function.

    Redis creates the functions of the parts when it loads the library. For a script it creates
    them again for every call, which takes longer than the script's commands.
    """
    include_lines = [line for script in NAMES for line in _lines(script, are_includes=True)]
    parts = _expanded("".join(include_lines), set())
    functions = "".join(_registered(_function_name(name, script), script) for script in NAMES)
    return f"#!lua name={name}\n{parts}{functions}"


def _registered(function_name: str, name: str) -> str:
    """The Lua that registers a script as a function of the library."""
    shebang, *body = _lines(name, are_includes=False)
    _, _, flag = shebang.partition("flags=")
    flags = f"{{ '{flag.strip()}' }}" if flag else "{}"
    return (
        f"\nredis.register_function{{ function_name = '{function_name}', flags = {flags}, "
        f"callback = function(KEYS, ARGV)\n{''.join(body)}end }}\n"
    )


def _function_name(library_name: str, name: str) -> str:
    return f"{library_name}_{name}"


def _expanded(source: str, included: set[str]) -> str:
    """A source with each include line replaced by the parts it names.

    Each part comes once, behind the parts that it includes itself; those in `included` are left
    out. The parts are small, since a script pays for each function in them with every call.
    """
    lines = []
    for line in source.splitlines(keepends=True):
        if not line.startswith(_INCLUDE):
            lines.append(line)
            continue
        for part in line.removeprefix(_INCLUDE).split():
            if part not in included:
                included.add(part)
                lines.append(f"\n{_expanded(_source(f'_{part}'), included)}")
    return "".join(lines)


def _lines(name: str, *, are_includes: bool) -> list[str]:
    """The lines of a source that include parts, or all its other lines."""
    lines = _source(name).splitlines(keepends=True)
    return [line for line in lines if line.startswith(_INCLUDE) == are_includes]


def _source(name: str) -> str:
    return (files("asyncinfer.repository") / "lua" / f"{name}.lua").read_text()


def main(arguments: Sequence[str]) -> int:
    if not arguments:
        sys.stdout.write(f"{library().name}  {_LIBRARY}\n")
        sys.stdout.writelines(f"{script(name).sha}  {name}\n" for name in NAMES)
        return 0
    if len(arguments) > 1 or arguments[0] not in (_LIBRARY, *NAMES):
        sys.stderr.write(
            f"There is no script {' '.join(arguments)!r}. The scripts are: {', '.join(NAMES)}; "
            f"{_LIBRARY!r} is all of them as functions.\n"
        )
        return 2
    name = arguments[0]
    sys.stdout.write(library().text if name == _LIBRARY else script(name).text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
