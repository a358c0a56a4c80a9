"""Checks and reads of files from elsewhere; they never block, not even on a FIFO."""

import codecs
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

_KINDS: Final[tuple[tuple[Callable[[int], bool], str], ...]] = (
    (stat.S_ISDIR, "is a folder, not a file"),
    (stat.S_ISFIFO, "is a FIFO, not a file"),
    (stat.S_ISSOCK, "is a socket, not a file"),
    (stat.S_ISBLK, "is a device, not a file"),
    (stat.S_ISCHR, "is a device, not a file"),
)
_O_NONBLOCK: Final = getattr(os, "O_NONBLOCK", 0)
_UTF_16: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def is_file(path: Path) -> bool:
    """Whether it is a regular file; False if permission is denied, where Path.is_file raises
    PermissionError (up to Python 3.13)."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: Path) -> bool:
    """Whether it is a folder; False if permission is denied."""
    return stat.S_ISDIR(_mode(path))


def is_inaccessible(path: Path) -> bool:
    """Whether the name exists but its file cannot be examined: a broken link, a stale NFS file.
    False if nothing has the name."""
    try:
        path.stat()
    except OSError:
        return os.path.lexists(path)
    return False


def _mode(path: Path) -> int:
    """The type and permission bits of a file, links followed; 0 if it cannot be examined."""
    try:
        return path.stat().st_mode
    except OSError:
        return 0


def unreadable_reason(path: Path) -> str:
    """Why the path is not a readable file, in words that follow its name; empty if it is one.

    Nothing is opened: a FIFO would wait for a writer, and a remote file might be fetched.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if os.path.islink(path) and not isinstance(error, PermissionError):
            return "is a link that leads to no file; repair or remove it"
        return os_error_reason(error)
    kind = next((words for is_kind, words in _KINDS if is_kind(mode)), "")
    return kind if kind or _has_access(path, os.R_OK) else permission_denied("chmod a+r")


def may_enter(folder: Path) -> bool:
    """Whether permissions allow this process to list the folder and to open what is in it."""
    return _has_access(folder, os.R_OK | os.X_OK)


def _has_access(path: Path, mode: int) -> bool:
    """Whether this process may access the path in `mode`, bits such as os.R_OK."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def os_error_reason(error: OSError) -> str:
    """Why an open or a read failed, in words that follow the name of the file or folder."""
    if isinstance(error, PermissionError):
        return permission_denied("chmod -R a+rX")
    return f"cannot be read: {error.strerror or error}"


def permission_denied(command: str) -> str:
    """The reason for missing permissions, in words that follow the name of the file or folder;
    `command` is the remedy."""
    user = f"uid {os.geteuid()}" if sys.platform != "win32" else "its user"
    return f"cannot be read: Permission denied; give {user} permission to read it ({command})"


class UnreadableFile(OSError):
    """A file cannot be read; `reason` is in words that follow its name."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def open_without_blocking(path: str, flags: int) -> int:
    """The `opener` of an `open` that may meet a FIFO, whose open would wait for a writer."""
    return os.open(path, flags | _O_NONBLOCK)


def read(path: Path, max_bytes: int) -> bytes:
    """The content of a file of at most `max_bytes`. Raises UnreadableFile if it has more or cannot
    be read; never waits, not even on a FIFO."""
    if problem := unreadable_reason(path):
        raise UnreadableFile(problem)
    try:
        # Opened without blocking, in case it has become a FIFO since.
        with open(path, "rb", opener=open_without_blocking) as file:
            content = file.read(max_bytes + 1) or b""
    except OSError as error:
        raise UnreadableFile(os_error_reason(error)) from error
    if len(content) > max_bytes:
        raise UnreadableFile(f"has more than {max_bytes} bytes")
    return content


def text(content: bytes) -> str:
    """Decodes UTF-8, with or without a byte order mark, which it removes. Raises UnreadableFile for
    any other content, also for a NUL byte."""
    if content.startswith(_UTF_16) or b"\0" in content:
        raise UnreadableFile("is UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise UnreadableFile(
            f"is not UTF-8 (byte 0x{byte:02x} in line {line}); save it as UTF-8"
        ) from error
