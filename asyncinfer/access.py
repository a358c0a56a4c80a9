"""API keys: who a caller is, and what they may do."""

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct

from asyncinfer.errors import KeyFileRefused

SCOPES: Final = ("submit", "read", "admin")
"""Each stands alone: `admin` does not bring the others."""

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PREFIX: Final = "ai_"
_SECRET_BYTES: Final = 32


class Caller(Struct, frozen=True):
    tenant: str
    scopes: frozenset[str]


class Entry(Struct, frozen=True):
    """One line of the key file: `tenant scopes sha256hex [comment]`."""

    caller: Caller
    digest: str

    def line(self) -> str:
        scopes = ",".join(scope for scope in SCOPES if scope in self.caller.scopes)
        return f"{self.caller.tenant} {scopes} {self.digest}"


class Keyring:
    """The keys that are let in. A tenant may have several, to change one without a gap."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = tuple(entries)

    @classmethod
    def load(cls, path: Path) -> "Keyring":
        """Raises KeyFileRefused naming the file and the line."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise KeyFileRefused(f"Cannot read the API keys in {path}: {reason}.") from error
        return cls(_entries(path, lines))

    def identify(self, key: str) -> Caller | None:
        """Whose key it is. Takes the same time wherever in the file it is, or is not."""
        digest, caller = _digest(key), None
        for entry in self._entries:
            if hmac.compare_digest(entry.digest, digest):
                caller = entry.caller
        return caller


def new_key() -> str:
    """256 random bits, so that its plain SHA-256 gives nothing away."""
    return _PREFIX + secrets.token_urlsafe(_SECRET_BYTES)


def entry_of(key: str, tenant: str, scopes: str) -> Entry:
    """`scopes` as in the file, comma-separated; raises ValueError with what is allowed."""
    return _entry(tenant, scopes, _digest(key))


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _entry(tenant: str, scopes: str, digest: str) -> Entry:
    if not _TENANT.fullmatch(tenant):
        raise ValueError("a tenant is up to 64 letters, digits, `_`, `.` and `-`")
    wanted = frozenset(scopes.split(","))
    if not wanted <= frozenset(SCOPES):
        raise ValueError(f"scopes are {', '.join(SCOPES)}, separated by commas without spaces")
    if not _DIGEST.fullmatch(digest):
        raise ValueError("the third word must be the key's SHA-256, 64 lower-case hex digits")
    return Entry(Caller(tenant, wanted), digest)


def _entries(path: Path, lines: Sequence[str]) -> list[Entry]:
    entries: dict[str, Entry] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        tenant, scopes, digest, *_ = [*line.split(), "", "", ""]
        try:
            entry = _entry(tenant, scopes, digest)
        except ValueError as error:
            raise KeyFileRefused(f"{path}, line {number}: {error}.") from error
        if digest in entries:
            raise KeyFileRefused(f"{path}, line {number}: the key of an earlier line; remove one.")
        entries[digest] = entry
    if not entries:
        raise KeyFileRefused(f"{path} has no key. `asyncinfer keygen` makes one, with its line.")
    return list(entries.values())
