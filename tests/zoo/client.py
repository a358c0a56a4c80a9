"""A client of the tensor requests, which shares no code with the server."""

import json
import struct
from collections.abc import Sequence
from math import prod
from typing import Any, Final, Literal, TypeAlias

import httpx2
import ml_dtypes
import numpy as np

from asyncinfer.tensors.datatypes import Array, Feeds
from tests.zoo.bare import Answers

Form: TypeAlias = Literal["json", "binary"]

_DTYPES: Final[dict[str, Any]] = {
    "BOOL": np.bool_,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "FP16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "FP32": np.float32,
    "FP64": np.float64,
    "BYTES": np.object_,
}
_NAMES: Final = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_LENGTH: Final = "Inference-Header-Content-Length"
_MEDIA_TYPES: Final[dict[Form, str]] = {
    "json": "application/json",
    "binary": "application/octet-stream",
}


async def infer(
    http: httpx2.AsyncClient, url: str, model: str, feeds: Feeds, form: Form
) -> Answers | None:
    """Submits, waits, fetches the result in the same form; None where the job failed."""
    headers, body = _request(feeds, form)
    submitted = await http.post(f"{url}/predict/{model}", content=body, headers=headers)
    assert submitted.status_code == 202, submitted.text
    job = f"{url}/job/{submitted.json()['job_id']}"
    state = (await http.get(f"{job}?wait=50")).json()
    if state["status"] == "failed":
        assert state["error"]["code"] == "model_failed", state["error"]
        return None
    assert state["status"] == "completed", state
    result = await http.get(f"{job}/result", headers={"Accept": _MEDIA_TYPES[form]})
    assert result.status_code == 200, result.text
    return _answers(result)


def _request(feeds: Feeds, form: Form) -> tuple[dict[str, str], bytes]:
    inputs: list[dict[str, Any]] = []
    tail = b""
    for name, array in feeds.items():
        datatype = _NAMES[array.dtype]
        one: dict[str, Any] = {"name": name, "shape": array.shape, "datatype": datatype}
        if form == "binary":
            content = _bytes_of(array)
            one["parameters"] = {"binary_data_size": len(content)}
            tail += content
        else:
            one["data"] = array.ravel().tolist()
        inputs.append(one)
    head = json.dumps({"inputs": inputs}).encode()
    headers = {"Content-Type": _MEDIA_TYPES[form]}
    if form == "binary":
        headers[_LENGTH] = str(len(head))
    return headers, head + tail


def _bytes_of(array: Array) -> bytes:
    if array.dtype != np.object_:
        return array.tobytes()
    encoded = [text.encode() for text in array.ravel().tolist()]
    return b"".join(struct.pack("<I", len(text)) + text for text in encoded)


def _answers(reply: httpx2.Response) -> Answers:
    length = int(reply.headers.get(_LENGTH, len(reply.content)))
    head, tail = reply.content[:length], reply.content[length:]
    answers = {}
    for one in json.loads(head)["outputs"]:
        dtype, shape = _DTYPES[one["datatype"]], one["shape"]
        if "data" in one:
            answers[one["name"]] = _of_json(one["data"], dtype, shape)
            continue
        size = one["parameters"]["binary_data_size"]
        answers[one["name"]] = _of_bytes(tail[:size], dtype, shape)
        tail = tail[size:]
    assert not tail
    return answers


def _of_json(data: Sequence[Any], dtype: Any, shape: Sequence[int]) -> Array:
    if dtype not in (np.object_, np.bool_):
        data = [float(one) if isinstance(one, str) else one for one in data]
    return np.array(data, dtype).reshape(shape)


def _of_bytes(content: bytes, dtype: Any, shape: Sequence[int]) -> Array:
    if dtype is not np.object_:
        return np.frombuffer(content, dtype).reshape(shape)
    texts = []
    while content:
        (size,) = struct.unpack_from("<I", content)
        texts.append(content[4 : 4 + size].decode())
        content = content[4 + size :]
    assert len(texts) == prod(shape)
    return np.array(texts, dtype).reshape(shape)
