"""The HTTP server of the API, which runs until SIGINT or SIGTERM."""

import contextlib
import logging
import socket
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from types import FrameType
from typing import Any, Final, cast

import uvicorn

from asyncinfer.api.app import Api, create_app
from asyncinfer.api.config import ApiConfig
from asyncinfer.api.express import Express
from asyncinfer.api.http.connection import Connection, ConnectionLimits
from asyncinfer.api.http.sockets import listen
from asyncinfer.errors import StartError
from asyncinfer.processes import tuning

_log = logging.getLogger(__name__)

_GRACE_SECONDS: Final = 5
"""The time for slow clients to read their answers; waiting clients are answered at once."""


Beside = Callable[[Api], AbstractAsyncContextManager[None]]
"""What runs beside the server, from when Redis was checked until the server has stopped."""


async def serve(
    config: ApiConfig, *, on_ready: Callable[[], None], beside: Beside | None = None
) -> None:
    """Serves until SIGINT or SIGTERM; returns once open requests are answered, at most 5 s later.
    `on_ready` is called once connections are accepted. Raises StartError if the address is taken or
    Redis cannot be used."""
    with contextlib.closing(listen(config.host, config.port)) as listener:
        await serve_on(listener, config, on_ready=on_ready, beside=beside)


async def serve_on(
    listener: socket.socket,
    config: ApiConfig,
    *,
    on_ready: Callable[[], None],
    beside: Beside | None = None,
) -> None:
    """`serve` on a socket that is already bound."""
    app = create_app(config)
    try:
        async with app.lifespan(), beside(app) if beside else contextlib.nullcontext():
            await Server(app, config, on_ready=on_ready).serve(sockets=[listener])
    finally:
        if config.tracing:
            config.tracing.close()
    _log.info("Stopped.")


class Server(uvicorn.Server):
    """uvicorn within our own lifespan, so that a failed start is raised, not logged. It listens,
    keeps the Date header, and stops at a signal; connections are ours."""

    def __init__(
        self,
        app: Api,
        config: ApiConfig,
        *,
        on_ready: Callable[[], None],
        connection: type[Connection] = Connection,
    ) -> None:
        super().__init__(_uvicorn_config(app, self._connect))
        if problem := unexpected(self.server_state):
            raise StartError(problem)
        self._app = app
        self._on_ready = on_ready
        self._connection = connection
        self._short_way = Express(app) if config.has_short_way else None
        self._limits = ConnectionLimits(
            header_seconds=config.header_timeout_seconds,
            body_seconds=config.body_timeout_seconds,
            header_bytes=config.max_header_bytes,
            connections=config.max_connections,
            idle_seconds=self.config.timeout_keep_alive,
            on_refusal=app.request_figures.refused,
        )

    def _connect(self, **_: Any) -> Connection:
        """Makes the object of a new connection. What uvicorn passes to it is in this object too."""
        return self._connection(self._app, self._limits, self.server_state, self._short_way)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Calls `on_ready` once connections are accepted. Sets this process's thread switch
        interval."""
        tuning.switch_threads_sooner()
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answers waiting clients at once, then does as uvicorn: gives open requests 5 s to end."""
        await self._app.stop_waiting()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Starts the shutdown, for a second signal without waiting for requests. Unlike uvicorn's,
        does not raise the signal again after the shutdown: `serve` returns."""
        self.force_exit = self.should_exit
        self.should_exit = True


def unexpected(server_state: object) -> str | None:
    """What uvicorn's state of a server lacks that connections need of it, with the remedy; None if
    it lacks nothing."""
    for name in ("connections", "tasks", "default_headers"):
        if not hasattr(server_state, name):
            return (
                f"uvicorn {uvicorn.__version__} has no ServerState.{name}, which the server needs. "
                "Install an older version of it, or a newer one of asyncinfer."
            )
    return None


def _uvicorn_config(app: Api, connect: Callable[..., Connection]) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=cast(Any, connect),
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
