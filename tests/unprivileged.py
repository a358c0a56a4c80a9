"""Removal of root's right to read files whose mode forbids it.

Tests may run as root, as they do in a container, and root reads every file.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from typing import Final

_DAC_OVERRIDE, _DAC_READ_SEARCH = 1, 2
_TAKEN: Final = 1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH
_VERSION_3: Final = 0x20080522
_PR_CAPBSET_DROP: Final = 24


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Capabilities(ctypes.Structure):
    """The low and the high 32 bits of each set."""

    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
        ("high", ctypes.c_uint32 * 3),
    )


def is_needed() -> bool:
    """Whether this process runs as root."""
    return sys.platform != "win32" and os.geteuid() == 0


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Meanwhile this thread can open only files whose mode allows it."""
    if not is_needed():
        yield
        return
    before = _capabilities()
    _set(before.effective & ~_TAKEN, before.permitted, before)
    try:
        yield
    finally:
        _set(before.effective, before.permitted, before)


def drop() -> None:
    """Removes the right from this process and its children for good: a child's `preexec_fn`."""
    if not is_needed():
        return
    libc = _libc()
    for capability in (_DAC_OVERRIDE, _DAC_READ_SEARCH):
        if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "root keeps CAP_DAC_OVERRIDE")
    before = _capabilities()
    _set(before.effective & ~_TAKEN, before.permitted & ~_TAKEN, before)


def skip_unless_possible() -> None:
    import pytest  # a child that only calls `drop` does not need it

    try:
        with unprivileged():
            pass
    except (OSError, AttributeError) as error:
        pytest.skip(f"needs a user who is not root, or capset(2): {error}")
    if sys.platform == "win32":
        pytest.skip("needs POSIX file modes")


def _capabilities() -> _Capabilities:
    found = _Capabilities()
    if _libc().capget(ctypes.byref(_Header(_VERSION_3, 0)), ctypes.byref(found)):
        raise OSError(ctypes.get_errno(), "capget")
    return found


def _set(effective: int, permitted: int, others: _Capabilities) -> None:
    wanted = _Capabilities(effective, permitted, others.inheritable & ~_TAKEN, others.high)
    if _libc().capset(ctypes.byref(_Header(_VERSION_3, 0)), ctypes.byref(wanted)):
        raise OSError(ctypes.get_errno(), "capset")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
