"""The entry point of the command line.

Modules are imported inside the functions that need them, so that `serve` starts its children before
it imports the rest, and a worker does not hold the memory that the option parser takes.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence

from asyncinfer.cli.exit_codes import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, report_error
from asyncinfer.errors import AsyncinferError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command in `argv` and returns its exit code.

    `argv` has no program name; None is sys.argv. Failures become one line on stderr. --help,
    --version and SIGTERM raise SystemExit, and a bug raises its own exception.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # The kernel does not deliver to process 1 of a container a signal that has no handler.
    previous_handler = signal.signal(signal.SIGTERM, _exit_at_once)
    try:
        return _find_command(arguments)()
    except (AsyncinferError, BaseExceptionGroup) as error:
        return report_error(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Else the interpreter reports an error as it flushes stdout at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_BROKEN_PIPE
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


def _find_command(arguments: list[str]) -> Callable[[], int]:
    """The function that runs the command and returns its exit code.

    The two kinds of children that `serve` starts need no option parser.
    """
    match arguments:
        case ["work"]:
            from asyncinfer.cli.serve.work import work_from_environment

            return work_from_environment
        case ["api-process", *numbers]:
            from asyncinfer.cli.serve.api_process import api_process

            return lambda: api_process(*map(int, numbers))
        case _:
            from asyncinfer.cli.commands import parse_and_run

            return lambda: parse_and_run(arguments)


def _exit_at_once(number: int, _: object) -> None:
    """Handles SIGTERM: raises SystemExit with the code 0."""
    sys.exit(0)
