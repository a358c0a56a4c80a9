"""One of several API processes of a `serve`, which starts it."""

import contextlib
import os
import socket
from typing import TYPE_CHECKING

from asyncinfer.cli.exit_codes import EXIT_CANNOT_START, details
from asyncinfer.cli.serve import configuration
from asyncinfer.cli.serve.log_setup import LOOP, set_up_logging
from asyncinfer.errors import StartError
from asyncinfer.processes import tuning
from asyncinfer.processes.tuning import tune_for_start
from asyncinfer.settings import Settings
from asyncinfer.settings import read as read_settings

if TYPE_CHECKING:
    from asyncinfer.api.app import Api


def api_process(held_fd: int, report_fd: int, figures_fd: int, own_worker_since_ms: int) -> int:
    """Serves at the address of the bound socket `held_fd` and returns the exit code.

    Reports on `report_fd` that it is ready, or why it cannot start; then it returns 2. Else it
    serves until a signal and returns 0. Sends its figures to `figures_fd`, if that is not -1.
    `own_worker_since_ms` is in milliseconds since 1970, 0 if the `serve` has no worker.
    """
    tune_for_start()
    import anyio

    from asyncinfer.processes import api_processes

    settings = read_settings(os.environ, {})
    set_up_logging("api", settings.log_level, settings.log_format)
    try:
        since_ms = own_worker_since_ms or None
        fds = (held_fd, report_fd, figures_fd)
        anyio.run(_serve, settings, fds, since_ms, backend_options=LOOP)
    except (StartError, BaseExceptionGroup) as error:
        api_processes.report_refusal(report_fd, " ".join(details(error)))
        return EXIT_CANNOT_START
    return 0


async def _serve(
    settings: Settings, fds: tuple[int, int, int], own_worker_since_ms: int | None
) -> None:
    """Serves until it is stopped, and reports when requests can be answered.

    `fds` are those of the held socket, the report and the figures. Closes the first and the last
    at the end.
    """
    from asyncinfer.api.http.sockets import bind_shared
    from asyncinfer.api.server import serve_on
    from asyncinfer.monitoring.figures import encode_figures
    from asyncinfer.processes import api_processes

    def on_ready() -> None:
        tuning.tune_for_serving()
        api_processes.report_ready(report_fd)

    def beside(app: "Api") -> contextlib.AbstractAsyncContextManager[None]:
        if figures_fd < 0:
            return contextlib.nullcontext()
        return api_processes.sending_figures(figures_fd, lambda: encode_figures(app.figures()))

    assert settings.redis_url, "the parent sets REDIS_URL"
    held_fd, report_fd, figures_fd = fds
    config = configuration.api_config(settings, settings.redis_url, own_worker_since_ms)
    with socket.socket(fileno=held_fd) as held, bind_shared(held) as listener:
        await serve_on(listener, config, on_ready=on_ready, beside=beside)
