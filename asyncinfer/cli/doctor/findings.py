"""What a doctor finds: each thing with a verdict and, where it is not well, what mends it."""

from typing import Literal

from msgspec import Struct


class Finding(Struct, frozen=True):
    about: str
    verdict: Literal["ok", "warning", "problem"]
    found: str
    mend: str = ""
    """A command, or what to set."""


def ok(about: str, found: str) -> Finding:
    return Finding(about, "ok", found)


def warning(about: str, found: str, mend: str) -> Finding:
    return Finding(about, "warning", found, mend)


def problem(about: str, found: str, mend: str) -> Finding:
    return Finding(about, "problem", found, mend)
