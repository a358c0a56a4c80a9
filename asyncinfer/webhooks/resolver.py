"""Looks up the addresses of host names, in few threads and for two seconds at most."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Final

from asyncinfer.webhooks import addresses
from asyncinfer.webhooks.addresses import Address

LOOK_UP_SECONDS: Final = 2.0
_THREADS: Final = 12
_SLOW_THREADS: Final = 4
"""Threads for names whose last look-up did not end in time: these share few threads, so that names
that never answer leave threads to all others."""
_MAX_SLOW_NAMES: Final = 1000

LookUp = Callable[[str], Sequence[str]]
"""Returns the addresses of a name; blocks, and raises OSError if there are none."""


class NameNotResolved(Exception):
    """A name has no address, or its look-up did not end in time."""


def look_up(name: str) -> Sequence[str]:
    """The addresses of a name by the system's resolver, which may block for half a minute."""
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Resolver:
    """Looks up names for one event loop. A thread that hangs is not waited for at exit."""

    def __init__(self, look_up: LookUp = look_up, *, seconds: float = LOOK_UP_SECONDS) -> None:
        self._look_up = look_up
        self._seconds = seconds
        self._free = asyncio.Semaphore(_THREADS)
        self._free_slow = asyncio.Semaphore(_SLOW_THREADS)
        self._slow: dict[str, None] = {}
        self._running: dict[str, asyncio.Future[Sequence[str]]] = {}
        """At most one look-up of a name runs at a time."""

    async def addresses_of(self, host: str) -> tuple[Address, ...]:
        """All addresses of a host name; that of an IP address is itself. Raises NameNotResolved."""
        if literal := addresses.parse(host):
            return (literal,)
        try:
            async with asyncio.timeout(self._seconds):
                texts = await self._texts(host)
        except TimeoutError:
            self._note_slow(host)
            raise NameNotResolved(f"{host} was not resolved within {self._seconds:g} s") from None
        except (OSError, UnicodeError) as error:
            raise NameNotResolved(f"{host} has no address") from error
        self._slow.pop(host, None)
        found = tuple(map(addresses.parse, texts))
        # An address with a zone (fe80::1%eth0) is a local one.
        if not found or None in found:
            raise NameNotResolved(f"{host} has no address that can be used")
        return tuple(address for address in found if address)

    async def _texts(self, host: str) -> Sequence[str]:
        while (running := self._running.get(host)) is None:
            free = self._free_slow if host in self._slow else self._free
            await free.acquire()
            if host in self._running:
                free.release()
            else:
                self._start(host, free)
        return await asyncio.shield(running)

    def _start(self, host: str, free: asyncio.Semaphore) -> None:
        """Starts a thread, whose place in `free` is given back when its look-up ends, however late
        that is."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Sequence[str]] = loop.create_future()
        self._running[host] = future

        def finish(found: Sequence[str] | Exception) -> None:
            free.release()
            del self._running[host]
            if isinstance(found, Exception):
                future.set_exception(found)
                future.exception()  # perhaps nobody waits for it any more
            else:
                future.set_result(found)

        def run() -> None:
            try:
                found: Sequence[str] | Exception = self._look_up(host)
            except Exception as error:
                found = error
            with contextlib.suppress(RuntimeError):  # the loop may have been closed meanwhile
                loop.call_soon_threadsafe(finish, found)

        threading.Thread(target=run, name="webhook-resolver", daemon=True).start()

    def _note_slow(self, host: str) -> None:
        self._slow.pop(host, None)
        if len(self._slow) >= _MAX_SLOW_NAMES:
            del self._slow[next(iter(self._slow))]
        self._slow[host] = None
