"""How a process that lives long collects its garbage."""

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_YOUNG_OBJECTS: Final = 20_000


@contextmanager
def left_until_settled() -> Iterator[None]:
    """Nothing that a start loads is garbage, and to look for it took a fifth of the start."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def settle() -> None:
    """To be called once all is loaded: leaves that out of every collection to come, and collects
    more rarely. With Python's own threshold (700) collections were 7 % of the API's time and
    most of its slowest replies."""
    trim()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, 10, 10)
    gc.enable()


def trim() -> None:
    """Gives freed memory back to the system, where its allocator can be told to (glibc): after
    twenty models loaded and let go, it would still hold most of the weights of them all."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
