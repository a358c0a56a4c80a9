"""The routes about models: list, read, validate, pause, resume, and cancel what waits."""

import contextlib
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Final

import msgspec

from asyncinfer.api.audit import audited
from asyncinfer.api.catalog import Served
from asyncinfer.api.http.messages import Reply, Request, json_reply
from asyncinfer.api.inputs.new_job import check_webhook
from asyncinfer.api.inputs.request_input import read_input
from asyncinfer.api.services import Services
from asyncinfer.errors import ModelNotFound, NoModelAnnounced
from asyncinfer.jobs import MAX_OPTION_SECONDS
from asyncinfer.models.signature import Signature, data_input
from asyncinfer.repository import keys
from asyncinfer.repository.announcements import WorkerAnnouncement, models_to_come
from asyncinfer.schemas.operations import public_worker_name
from asyncinfer.schemas.requests import NoQuery, RequestOptions
from asyncinfer.schemas.responses import (
    Model,
    ModelList,
    ModelProblem,
    Pause,
    QueueCancelResult,
    TensorShape,
    ValidationResult,
)
from asyncinfer.tensors import datatypes
from asyncinfer.tensors.datatypes import TensorSpec, has_dynamic_first_dim
from asyncinfer.untrusted import decoding

Workers = Mapping[str, WorkerAnnouncement]

_MAX_ELEMENTS: Final = 1000
_ELEMENTS: Final[dict[str, object]] = {"BOOL": False, "BYTES": "text"}


async def list_models(services: Services, request: Request[NoQuery]) -> Reply:
    """The models that are served, and the problems of those that are not.

    Also names the models that workers are loading. Raises RedisUnavailable.
    """
    served = await services.catalog.list_served()
    workers = await _workers(services)
    names = {model.signature.model for model in served}
    broken = [problem for problem in _problems(workers) if problem.model not in names]
    loading = sorted(models_to_come(workers.values(), names))
    return json_reply(200, ModelList(await _views(services, served, workers), broken, loading))


async def read_model(services: Services, request: Request[NoQuery]) -> Reply:
    """One model: its inputs, outputs, labels, versions, workers, and a request that works.

    Raises as `Catalog.find` does.
    """
    served = await services.catalog.find(request.path("model"))
    (view,) = await _views(services, [served], await _workers(services))
    return json_reply(200, view)


async def pause_model(services: Services, request: Request[NoQuery]) -> Reply:
    """Runs none of a model's jobs until it is resumed; new jobs are still accepted.

    Running jobs continue. Raises as `Catalog.find` does.
    """
    return await _pause(services, request, paused=True)


async def resume_model(services: Services, request: Request[NoQuery]) -> Reply:
    """Runs a paused model's jobs again.

    Does nothing to a model that is not paused. Raises as `Catalog.find` does.
    """
    return await _pause(services, request, paused=False)


async def _pause(services: Services, request: Request[NoQuery], *, paused: bool) -> Reply:
    """Pauses the model that the path names, or resumes it; replies with its new state."""
    verb, named = "pause" if paused else "resume", {"model": request.path("model")}
    async with audited(services, request, verb, named, over_tenants=True) as audit:
        audit.count = None
        served = await services.catalog.find(request.path("model"))
        await services.operations.pause(served.queue, paused=paused)
    # The next answers already say that the model is paused.
    await services.worker_snapshot.refresh()
    return json_reply(200, Pause(served.signature.model, paused))


async def cancel_queue(services: Services, request: Request[NoQuery]) -> Reply:
    """Cancels all waiting jobs of a model, of all tenants; running jobs continue.

    Replies with how many were cancelled. Raises ModelNotFound or NoModelAnnounced if the model has
    no queue either, and RedisUnavailable.
    """
    name = request.path("model") or ""
    criteria = {"status": "pending", "model": name}
    async with audited(services, request, "cancel_queue", criteria, over_tenants=True) as audit:
        queue = await _queue_of(services, name)
        audit.count = cancelled = await services.operations.cancel_queue(queue)
    return json_reply(200, QueueCancelResult(name, cancelled))


async def _queue_of(services: Services, name: str) -> str:
    """The queue of a model, also of one that no worker serves any more, whose jobs would wait
    forever. Raises ModelNotFound or NoModelAnnounced if it has no queue either, and as
    `Catalog.find` does."""
    try:
        return (await services.catalog.find(name)).queue
    except (ModelNotFound, NoModelAnnounced):
        queue = keys.queue(services.store.queue_name, name, services.catalog.default_model)
        if queue in await services.store.queues():
            return queue
        raise


