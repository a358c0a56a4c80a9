"""Real processes for the fault tests: workers that can be killed, a Valkey with a disk."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypedDict, Unpack

import msgspec
import redis

from asyncinfer.repository import keys
from asyncinfer.repository.announcements import worker_says
from asyncinfer.repository.policy import Policy
from asyncinfer.worker.held_claim import Step
from asyncinfer.worker.models.engine_cache import Bounds
from asyncinfer.worker.worker import WorkerConfig
from tests.faults import fork_server

from .harness import eventually, eventually_sync
from .worker_main import Order


class Started(Protocol):
    """A process that runs; what these tests use of a Popen."""

    pid: int
    returncode: Any
    """None until `poll` or `wait` saw its end."""

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


Start: TypeAlias = Callable[[str, Path], Started]
"""Starts a worker: its order as JSON, and the file that its output goes to."""


def spawned(order_json: str, log: Path) -> Started:
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.faults.worker_main", order_json],
            stdout=output,
            stderr=subprocess.STDOUT,
        )


class Nursery:
    """The process that workers are forked from, for the session."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            # A process with one thread can be forked; numpy would start one more.
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )

    def forked(self, order_json: str, log: Path) -> Started:
        pid = self.ask(fork_server.Birth(order_json, str(log)))
        assert pid
        return Forked(self, pid)

    def ask(self, request: fork_server.Birth | fork_server.Look) -> int | None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(msgspec.json.encode(request) + b"\n")
        self._process.stdin.flush()
        return msgspec.json.decode(self._process.stdout.readline(), type=int | None)

    def close(self) -> None:
        self._process.communicate()


class Forked:
    """A process of the nursery's."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self._nursery = nursery
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._look(wait=False)

    def wait(self) -> int:
        ended = self._look(wait=True)
        assert ended is not None
        return ended

    def _look(self, *, wait: bool) -> int | None:
        if self.returncode is None:
            self.returncode = self._nursery.ask(fork_server.Look(self.pid, wait))
        return self.returncode


class WorkerChild:
    """A worker process under test; its log is kept for a failing test to show."""

    def __init__(self, order: Order, log: Path, start: Start = spawned) -> None:
        self.process = start(msgspec.json.encode(order).decode(), log)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()

    def died(self) -> bool:
        return self.process.poll() is not None

    def announced(self, client: redis.Redis) -> bool:
        """Whether it has loaded all its models and said so."""
        pattern = keys.worker("predict_queue", f"*-{self.process.pid}-*")
        bodies = [client.get(key) for key in client.scan_iter(pattern, count=1000)]
        says = [worker_says(body) for body in bodies if isinstance(body, bytes)]
        return any(one.models and not one.loading for one in says)

    async def left(self, seconds: float = 30.0) -> int:
        """The exit code, once it has gone by itself; the loop may serve it meanwhile."""
        await eventually(self.died, "the worker leaves", seconds)
        return int(self.process.returncode)

    async def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        return await self.left()

    def close(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.kill()


class Crew:
    """The worker processes of one test; all gone at its end."""

    def __init__(self, folder: Path, order: Order, start: Start = spawned) -> None:
        self._log = folder / "workers.log"
        self._order = order
        self._start = start
        self.members: list[WorkerChild] = []

    def hire(self, die_at: Step | None = None, fail_at: Step | None = None) -> WorkerChild:
        order = msgspec.structs.replace(self._order, die_at=die_at, fail_at=fail_at)
        member = WorkerChild(order, self._log, self._start)
        self.members.append(member)
        return member

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def close(self) -> None:
        for member in self.members:
            member.close()


class Terms(TypedDict, total=False):
    """What a test may ask of its crew; the rest is as the fixture `crew` and `Order` have it."""

    redis_url: str
    model_dir: str
    models: tuple[str, ...]
    """() is every model of the folder."""
    default_model: str
    policy: Policy
    worker: WorkerConfig
    bounds: Bounds
    monitor_port: int
    allow_custom_ops: bool
    unprivileged: bool


class OpenCrew(Protocol):
    """What the fixture `crew` gives: called, it opens the test's crew, with no one hired yet."""

    def __call__(self, **terms: Unpack[Terms]) -> AbstractContextManager[Crew]: ...


@contextlib.contextmanager
def open_crew(folder: Path, order: Order, start: Start = spawned) -> Iterator[Crew]:
    it = Crew(folder, order, start)
    try:
        yield it
    except BaseException:
        sys.stderr.write(it.log[-8000:])
        raise
    finally:
        it.close()


class DurableServer:
    """A Valkey (or TEST_REDIS_BINARY) with AOF in a folder, that can be killed and restarted.

    Without AOF it comes back with its last dump, or empty.
    """

    def __init__(self, folder: Path, binary: str, *, has_aof: bool = True) -> None:
        self._folder = folder
        self._binary = binary
        self._has_aof = has_aof
        self._socket = folder / "s"
        self.url = f"unix://{self._socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [
                *(self._binary, "--port", "0", "--unixsocket", str(self._socket), "--save", ""),
                *("--appendonly", "yes" if self._has_aof else "no", "--appendfsync", "everysec"),
                *("--dir", str(self._folder)),
            ],
            stdout=subprocess.DEVNULL,
        )
        client = redis.Redis.from_url(self.url)
        eventually_sync(lambda: _answers(client), "the server answers")
        client.close()

    def dump(self) -> None:
        """Writes what it holds to the file that it starts from when it has no AOF."""
        with contextlib.closing(redis.Redis.from_url(self.url)) as client:
            client.save()

    def kill(self) -> None:
        assert self._process
        self._process.kill()
        self._process.wait()

    def signal(self, number: int) -> None:
        assert self._process
        self._process.send_signal(number)

    def close(self) -> None:
        if self._process and self._process.poll() is None:
            self.signal(signal.SIGCONT)
            self.kill()


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False
