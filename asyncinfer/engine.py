"""ONNX Runtime sessions: load, prove batching, run, stop (the only door to onnxruntime).

Everything here blocks; call it from a thread. `Engine.run` releases the GIL.
"""

import hashlib
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import msgspec
import numpy as np

# From 1.29 on it tells its maker, unless told not to, which models it loads. Read at import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

from asyncinfer import batching, models
from asyncinfer.batching import Probe, Verdict
from asyncinfer.errors import InvalidInput, JobError, ModelFailed, ModelRefused, OutOfMemory
from asyncinfer.models import ModelFile, Signature
from asyncinfer.tensors import DTYPES, Array, Feeds, TensorSpec

PROBE_SECONDS: Final = 5.0
"""How long a model may take to show whether its rows can be stacked."""

MAX_EXAMPLE_ELEMENTS: Final = 1000
"""A longer example is not made up: nobody would paste it, and every announcement carries it."""

_LOG_ERRORS: Final = 3
_LOG_NOTHING: Final = 4

_DATATYPES: Final[dict[str, str]] = {
    "tensor(bool)": "BOOL",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}


class Stopped(Exception):
    """The run ended because its `Stop` was asked to, not because of model or input."""


class Stop:
    """Ends one run from any thread, at its next kernel; one huge kernel runs on."""

    def __init__(self) -> None:
        self.stopped = False
        self.options = ort.RunOptions()
        # We report what went wrong; ONNX Runtime's own line would show values of the input.
        self.options.log_severity_level = _LOG_NOTHING

    def stop(self) -> None:
        self.stopped = True
        self.options.terminate = True


class Engine:
    """One version of a model, loaded; threads may share it."""

    def __init__(
        self,
        session: ort.InferenceSession,
        signature: Signature,
        timeout_seconds: float | None = None,
    ) -> None:
        self._session = session
        self.signature = signature
        self.timeout_seconds = timeout_seconds
        """How long one run may take, where `model.toml` says so."""

    @classmethod
    def load(
        cls, file: ModelFile, *, intra_op_threads: int, probe_seconds: float = PROBE_SECONDS
    ) -> "Engine":
        """Raises ModelRefused with the reason; probes the model where batching is in question."""
        if file.problem:
            raise ModelRefused(f"{file.shown}: {file.problem}")
        session, sha256 = _open(file, intra_op_threads)
        signature = _describe(file, session, sha256)
        verdict = _verdict(cls(session, signature), file, probe_seconds)
        return cls(
            session,
            msgspec.structs.replace(signature, batched=verdict.batched, batching=verdict.reason),
            file.config.limits.timeout_seconds,
        )

    def run(self, feeds: Feeds, stop: Stop) -> list[Array]:
        """Every output, in the signature's order, for these inputs.

        Raises ModelFailed when the model refuses this input, OutOfMemory when another try may
        succeed, Stopped when `stop` was called before the run was done.
        """
        if stop.stopped:
            raise Stopped
        try:
            outputs: list[Array] = self._session.run(None, feeds, stop.options)
        except Exception as error:  # ONNX Runtime's exceptions have no base of their own
            # Its answer to a terminated run is a generic failure: only our flag tells.
            if stop.stopped:
                raise Stopped from error
            raise _run_error(error) from error
        return outputs


# --- load --------------------------------------------------------------------------------------


def _open(file: ModelFile, intra_op_threads: int) -> tuple[ort.InferenceSession, str]:
    try:
        with file.path.open("rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        session = ort.InferenceSession(
            str(file.path), _session_options(intra_op_threads), providers=["CPUExecutionProvider"]
        )
    except OSError as error:
        raise ModelRefused(f"{file.shown}: cannot be read: {error.strerror}") from error
    except Exception as error:  # ONNX Runtime's exceptions have no base of their own
        raise ModelRefused(f"{file.shown}: {_load_problem(error, file)}") from error
    return session, sha256


