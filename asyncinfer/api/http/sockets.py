"""The socket that the API listens on, alone or shared with other API processes."""

import socket
import sys
from typing import Final

from asyncinfer.errors import StartError

_BACKLOG: Final = 2048

_UNSENT_BYTES: Final = 128 << 10
"""How much of an answer the kernel buffers before the network has sent it. By default it took
2.7 MiB of each event stream that nobody read, all of it read from Redis and encoded first."""


def listen(host: str, port: int) -> socket.socket:
    """Returns a listening socket, which the caller closes; raises StartError if the address is
    taken or invalid."""
    try:
        listener = socket.create_server((host, port), family=_family(host), backlog=_BACKLOG)
    except OSError as error:
        raise _listen_error(host, port, error) from error
    _limit_unsent(listener)
    return listener


def reserve(host: str, port: int) -> socket.socket:
    """Returns a bound socket that does not listen: it reserves the address for processes that
    listen there later, each on its `bind_shared`. Raises StartError if the address is taken or
    invalid."""
    try:
        return _bind(_family(host), (host, port), siblings=False)
    except OSError as error:
        raise _listen_error(host, port, error) from error


def bind_shared(held: socket.socket, platform: str = sys.platform) -> socket.socket:
    """Returns the socket for one process to listen on, at the address that `reserve` reserved;
    raises StartError. On Linux each is a socket of its own, elsewhere a duplicate of `held`."""
    # Processes that accept from one socket race for it, and the first to wake takes all waiting
    # connections: measured, half of the bursts of 32 connections to two processes went to one of
    # them alone, and 32 that came one after another went 30 : 2. Linux spreads connections among
    # the sockets of one address by a hash (22 : 10 was the worst of 32 rounds) and leaves out
    # those of processes that have ended; connections that such a process had not accepted yet are
    # reset, as are its accepted ones. Other systems do not spread with SO_REUSEPORT, so there the
    # processes race for one socket.
    if platform != "linux":
        return held.dup()
    address = held.getsockname()
    try:
        return _bind(held.family, address, siblings=True)
    except OSError as error:
        raise _listen_error(address[0], address[1], error) from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _bind(family: int, address: tuple[str | int, ...], *, siblings: bool) -> socket.socket:
    """Returns a bound socket, not listening; raises OSError. With `siblings` other processes of the
    same user may bind the address too."""
    bound = socket.socket(family)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if siblings:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)
        _limit_unsent(bound)
    except BaseException:
        bound.close()
        raise
    return bound


def _limit_unsent(listener: socket.socket) -> None:
    """Limits what the kernel buffers of an answer, where it can. Accepted connections inherit this
    option from their listener."""
    if option := getattr(socket, "TCP_NOTSENT_LOWAT", None):
        listener.setsockopt(socket.IPPROTO_TCP, option, _UNSENT_BYTES)


def _listen_error(host: str, port: int, error: OSError) -> StartError:
    """Makes the error of an address that cannot be listened on."""
    return StartError(
        f"Cannot listen on {host}:{port}: {error.strerror}. Stop the program that listens there, "
        "or choose another HOST or PORT."
    )
