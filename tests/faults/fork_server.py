"""Forks worker processes on request: it has imported what they need, they start in no time.

Reads requests from stdin, a line each, and answers each with a line; at the end of stdin it ends,
and all its workers with it. ONNX Runtime is left for each worker to import: it has a thread, which
no fork inherits, and a fork without it aborts at its exit.
"""

import os
import signal
import sys
from importlib import import_module
from typing import Final

import msgspec

_IMPORTED: Final = (
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


class Birth(msgspec.Struct, tag=True):
    """Asks for a worker; answered with its pid."""

    order_json: str
    log: str


class Look(msgspec.Struct, tag=True):
    """Asks how a worker ended; answered with its exit code, or null while it lives."""

    pid: int
    wait: bool


def main() -> None:
    for module in _IMPORTED:
        import_module(module)
    assert "onnxruntime" not in sys.modules
    requests = msgspec.json.Decoder(Birth | Look)
    living: set[int] = set()
    for line in sys.stdin.buffer:
        answer = msgspec.json.encode(_answer(requests.decode(line), living))
        os.write(sys.stdout.fileno(), answer + b"\n")
    for pid in living:
        os.kill(pid, signal.SIGKILL)


def _answer(request: Birth | Look, living: set[int]) -> int | None:
    if isinstance(request, Look):
        return _exit_code(request, living)
    pid = _born(request)
    living.add(pid)
    return pid


def _born(request: Birth) -> int:
    if pid := os.fork():
        return pid
    log = os.open(request.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate((nothing, log, log)):
        os.dup2(file, number)
    sys.argv[1:] = [request.order_json]
    # Not before the fork: it imports ONNX Runtime.
    sys.exit(import_module("tests.faults.worker_main").main())


def _exit_code(request: Look, living: set[int]) -> int | None:
    pid, status = os.waitpid(request.pid, 0 if request.wait else os.WNOHANG)
    if not pid:
        return None
    living.remove(pid)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    main()
