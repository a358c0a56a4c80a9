"""Findings of `doctor`: a verdict on one thing and, unless it is ok, how to fix it."""

from typing import Literal

from msgspec import Struct


class Finding(Struct, frozen=True):
    about: str
    """What was checked."""
    verdict: Literal["ok", "warning", "problem"]
    found: str
    mend: str = ""
    """How to fix it: a command, or what to set."""


def ok(about: str, found: str) -> Finding:
    return Finding(about, "ok", found)


def warning(about: str, found: str, mend: str) -> Finding:
    return Finding(about, "warning", found, mend)


def problem(about: str, found: str, mend: str) -> Finding:
    return Finding(about, "problem", found, mend)
