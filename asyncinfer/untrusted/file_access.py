"""Files that someone else put into a folder, looked at without ever waiting for one of them."""

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
_O_BINARY: Final = getattr(os, "O_BINARY", 0)
_UTF_16: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def is_file(path: Path) -> bool:
    """False for what may not be looked at: Path.is_file raises PermissionError, up to 3.13."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: Path) -> bool:
    return stat.S_ISDIR(_mode(path))


def is_lost(path: Path) -> bool:
    """Whether something is there that cannot be looked at: a link to nothing, a stale NFS file."""
    try:
        path.stat()
    except OSError:
        return os.path.lexists(path)
    return False


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError:
        return 0


def why_unreadable(path: Path) -> str:
    """Why a path is no file that can be read, in words that follow its name; empty if it is one.

    Opens nothing: a FIFO would wait for a writer, and a remote file might be fetched.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if os.path.islink(path) and not isinstance(error, PermissionError):
            return "is a link that leads to no file; mend or remove it"
        return why(error)
    kind = next((words for is_kind, words in _KINDS if is_kind(mode)), "")
    return kind if kind or may_read(path) else denied("chmod a+r")


def may_read(path: Path) -> bool:
    return _has_access(path, os.R_OK)


def may_enter(folder: Path) -> bool:
    """Whether both the names in it and what they name may be read."""
    return _has_access(folder, os.R_OK | os.X_OK)


def _has_access(path: Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def why(error: OSError) -> str:
    """The same words for what was raised."""
    if isinstance(error, PermissionError):
        return denied("chmod -R a+rX")
    return f"cannot be read: {error.strerror or error}"


def denied(command: str) -> str:
    user = f"uid {os.geteuid()}" if sys.platform != "win32" else "its user"
    return f"cannot be read: Permission denied; give {user} leave to read it ({command})"


class Unreadable(OSError):
    """`words` follow the name of the file."""

    def __init__(self, words: str) -> None:
        super().__init__(words)
        self.words = words


def read(path: Path, most_bytes: int) -> bytes:
    """The content of a file; raises Unreadable."""
    if problem := why_unreadable(path):
        raise Unreadable(problem)
    try:
        # Not blocking, in case it has become a FIFO since.
        with open(os.open(path, os.O_RDONLY | _O_NONBLOCK | _O_BINARY), "rb") as file:
            content = file.read(most_bytes + 1) or b""
    except OSError as error:
        raise Unreadable(why(error)) from error
    if len(content) > most_bytes:
        raise Unreadable(f"has more than {most_bytes} bytes")
    return content


def text(content: bytes) -> str:
    """UTF-8, with or without a byte order mark; raises Unreadable."""
    if content.startswith(_UTF_16) or b"\0" in content:
        raise Unreadable("is UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise Unreadable(
            f"is not UTF-8 (byte 0x{byte:02x} in line {line}); save it as UTF-8"
        ) from error
