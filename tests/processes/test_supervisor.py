"""`serve` keeps its processes running, and ends them in order."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import redis

from asyncinfer.errors import StartError
from asyncinfer.processes import supervisor, valkey
from asyncinfer.processes.supervisor import ServePlan, StopSignals
from tests.faults.harness import eventually, eventually_sync
from tests.process import PythonProcess, is_gone, python_process

WORKER: Final = """
import os, signal, sys
from pathlib import Path

log = Path(sys.argv[1])

def write(text):
    with log.open("a") as file:
        file.write(f"{text} {os.getpid()}\\n")

def stopped(*_):
    write("drained" if SERVER.exists() else "drained without Valkey")
    raise SystemExit(0)

SERVER = Path(os.environ["REDIS_URL"].removeprefix("unix://"))
signal.signal(signal.SIGTERM, signal.SIG_IGN if "stubborn" in sys.argv else stopped)
write("started")
if "refused" in sys.argv or ("refused later" in sys.argv and SERVER.with_name("been").exists()):
    raise SystemExit(2)
SERVER.with_name("been").touch()
while True:
    signal.pause()
"""
"""A stand-in for a worker: it logs its start, and that it was told to end."""

SERVE: Final = """
import asyncio, sys, signal
from pathlib import Path
from asyncinfer.processes import supervisor

async def api(url, stop):
    # As uvicorn does: its own handlers while it serves, what was there before afterwards.
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    handle = lambda *_: loop.call_soon_threadsafe(stopped.set)
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    stop.leave_first_to_api()
    print("ready", flush=True)
    await stopped.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    print("stopping", flush=True)

data_dir, *worker = sys.argv[1:]
worker = (sys.executable, *worker)
plan = supervisor.ServePlan(data_dir=Path(data_dir), worker=worker, drain_seconds=60)
asyncio.run(supervisor.serve(plan, api))
print("stopped", flush=True)
"""


class WorkerLog:
    """The log of the stand-in workers."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pids(self, event: str) -> list[int]:
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        entries = (line.rpartition(" ") for line in lines)
        return [int(pid) for text, _, pid in entries if text == event]

    def wait_for_start(self) -> int:
        """The pid of the first worker, once it has started."""
        eventually_sync(lambda: bool(self.pids("started")), "a worker starts")
        return self.pids("started")[0]


@pytest.fixture
def worker_log(tmp_path: Path) -> WorkerLog:
    return WorkerLog(tmp_path / "worker.log")


def worker(tmp_path: Path, *options: str) -> tuple[str, ...]:
    return ("-c", WORKER, str(tmp_path / "worker.log"), *options)


@contextlib.contextmanager
def serving(tmp_path: Path, *options: str) -> Iterator[PythonProcess]:
    with python_process("-c", SERVE, str(tmp_path / "data"), *worker(tmp_path, *options)) as serve:
        assert serve.read_line() == "ready"
        yield serve


def valkey_pid(tmp_path: Path) -> int:
    return int((tmp_path / "data/valkey/valkey.lock").read_text())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_api_then_the_worker_then_valkey(
    tmp_path: Path, worker_log: WorkerLog, number: signal.Signals
) -> None:
    with serving(tmp_path) as serve:
        pids = (worker_log.wait_for_start(), valkey_pid(tmp_path))
        serve.signal_group(number)

        assert (serve.read_line(), serve.read_line()) == ("stopping", "stopped")
        assert serve.process.wait() == 0
        assert worker_log.pids("drained") == [pids[0]]
        assert all(map(is_gone, pids))
        assert serve.read_stderr() == ""


def test_a_second_signal_hastens_the_end(tmp_path: Path, worker_log: WorkerLog) -> None:
    with serving(tmp_path, "stubborn") as serve:
        pid = worker_log.wait_for_start()
        serve.signal_group(signal.SIGINT)
        assert serve.read_line() == "stopping"
        serve.signal_group(signal.SIGINT)

        assert serve.read_line() == "stopped"
        assert is_gone(pid)
        assert serve.process.wait() == 0


def test_a_killed_serve_leaves_no_process_after_5_s(tmp_path: Path, worker_log: WorkerLog) -> None:
    with serving(tmp_path, "stubborn") as serve:
        pids = (worker_log.wait_for_start(), valkey_pid(tmp_path))
        serve.kill()

        eventually_sync(lambda: all(map(is_gone, pids)), "both have ended", seconds=5)


