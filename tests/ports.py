"""Ports for the servers of tests."""

import atexit
from contextlib import ExitStack
from typing import Final

from asyncinfer.testing import process

_held: Final = ExitStack()
atexit.register(_held.close)


def free_port() -> int:
    """A port that no other process is given until this one ends, on Linux.

    It is bound, with SO_REUSEADDR, but not listened on: a server that names it may listen, and
    until one does, connections to it are refused.
    """
    return _held.enter_context(process.free_port())
