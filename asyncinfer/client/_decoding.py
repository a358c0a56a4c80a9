"""The results of a server as plain Python: labelled rows as they are, tensors as numpy arrays."""

from typing import TYPE_CHECKING, Any

import msgspec

from asyncinfer.client._encoding import JSON_LENGTH_HEADER
from asyncinfer.client._errors import reject_unreadable_result
from asyncinfer.client._protocol import Response
from asyncinfer.tensors.missing_values import NONFINITE_WORDS

if TYPE_CHECKING:
    from asyncinfer.tensors.datatypes import Array


def decode_result(value: Any) -> Any:
    """The result of a job from its decoded JSON, as the methods of the client return it.

    Of one tensor it is the array, of several a dict of them, else the labelled row or list of rows
    with floats for "NaN" and other words. Raises NotAsyncinfer for a tensor that cannot be read.
    """
    if not (isinstance(value, dict) and isinstance(value.get("outputs"), list)):
        return list(map(_with_numbers, value)) if isinstance(value, list) else _with_numbers(value)
    with reject_unreadable_result():
        return unwrap_single(
            {tensor["name"]: _parse_json_tensor(tensor) for tensor in value["outputs"]}
        )


def _with_numbers(row: Any) -> Any:
    """A labelled row with floats for the words, such as "NaN", that stand for them in JSON."""
    shares = row.get("probabilities") if isinstance(row, dict) else None
    if not (isinstance(shares, list) and str in map(type, shares)):
        return row
    numbers = [
        NONFINITE_WORDS.get(share, share) if isinstance(share, str) else share for share in shares
    ]
    return {**row, "probabilities": numbers}


def decode_binary_result(response: Response) -> Any:
    """The same from an answer in the binary layout of the Open Inference Protocol.

    Raises NotAsyncinfer if it cannot be read.
    """
    with reject_unreadable_result():
        return _parse_binary_tensors(response)


def _parse_binary_tensors(response: Response) -> Any:
    """The array, or a dict of arrays by name; raises what `reject_unreadable_result` turns."""
    at = int(response.headers[JSON_LENGTH_HEADER])
    arrays = {}
    view = memoryview(response.content)
    for tensor in msgspec.json.decode(view[:at])["outputs"]:
        end = at + tensor["parameters"]["binary_data_size"]
        arrays[tensor["name"]] = _parse_binary_tensor(
            view[at:end], tensor["datatype"], tensor["shape"]
        )
        at = end
    return unwrap_single(arrays)


def unwrap_single(arrays: dict[str, "Array"]) -> Any:
    """The array itself if there is only one, else the same dict; {} stays as it is."""
    return next(iter(arrays.values())) if len(arrays) == 1 else arrays


def _parse_json_tensor(tensor: dict[str, Any]) -> "Array":
    """The array of a tensor in JSON, whose `data` is flat."""
    import numpy as np

    from asyncinfer.tensors.datatypes import DTYPES, FLOATS

    dtype, data = DTYPES[tensor["datatype"]], tensor["data"]
    if tensor["datatype"] in FLOATS:
        # float() also reads "NaN", "Infinity" and "-Infinity", which stand for numbers in JSON.
        return np.array([float(value) for value in data]).astype(dtype).reshape(tensor["shape"])
    return np.array(data, dtype=dtype).reshape(tensor["shape"])


def _parse_binary_tensor(content: memoryview, datatype: str, shape: list[int]) -> "Array":
    """A writable array of the tensor's bytes; strings are `str` objects."""
    import numpy as np

    from asyncinfer.tensors.datatypes import DTYPES

    if datatype == "BYTES":
        return np.array(_parse_strings(content), dtype=object).reshape(shape)
    dtype = DTYPES[datatype]
    # A copy, so that it is writable and does not keep the whole answer in memory.
    return np.frombuffer(content, dtype.newbyteorder("<")).astype(dtype).reshape(shape)


def _parse_strings(content: memoryview) -> list[str]:
    """Strings, each after its length in 4 bytes, little-endian."""
    strings = []
    at = 0
    while at < len(content):
        end = at + 4 + int.from_bytes(content[at : at + 4], "little")
        strings.append(bytes(content[at + 4 : end]).decode())
        at = end
    return strings
