"""The routes about models: which there are, and what each takes."""

from math import prod
from typing import Any, Final

import msgspec

from asyncinfer import models, tensors
from asyncinfer.api.catalog import Served
from asyncinfer.api.exchange import Reply, Request, json_reply
from asyncinfer.api.inputs import read_input
from asyncinfer.api.services import Services
from asyncinfer.models import Signature
from asyncinfer.schemas import (
    AskedOptions,
    Model,
    ModelList,
    NoQuery,
    TensorShape,
    Validated,
)
from asyncinfer.tensors import TensorSpec, is_open

_MOST_ELEMENTS: Final = 1000
_ELEMENTS: Final[dict[str, object]] = {"BOOL": False, "BYTES": "text"}


async def list_models(services: Services, request: Request[NoQuery]) -> Reply:
    """The models that can be asked."""
    default = services.catalog.default_model
    return json_reply(200, ModelList([_view(one, default) for one in await services.catalog.all()]))


async def read_model(services: Services, request: Request[NoQuery]) -> Reply:
    """One model: its inputs, outputs, labels, and a request that works."""
    served = await services.catalog.find(request.path("model"))
    return json_reply(200, _view(served, services.catalog.default_model))


async def validate(services: Services, request: Request[AskedOptions]) -> Reply:
    """Whether a request would be taken, and how it is understood; stores nothing."""
    served = await services.catalog.find(request.path("model"))
    asked = await read_input(request, services.config, served)
    signature = asked.signature
    with_rows = {spec.name for spec in signature.inputs if is_open(spec)}
    return json_reply(
        200,
        Validated(
            model=signature.model,
            version=signature.version,
            inputs=[TensorShape(one.name, one.datatype, one.shape) for one in asked.tensors],
            outputs=list(asked.outputs or (spec.name for spec in signature.outputs)),
            rows=next((one.shape[0] for one in asked.tensors if one.name in with_rows), None),
            options=asked.options,
        ),
    )


def _view(served: Served, default_model: str | None) -> Model:
    signature = served.signature
    return Model(
        model=signature.model,
        version=signature.version,
        versions=list(served.versions),
        default=signature.model == default_model,
        url=f"/predict/{signature.model}",
        description=signature.description,
        inputs=signature.inputs,
        outputs=signature.outputs,
        labels=signature.labels,
        batched=signature.batched,
        batching=signature.batching,
        max_rows=signature.max_rows,
        sha256=signature.sha256,
        version_sha256={one: served.signatures[one].sha256 for one in served.versions},
        symbols=_symbols(signature),
        example=example_of(signature),
    )


def example_of(signature: Signature) -> dict[str, Any] | None:
    """A body that works as it is: `data` where one input is enough, else named tensors."""
    if models.data_input(signature) is not None and signature.example is not None:
        return {"data": signature.example}
    if shown := signature.example_inputs:
        specs = [spec for spec in signature.inputs if spec.name in shown]
        return {"inputs": [_shown_input(spec, shown[spec.name]) for spec in specs]}
    inputs = [_example_input(spec) for spec in signature.inputs if not spec.optional]
    if any(prod(one["shape"]) > _MOST_ELEMENTS for one in inputs):
        return None
    return {"inputs": inputs}


def _shown_input(spec: TensorSpec, value: object) -> dict[str, Any]:
    """An input as its `model.toml` shows it, which its worker has checked."""
    shape = tensors.decode(msgspec.json.encode(value), spec).shape
    return {"name": spec.name, "shape": shape, "datatype": spec.datatype, "data": value}


def _example_input(spec: TensorSpec) -> dict[str, Any]:
    shape = [dim if isinstance(dim, int) else 1 for dim in spec.shape]
    element = _ELEMENTS.get(spec.datatype, 0)
    data = [element] * prod(shape) if prod(shape) <= _MOST_ELEMENTS else []
    return {"name": spec.name, "shape": shape, "datatype": spec.datatype, "data": data}


def _symbols(signature: Signature) -> dict[str, list[str]]:
    """Where each symbolic dimension is: `{"batch": ["x[0]", "y[0]"]}`."""
    found: dict[str, list[str]] = {}
    for spec in (*signature.inputs, *signature.outputs):
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, str):
                found.setdefault(dim, []).append(f"{spec.name}[{axis}]")
    return found