def test_a_killed_worker_is_started_again(tmp_path: Path, worker_log: WorkerLog) -> None:
    with serving(tmp_path) as serve:
        os.kill(worker_log.wait_for_start(), signal.SIGKILL)

        eventually_sync(lambda: len(worker_log.pids("started")) == 2, "another worker starts")
        serve.signal_group(signal.SIGTERM)
        assert serve.process.wait() == 0
        assert worker_log.pids("drained") == worker_log.pids("started")[1:]


# --- in this process -------------------------------------------------------------------------


def plan(tmp_path: Path, *options: str) -> ServePlan:
    return ServePlan(data_dir=tmp_path, worker=(sys.executable, *worker(tmp_path, *options)))


async def test_a_killed_valkey_is_started_again_with_its_data(tmp_path: Path) -> None:
    async def api(url: str, stop: StopSignals) -> None:
        client = redis.Redis.from_url(url)
        client.set("job", "1")
        os.kill(int((tmp_path / "valkey/valkey.lock").read_text()), signal.SIGKILL)
        await eventually(lambda: valkey.running_url(tmp_path) is None, "it is gone")
        await eventually(lambda: valkey.running_url(tmp_path) == url, "it is back")
        await eventually(lambda: _answers(client), "it answers")
        assert client.get("job") == b"1"

    await supervisor.serve(ServePlan(data_dir=tmp_path), api)


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


async def test_a_signal_before_the_api_is_ready_ends_the_start(
    tmp_path: Path, worker_log: WorkerLog
) -> None:
    async def api(url: str, stop: StopSignals) -> None:
        worker_log.wait_for_start()
        signal.raise_signal(signal.SIGTERM)
        await asyncio.Event().wait()

    await supervisor.serve(plan(tmp_path), api)

    assert worker_log.pids("drained") == worker_log.pids("started")


async def test_an_api_that_cannot_start_ends_the_other_processes_and_raises_its_error(
    tmp_path: Path, worker_log: WorkerLog
) -> None:
    async def api(url: str, stop: StopSignals) -> None:
        worker_log.wait_for_start()
        raise StartError("no")

    with pytest.raises(ExceptionGroup) as group:
        await supervisor.serve(plan(tmp_path), api)

    assert group.group_contains(StartError, match="^no$")
    assert all(map(is_gone, worker_log.pids("started")))


async def test_a_worker_that_is_refused_its_settings_ends_serve(
    tmp_path: Path, worker_log: WorkerLog
) -> None:
    async def api(url: str, stop: StopSignals) -> None:
        await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as group:
        await supervisor.serve(plan(tmp_path, "refused"), api)

    assert group.group_contains(StartError, match="The worker cannot start with these settings")
    assert len(worker_log.pids("started")) == 1


@pytest.mark.soak
async def test_a_worker_that_served_and_is_then_refused_does_not_end_the_api(
    tmp_path: Path, worker_log: WorkerLog
) -> None:
    async def api(url: str, stop: StopSignals) -> None:
        await eventually(lambda: bool(worker_log.pids("started")), "a worker starts")
        await eventually(Path(url.removeprefix("unix://")).with_name("been").exists, "it works")
        os.kill(worker_log.wait_for_start(), signal.SIGKILL)
        await eventually(lambda: len(worker_log.pids("started")) == 3, "it is tried again")

    await supervisor.serve(plan(tmp_path, "refused later"), api)


async def test_with_a_redis_of_its_own_nothing_is_embedded(tmp_path: Path) -> None:
    seen = []

    async def api(url: str, stop: StopSignals) -> None:
        seen.append(url)

    await supervisor.serve(ServePlan(redis_url="redis://elsewhere", data_dir=tmp_path), api)

    assert seen == ["redis://elsewhere"]
    assert not os.listdir(tmp_path)


async def test_signal_handlers_are_restored_afterwards(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    await supervisor.serve(ServePlan(redis_url="redis://elsewhere", data_dir=tmp_path), _no_api)

    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


async def _no_api(url: str, stop: StopSignals) -> None:
    return


def test_pauses_between_starts_grow_to_a_bound() -> None:
    pauses = [supervisor.pause_seconds(failures) for failures in range(100)]

    assert pauses == sorted(pauses)
    assert pauses[0] < 0.2
    assert pauses[-1] == 30
