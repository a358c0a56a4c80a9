"""The ports of tests: nobody listens on them, and nobody else is given them."""

import socket
import sys

import pytest

from tests.ports import free_port

ONLY_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no port can be kept")


def test_connections_are_refused_until_a_server_listens() -> None:
    address = ("127.0.0.1", free_port())
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, 5)
    for _ in range(2):
        with socket.create_server(address):
            socket.create_connection(address, 5).close()


@ONLY_LINUX
def test_another_process_cannot_have_the_port() -> None:
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", free_port()))


@ONLY_LINUX
def test_several_processes_can_share_the_port() -> None:
    address = ("127.0.0.1", free_port())
    with (
        socket.create_server(address, reuse_port=True),
        socket.create_server(address, reuse_port=True),
    ):
        socket.create_connection(address, 5).close()
