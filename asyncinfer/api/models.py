"""The routes about models: which there are, and what each takes."""

from asyncinfer.api.catalog import Served
from asyncinfer.api.exchange import Reply, Request, json_reply
from asyncinfer.api.services import Services
from asyncinfer.schemas import Model, ModelList, NoQuery


async def list_models(services: Services, request: Request[NoQuery]) -> Reply:
    """The models that can be asked."""
    default = services.catalog.default_model
    return json_reply(200, ModelList([_view(one, default) for one in await services.catalog.all()]))


async def read_model(services: Services, request: Request[NoQuery]) -> Reply:
    """One model: its inputs, outputs, labels, and a request that works."""
    served = await services.catalog.find(request.path("model"))
    return json_reply(200, _view(served, services.catalog.default_model))


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
        example=None if signature.example is None else {"data": signature.example},
    )
