"""`asyncinfer serve`: the API, and the processes that it starts."""

import contextlib
import os
import sys
from functools import partial
from typing import TYPE_CHECKING

from asyncinfer.cli.addresses import is_loopback, shown_url
from asyncinfer.cli.output import say
from asyncinfer.cli.serve import configuration, metrics
from asyncinfer.cli.serve.banner import Banner
from asyncinfer.cli.serve.leftovers import LeftoverCleaner
from asyncinfer.cli.serve.log_setup import LOOP, Role, set_up_logging
from asyncinfer.errors import RedisUnavailable, StartError
from asyncinfer.processes import tuning
from asyncinfer.processes.tuning import tune_for_start
from asyncinfer.settings import Settings, as_environment

if TYPE_CHECKING:
    from asyncinfer.processes.supervisor import Api, StopSignals


def run_serve(settings: Settings, *, work: bool, insecure: bool) -> int:
    """Serves until SIGINT or SIGTERM and returns 0; raises StartError if it cannot start.

    `work` runs a worker beside a Redis of the user's; without such a Redis a worker is always run.
    `insecure` allows any HOST without API keys.
    """
    tune_for_start()
    import anyio

    from asyncinfer.processes import supervisor

    configuration.check_traces(settings)
    _reject_open_host(settings, insecure)
    redis_url = configuration.redis_url(settings)
    with_worker = work or redis_url is None
    _reject_missing_models(settings, with_worker)
    role: Role = "api" if settings.api_processes == 1 else "parent"
    set_up_logging(role, settings.log_level, settings.log_format)
    plan = supervisor.ServePlan(
        redis_url=redis_url,
        data_dir=configuration.data_dir(settings),
        embedded_max_bytes=settings.embedded_maxmemory,
        worker=_own_command("work") if with_worker else (),
        environ=_child_environ(settings),
        drain_seconds=settings.drain_timeout,
    )
    cleaner = LeftoverCleaner(settings) if with_worker else None
    if cleaner:
        cleaner.check()
    api: Api = partial(_api if settings.api_processes == 1 else _apis, settings, cleaner)
    anyio.run(supervisor.serve, plan, api, cleaner, backend_options=LOOP)
    return 0


def _reject_open_host(settings: Settings, insecure: bool) -> None:
    """Raises StartError if others may reach HOST, there are no API keys, and not `insecure`."""
    if not (insecure or settings.api_keys or is_loopback(settings.host)):
        raise StartError(
            f"HOST {settings.host} lets in everyone who reaches it, and there are no API keys. "
            "Make one with `asyncinfer keygen >> keys` and set API_KEYS=keys, or add --insecure if "
            "something else protects this port."
        )


def _reject_missing_models(settings: Settings, with_worker: bool) -> None:
    """Raises StartError, before anything is started, if MODEL or MODELS cannot be served.

    Without these settings the folder is read later, while the worker starts: the imports for it
    take a tenth of a second.
    """
    configuration.model_file(settings)
    if with_worker and settings.models:
        configuration.source(settings).files_at_start()


def _own_command(*words: str) -> tuple[str, ...]:
    """The command of a child that runs `asyncinfer` with these words, in the same interpreter.

    The current folder is on its path only if it is on ours.
    """
    safe_path = () if sys.path[0] in ("", os.getcwd()) else ("-P",)
    return (sys.executable, *safe_path, "-m", "asyncinfer", *words)


def _child_environ(settings: Settings) -> dict[str, str]:
    """The environment of a child: ours, and the variables of the settings."""
    return {**os.environ, **as_environment(settings)}


async def _api(
    settings: Settings, cleaner: LeftoverCleaner | None, redis_url: str, stop: "StopSignals"
) -> None:
    """Serves in this process until a signal ends it, and prints the banner once it is ready."""
    from asyncinfer.api.server import serve

    banner = await _read_banner(settings, cleaner, redis_url)

    def on_ready() -> None:
        tuning.tune_for_serving()
        stop.leave_first_to_api()
        say(banner.text())

    config = configuration.api_config(settings, redis_url, cleaner.since_ms if cleaner else None)
    with metrics.listening(settings) as listener:
        await serve(
            config, on_ready=on_ready, beside=lambda app: metrics.serving_own(listener, app)
        )


async def _apis(
    settings: Settings, cleaner: LeftoverCleaner | None, redis_url: str, stop: "StopSignals"
) -> None:
    """Runs several API processes at one address until it is cancelled.

    Prints the banner once the first is ready. Raises StartError if the first that reports cannot
    start.
    """
    import anyio

    from asyncinfer.api.http.sockets import reserve
    from asyncinfer.api.process_figures import ProcessFigures
    from asyncinfer.processes import api_processes

    since_ms = str(cleaner.since_ms if cleaner else 0)
    figures = ProcessFigures() if settings.metrics_port else None
    with (
        contextlib.closing(reserve(settings.host, settings.port)) as held,
        metrics.listening(settings) as listener,
    ):
        held_fd = held.fileno()
        plan = api_processes.ApiProcessPlan(
            count=settings.api_processes,
            command=lambda report_fd, figures_fd: _own_command(
                "api-process", str(held_fd), str(report_fd), str(figures_fd), since_ms
            ),
            environ={**_child_environ(settings), "REDIS_URL": redis_url},
            keep_fds=(held_fd,),
            figures=figures,
        )
        async with (
            metrics.serving_sum(listener, settings, redis_url, figures),
            api_processes.run_api_processes(plan, stop) as ready,
        ):
            banner = await _read_banner(settings, cleaner, redis_url)
            await ready.wait()
            tuning.tune_for_serving()
            say(banner.text())
            await anyio.sleep_forever()


async def _read_banner(
    settings: Settings, cleaner: LeftoverCleaner | None, redis_url: str
) -> Banner:
    """Reads what the banner shows from the folder and from Redis.

    Without a `cleaner` this `serve` has no worker, and the folder is not read. Raises StartError as
    `files_at_start` does.
    """
    from asyncinfer.models.folder import default_model, served_versions

    source = configuration.source(settings) if cleaner else None
    found = source.files_at_start() if source else []
    names = {file.model for file in found}
    files = served_versions([file for file in found if configuration.looks_intact(file)])
    server, stored_default = await _read_server(settings, redis_url)
    default = default_model(configuration.default_model(settings) or stored_default, names)
    default_file = files.get(default or "")
    return Banner(
        host=settings.host,
        port=settings.port,
        redis=f"{server}, {_location(settings, redis_url)}",
        models=tuple(files),
        model_dir=str(source.path) if source else None,
        refused=sorted(names - files.keys()),
        default_model=default,
        example=default_file.config.example if default_file else None,
        needs_key=settings.api_keys is not None,
        note=cleaner.note if cleaner else "",
    )


async def _read_server(settings: Settings, redis_url: str) -> tuple[str, str | None]:
    """The server's name and version, and the default model that is stored on it, or None.

    If Redis does not answer, a text that says so in place of the name.
    """
    from asyncinfer.repository.rights import denial_as_start_error

    async with configuration.store(settings, redis_url) as store:
        try:
            with denial_as_start_error():
                return await store.check_server(), await store.default_model()
        except RedisUnavailable:
            return "not answering yet", None


def _location(settings: Settings, redis_url: str) -> str:
    """Where Redis is: the data folder of the embedded one, else its address without password."""
    if configuration.redis_url(settings) is None:
        return f"embedded; its data in {configuration.data_dir(settings)}"
    return f"at {shown_url(redis_url)}"
