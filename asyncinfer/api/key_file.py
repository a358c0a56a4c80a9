"""The file of API keys, followed while the API runs."""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from asyncinfer.api_keys import Keyring, read_key_file
from asyncinfer.errors import KeyFileRefused
from asyncinfer.timeouts import settled

_READ_SECONDS: Final = 1.0
_TRUSTED_SECONDS: Final = 60.0
"""How long keys count whose file is no longer there, cannot be read, or never stays the same."""

_COMPLAIN_SECONDS: Final = 10.0
_LOCKED_COMPLAIN_SECONDS: Final = 60.0
_MOST_BROKEN_TOLD: Final = 10

_log = logging.getLogger(__name__)


class KeyFile:
    """The keys in a file. `run` looks at it, so that no request waits for a disk."""

    def __init__(
        self,
        path: Path,
        *,
        stable_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A content counts once it has been the same for `stable_seconds`: an editor may be half
        way through. Raises KeyFileRefused where there is no file that can be read."""
        self._path = path
        self._stable_seconds = stable_seconds
        self._clock = clock
        self._content: bytes | None = read_key_file(path)
        self._keyring = Keyring.parse(self._content)
        self._candidate: tuple[bytes, float] | None = None
        """A content that is not believed yet, and since when it is there."""
        self._doubted_at: float | None = None
        """Since when the file is not the one that the keys are of."""
        self._complained_at: float | None = None
        self._changed = asyncio.Event()
        _tell(path, self._keyring)

    @property
    def keyring(self) -> Keyring:
        """The keys that count now; another object after each change."""
        return self._keyring

    async def changed(self, known: Keyring) -> None:
        """Returns when other keys count than `known`."""
        while self._keyring is known:
            await self._changed.wait()

    async def run(self) -> None:
        """Looks at the file until cancelled."""
        loop = asyncio.get_running_loop()
        thread = ThreadPoolExecutor(1, "api-keys")
        reading: asyncio.Future[bytes] | None = None
        try:
            while True:
                # A read from a file system that hangs cannot be cancelled, so that there is never
                # a second one.
                reading = reading or loop.run_in_executor(thread, read_key_file, self._path)
                if await settled(reading, _READ_SECONDS):
                    self.look(_outcome(reading))
                    reading = None
                else:
                    self.look(self._silence())
                await asyncio.sleep(self._stable_seconds / 2)
        finally:
            if reading:
                reading.cancel()
            thread.shutdown(wait=False)

    def look(self, found: bytes | KeyFileRefused) -> None:
        """Decides which keys count, after each look at the file."""
        now = self._clock()
        if found == self._content:
            self._settle()
            return
        if self._doubted_at is None:
            self._doubted_at = now
        if isinstance(found, KeyFileRefused):
            self._candidate = None
            self._doubt(found.detail, now)
        elif self._candidate is None or self._candidate[0] != found:
            self._candidate = found, now
            self._doubt(f"The API keys in {self._path} keep changing.", now, patient=True)
        elif now - self._candidate[1] >= self._stable_seconds:
            self._take(found)

    def _take(self, content: bytes) -> None:
        self._content = content
        keyring = Keyring.parse(content)
        self._settle()
        self._replace(keyring)
        _log.info("API keys read again from %s: %d", self._path, len(keyring))
        _tell(self._path, keyring)

    def _settle(self) -> None:
        """The file is the one that the keys are of."""
        if self._complained_at is not None:
            _log.info("The API keys in %s can be read again.", self._path)
        self._candidate = self._doubted_at = self._complained_at = None

    def _doubt(self, reason: str, now: float, *, patient: bool = False) -> None:
        """A slip must not lock all out at once, nor keep a revoked key valid for ever."""
        assert self._doubted_at is not None
        doubted = now - self._doubted_at
        if doubted >= _TRUSTED_SECONDS:
            if self._content is not None or len(self._keyring):
                self._content = None
                self._complained_at = None
                self._replace(Keyring())
            self._complain(now, _LOCKED_COMPLAIN_SECONDS, f"{reason} No API key is let in.")
        elif doubted >= (_COMPLAIN_SECONDS if patient else self._stable_seconds):
            left = _TRUSTED_SECONDS - doubted
            told = f"{reason} Those read last count for {left:.0f} s more, then no key is let in."
            self._complain(now, _COMPLAIN_SECONDS, told)

    def _complain(self, now: float, every_seconds: float, told: str) -> None:
        if self._complained_at is None or now - self._complained_at >= every_seconds:
            self._complained_at = now
            _log.error("%s", told)

    def _replace(self, keyring: Keyring) -> None:
        self._keyring = keyring
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _silence(self) -> KeyFileRefused:
        return KeyFileRefused(f"Cannot read the API keys in {self._path}: the read hangs.")


def _outcome(reading: asyncio.Future[bytes]) -> bytes | KeyFileRefused:
    try:
        return reading.result()
    except KeyFileRefused as error:
        return error


def _tell(path: Path, keyring: Keyring) -> None:
    """What is wrong with a content, once; never the text of a line, which may be a key."""
    for line in keyring.broken[:_MOST_BROKEN_TOLD]:
        _log.error("%s, line %d lets nobody in: %s.", path, line.number, line.reason)
    if len(keyring.broken) > _MOST_BROKEN_TOLD:
        more = len(keyring.broken) - _MOST_BROKEN_TOLD
        _log.error("%s: %d more lines let nobody in.", path, more)
    if not len(keyring):
        _log.error(
            "%s has no key, so nobody is let in. `asyncinfer keygen` makes one, with its line.",
            path,
        )
