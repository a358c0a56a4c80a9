"""API keys: the file of keys, and the tenant and scopes of a caller."""

import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from msgspec import Struct

from asyncinfer.errors import KeyFileRefused
from asyncinfer.jobs import NAME_PATTERN
from asyncinfer.untrusted.entry_lines import BrokenLine, numbered_lines, three_words
from asyncinfer.untrusted.file_access import open_without_blocking

SCOPES: Final = ("submit", "read", "admin", "operator")
"""Each scope stands alone: `admin` does not include the others."""

MAX_FILE_BYTES: Final = 4 << 20
"""The largest key file: about 40,000 keys."""

_TENANT = re.compile(NAME_PATTERN)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PREFIX: Final = "ai_"
_SECRET_BYTES: Final = 32


class Caller(Struct, frozen=True):
    """The tenant of a request, and the scopes that its key allows."""

    tenant: str
    scopes: frozenset[str]


class Entry(Struct, frozen=True):
    """One line of the key file: `tenant scopes sha256hex [comment]`. `digest` is the key's SHA-256
    in 64 hex digits."""

    caller: Caller
    digest: str

    def line(self) -> str:
        """The entry as a line of the key file, without a line end."""
        scopes = ",".join(scope for scope in SCOPES if scope in self.caller.scopes)
        return f"{self.caller.tenant} {scopes} {self.digest}"


class Keyring:
    """The valid keys. A tenant may have several, so that it can replace one without a gap."""

    def __init__(self, entries: Sequence[Entry] = (), broken: Sequence[BrokenLine] = ()) -> None:
        self._entries = tuple(entries)
        self.broken = tuple(broken)
        """Lines of the file that were ignored."""

    def __len__(self) -> int:
        return len(self._entries)

    @classmethod
    def load(cls, path: Path) -> "Keyring":
        """The keys in a file; raises KeyFileRefused if it cannot be read."""
        return cls.parse(read_key_file(path))

    @classmethod
    def parse(cls, content: bytes) -> "Keyring":
        """The keys of the valid lines; raises nothing. Only broken lines are ignored, not the whole
        file: otherwise a key that was removed in the same edit would stay valid."""
        entries: dict[str, Entry] = {}
        broken: list[BrokenLine] = []
        for number, line in numbered_lines(content):
            try:
                entry = _entry(*three_words(line))
                if entry.digest in entries:
                    raise ValueError("it repeats the key of an earlier line, which counts")
            except ValueError as error:
                broken.append(BrokenLine(number, str(error)))
            else:
                entries[entry.digest] = entry
        return cls(tuple(entries.values()), broken)

    def caller_of(self, digest: str) -> Caller | None:
        """The caller whose key has this SHA-256 in hex digits; None if there is none. Takes the
        same time for every digest."""
        caller = None
        for entry in self._entries:
            if hmac.compare_digest(entry.digest, digest):
                caller = entry.caller
        return caller


def read_key_file(path: Path) -> bytes:
    """The content of the key file; raises KeyFileRefused unless it is a readable regular file of at
    most MAX_FILE_BYTES. Never waits, not even on a named pipe."""
    try:
        with open(path, "rb", opener=open_without_blocking) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise KeyFileRefused(f"Cannot read the API keys in {path}: it is not a file.")
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise KeyFileRefused(f"Cannot read the API keys in {path}: {reason}.") from error
    if len(content) > MAX_FILE_BYTES:
        raise KeyFileRefused(
            f"Cannot read the API keys in {path}: it has more than {MAX_FILE_BYTES} bytes."
        )
    return content


def new_key() -> str:
    """A new random key, as its holder sends it. It has 256 bits, so that its plain SHA-256 reveals
    nothing. It is valid once the key file has its `entry_of`."""
    return _PREFIX + secrets.token_urlsafe(_SECRET_BYTES)


def entry_of(key: str, tenant: str, scopes: str) -> Entry:
    """The entry of a key in plain text, for a line of the key file; `scopes` are comma-separated,
    as there. Raises ValueError, whose message says what is allowed."""
    return _entry(tenant, scopes, digest_of(key))


def digest_of(key: str) -> str:
    """The SHA-256 of a key in 64 lower-case hex digits, as in the file."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _entry(tenant: str, scopes: str, digest: str) -> Entry:
    """The entry of the words of a line, `digest` in hex digits; raises ValueError, whose message
    says what is allowed."""
    if not _TENANT.fullmatch(tenant):
        raise ValueError("a tenant is up to 64 letters, digits, `_`, `.` and `-`")
    names = frozenset(scopes.split(","))
    if not names <= frozenset(SCOPES):
        raise ValueError(f"scopes are {', '.join(SCOPES)}, separated by commas without spaces")
    if not _DIGEST.fullmatch(digest):
        raise ValueError("the third word must be the key's SHA-256, 64 lower-case hex digits")
    return Entry(Caller(tenant, names), digest)


KeyScope = Literal["submit", "read", "admin", "operator"]
