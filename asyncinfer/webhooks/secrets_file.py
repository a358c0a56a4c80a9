"""The file of webhook secrets, which is read again when it changes."""

import asyncio
import logging
import os
import re
import stat
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from asyncinfer.errors import SecretsFileRefused, WebhookRefused
from asyncinfer.jobs import NAME_PATTERN
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.timeouts import done_within
from asyncinfer.untrusted.entry_lines import BrokenLine, numbered_lines, three_words
from asyncinfer.untrusted.file_access import open_without_blocking
from asyncinfer.webhook_signatures import signing_key
from asyncinfer.webhooks.url_rules import normal_host

ANY_HOST: Final = "*"
MAX_FILE_BYTES: Final = 4 << 20
_MAX_KEYS: Final = 10
"""How many secrets a tenant may have for one host: one, and another while it rotates."""

LOOK_SECONDS: Final = 1.0
_READ_SECONDS: Final = 5.0
_MAX_BROKEN_LOGGED: Final = 10

_TENANT = re.compile(NAME_PATTERN)

_log = logging.getLogger(__name__)
_limited_log = LimitedLog(_log)


class Secrets:
    """The signing keys of tenants and hosts."""

    def __init__(
        self,
        keys: Mapping[tuple[str, str], tuple[bytes, ...]] | None = None,
        broken: tuple[BrokenLine, ...] = (),
    ) -> None:
        self._keys = dict(keys or {})
        self.broken = broken
        """Lines of the file that were ignored."""

    def __len__(self) -> int:
        return sum(map(len, self._keys.values()))

    def keys_of(self, tenant: str, host: str) -> tuple[bytes, ...]:
        """The keys that sign a tenant's webhooks to a host: those of the host's own lines, else
        those for `*`. Empty if there are none."""
        return self._keys.get((tenant, host)) or self._keys.get((tenant, ANY_HOST), ())

    @classmethod
    def parse(cls, content: bytes) -> "Secrets":
        """The secrets of the valid lines, `tenant host whsec_… [comment]`, in the order of the
        file; raises nothing. Only broken lines are ignored, so that one mistake does not take the
        signatures of all tenants."""
        keys: dict[tuple[str, str], tuple[bytes, ...]] = {}
        broken: list[BrokenLine] = []
        for number, line in numbered_lines(content):
            try:
                place, key = _read_entry(line)
                known = keys.get(place, ())
                if key in known:
                    raise ValueError("it repeats an earlier line")
                if len(known) == _MAX_KEYS:
                    raise ValueError(f"{_MAX_KEYS} lines before it have this tenant and host")
                keys[place] = (*known, key)
            except ValueError as error:
                broken.append(BrokenLine(number, str(error)))
        return cls(keys, tuple(broken))


class SecretsFile:
    """The secrets in a file. `run` looks at it in the background, so that no delivery waits for a
    disk."""

    def __init__(self, path: Path, *, look_seconds: float = LOOK_SECONDS) -> None:
        """Reads the file at once; raises SecretsFileRefused. A later content is used once two looks
        at it, `look_seconds` apart, found the same: an editor may be writing it."""
        self._path = path
        self._look_seconds = look_seconds
        self._content = read_secrets_file(path)
        self._candidate = self._content
        self._secrets = Secrets.parse(self._content)
        _log_broken_lines(path, self._secrets)

    @property
    def secrets(self) -> Secrets:
        return self._secrets

    async def run(self) -> None:
        """Reads the file every `look_seconds` until cancelled. While it cannot be read, the last
        secrets are used, and the log says so."""
        loop = asyncio.get_running_loop()
        thread = ThreadPoolExecutor(1, "webhook-secrets")
        reading: asyncio.Future[bytes] | None = None
        try:
            while True:
                await asyncio.sleep(self._look_seconds)
                # A read from a file system that hangs cannot be cancelled, so there is one at most.
                reading = reading or loop.run_in_executor(thread, read_secrets_file, self._path)
                if not await done_within(reading, _READ_SECONDS):
                    self._report(f"Cannot read the webhook secrets in {self._path}: it hangs.")
                    continue
                try:
                    self.update(reading.result())
                except SecretsFileRefused as error:
                    self._report(error.detail)
                reading = None
        finally:
            if reading:
                reading.cancel()
            thread.shutdown(wait=False)

    def update(self, content: bytes) -> None:
        """Call it with each content that is read: one that is read twice in a row is used."""
        is_stable, self._candidate = content == self._candidate, content
        if is_stable and content != self._content:
            self._content = content
            self._secrets = Secrets.parse(content)
            _log.info("Webhook secrets read again from %s: %d", self._path, len(self._secrets))
            _log_broken_lines(self._path, self._secrets)

    def _report(self, reason: str) -> None:
        _limited_log.error(f"{reason} The secrets that were read last are used.")


def read_secrets_file(path: Path) -> bytes:
    """The content of the file of secrets. Raises SecretsFileRefused unless it is a regular file of
    at most MAX_FILE_BYTES that only its owner may read, who is this process's user; or root, whose
    file a group may read too, as Kubernetes mounts secrets. Never waits, not even on a FIFO."""
    try:
        with open(path, "rb", opener=open_without_blocking) as file:
            _check_file(path, os.fstat(file.fileno()))
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise _refused(path, f"{reason}.") from error
    if len(content) > MAX_FILE_BYTES:
        raise _refused(path, f"it has more than {MAX_FILE_BYTES} bytes.")
    return content


def _check_file(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise _refused(path, "it is not a file.")
    if sys.platform == "win32":
        return
    is_own, is_roots = found.st_uid == os.geteuid(), found.st_uid == 0
    if not (is_own or is_roots):
        raise _refused(path, f"its owner is uid {found.st_uid}; run chown {os.geteuid()} {path}.")
    others = found.st_mode & (0o077 if is_own and not is_roots else 0o037)
    if others:
        raise _refused(path, f"others may read or write it; run chmod 600 {path}.")


def _refused(path: Path, reason: str) -> SecretsFileRefused:
    return SecretsFileRefused(f"Cannot use the webhook secrets in {path}: {reason}")


def _read_entry(line: bytes) -> tuple[tuple[str, str], bytes]:
    """Tenant and host of a line, and its key; raises ValueError, which does not repeat the line."""
    tenant, host, secret = three_words(line)
    if not _TENANT.fullmatch(tenant):
        raise ValueError("a tenant is up to 64 letters, digits, `_`, `.` and `-`")
    try:
        host = host if host == ANY_HOST else normal_host(host)
    except WebhookRefused:
        raise ValueError(
            "the second word must be a host that a URL may have, without port, or `*` for all"
        ) from None
    return (tenant, host), signing_key(secret)


def _log_broken_lines(path: Path, secrets: Secrets) -> None:
    """Logs the lines of a content that have no valid secret, at most ten, never their text."""
    for line in secrets.broken[:_MAX_BROKEN_LOGGED]:
        _log.error("%s, line %d has no secret: %s.", path, line.number, line.reason)
    if len(secrets.broken) > _MAX_BROKEN_LOGGED:
        _log.error(
            "%s: %d more lines have no secret.", path, len(secrets.broken) - _MAX_BROKEN_LOGGED
        )
