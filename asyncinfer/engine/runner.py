"""One run of a loaded model: what ONNX Runtime takes and gives, stopped and failing."""

import ctypes
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import ml_dtypes
import numpy as np

from asyncinfer.engine.runtime import ort
from asyncinfer.errors import JobError, ModelFailed, OutOfMemory
from asyncinfer.tensors.datatypes import Array, Feeds

_LOG_NOTHING: Final = 4
_ONNX_BFLOAT16: Final = 16
_BFLOAT16: Final = np.dtype(ml_dtypes.bfloat16)


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


class Runner:
    """The sessions of one model, one per device, taken in turn; threads may share it."""

    def __init__(self, sessions: Sequence[ort.InferenceSession], outputs: Sequence[str]) -> None:
        self._sessions = sessions
        self._turn = itertools.count()
        self._outputs = list(outputs)
        types = {node.name: node.type for node in sessions[0].get_outputs()}
        self._bfloat16 = any(
            "bfloat16" in one
            for one in (*(node.type for node in _inputs(sessions[0])), *types.values())
        )
        self.maps = [
            at for at, name in enumerate(outputs) if types.get(name, "").startswith("seq(map")
        ]
        self.keys: tuple[int | str, ...] = ()
        """The keys of those maps, by column of the matrix that is made of them."""

    def run(self, feeds: Feeds, stop: Stop) -> list[Array]:
        """Every output for these inputs, maps as a matrix.

        Raises ModelFailed when the model refuses this input, OutOfMemory when another try may
        succeed, Stopped when `stop` was called before the run was done.
        """
        outputs: list[Any] = self.run_raw(feeds, stop)
        for at in self.maps:
            outputs[at] = _matrix(outputs[at], self.keys)
        return outputs

    def run_raw(self, feeds: Feeds, stop: Stop) -> list[Any]:
        if stop.stopped:
            raise Stopped
        session = self._sessions[0]
        if len(self._sessions) > 1:
            session = self._sessions[next(self._turn) % len(self._sessions)]
        try:
            if self._bfloat16:
                return _run_bfloat16(session, self._outputs, feeds, stop.options)
            outputs: list[Any] = session.run(self._outputs, feeds, stop.options)
        except Exception as error:  # ONNX Runtime's exceptions have no base of their own
            # Its answer to a terminated run is a generic failure: only our flag tells.
            if stop.stopped:
                raise Stopped from error
            raise _run_error(error) from error
        return outputs


def _inputs(session: ort.InferenceSession) -> list[Any]:
    return [*session.get_inputs(), *session.get_overridable_initializers()]


def _matrix(maps: Sequence[Mapping[int | str, float]], keys: Sequence[int | str]) -> Array:
    try:
        rows = [[row[key] for key in keys] for row in maps]
    except KeyError as error:
        raise ModelFailed("the model gave scores for other classes than when it loaded") from error
    return np.array(rows, np.float32).reshape(len(rows), len(keys))


# numpy has no bfloat16 that ONNX Runtime knows, so its values travel as OrtValues of 16 bits.


def _run_bfloat16(
    session: ort.InferenceSession, names: Sequence[str], feeds: Feeds, options: ort.RunOptions
) -> list[Any]:
    # ONNX Runtime reads the memory of these arrays; they must outlive the run.
    kept = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in feeds.items()}
    values = {name: _ort_value(array) for name, array in kept.items()}
    return [_array(value) for value in session.run_with_ort_values(names, values, options)]


def _ort_value(array: Array) -> ort.OrtValue:
    if array.dtype != _BFLOAT16:
        return ort.OrtValue.ortvalue_from_numpy(array)
    bits = array.view(np.uint16)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _ONNX_BFLOAT16)


def _array(value: ort.OrtValue) -> Array:
    if not value.is_tensor() or value.data_type() != "tensor(bfloat16)":
        plain: Array = value.numpy()
        return plain
    shape = tuple(value.shape())
    if 0 in shape:
        return np.empty(shape, _BFLOAT16)
    buffer = (ctypes.c_uint16 * math.prod(shape)).from_address(value.data_ptr())
    bits = np.frombuffer(buffer, np.uint16).copy()
    array: Array = bits.view(_BFLOAT16).reshape(shape)
    return array


# --- what went wrong ---------------------------------------------------------------------------

_NO_MEMORY: Final = re.compile(r"Failed to allocate memory|bad.alloc|bad allocation")
_WHERE: Final = re.compile(r"\] : -?\d+ : (\w+) : (?:.*? running (\w+) node\. Name:'([^']*)')?")


def _run_error(error: Exception) -> JobError:
    if isinstance(error, UnicodeEncodeError):
        return ModelFailed("a string of the input has half a surrogate pair, which UTF-8 has not")
    if isinstance(error, UnicodeDecodeError):
        return ModelFailed("the model gave a string that is not UTF-8")
    # Only code and node: the rest of the message may quote values of the input.
    found = _WHERE.search(str(error))
    code, operator, node = found.groups() if found else (type(error).__name__, None, None)
    where = f" in {operator} {node}".rstrip() if operator else ""
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        return OutOfMemory(f"not enough memory to run the model{where}")
    return ModelFailed(f"ONNX Runtime refused the input: {code}{where}")
