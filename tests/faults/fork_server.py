"""A process that forks workers on request; they start fast, since their imports are done.

It reads requests from stdin, one per line, and answers each with a line. At the end of stdin it
kills its workers and ends. Each worker imports ONNX Runtime itself: ONNX Runtime has a thread,
which a fork does not inherit, and a process without it aborts at its exit.
"""

import os
import signal
import sys
from importlib import import_module
from typing import Final

import msgspec

_IMPORTS: Final = (
    "numpy",
    "redis.asyncio",
    "uvloop",
    "asyncinfer.models.signature",
    "asyncinfer.repository.claims",
    "asyncinfer.repository.submissions",
    "asyncinfer.repository.maintenance",
    "asyncinfer.models.results",
    "asyncinfer.repository.reaper",
)


class StartRequest(msgspec.Struct, tag=True):
    """A request for a new worker; the reply is its pid."""

    settings_json: str
    log: str


class ExitCodeRequest(msgspec.Struct, tag=True):
    """A request for a worker's exit code; the reply is null if it runs and `wait` is false."""

    pid: int
    wait: bool


def main() -> None:
    for module in _IMPORTS:
        import_module(module)
    assert "onnxruntime" not in sys.modules
    requests = msgspec.json.Decoder(StartRequest | ExitCodeRequest)
    running: set[int] = set()
    for line in sys.stdin.buffer:
        reply = msgspec.json.encode(_handle(requests.decode(line), running))
        os.write(sys.stdout.fileno(), reply + b"\n")
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _handle(request: StartRequest | ExitCodeRequest, running: set[int]) -> int | None:
    if isinstance(request, ExitCodeRequest):
        return _exit_code(request, running)
    pid = _fork_worker(request)
    running.add(pid)
    return pid


def _fork_worker(request: StartRequest) -> int:
    if pid := os.fork():
        return pid
    log = os.open(request.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    empty = os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate((empty, log, log)):
        os.dup2(file, number)
    sys.argv[1:] = [request.settings_json]
    # Imported only after the fork, since it imports ONNX Runtime.
    sys.exit(import_module("tests.faults.worker_main").main())


def _exit_code(request: ExitCodeRequest, running: set[int]) -> int | None:
    pid, status = os.waitpid(request.pid, 0 if request.wait else os.WNOHANG)
    if not pid:
        return None
    running.remove(pid)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    main()
