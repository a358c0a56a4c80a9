"""The errors of rows, in the same words for every format of the input."""

import re
from typing import Any, Final

from asyncinfer.cli.output import counted
from asyncinfer.client import Model
from asyncinfer.errors import AsyncinferError, InputError, RequestError

_VALUE_POINTER: Final = re.compile(r"(?:/data/\d+)?/?([\d/]*)\Z")
_TENSOR_POINTER: Final = re.compile(r"/inputs/(\d+)/(datatype|shape)")
_ROW_IN_JOB: Final = re.compile(r"\Arow \d+ (?=has )")


def error_text(error: AsyncinferError, value: Any, model: Model) -> str:
    """The error of a row with this value, without its number in its job, which says nothing here.

    Several faults are joined by semicolons.
    """
    faults = error.faults if isinstance(error, RequestError) else ()
    texts = dict.fromkeys(_fault_text(fault, value, model) for fault in faults)
    return "; ".join(texts) or error.detail


def _fault_text(fault: InputError, value: Any, model: Model) -> str:
    """The detail of a fault after its place in the row, as `value at 2: ...`."""
    if match := _TENSOR_POINTER.match(fault.pointer):
        return _tensor_fault_text(int(match[1]), match[2], value, model)
    if fault.pointer == "/data" and not hasattr(value, "dtype"):
        return _no_row_text(value, model)
    detail = _ROW_IN_JOB.sub("", fault.detail)
    match = _VALUE_POINTER.fullmatch(fault.pointer)
    place = match[1] if match else fault.pointer.removeprefix("/inputs")
    return f"value at {place}: {detail}" if place else detail


def _tensor_fault_text(index: int, field: str, value: Any, model: Model) -> str:
    """What is wrong with a tensor of the row, as the server says it of rows in JSON.

    `index` is its place among those that were sent: of an array there is one, and of a dict one for
    each key. `field` is `shape` or `datatype`.
    """
    import numpy as np

    spec, subject, given = model.inputs[0], "", value
    if isinstance(value, dict):
        name, given = list(value.items())[index]
        spec, subject = next(spec for spec in model.inputs if spec.name == name), f"`{name}` "
    array = np.asarray(given)
    if field == "datatype":
        kind = "strings" if array.dtype.kind in "SU" else array.dtype.name
        return f"{subject}has {kind}, {model.model} takes {spec.datatype}"
    dims = list((spec.shape or ())[1:])
    if array.ndim == len(dims) == 1:
        return f"{subject}has {counted(len(array), 'number')}, {model.model} takes {dims[0]}"
    return f"{subject}has shape {list(array.shape)}, {model.model} takes {dims}"


def _no_row_text(value: Any, model: Model) -> str:
    """The error of a value that is no row of the model at all."""
    if len(model.inputs) == 1:
        shape = model.inputs[0].shape or ()
        given = "a list" if isinstance(value, list) else "a single value"
        takes = f"a list of shape {list(shape[1:])}" if shape else "a single value, as in NDJSON"
        return f"is {given}, {model.model} takes {takes}"
    names = ", ".join(repr(spec.name) for spec in model.inputs)
    return (
        f"{model.model} takes several inputs; give a table with a column, or JSON objects with a "
        f"key, for each of {names}"
    )
