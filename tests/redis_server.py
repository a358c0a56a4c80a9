"""Redis servers that tests start besides the common one."""

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import redis

from tests.ports import free_port


@contextmanager
def running_server(program: str, *arguments: str) -> Iterator[int]:
    """Runs a server that saves nothing; its port, for which `{port}` stands in the arguments."""
    port = free_port()
    command = [program, *(word.format(port=port) for word in arguments)]
    if "--sentinel" not in arguments:
        command += ["--save", ""]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        _wait_for_port(port)
        yield port
    finally:
        process.kill()
        process.wait()


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing listens at port {port}")
        time.sleep(0.01)


def wait_for_server(url: str) -> None:
    client = redis.Redis.from_url(url)
    deadline = time.monotonic() + 10
    while True:
        try:
            client.ping()
        except redis.ConnectionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            client.close()
            return
