"""A new file is first loaded and run in a child process, which it may take down."""

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
"""Of address space, for Python, numpy and ONNX Runtime; what they use of it is far less."""

_TIMES_FILE: Final = 4
"""A model is read, copied and optimized while it is loaded."""


class _Order(Struct, frozen=True):
    model: str
    version: str
    path: str
    config: ModelConfig
    memory_bytes: int
    seconds: float
    allow_custom_ops: bool


class _Verdict(Struct, frozen=True):
    problem: str = ""


async def trial(
    file: ModelFile,
    size_bytes: int,
    *,
    allow_custom_ops: bool = False,
    seconds: float = TRIAL_SECONDS,
) -> str:
    """Why this version must not be loaded here; empty when it may.

    It runs on the CPU, since an accelerator's memory is not the child's to try out.
    """
    cpu = SessionOptions(custom_ops=file.config.session.custom_ops)
    order = _Order(
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
            said, _ = await child.communicate(msgspec.json.encode(order))
    except TimeoutError:
        return f"{file.shown}: took longer than {seconds:g} s to load and run once"
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
    return _judged(file, await child.wait(), said)


def _judged(file: ModelFile, code: int, said: bytes) -> str:
    try:
        return msgspec.json.decode(said, type=_Verdict).problem
    except msgspec.DecodeError:
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"{file.shown}: the process that tried to load it and run it once ended with {how}"


# --- the child -------------------------------------------------------------------------------


def main() -> int:
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=_Order)
    _limit(order)
    file = ModelFile(order.model, order.version, Path(order.path), order.config)
    problem = _problem(file, allow_custom_ops=order.allow_custom_ops)
    sys.stdout.buffer.write(msgspec.json.encode(_Verdict(problem)))
    sys.stdout.flush()
    return 0


def _limit(order: _Order) -> None:
    if sys.platform != "linux":
        return
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (order.memory_bytes, order.memory_bytes))
    # It ends too when the worker that waits for it is gone.
    cpu_seconds = int(order.seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _problem(file: ModelFile, *, allow_custom_ops: bool) -> str:
    # Only here: the worker's own process imports this module for `trial`.
    from asyncinfer.engine import Engine, Stop

    try:
        engine = Engine.load(file, intra_op_threads=1, allow_custom_ops=allow_custom_ops)
        engine.run(_zeros(engine.signature), Stop())
    except ModelRefused as error:
        return error.detail
    except (OutOfMemory, MemoryError):
        return f"{file.shown}: there is not enough memory to load it and run it once"
    except ModelFailed:
        # Zeros may be no input for this model.
        return ""
    return ""


def _zeros(signature: Signature) -> Feeds:
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
