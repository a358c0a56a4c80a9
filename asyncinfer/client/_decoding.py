"""A server's answer as plain Python: labelled rows as they are, tensors as numpy arrays."""

from typing import TYPE_CHECKING, Any

import msgspec

from asyncinfer.client._encoding import LENGTH
from asyncinfer.client._errors import strange_refused
from asyncinfer.client._protocol import Response
from asyncinfer.tensors.missing_values import WORDS

if TYPE_CHECKING:
    from asyncinfer.tensors.datatypes import Array


def result_of(value: Any) -> Any:
    """A job's result. Of one tensor the array, of several a dict of them, else the JSON value."""
    if not (isinstance(value, dict) and isinstance(value.get("outputs"), list)):
        return list(map(_labelled, value)) if isinstance(value, list) else _labelled(value)
    with strange_refused("A result"):
        return unwrapped({one["name"]: _array_of_json(one) for one in value["outputs"]})


def _labelled(row: Any) -> Any:
    """A row of a labelled classifier with numbers for the words that JSON has for some."""
    shares = row.get("probabilities") if isinstance(row, dict) else None
    if not (isinstance(shares, list) and str in map(type, shares)):
        return row
    numbers = [WORDS.get(one, one) if isinstance(one, str) else one for one in shares]
    return {**row, "probabilities": numbers}


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

    from asyncinfer.tensors.datatypes import DTYPES, FLOATS

    dtype, data = DTYPES[one["datatype"]], one["data"]
    if one["datatype"] in FLOATS:
        # Python reads the words of `gaps` as the numbers that they stand for.
        return np.array([float(value) for value in data]).astype(dtype).reshape(one["shape"])
    return np.array(data, dtype=dtype).reshape(one["shape"])


def _array_of_bytes(content: memoryview, datatype: str, shape: list[int]) -> "Array":
    import numpy as np

    from asyncinfer.tensors.datatypes import DTYPES

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
