"""Garbage collection, memory and threads of a long-running process."""

import contextlib
import ctypes
import gc
import os
import sys
from typing import Final

_OBJECTS_OF_A_START: Final = 200_000
_YOUNG_OBJECTS: Final = 20_000
_SWITCH_SECONDS: Final = 0.0005


def tune_for_start() -> None:
    """Makes the start cheap: collects garbage rarely, and lets numpy start no threads. Call it
    first, before numpy is imported.

    A start leaves next to no garbage (a worker with 58 models: 61 objects), and collecting took a
    fifth of its time. numpy starts a thread for each core to multiply matrices, which this service
    never does. A value of OPENBLAS_NUM_THREADS in the environment is left.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.set_threshold(_OBJECTS_OF_A_START)


def tune_for_serving() -> None:
    """Excludes all that is loaded by now from later garbage collections, and makes them rarer; call
    it once the process serves. With Python's own threshold (700) collections took 7 % of the API's
    time and caused most of its slowest replies."""
    release_freed_memory()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, 10, 10)


def switch_threads_sooner() -> None:
    """Lets another thread run after 0.5 ms of Python instead of 5 ms: a thread that reads a long
    request, or renders results, must not hold up the event loop for longer."""
    sys.setswitchinterval(_SWITCH_SECONDS)


def release_freed_memory() -> None:
    """Returns freed memory to the system: after loading and closing twenty models the allocator
    would still hold most of their weights. Does nothing with an allocator other than glibc's."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
