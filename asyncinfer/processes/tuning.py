"""How a process that lives long collects its garbage."""

import contextlib
import ctypes
import gc
import sys
from typing import Final

_OBJECTS_OF_A_START: Final = 200_000
_YOUNG_OBJECTS: Final = 20_000


def starting() -> None:
    """To be called first. A start leaves next to no garbage (a worker with 58 models 61 objects),
    and to look for it was a fifth of its time."""
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
