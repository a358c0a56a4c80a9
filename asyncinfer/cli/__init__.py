"""The command line: argv and environment to a command, and every failure to one line.

Imports what a command needs where it needs it: `serve` starts its children first, and a worker
does without the memory that parsing takes.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence

from asyncinfer.cli.exit_codes import EXIT_INTERRUPTED, EXIT_NOBODY_READS, refused
from asyncinfer.errors import AsyncinferError


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    # The kernel keeps from process 1 of a container each signal that it has no handler for.
    before = signal.signal(signal.SIGTERM, _stopped_before_it_began)
    try:
        return _command(arguments)()
    except (AsyncinferError, BaseExceptionGroup) as error:
        return refused(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else the interpreter complains at its end
        return EXIT_NOBODY_READS
    finally:
        signal.signal(signal.SIGTERM, before)


def _command(arguments: list[str]) -> Callable[[], int]:
    """Children of `serve` have nothing to parse, or what nobody else may write."""
    match arguments:
        case ["work"]:
            from asyncinfer.cli.serve.work import work_as_set

            return work_as_set
        case ["api-process", held_fd, report_fd, own_worker_since_ms]:
            from asyncinfer.cli.serve.api_process import api_process

            return lambda: api_process(int(held_fd), int(report_fd), int(own_worker_since_ms))
        case _:
            from asyncinfer.cli.commands import parsed

            return lambda: parsed(arguments)


def _stopped_before_it_began(number: int, _: object) -> None:
    sys.exit(0)
