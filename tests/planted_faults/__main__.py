"""`python -m tests.planted_faults`: plants one fault at a time, and says which test notices it."""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

from msgspec import Struct

from tests.planted_faults.faults import FAULTS, Fault, problem_of
from tests.process import REPOSITORY

Selection = Literal["named", "default", "all"]

_NAMES: Final = [fault.name for fault in FAULTS]
_NAMED_SECONDS: Final = 180
_SUITE_SECONDS: Final = 1800

_PASSED, _NONE_SELECTED = 0, 5
"""Exit codes of pytest; any other one stands for a fault that was noticed."""

_DEFAULT: Final = "not soak and not by_hand"
# The tests of this folder look for the lines of the faults, so they would notice every fault.
_SUITE: Final = ("-n", "2", "--dist", "loadfile", "--ignore", "tests/planted_faults", "tests")
_NOTICED_BY: Final = re.compile(r"^(?:FAILED|ERROR) (tests/.+)$", re.MULTILINE)
_MAX_SHOWN: Final = 240
_STARTED: Final = re.compile(r"^(tests/\S+::\S+)", re.MULTILINE)


class Run(Struct, frozen=True):
    """How a run of pytest ended. `noticed_by` is the test that failed, and its error; None if none
    did."""

    noticed_by: str | None
    seconds: float
    output: str


def main() -> int:
    """Returns 0 if all faults were noticed, 1 if one was not, 2 if they could not be planted."""
    arguments = _arguments()
    chosen = [fault for fault in FAULTS if fault.name in (arguments.only or _NAMES)]
    if arguments.tests == "default":
        chosen = [fault for fault in chosen if not fault.only_soak]
    if problems := list(filter(None, map(problem_of, chosen))):
        _say(*problems)
        return 2
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        copy = Path(folder).resolve()
        _copy_checkout(copy)
        if not arguments.unchecked and not _pass_without_a_fault(copy, chosen):
            return 2
        survivors = [
            fault.name for fault in chosen if not _is_noticed(copy, fault, arguments.tests)
        ]
    _say(f"{len(chosen) - len(survivors)} of {len(chosen)} faults were noticed.")
    return 1 if survivors else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.planted_faults", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=_NAMES, metavar="NAME", help="these faults")
    parser.add_argument(
        "--tests",
        choices=["named", "default", "all"],
        default="named",
        help="named: the tests that are known to notice the fault (default); default: these, as "
        "far as they are not soak tests, then the default suite, without the faults that only soak "
        "tests notice; all: every test",
    )
    parser.add_argument(
        "--unchecked",
        action="store_true",
        help="do not run the named tests without a fault first",
    )
    return parser.parse_args()


def _copy_checkout(copy: Path) -> None:
    """Copies the files of the checkout that git knows or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (REPOSITORY / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, copy / name)


def _pass_without_a_fault(copy: Path, faults: Sequence[Fault]) -> bool:
    """Whether the named tests pass in the copy as it is; says which does not."""
    tests = list(dict.fromkeys(test for fault in faults for test in fault.tests))
    run = _run(copy, ("-n", "0", "-m", "", *tests), _SUITE_SECONDS)
    if run.noticed_by is not None:
        _say(run.output, f"{run.noticed_by} fails without any fault.")
        return False
    _say(f"{len(tests)} named tests pass without a fault, in {run.seconds:.0f} s.")
    return True


def _is_noticed(copy: Path, fault: Fault, selection: Selection) -> bool:
    """Plants a fault, runs tests until one fails, and says which; False if none fails."""
    seconds = 0.0
    with _planted(copy, fault):
        for arguments, limit_seconds in _runs(fault, selection):
            run = _run(copy, arguments, limit_seconds)
            seconds += run.seconds
            if run.noticed_by is not None:
                _say(f"killed    {fault.name}  in {seconds:.1f} s by {run.noticed_by}")
                return True
    _say(f"SURVIVED  {fault.name}  ({fault.file}) in {seconds:.1f} s")
    return False


def _runs(fault: Fault, selection: Selection) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yields the runs of a selection, as arguments of pytest and the longest time in seconds."""
    yield ("-n", "0", "-m", _DEFAULT * (selection == "default"), *fault.tests), _NAMED_SECONDS
    if selection != "named":
        yield ("-m", _DEFAULT, *_SUITE), _SUITE_SECONDS
    if selection == "all":
        yield ("-m", "soak", *_SUITE), _SUITE_SECONDS


@contextmanager
def _planted(copy: Path, fault: Fault) -> Iterator[None]:
    """Has the fault in the copy during the block."""
    path = copy / fault.file
    text = path.read_text()
    _write(path, text.replace(fault.old, fault.new))
    try:
        yield
    finally:
        _write(path, text)


def _write(path: Path, text: str) -> None:
    """Writes a file and removes its bytecode, which Python may take for that of the new text if
    both are of one second and one size."""
    path.write_text(text)
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
        compiled.unlink()


def _run(copy: Path, arguments: Sequence[str], limit_seconds: int) -> Run:
    """Runs pytest in the copy until a test fails. A run that exceeds the limit is killed with all
    its processes, and counts as a test that failed."""
    # -vv shows which test runs, for the case that it hangs, and does not cut its error.
    command = [sys.executable, "-m", "pytest", "-x", "-vv", "-p", "no:cacheprovider", *arguments]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    started_at = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            cwd=copy,
            env={**environ, "PYTHONPATH": str(copy)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        text = output.read()
    seconds = time.monotonic() - started_at
    if code is None:
        running = _STARTED.findall(text)[-1:] or ["no test"]
        return Run(f"a hang: {running[0]} had not ended", seconds, text)
    if code in (_PASSED, _NONE_SELECTED):
        return Run(None, seconds, text)
    found = _NOTICED_BY.search(text)
    return Run(found[1][:_MAX_SHOWN] if found else f"exit code {code} of pytest", seconds, text)


def _say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
