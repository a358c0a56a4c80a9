"""Reading models, and keeping them for a while."""

import math
import time
from typing import Final

from asyncinfer.client._models import Catalog, Model
from asyncinfer.client._protocol import Flow
from asyncinfer.client._requests import (
    FIRST_WORKER_RETRIES,
    RemoteServer,
    backoff_seconds,
    convert,
    get,
    path_part,
    wait_before_retry,
)
from asyncinfer.client._wait_reasons import WaitingFor
from asyncinfer.errors import ModelLoading, ModelNotFound, NoModelAnnounced

_CACHE_SECONDS: Final = 30.0


def catalog(server: RemoteServer) -> Flow[Catalog]:
    """All models, as the server lists them; those that workers serve are also cached."""
    listed = convert(server, (yield from get(server, "/models")), Catalog)
    for model in listed.models:
        _cache(server, model)
    return listed


def model(server: RemoteServer, name: str | None) -> Flow[Model]:
    """The model called `name`, or the default one, read from the server and cached.

    Raises ModelNotFound, and for the default one NoModelAnnounced and ModelLoading after all
    retries.
    """
    if name is None:
        return (yield from _default_model(server))
    model = convert(server, (yield from get(server, f"/models/{path_part(name)}")), Model)
    _cache(server, model)
    return model


def cached_model(server: RemoteServer, name: str | None) -> Flow[Model]:
    """The model as it was at most 30 s ago, which saves a request; else as `model` reads it."""
    read_at, cached = server.models.get(name, (-math.inf, None))
    if cached is not None and time.monotonic() - read_at < _CACHE_SECONDS:
        return cached
    return (yield from model(server, name))


def _cache(server: RemoteServer, model: Model) -> None:
    """Keeps the model by its name, and as the default one if it is."""
    now = time.monotonic()
    server.models[model.model] = (now, model)
    if model.default:
        server.models[None] = (now, model)


def _default_model(server: RemoteServer) -> Flow[Model]:
    """The default model, or the only one; waits for one that is still being loaded.

    Raises ModelNotFound, NoModelAnnounced or ModelLoading if there is none after all retries.
    """
    attempt = 0
    begun_at = time.monotonic()
    while True:
        listed = yield from catalog(server)
        is_only = len(listed.models) == 1 and not listed.loading
        for model in listed.models:
            if model.default or is_only:
                server.models[None] = (time.monotonic(), model)
                return model
        error, is_temporary = _no_default_error(listed)
        attempt += 1
        retries = server.retries if listed.loading else FIRST_WORKER_RETRIES
        is_awaited = bool(listed.loading) and server.waits_for_models
        if not is_temporary or (attempt > retries and not is_awaited):
            raise error
        reason = WaitingFor(error.code, error.detail)
        yield from wait_before_retry(server, backoff_seconds(attempt), reason, begun_at)


def _no_default_error(
    listed: Catalog,
) -> tuple[ModelLoading | ModelNotFound | NoModelAnnounced, bool]:
    """The error for there being no default model, and whether there may be one soon."""
    if listed.loading:
        names = ", ".join(listed.loading[:3])
        detail = f"No model is the default yet; a worker is loading {names}. Retry in a moment."
        return ModelLoading(detail), True
    if listed.models:
        names = ", ".join(model.model for model in listed.models)
        return ModelNotFound(f"No model is the default; give model= one of: {names}."), False
    if listed.problems:
        detail = f"No worker serves any model. {listed.problems[0].reason}"
        return NoModelAnnounced(detail), False
    detail = (
        "No worker serves any model. Start one with `asyncinfer work`, or look at the log of those "
        "that run."
    )
    return NoModelAnnounced(detail), True
