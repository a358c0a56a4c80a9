"""The port of the API's metrics: METRICS_PORT of a `serve`."""

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from asyncinfer.cli.serve import configuration
from asyncinfer.settings import Settings

if TYPE_CHECKING:
    import socket

    from asyncinfer.api.app import Api
    from asyncinfer.api.process_figures import ProcessFigures


def listening(settings: Settings) -> contextlib.AbstractContextManager["socket.socket | None"]:
    """The socket of METRICS_PORT as a block, None without one.

    Raises StartError if it cannot be opened.
    """
    if settings.metrics_port is None:
        return contextlib.nullcontext()
    from asyncinfer.monitoring.port import open_listener

    return contextlib.closing(
        open_listener(settings.metrics_host, settings.metrics_port, "METRICS")
    )


@contextlib.asynccontextmanager
async def serving_own(listener: "socket.socket | None", app: "Api") -> AsyncIterator[None]:
    """Serves the metrics of the API in this process within the block.

    Does nothing without a listener.
    """
    if listener is None:
        yield
        return
    from asyncinfer.api.metrics_port import serve_metrics

    async with serve_metrics(listener, app.store, app.figures):
        yield


@contextlib.asynccontextmanager
async def serving_sum(
    listener: "socket.socket | None",
    settings: Settings,
    redis_url: str,
    figures: "ProcessFigures | None",
) -> AsyncIterator[None]:
    """Serves the metrics of all API processes, from the figures that they send, within the block.

    Does nothing without a listener.
    """
    if listener is None or figures is None:
        yield
        return
    # It takes the memory of an API's modules, which a parent without the port has no use for.
    from asyncinfer.api.metrics_port import serve_metrics

    async with (
        configuration.store(settings, redis_url) as store,
        serve_metrics(listener, store, figures.total),
    ):
        yield
