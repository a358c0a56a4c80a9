"""Models are loaded and run once in a child that may die of one, and what became of each.

The child says which file comes next before it loads it: so the one that it died of is known.
"""

import contextlib
import json
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Final

import numpy as np
from msgspec import Struct

from asyncinfer.engine import Engine, Stop, Stopped
from asyncinfer.errors import JobError, ModelRefused
from asyncinfer.models.folder import scan
from asyncinfer.tensors.datatypes import DTYPES, dims
from tests.process import REPOSITORY

ADDRESS_SPACE_BYTES: Final = 6 << 30
SECONDS_EACH: Final = 5
_RUN_SECONDS: Final = 0.5
_MOST_ELEMENTS: Final = 1 << 20


class Loaded(Struct, frozen=True):
    """What became of one model."""

    reason: str = ""
    """Why it was refused; "" when it was loaded."""
    died: str = ""
    """The signal or exit code that its process ended with, where it did."""


def load_each(folder: Path, seconds_each: int = SECONDS_EACH) -> dict[str, Loaded]:
    """Every model in the folder, by name; a child that dies of one is followed by another.

    One may take so many seconds of processor time before its child is killed.
    """
    found: dict[str, Loaded] = {}
    names = sorted(path.name for path in folder.iterdir())
    while waiting := [name for name in names if name not in found]:
        ended = _child(folder, seconds_each, waiting)
        begun = [json.loads(line) for line in ended.stdout.splitlines()]
        for line in begun:
            if "reason" in line:
                found[line["name"]] = Loaded(line["reason"])
        if ended.returncode:
            culprit = begun[-1]["name"]
            assert culprit not in found, ended.stderr
            found[culprit] = Loaded(died=_ending(ended.returncode))
    return found


def _child(folder: Path, seconds_each: int, names: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", __name__, str(folder), str(seconds_each), *names]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


# --- the child ---------------------------------------------------------------------------------


def _load_all(folder: Path, seconds_each: int, names: list[str]) -> Iterator[dict[str, str]]:
    files = {file.model: file for file in scan(folder)}
    for name in names:
        yield {"name": name}
        # Processor time, and deadly: a load that takes longer cannot be stopped.
        signal.setitimer(signal.ITIMER_PROF, seconds_each)
        try:
            engine = Engine.load(files[name], intra_op_threads=1, probe_seconds=_RUN_SECONDS)
            _run_once(engine)
        except ModelRefused as error:
            yield {"name": name, "reason": error.detail}
        else:
            yield {"name": name, "reason": ""}


def _run_once(engine: Engine) -> None:
    feeds = {}
    for spec in engine.signature.inputs:
        shape = [dim if isinstance(dim, int) else 1 for dim in dims(spec)]
        if prod(shape) > _MOST_ELEMENTS:
            return
        filling = "" if spec.datatype == "BYTES" else 0
        feeds[spec.name] = np.full(shape, filling, DTYPES[spec.datatype])
    stop = Stop()
    timer = threading.Timer(_RUN_SECONDS, stop.stop)
    timer.start()
    # Zeros may be no input for it: whatever it raises, it has not killed us.
    with contextlib.suppress(JobError, Stopped):
        engine.run(feeds, stop)
    timer.cancel()


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    folder, seconds_each, *names = sys.argv[1:]
    for line in _load_all(Path(folder), int(seconds_each), names):
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