def _session_options(intra_op_threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = intra_op_threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _LOG_ERRORS
    # A tiny model at 50 runs a second took 0.85 cores with spinning, 0.02 without.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


_PREAMBLE: Final = re.compile(r"\[ONNXRuntimeError\] : -?\d+ : \w+ : (Load model from .* failed:)?")


def _load_problem(error: Exception, file: ModelFile) -> str:
    # ONNX Runtime names files by absolute paths, which are nobody's business.
    text = _PREAMBLE.sub("", str(error))
    for folder in (file.path.parent, file.path.parent.resolve()):
        text = text.replace(f"{folder}/", "")
    return f"ONNX Runtime cannot load it: {(text or type(error).__name__).splitlines()[0]}"


def _describe(file: ModelFile, session: ort.InferenceSession, sha256: str) -> Signature:
    config = file.config
    inputs = _specs(session.get_inputs(), file)
    outputs = _specs(session.get_outputs(), file)
    _check_labels(config.labels, outputs, file)
    return Signature(
        model=file.model,
        version=file.version,
        sha256=sha256,
        inputs=inputs,
        outputs=outputs,
        labels=config.labels,
        description=config.description or session.get_modelmeta().description,
        max_rows=config.limits.max_rows_per_job or models.MAX_ROWS,
        example=_made_up_example(inputs) if config.example is None else config.example,
    )


def _specs(nodes: Sequence[Any], file: ModelFile) -> tuple[TensorSpec, ...]:
    for node in nodes:
        if node.type not in _DATATYPES:
            hint = "; export it with zipmap off" if node.type.startswith("seq(map") else ""
            raise ModelRefused(
                f"{file.shown}: `{node.name}` is a {node.type}, which cannot be served{hint}"
            )
    return tuple(TensorSpec(node.name, _DATATYPES[node.type], tuple(node.shape)) for node in nodes)


def _check_labels(labels: Sequence[str], outputs: Sequence[TensorSpec], file: ModelFile) -> None:
    widths = [spec.shape[1] for spec in outputs if len(spec.shape) == 2]
    if not labels or any(width == len(labels) or not isinstance(width, int) for width in widths):
        return
    raise ModelRefused(
        f"{file.model}/model.toml: {len(labels)} labels, but no output of shape "
        f"[batch, {len(labels)}]"
    )


def _example_input(file: ModelFile, signature: Signature) -> Array | None:
    """The input that `model.toml` shows; it must be one that a request may have."""
    if file.config.example is None:
        return None
    try:
        return models.check_data(msgspec.json.encode(file.config.example), signature)
    except InvalidInput as error:
        raise ModelRefused(f"{file.model}/model.toml: example: {error.detail}") from error


def _made_up_example(inputs: Sequence[TensorSpec]) -> object:
    if len(inputs) != 1:
        return None
    shape = [dim if isinstance(dim, int) else 1 for dim in inputs[0].shape]
    if np.prod(shape) > MAX_EXAMPLE_ELEMENTS:
        return None
    element = "text" if inputs[0].datatype == "BYTES" else 0
    return np.full(shape, element, DTYPES[inputs[0].datatype]).tolist()


# --- run ---------------------------------------------------------------------------------------

_NO_MEMORY: Final = re.compile(r"Failed to allocate memory|bad.alloc|bad allocation")
_WHERE: Final = re.compile(r"\] : -?\d+ : (\w+) : (?:.*? running (\w+) node\. Name:'([^']*)')?")


def _run_error(error: Exception) -> JobError:
    # Only code and node: the rest of the message may quote values of the input.
    found = _WHERE.search(str(error))
    code, operator, node = found.groups() if found else (type(error).__name__, None, None)
    where = f" in {operator} {node}".rstrip() if operator else ""
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        return OutOfMemory(f"not enough memory to run the model{where}")
    return ModelFailed(f"ONNX Runtime refused the input: {code}{where}")


# --- may rows be stacked -----------------------------------------------------------------------


def _verdict(engine: Engine, file: ModelFile, probe_seconds: float) -> Verdict:
    forced = file.config.batching.enabled
    inputs, outputs = engine.signature.inputs, engine.signature.outputs
    example = _example_input(file, engine.signature)
    obstacle = batching.obstacle(inputs, outputs)
    if forced is False:
        return Verdict(False, "off: model.toml says so")
    if forced and obstacle:
        raise ModelRefused(f"{file.model}/model.toml: batching.enabled = true, but {obstacle}")
    if forced:
        return Verdict(True, "on: model.toml says so, not probed")
    reason = obstacle or batching.doubt(inputs, outputs)
    return Verdict(False, f"off: {reason}") if reason else _probe(engine, example, probe_seconds)


def _probe(engine: Engine, example: Array | None, seconds: float) -> Verdict:
    with _deadline(seconds) as stop:
        try:
            probes, failure = _run_probes(engine, example, stop)
        except Stopped:
            return Verdict(False, f"off: probing took longer than {seconds:g} s")
        except JobError as error:
            return Verdict(False, f"off: rows that ran alone failed together: {error.detail}")
    if not probes:
        return Verdict(False, f"off: no probe row could be run: {failure}")
    return batching.judge(probes, engine.signature.outputs)


def _run_probes(engine: Engine, example: Array | None, stop: Stop) -> tuple[list[Probe], str]:
    probes, failure = [], ""
    for feeds in batching.probe_feeds(engine.signature.inputs, example):
        try:
            alone = [engine.run(row, stop) for row in _rows(feeds)]
        except JobError as error:
            # Random numbers may be no input for this model; that proves nothing either way.
            failure = error.detail
            continue
        probes.append(Probe(alone, engine.run(feeds, stop)))
    return probes, failure


def _rows(feeds: Feeds) -> list[Feeds]:
    return [
        {name: data[row : row + 1] for name, data in feeds.items()}
        for row in range(batching.PROBE_ROWS)
    ]


@contextmanager
def _deadline(seconds: float) -> Iterator[Stop]:
    stop = Stop()
    timer = threading.Timer(seconds, stop.stop)
    timer.start()
    try:
        yield stop
    finally:
        timer.cancel()
