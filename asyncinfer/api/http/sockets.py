"""The socket that the API listens on, alone or beside its siblings."""

import socket
import sys
from typing import Final

from asyncinfer.errors import StartError

_BACKLOG: Final = 2048

_UNSENT_BYTES: Final = 128 << 10
"""What the kernel takes of an answer ahead of what the network carries. By itself it took 2.7 MiB
of each event stream that nobody read, all of which was read from Redis and encoded for it."""


def listen(host: str, port: int) -> socket.socket:
    try:
        it = socket.create_server((host, port), family=_family(host), backlog=_BACKLOG)
    except OSError as error:
        raise _refusal(host, port, error) from error
    _bound_unsent(it)
    return it


def hold(host: str, port: int) -> socket.socket:
    """Takes the address for processes that listen there later, each with its `share`."""
    try:
        return _bound(_family(host), (host, port), siblings=False)
    except OSError as error:
        raise _refusal(host, port, error) from error


def share(held: socket.socket, platform: str = sys.platform) -> socket.socket:
    """What one process listens on, of an address that is held."""
    # Processes that accept from one socket race for it, and the first to wake takes all that
    # waits: measured, half of the bursts of 32 connections to two processes went to one of them
    # alone, and 32 that came one by one went 30 : 2. Linux spreads connections among the sockets
    # of one address by a hash (22 : 10 was the worst of 32 rounds) and leaves out those of
    # processes that have ended; what they had not accepted yet is reset, as what they had.
    # Elsewhere SO_REUSEPORT does not spread, so there they race.
    if platform != "linux":
        return held.dup()
    address = held.getsockname()
    try:
        return _bound(held.family, address, siblings=True)
    except OSError as error:
        raise _refusal(address[0], address[1], error) from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _bound(family: int, address: tuple[str | int, ...], *, siblings: bool) -> socket.socket:
    """With `siblings` it shares its address with others of our user, not with strangers."""
    it = socket.socket(family)
    try:
        it.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if siblings:
            it.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            it.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        it.bind(address)
        _bound_unsent(it)
    except BaseException:
        it.close()
        raise
    return it


def _bound_unsent(listener: socket.socket) -> None:
    """Each connection that is accepted has this from its listener."""
    if option := getattr(socket, "TCP_NOTSENT_LOWAT", None):
        listener.setsockopt(socket.IPPROTO_TCP, option, _UNSENT_BYTES)


def _refusal(host: str, port: int, error: OSError) -> StartError:
    return StartError(
        f"Cannot listen on {host}:{port}: {error.strerror}. Stop what listens there, or "
        "choose another HOST or PORT."
    )
