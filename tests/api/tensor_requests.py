"""Requests with named tensors in the Open Inference layout, and a model that takes any."""

import json
from typing import Any

from asyncinfer.models.signature import Signature
from asyncinfer.tensors import packing
from asyncinfer.tensors.datatypes import DTYPES, Array, TensorSpec

LENGTH = "inference-header-content-length"


def identity(datatype: str, shape: tuple[Any, ...] = ("n", None)) -> Signature:
    tensor = TensorSpec("x", datatype, shape)
    return Signature(datatype, "1", "", (tensor,), (tensor,))


def described(name: str, array: Array, **more: Any) -> dict[str, Any]:
    datatype = {dtype: datatype for datatype, dtype in DTYPES.items()}[array.dtype]
    return {"name": name, "shape": list(array.shape), "datatype": datatype, **more}


def binary(*tensors: tuple[str, Array], **more: Any) -> tuple[bytes, dict[str, str]]:
    """A body in the Open Inference layout, and its headers."""
    contents = [content_of(array) for _, array in tensors]
    inputs = [
        described(name, array, parameters={"binary_data_size": len(content)})
        for (name, array), content in zip(tensors, contents, strict=True)
    ]
    return with_json_length({"inputs": inputs, **more}, *contents)


def with_json_length(head: Any, *contents: bytes) -> tuple[bytes, dict[str, str]]:
    text = json.dumps(head).encode()
    return text + b"".join(contents), {LENGTH: str(len(text))}


def content_of(array: Array) -> bytes:
    if array.dtype == object:
        return packing.pack_strings(array.ravel().tolist())
    return array.tobytes()
