"""Findings of `doctor`: a verdict on one thing and, unless it is ok, how to fix it."""

from typing import Literal

from msgspec import Struct


class Finding(Struct, frozen=True):
    """One finding of `doctor`; `found` is what the check has found, in words."""

    about: str
    """What was checked."""
    verdict: Literal["ok", "warning", "problem"]
    found: str
    mend: str = ""
    """How to fix it: a command, or what to set."""


def ok(about: str, found: str) -> Finding:
    """A finding that needs no fix."""
    return Finding(about, "ok", found)


def warning(about: str, found: str, mend: str) -> Finding:
    """A finding that should be fixed; `doctor` still exits with 0. `mend` says how to fix it."""
    return Finding(about, "warning", found, mend)


def problem(about: str, found: str, mend: str) -> Finding:
    """A finding that must be fixed; `doctor` exits with 1. `mend` says how to fix it."""
    return Finding(about, "problem", found, mend)
