"""The port of the API's metrics: what its processes count, and what Redis holds."""

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

from asyncinfer.api.families import metrics_text
from asyncinfer.errors import RequestError
from asyncinfer.monitoring.figures import Figures
from asyncinfer.monitoring.page import MetricsPage, WriteText
from asyncinfer.monitoring.port import serve_pages
from asyncinfer.repository.inspect.overview import read_overview
from asyncinfer.repository.store import Store


@asynccontextmanager
async def serve_metrics(
    listener: socket.socket, store: Store, read_figures: Callable[[], Figures]
) -> AsyncIterator[None]:
    """Answers `GET /metrics` on `listener` within the context. `read_figures` gives what the API
    has counted, of all its processes; the queues are read from `store` for each request."""

    async def read() -> WriteText:
        try:
            overview = await read_overview(store)
        except RequestError:
            overview = None
        return partial(metrics_text, read_figures(), overview)

    async with serve_pages(listener, {"/metrics": MetricsPage(read)}):
        yield
