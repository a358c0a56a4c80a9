"""One address for several processes: reserved once, and served by those that listen."""

import socket
import sys

import pytest

from asyncinfer.api.http.sockets import bind_shared, listen, reserve
from asyncinfer.errors import StartError


@pytest.fixture(params=["127.0.0.1", "::1"])
def held(request: pytest.FixtureRequest) -> socket.socket:
    try:
        return reserve(request.param, 0)
    except StartError:
        pytest.skip("no IPv6 here")


def connect(held: socket.socket) -> socket.socket:
    return socket.create_connection(held.getsockname()[:2], timeout=5)


def test_no_connection_is_accepted_before_a_process_listens(held: socket.socket) -> None:
    with held, bind_shared(held), pytest.raises(ConnectionRefusedError):
        connect(held)


@pytest.mark.skipif(sys.platform != "linux", reason="a hash spreads them on Linux alone")
def test_connections_after_a_process_has_ended_go_to_the_others(
    held: socket.socket,
) -> None:
    with held, bind_shared(held) as staying:
        with bind_shared(held) as ending:
            for listener in (staying, ending):
                listener.listen()
        staying.settimeout(5)
        for _ in range(20):
            with connect(held), staying.accept()[0]:
                pass


def test_where_connections_are_not_spread_all_processes_share_one_socket(
    held: socket.socket,
) -> None:
    with held, bind_shared(held, "darwin") as first, bind_shared(held, "darwin") as second:
        for process in (first, second, first):
            process.listen()
            process.settimeout(5)
            with connect(held), process.accept()[0]:
                pass


def test_an_address_that_is_listened_on_cannot_be_held() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(StartError, match="another HOST or PORT"):
        reserve("127.0.0.1", taken.getsockname()[1])


def test_an_address_that_processes_share_cannot_be_held_again(held: socket.socket) -> None:
    with held, bind_shared(held) as process:
        process.listen()
        with pytest.raises(StartError, match="another HOST or PORT"):
            reserve(*held.getsockname()[:2])
