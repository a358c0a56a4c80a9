"""The monitor port of a worker: liveness, readiness and metrics."""

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, TypeAlias

import msgspec

from asyncinfer.errors import NotReady
from asyncinfer.monitoring.page import MetricsPage
from asyncinfer.monitoring.port import Answer, serve_pages
from asyncinfer.schemas.responses import Liveness

_NOT_CONNECTED: Final = "It has not reached its Redis yet."
_ALIVE: Final = Answer(200, msgspec.json.encode(Liveness()))

Unready: TypeAlias = Callable[[], str | None]
"""Returns why the worker cannot claim now; None when it can."""


class Monitor:
    """The pages of the port. The worker is not ready until `why_not_ready` is set, and has no
    metrics until `metrics` is set."""

    def __init__(self) -> None:
        self.why_not_ready: Unready = lambda: _NOT_CONNECTED
        self.metrics: MetricsPage | None = None
        self.pages = {
            "/health/live": self._liveness_page,
            "/health/ready": self._readiness_page,
            "/metrics": self._metrics_page,
        }

    async def _liveness_page(self) -> Answer:
        return _ALIVE

    async def _readiness_page(self) -> Answer:
        """The page of a ready worker; raises NotReady with the reason."""
        if reason := self.why_not_ready():
            raise NotReady(reason)
        return _ALIVE

    async def _metrics_page(self) -> Answer:
        """The page of the metrics; raises NotReady until the worker has some."""
        if self.metrics is None:
            raise NotReady(_NOT_CONNECTED)
        return await self.metrics()


@asynccontextmanager
async def serve_monitor(
    listener: socket.socket | None, *, head_seconds: float = 5.0
) -> AsyncIterator[Monitor]:
    """A monitor that answers on `listener` within the context, as `serve_pages` does; None: it
    answers nowhere."""
    monitor = Monitor()
    if listener is None:
        yield monitor
        return
    async with serve_pages(listener, monitor.pages, head_seconds=head_seconds):
        yield monitor
