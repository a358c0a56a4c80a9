"""Garbage collection, memory and threads of a process that runs for a long time."""

import contextlib
import ctypes
import gc
import os
import sys
from typing import Final

_OBJECTS_OF_A_START: Final = 200_000
_YOUNG_OBJECTS: Final = 20_000


def lean_start() -> None:
    """To be called first, before numpy is imported.

    A start leaves next to no garbage (a worker with 58 models 61 objects),
    and to look for it was a fifth of its time. numpy starts a thread for each core to multiply
    matrices, which no service of ours does.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.set_threshold(_OBJECTS_OF_A_START)


def settle() -> None:
    """To be called once all is loaded: leaves that out of every collection to come, and collects
    more rarely. With Python's own threshold (700) collections were 7 % of the API's time and
    most of its slowest replies."""
    trim()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, 10, 10)


def trim() -> None:
    """Gives freed memory back to the system, where its allocator can be told to (glibc): after
    twenty models loaded and let go, it would still hold most of the weights of them all."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
