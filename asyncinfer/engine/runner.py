"""Running a loaded model: inputs and outputs of ONNX Runtime, stopping a run, and its errors."""

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
    """The run ended because its `Stop` was set, not because of the model or its input."""


class Stop:
    """Stops one run from any thread. The run ends before its next kernel: a kernel under way is
    finished."""

    def __init__(self) -> None:
        self.stopped = False
        self.options = ort.RunOptions()
        # The error is reported here; ONNX Runtime's own log line would show values of the input.
        self.options.log_severity_level = _LOG_NOTHING

    def stop(self) -> None:
        """Ends the run, or a later one with this `Stop` before it begins; returns at once. Has no
        effect on a run that is done."""
        self.stopped = True
        self.options.terminate = True


class Runner:
    """Runs one model in its sessions, one per device, in turn; threads may share it."""

    def __init__(self, sessions: Sequence[ort.InferenceSession], outputs: Sequence[str]) -> None:
        """All sessions are of the same model; `outputs` are the names of the outputs to compute, in
        order."""
        self._sessions = sessions
        self._turn = itertools.count()
        self._outputs = list(outputs)
        session = sessions[0]
        self.provider = str(session.get_providers()[0])
        """The name of the execution provider that runs what it can; others run the rest."""
        types = {node.name: node.type for node in session.get_outputs()}
        inputs = (*session.get_inputs(), *session.get_overridable_initializers())
        kinds = (*(node.type for node in inputs), *types.values())
        self._bfloat16 = any("bfloat16" in kind for kind in kinds)
        self.maps = [
            at for at, name in enumerate(outputs) if types.get(name, "").startswith("seq(map")
        ]
        """The outputs that are maps of scores, by position."""
        self.keys: tuple[int | str, ...] = ()
        """The keys of those maps, in the order of the columns of the matrix made from them."""

    def run(self, feeds: Feeds, stop: Stop) -> list[Array]:
        """Runs the model; returns all outputs in order, a map of scores as a matrix with a column
        for each key. Blocks, so call it in a thread.

        Raises ModelFailed when the model refuses this input, OutOfMemory when another try may
        succeed, Stopped when `stop` was set before the run was done.
        """
        outputs: list[Any] = self.run_raw(feeds, stop)
        for at in self.maps:
            outputs[at] = _matrix_of_maps(outputs[at], self.keys)
        return outputs

    def run_raw(self, feeds: Feeds, stop: Stop) -> list[Any]:
        """As `run`, with maps as ONNX Runtime gives them: a list with a dict for each row."""
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
            # It raises a generic failure for a terminated run, so only our flag tells.
            if stop.stopped:
                raise Stopped from error
            raise _run_error(error) from error
        return outputs


def _matrix_of_maps(maps: Sequence[Mapping[int | str, float]], keys: Sequence[int | str]) -> Array:
    """FP32 of shape (rows, keys); raises ModelFailed if a map lacks a key."""
    try:
        rows = [[row[key] for key in keys] for row in maps]
    except KeyError as error:
        raise ModelFailed("the model gave scores for other classes than when it loaded") from error
    return np.array(rows, np.float32).reshape(len(rows), len(keys))


# ONNX Runtime knows no bfloat16 of numpy, so such values are passed as OrtValues of 16 bits.


def _run_bfloat16(
    session: ort.InferenceSession, names: Sequence[str], feeds: Feeds, options: ort.RunOptions
) -> list[Any]:
    """Runs a model that has bfloat16 inputs or outputs; returns the outputs in order. Raises what
    ONNX Runtime raises."""
    # ONNX Runtime reads the memory of these arrays; they must outlive the run.
    contiguous = {
        name: np.ascontiguousarray(array).reshape(array.shape) for name, array in feeds.items()
    }
    values = {name: _ort_value(array) for name, array in contiguous.items()}
    return [_array_of(value) for value in session.run_with_ort_values(names, values, options)]


def _ort_value(array: Array) -> ort.OrtValue:
    """The array as ONNX Runtime takes it; bfloat16 as its 16 bits."""
    if array.dtype != _BFLOAT16:
        return ort.OrtValue.ortvalue_from_numpy(array)
    bits = array.view(np.uint16)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _ONNX_BFLOAT16)


def _array_of(value: ort.OrtValue) -> Array:
    """The value as an array; bfloat16 as a copy in the type of ml_dtypes."""
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


# --- errors ------------------------------------------------------------------------------------

_NO_MEMORY: Final = re.compile(r"Failed to allocate memory|bad.alloc|bad allocation")
_ERROR_PLACE: Final = re.compile(
    r"\] : -?\d+ : (\w+) : (?:.*? running (\w+) node\. Name:'([^']*)')?"
)


def _run_error(error: Exception) -> JobError:
    """Makes the error of a failed run: OutOfMemory or ModelFailed, without values of the input."""
    if isinstance(error, UnicodeEncodeError):
        return ModelFailed("a string of the input has half a surrogate pair, which UTF-8 has not")
    if isinstance(error, UnicodeDecodeError):
        return ModelFailed("the model gave a string that is not UTF-8")
    # Only the code and the node are kept: the rest of the message may quote values of the input.
    found = _ERROR_PLACE.search(str(error))
    code, operator, node = found.groups() if found else (type(error).__name__, None, None)
    where = f" in {operator} {node}".rstrip() if operator else ""
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        return OutOfMemory(f"not enough memory to run the model{where}")
    return ModelFailed(f"ONNX Runtime refused the input: {code}{where}")