async def validate(services: Services, request: Request[RequestOptions]) -> Reply:
    """Whether a request would be accepted, and how it is understood; stores nothing.

    `rows` in the reply is None if the model has no batch dimension. Raises as `Catalog.find` and
    `read_input` do.
    """
    served = await services.catalog.find(request.path("model"))
    checked = await read_input(request, services.config, served, services.long_reads)
    check_webhook(services.webhook_checks, request.tenant, checked.options)
    signature = checked.signature
    batched_inputs = {spec.name for spec in signature.inputs if has_dynamic_first_dim(spec)}
    return json_reply(
        200,
        ValidationResult(
            model=signature.model,
            version=signature.version,
            inputs=[
                TensorShape(tensor.name, tensor.datatype, tensor.shape)
                for tensor in checked.tensors
            ],
            outputs=list(checked.outputs or (spec.name for spec in signature.outputs)),
            rows=next(
                (tensor.shape[0] for tensor in checked.tensors if tensor.name in batched_inputs),
                None,
            ),
            options=checked.options,
        ),
    )


async def _workers(services: Services) -> Workers:
    """Announcements of the living workers, by the names that everyone may see."""
    workers = await services.announcements.read_workers()
    return {public_worker_name(worker_id): worker for worker_id, worker in workers.items()}


def _problems(workers: Workers) -> list[ModelProblem]:
    """Why workers refuse to serve models or versions, by worker; version None means the whole
    model."""
    return [
        ModelProblem(model=model, version=version or None, worker=worker, reason=reason)
        for worker, announcement in sorted(workers.items())
        for model, versions in sorted(announcement.problems.items())
        for version, reason in sorted(versions.items())
    ]


async def _views(services: Services, served: Sequence[Served], workers: Workers) -> list[Model]:
    """The models as answers show them, in the order of `served`. Raises RedisUnavailable."""
    paused = await services.inspection.paused([model.queue for model in served])
    default = services.catalog.default_model
    max_ttl_seconds = min(services.config.max_ttl_seconds, MAX_OPTION_SECONDS)
    return [
        _view(
            model,
            workers,
            is_default=model.signature.model == default,
            paused=is_paused,
            max_ttl_seconds=max_ttl_seconds,
        )
        for model, is_paused in zip(served, paused, strict=True)
    ]


def _view(
    served: Served, workers: Workers, *, is_default: bool, paused: bool, max_ttl_seconds: int
) -> Model:
    signature = served.signature
    name = signature.model
    return Model(
        model=name,
        version=signature.version,
        versions=list(served.versions),
        default=is_default,
        url=f"/predict/{name}",
        description=signature.description,
        inputs=signature.inputs,
        outputs=signature.outputs,
        input_axes=signature.input_axes,
        output_axes=signature.output_axes,
        labels=signature.labels,
        batched=signature.batched,
        batching=signature.batching,
        max_rows=signature.max_rows,
        max_ttl_seconds=max_ttl_seconds,
        sha256=signature.sha256,
        version_sha256={version: served.signatures[version].sha256 for version in served.versions},
        symbols=_symbols(signature),
        example=example_of(signature),
        paused=paused,
        workers=sum(
            name in worker.models and worker.state == "ready" for worker in workers.values()
        ),
        problems=[problem for problem in _problems(workers) if problem.model == name],
        run_times={
            worker_name: worker.run_times[name]
            for worker_name, worker in workers.items()
            if name in worker.run_times
        },
    )


def example_of(signature: Signature) -> dict[str, Any] | None:
    """A request body that works as it is: `data` if the model has an example of it, else named
    tensors. None if it would be too large."""
    if data_input(signature) is not None and signature.example is not None:
        return {"data": signature.example}
    if shown := signature.example_inputs:
        specs = [spec for spec in signature.inputs if spec.name in shown]
        # Only a foreign writer can have announced an example that does not fit its input.
        with contextlib.suppress(*decoding.DECODE_ERRORS):
            return {"inputs": [_shown_input(spec, shown[spec.name]) for spec in specs]}
    inputs = [_example_input(spec) for spec in signature.inputs if not spec.optional]
    if any(prod(tensor["shape"]) > _MAX_ELEMENTS for tensor in inputs):
        return None
    return {"inputs": inputs}


def _shown_input(spec: TensorSpec, value: object) -> dict[str, Any]:
    """An input with the example that its worker has checked."""
    shape = datatypes.decode(msgspec.json.encode(value), spec).shape
    data = value if isinstance(value, list | tuple) else [value]
    return {"name": spec.name, "shape": shape, "datatype": spec.datatype, "data": data}


def _example_input(spec: TensorSpec) -> dict[str, Any]:
    """An input of zeros (False, "text") with 1 for each open dimension; its `data` is an empty list
    if it would have more than 1,000 elements."""
    shape = [dim if isinstance(dim, int) else 1 for dim in datatypes.dims(spec)]
    element = _ELEMENTS.get(spec.datatype, 0)
    data = [element] * prod(shape) if prod(shape) <= _MAX_ELEMENTS else []
    return {"name": spec.name, "shape": shape, "datatype": spec.datatype, "data": data}


def _symbols(signature: Signature) -> dict[str, list[str]]:
    """The axes of each symbolic dimension, inputs before outputs: `{"batch": ["x[0]", "y[0]"]}`."""
    axes: dict[str, list[str]] = {}
    for spec in (*signature.inputs, *signature.outputs):
        for axis, dim in enumerate(datatypes.dims(spec)):
            if isinstance(dim, str):
                axes.setdefault(dim, []).append(f"{spec.name}[{axis}]")
    return axes
