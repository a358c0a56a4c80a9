"""A server's answer as plain Python: labelled rows as they are, tensors as numpy arrays."""

from typing import TYPE_CHECKING, Any

import msgspec

from asyncinfer.client._errors import strange_refused
from asyncinfer.client._inputs import LENGTH
from asyncinfer.client._wire import Response

if TYPE_CHECKING:
    from asyncinfer.tensors import Array


def result_of(value: Any) -> Any:
    """A job's result. Of one tensor the array, of several a dict of them, else the JSON value."""
    if not (isinstance(value, dict) and isinstance(value.get("outputs"), list)):
        return value
    with strange_refused("A result"):
        return unwrapped({one["name"]: _array_of_json(one) for one in value["outputs"]})


def result_of_bytes(response: Response) -> Any:
    """The same, of an answer in the binary layout of the Open Inference Protocol."""
    with strange_refused("A result"):
        return _arrays_of_bytes(response)


def _arrays_of_bytes(response: Response) -> Any:
    at = int(response.headers[LENGTH])
    arrays = {}
    view = memoryview(response.content)
    for one in msgspec.json.decode(view[:at])["outputs"]:
        end = at + one["parameters"]["binary_data_size"]
        arrays[one["name"]] = _array_of_bytes(view[at:end], one["datatype"], one["shape"])
        at = end
    return unwrapped(arrays)


def unwrapped(arrays: dict[str, "Array"]) -> Any:
    return next(iter(arrays.values())) if len(arrays) == 1 else arrays


def _array_of_json(one: dict[str, Any]) -> "Array":
    import numpy as np

    from asyncinfer.tensors import DTYPES, FLOATS

    dtype, data = DTYPES[one["datatype"]], one["data"]
    if one["datatype"] in FLOATS:
        # Numbers that JSON has not are the strings "NaN", "Infinity" and "-Infinity".
        return np.array([float(value) for value in data]).astype(dtype).reshape(one["shape"])
    return np.array(data, dtype=dtype).reshape(one["shape"])


def _array_of_bytes(content: memoryview, datatype: str, shape: list[int]) -> "Array":
    import numpy as np

    from asyncinfer.tensors import DTYPES

    if datatype == "BYTES":
        return np.array(_texts(content), dtype=object).reshape(shape)
    dtype = DTYPES[datatype]
    # A copy, which can be written to and does not hold the whole answer.
    return np.frombuffer(content, dtype.newbyteorder("<")).astype(dtype).reshape(shape)


def _texts(content: memoryview) -> list[str]:
    texts = []
    at = 0
    while at < len(content):
        end = at + 4 + int.from_bytes(content[at : at + 4], "little")
        texts.append(bytes(content[at + 4 : end]).decode())
        at = end
    return texts
