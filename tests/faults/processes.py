"""Real processes for the fault tests: workers that can be killed, and a Valkey with a disk."""

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
from asyncinfer.repository.announcements import decode_worker_announcement, upcoming_models
from asyncinfer.repository.policy import Policy
from asyncinfer.schemas.operations import public_worker_name
from asyncinfer.worker.held_claim import Step
from asyncinfer.worker.models.engine_cache import CacheBounds
from asyncinfer.worker.worker import WorkerConfig
from tests.faults import fork_server

from .harness import eventually, eventually_sync
from .worker_main import WorkerSettings


class ProcessHandle(Protocol):
    """The part of a Popen that these tests use."""

    pid: int
    returncode: Any
    """None until `poll` or `wait` has seen the end of the process."""

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


StartWorker: TypeAlias = Callable[[str, Path], ProcessHandle]
"""Starts a worker, given its settings as JSON and the file that its output goes to."""


def spawn_worker(settings_json: str, log: Path) -> ProcessHandle:
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.faults.worker_main", settings_json],
            stdout=output,
            stderr=subprocess.STDOUT,
        )


class ForkServer:
    """The process that all workers of the session are forked from."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            # Only a process with one thread can be forked; numpy would start another.
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )

    def fork_worker(self, settings_json: str, log: Path) -> ProcessHandle:
        pid = self.send(fork_server.StartRequest(settings_json, str(log)))
        assert pid
        return ForkedWorker(self, pid)

    def send(self, request: fork_server.StartRequest | fork_server.ExitCodeRequest) -> int | None:
        """Returns the reply: a pid, an exit code, or None while the process runs."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(msgspec.json.encode(request) + b"\n")
        self._process.stdin.flush()
        return msgspec.json.decode(self._process.stdout.readline(), type=int | None)

    def close(self) -> None:
        self._process.communicate()


class ForkedWorker:
    """A process that the fork server started."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self._server = server
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._read_exit_code(wait=False)

    def wait(self) -> int:
        exit_code = self._read_exit_code(wait=True)
        assert exit_code is not None
        return exit_code

    def _read_exit_code(self, *, wait: bool) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.send(fork_server.ExitCodeRequest(self.pid, wait))
        return self.returncode


class WorkerChild:
    """A worker process under test, with its log."""

    def __init__(
        self, settings: WorkerSettings, log: Path, start: StartWorker = spawn_worker
    ) -> None:
        self.process = start(msgspec.json.encode(settings).decode(), log)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def is_announced(self, client: redis.Redis) -> bool:
        """Whether it has announced that it claims the jobs of all models in its folder."""
        pattern = keys.worker("predict_queue", f"*-{self.process.pid}-*")
        bodies = [client.get(key) for key in client.scan_iter(pattern, count=1000)]
        workers = [decode_worker_announcement(body) for body in bodies if isinstance(body, bytes)]
        return any(worker.models and not upcoming_models(worker) for worker in workers)

    def name(self, client: redis.Redis) -> str:
        """Its name in logs and answers, from its announcement, which it may have left behind."""
        (key,) = client.scan_iter(keys.worker("predict_queue", f"*-{self.process.pid}-*"))
        return public_worker_name(key.decode().rpartition(":")[2])

    async def wait_for_exit(self, seconds: float = 30.0) -> int:
        """Waits until the worker has ended by itself; returns its exit code.

        The event loop goes on meanwhile: it may serve what the worker needs.
        """
        await eventually(self.has_ended, "the worker ends", seconds)
        return int(self.process.returncode)

    async def stop(self) -> int:
        """Sends SIGTERM, also to a frozen worker; returns the exit code."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        return await self.wait_for_exit()

    def close(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.kill()


class Workers:
    """The worker processes of one test; they are killed at its end."""

    def __init__(
        self, folder: Path, settings: WorkerSettings, start: StartWorker = spawn_worker
    ) -> None:
        self._log = folder / "workers.log"
        self._settings = settings
        self._start = start
        self.members: list[WorkerChild] = []

    def start(self, die_at: Step | None = None, fail_at: Step | None = None) -> WorkerChild:
        """Starts one more worker, which may die or fail at a chosen step of a job."""
        settings = msgspec.structs.replace(self._settings, die_at=die_at, fail_at=fail_at)
        member = WorkerChild(settings, self._log, self._start)
        self.members.append(member)
        return member

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def close(self) -> None:
        for member in self.members:
            member.close()


class WorkerOptions(TypedDict, total=False):
    """Changes of the settings that `open_workers` and `WorkerSettings` give by default."""

    redis_url: str
    model_dir: str
    models: tuple[str, ...]
    """() means every model of the folder."""
    default_model: str
    policy: Policy
    worker: WorkerConfig
    bounds: CacheBounds
    monitor_port: int
    allow_custom_ops: bool
    unprivileged: bool
    run_seconds: float


class OpenWorkers(Protocol):
    """The type of the fixture `open_workers`: its context starts with no worker running."""

    def __call__(self, **options: Unpack[WorkerOptions]) -> AbstractContextManager[Workers]: ...


@contextlib.contextmanager
def running_workers(
    folder: Path, settings: WorkerSettings, start: StartWorker = spawn_worker
) -> Iterator[Workers]:
    """Kills the workers at the end; prints their log if the test failed."""
    workers = Workers(folder, settings, start)
    try:
        yield workers
    except BaseException:
        sys.stderr.write(workers.log[-8000:])
        raise
    finally:
        workers.close()


class DurableServer:
    """A Valkey (or TEST_REDIS_BINARY) with AOF in a folder, which can be killed and restarted.

    It keeps all that it has acknowledged: with `everysec` it puts writes off for up to 2 s while
    its disk is busy, and a kill then loses them. Without AOF it restarts with its last dump, or
    empty.
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
                *("--appendonly", "yes" if self._has_aof else "no", "--appendfsync", "always"),
                *("--dir", str(self._folder)),
            ],
            stdout=subprocess.DEVNULL,
        )
        client = redis.Redis.from_url(self.url)
        eventually_sync(lambda: _answers(client), "the server answers")
        client.close()

    def dump(self) -> None:
        """Writes the dump that a server without AOF restarts with."""
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
