"""The file of API keys, which is read again while the API runs."""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from asyncinfer.api_keys import Keyring, read_key_file
from asyncinfer.errors import KeyFileRefused
from asyncinfer.timeouts import done_within

_READ_SECONDS: Final = 1.0
_TRUSTED_SECONDS: Final = 60.0
"""How long the last keys stay valid if their file is missing, cannot be read or keeps changing."""

_ERROR_EVERY_SECONDS: Final = 10.0
_LOCKED_ERROR_EVERY_SECONDS: Final = 60.0
_MAX_BROKEN_LOGGED: Final = 10

_log = logging.getLogger(__name__)


class KeyFile:
    """The keys in a file. `run` reads it in the background, so that no request waits for a disk."""

    def __init__(
        self,
        path: Path,
        *,
        stable_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Reads the file at once; raises KeyFileRefused if that fails. A later content is used once
        it was unchanged for `stable_seconds`, since an editor may be writing the file. `clock`
        gives seconds."""
        self._path = path
        self._stable_seconds = stable_seconds
        self._clock = clock
        self._content: bytes | None = read_key_file(path)
        self._keyring = Keyring.parse(self._content)
        self._candidate: tuple[bytes, float] | None = None
        """A new content that is not used yet, and when it was first read."""
        self._differs_since: float | None = None
        """Since when the file differs from the keys in use; None while it does not."""
        self._error_logged_at: float | None = None
        self._changed = asyncio.Event()
        _log_broken_lines(path, self._keyring)

    @property
    def keyring(self) -> Keyring:
        """The valid keys; another object after each change."""
        return self._keyring

    async def changed(self, known: Keyring) -> None:
        """Returns once the valid keys are another object than `known`, at once if they already
        are."""
        while self._keyring is known:
            await self._changed.wait()

    async def run(self) -> None:
        """Reads the file every half `stable_seconds` until cancelled. A read that fails or takes
        longer than 1 s is reported in the log, not raised."""
        loop = asyncio.get_running_loop()
        thread = ThreadPoolExecutor(1, "api-keys")
        reading: asyncio.Future[bytes] | None = None
        try:
            while True:
                # A read from a file system that hangs cannot be cancelled, so never start another
                # one beside it.
                reading = reading or loop.run_in_executor(thread, read_key_file, self._path)
                if await done_within(reading, _READ_SECONDS):
                    self.update(_result_or_error(reading))
                    reading = None
                else:
                    self.update(self._hanging_read_error())
                await asyncio.sleep(self._stable_seconds / 2)
        finally:
            if reading:
                reading.cancel()
            thread.shutdown(wait=False)

    def update(self, content: bytes | KeyFileRefused) -> None:
        """Decides which keys are valid; call it after each read of the file, with its content or
        the error. A new content replaces the keys once it was read unchanged for `stable_seconds`;
        while the file cannot be read or keeps changing, the last keys stay valid for 60 s, then no
        key is."""
        now = self._clock()
        if content == self._content:
            self._note_unchanged()
            return
        if self._differs_since is None:
            self._differs_since = now
        if isinstance(content, KeyFileRefused):
            self._candidate = None
            self._handle_difference(content.detail, now)
        elif self._candidate is None or self._candidate[0] != content:
            self._candidate = content, now
            self._handle_difference(
                f"The API keys in {self._path} keep changing.", now, is_changing=True
            )
        elif now - self._candidate[1] >= self._stable_seconds:
            self._use(content)

    def _use(self, content: bytes) -> None:
        """Makes the keys in this content the valid ones, and logs how many they are."""
        self._content = content
        keyring = Keyring.parse(content)
        self._note_unchanged()
        self._replace(keyring)
        _log.info("API keys read again from %s: %d", self._path, len(keyring))
        _log_broken_lines(self._path, keyring)

    def _note_unchanged(self) -> None:
        """Call when the file has the content in use: forgets what differed, and logs the end of an
        error."""
        if self._error_logged_at is not None:
            _log.info("The API keys in %s can be read again.", self._path)
        self._candidate = self._differs_since = self._error_logged_at = None

    def _handle_difference(self, reason: str, now: float, *, is_changing: bool = False) -> None:
        """Call when the file is not as the keys in use, because of `reason`. Keeps the keys for a
        minute since it first differed, then drops them: a mistake must not lock everyone out at
        once, nor keep a revoked key valid forever. Logs an error after `stable_seconds`, but of a
        file that `is_changing` after 10 s."""
        assert self._differs_since is not None
        differs_seconds = now - self._differs_since
        if differs_seconds >= _TRUSTED_SECONDS:
            if self._content is not None or len(self._keyring):
                self._content = None
                self._error_logged_at = None
                self._replace(Keyring())
            self._log_error(now, _LOCKED_ERROR_EVERY_SECONDS, f"{reason} No API key is accepted.")
        elif differs_seconds >= (_ERROR_EVERY_SECONDS if is_changing else self._stable_seconds):
            seconds_left = _TRUSTED_SECONDS - differs_seconds
            message = (
                f"{reason} The keys read last stay valid for {seconds_left:.0f} s; then no key is "
                "accepted."
            )
            self._log_error(now, _ERROR_EVERY_SECONDS, message)

    def _log_error(self, now: float, every_seconds: float, message: str) -> None:
        """Logs the message, unless an error was logged less than `every_seconds` before `now`."""
        if self._error_logged_at is None or now - self._error_logged_at >= every_seconds:
            self._error_logged_at = now
            _log.error("%s", message)

    def _replace(self, keyring: Keyring) -> None:
        """Makes the keyring the valid one, and wakes all callers of `changed`."""
        self._keyring = keyring
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _hanging_read_error(self) -> KeyFileRefused:
        """Makes the error that stands for a read which has not returned."""
        return KeyFileRefused(f"Cannot read the API keys in {self._path}: the read hangs.")


def _result_or_error(reading: asyncio.Future[bytes]) -> bytes | KeyFileRefused:
    """Returns what a completed read returned, or the KeyFileRefused it raised; raises other
    errors."""
    try:
        return reading.result()
    except KeyFileRefused as error:
        return error


def _log_broken_lines(path: Path, keyring: Keyring) -> None:
    """Logs the lines of a content that have no valid key, at most ten, and whether there is no key
    at all; never the text of a line, which may be a key."""
    for line in keyring.broken[:_MAX_BROKEN_LOGGED]:
        _log.error("%s, line %d lets nobody in: %s.", path, line.number, line.reason)
    if len(keyring.broken) > _MAX_BROKEN_LOGGED:
        more = len(keyring.broken) - _MAX_BROKEN_LOGGED
        _log.error("%s: %d more lines let nobody in.", path, more)
    if not len(keyring):
        _log.error(
            "%s has no key, so nobody is let in. `asyncinfer keygen` makes a key and its line for "
            "the file.",
            path,
        )
