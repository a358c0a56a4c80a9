"""A trial of a new file in a child process, which it may crash or fill with memory."""

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from msgspec import Struct

from asyncinfer.errors import ModelFailed, ModelRefused, OutOfMemory
from asyncinfer.models.config import ModelConfig, SessionOptions
from asyncinfer.models.folder import ModelFile
from asyncinfer.models.signature import Signature
from asyncinfer.tensors.datatypes import DTYPES, Feeds, dims

TRIAL_SECONDS: Final = 60.0
_BASE_BYTES: Final = 3 << 30
"""Address space for Python, numpy and ONNX Runtime; the memory that they use is far less."""

_TIMES_FILE: Final = 4
"""How many times its file's size a model may take, as it is read, copied and optimized."""


class _TrialRequest(Struct, frozen=True):
    model: str
    version: str
    path: str
    config: ModelConfig
    memory_bytes: int
    seconds: float
    allow_custom_ops: bool


class _TrialResult(Struct, frozen=True):
    problem: str = ""


async def try_in_child(
    file: ModelFile,
    size_bytes: int,
    *,
    allow_custom_ops: bool = False,
    seconds: float = TRIAL_SECONDS,
) -> str:
    """Loads a version in a child process and runs it once, within limits on time and memory.
    `size_bytes` is the size of its files, which decides how much memory it may take.

    Returns why it must not be loaded here, empty if it may; raises nothing for a bad file. The
    child uses the CPU only: the memory of an accelerator belongs to the models that are served.
    """
    cpu = SessionOptions(custom_ops=file.config.session.custom_ops)
    request = _TrialRequest(
        file.model,
        file.version,
        str(file.path),
        msgspec.structs.replace(file.config, session=cpu),
        _BASE_BYTES + _TIMES_FILE * size_bytes,
        seconds,
        allow_custom_ops,
    )
    safe = ("-P",) if sys.flags.safe_path else ()
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, *safe, "-m", __name__),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    try:
        async with asyncio.timeout(seconds):
            output, _ = await child.communicate(msgspec.json.encode(request))
    except TimeoutError:
        return f"{file.display_path}: took longer than {seconds:g} s to load and run once"
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
    return _read_result(file, await child.wait(), output)


def _read_result(file: ModelFile, code: int, output: bytes) -> str:
    """The problem that the child has reported, empty if there is none; else that it died, and how.
    `code` is its exit code, negative for a signal."""
    try:
        return msgspec.json.decode(output, type=_TrialResult).problem
    except msgspec.DecodeError:
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        path = file.display_path
        return f"{path}: the process that tried to load it and run it once ended with {how}"


# --- the child -------------------------------------------------------------------------------


def main() -> int:
    """The child: reads a trial request from stdin and writes the result to stdout; returns 0."""
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=_TrialRequest)
    _set_limits(request)
    file = ModelFile(request.model, request.version, Path(request.path), request.config)
    problem = _find_problem(file, allow_custom_ops=request.allow_custom_ops)
    sys.stdout.buffer.write(msgspec.json.encode(_TrialResult(problem)))
    sys.stdout.flush()
    return 0


def _set_limits(request: _TrialRequest) -> None:
    """Limits the memory and CPU time of this process; only on Linux."""
    if sys.platform != "linux":
        return
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (request.memory_bytes, request.memory_bytes))
    # So that it ends also when the worker that waits for it has died.
    cpu_seconds = int(request.seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _find_problem(file: ModelFile, *, allow_custom_ops: bool) -> str:
    """Loads the file and runs it once on zeros; returns what is wrong with it, or an empty text,
    also if it refuses the zeros."""
    # Imported here, since only the child needs it.
    from asyncinfer.engine import Engine, Stop

    try:
        engine = Engine.load(file, intra_op_threads=1, allow_custom_ops=allow_custom_ops)
        engine.run(_zeros(engine.signature), Stop())
    except ModelRefused as error:
        return error.detail
    except (OutOfMemory, MemoryError):
        return f"{file.display_path}: there is not enough memory to load it and run it once"
    except ModelFailed:
        # Zeros may be no valid input for this model, which is no problem of its file.
        return ""
    return ""


def _zeros(signature: Signature) -> Feeds:
    """Inputs of zeros and empty strings, with 1 for each dimension of unknown size; without
    optional ones."""
    return {
        spec.name: np.full(
            [dim if isinstance(dim, int) else 1 for dim in dims(spec)],
            "" if spec.datatype == "BYTES" else 0,
            DTYPES[spec.datatype],
        )
        for spec in signature.inputs
        if not spec.optional
    }


if __name__ == "__main__":
    sys.exit(main())
