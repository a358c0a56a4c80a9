"""Loads models and runs each once, in a child process that a model may kill.

The child prints each name before it loads the model, so the model that killed it is known.
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
_MAX_ELEMENTS: Final = 1 << 20


class LoadResult(Struct, frozen=True):
    """The outcome of loading and running a model once."""

    reason: str = ""
    """The reason why it was refused; "" if it was loaded."""
    killed_by: str = ""
    """The signal or exit code that the child ended with because of it; "" if the child went on."""


def load_each(folder: Path, seconds_each: int = SECONDS_EACH) -> dict[str, LoadResult]:
    """Loads every model in the folder; a child that a model kills is followed by another.

    A child is killed if a model takes more than `seconds_each` of processor time.
    """
    results: dict[str, LoadResult] = {}
    names = sorted(path.name for path in folder.iterdir())
    while remaining := [name for name in names if name not in results]:
        done = _run_child(folder, seconds_each, remaining)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        for line in lines:
            if "reason" in line:
                results[line["name"]] = LoadResult(line["reason"])
        if done.returncode:
            culprit = lines[-1]["name"]
            assert culprit not in results, done.stderr
            results[culprit] = LoadResult(killed_by=_describe(done.returncode))
    return results


def _run_child(
    folder: Path, seconds_each: int, names: list[str]
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", __name__, str(folder), str(seconds_each), *names]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def _describe(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


# --- the child ---------------------------------------------------------------------------------


def _load_all(folder: Path, seconds_each: int, names: list[str]) -> Iterator[dict[str, str]]:
    files = {file.model: file for file in scan(folder)}
    for name in names:
        yield {"name": name}
        # The signal kills the child, since a load that takes longer cannot be stopped.
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
        if prod(shape) > _MAX_ELEMENTS:
            return
        value = "" if spec.datatype == "BYTES" else 0
        feeds[spec.name] = np.full(shape, value, DTYPES[spec.datatype])
    stop = Stop()
    timer = threading.Timer(_RUN_SECONDS, stop.stop)
    timer.start()
    # Zeros may be a wrong input; an error is fine, since the child is still running.
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
