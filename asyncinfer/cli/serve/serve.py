"""`asyncinfer serve`: the API, and what it starts beside itself."""

import contextlib
import ipaddress
import os
import sys
from functools import partial
from typing import TYPE_CHECKING

from asyncinfer import settings
from asyncinfer.cli.addresses import shown_url
from asyncinfer.cli.output import say
from asyncinfer.cli.serve import configuration
from asyncinfer.cli.serve.banner import Welcome
from asyncinfer.cli.serve.leftovers import Clearing
from asyncinfer.cli.serve.log_setup import LOOP, set_up_logging
from asyncinfer.errors import RedisUnavailable, StartError
from asyncinfer.processes import tuning
from asyncinfer.processes.tuning import lean_start
from asyncinfer.settings import Settings

if TYPE_CHECKING:
    from asyncinfer.processes.supervisor import Api, Stop


def run_serve(chosen: Settings, *, work: bool, insecure: bool) -> int:
    lean_start()
    import anyio

    from asyncinfer.processes import supervisor

    _refuse_open_door(chosen, insecure)
    redis_url = configuration.redis_url(chosen)
    with_worker = work or redis_url is None
    _refuse_missing_models(chosen, with_worker)
    set_up_logging()
    plan = supervisor.Plan(
        redis_url=redis_url,
        data_dir=configuration.data_dir(chosen),
        worker=_own_command("work") if with_worker else (),
        environ=_child_environ(chosen),
        drain_seconds=chosen.drain_timeout,
    )
    clearing = Clearing(chosen) if with_worker else None
    if clearing:
        clearing.check()
    api: Api = partial(_api if chosen.api_processes == 1 else _apis, chosen, clearing)
    anyio.run(supervisor.serve, plan, api, clearing, backend_options=LOOP)
    return 0


def _refuse_open_door(chosen: Settings, insecure: bool) -> None:
    if not (insecure or chosen.api_keys or _is_loopback(chosen.host)):
        raise StartError(
            f"HOST {chosen.host} lets in everyone who reaches it, and there are no API keys. Make "
            "one with `asyncinfer keygen >> keys` and set API_KEYS=keys, or add --insecure where "
            "something else guards this port."
        )


def _refuse_missing_models(chosen: Settings, with_worker: bool) -> None:
    """Before anything is started. Without these settings the folder is looked at later, beside
    what starts: it takes a tenth of a second to import what looks."""
    configuration.model_file(chosen)
    if with_worker and chosen.models:
        configuration.source(chosen).files_at_start()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _own_command(*words: str) -> tuple[str, ...]:
    """The child finds its modules as we do: by a current folder on our path, or else not."""
    safe = () if sys.path[0] in ("", os.getcwd()) else ("-P",)
    return (sys.executable, *safe, "-m", "asyncinfer", *words)


def _child_environ(chosen: Settings) -> dict[str, str]:
    return {**os.environ, **settings.as_environment(chosen)}


async def _api(chosen: Settings, clearing: Clearing | None, redis_url: str, stop: "Stop") -> None:
    from asyncinfer.api.server import serve

    welcome = await _welcome(chosen, clearing, redis_url)

    def on_ready() -> None:
        tuning.settle()
        stop.hand_over()
        say(welcome.text())

    config = configuration.api_config(chosen, redis_url, clearing.since_ms if clearing else None)
    await serve(config, on_ready=on_ready)


async def _apis(chosen: Settings, clearing: Clearing | None, redis_url: str, stop: "Stop") -> None:
    import anyio

    from asyncinfer.api.http.sockets import hold
    from asyncinfer.processes import api_processes

    since_ms = str(clearing.since_ms if clearing else 0)
    with contextlib.closing(hold(chosen.host, chosen.port)) as held:
        held_fd = held.fileno()
        plan = api_processes.ApiProcesses(
            count=chosen.api_processes,
            command=lambda report_fd: _own_command(
                "api-process", str(held_fd), str(report_fd), since_ms
            ),
            environ={**_child_environ(chosen), "REDIS_URL": redis_url},
            keep_fds=(held_fd,),
        )
        async with api_processes.running(plan, stop) as ready:
            welcome = await _welcome(chosen, clearing, redis_url)
            await ready.wait()
            tuning.settle()
            say(welcome.text())
            await anyio.sleep_forever()


async def _welcome(chosen: Settings, clearing: Clearing | None, redis_url: str) -> Welcome:
    from asyncinfer.models.folder import default_model, to_serve

    source = configuration.source(chosen) if clearing else None
    found = source.files_at_start() if source else []
    names = {one.model for one in found}
    files = to_serve([one for one in found if configuration.is_whole(one)])
    server, stored_default = await _ask_server(chosen, redis_url)
    default = default_model(configuration.default_model(chosen) or stored_default, names)
    file = files.get(default or "")
    return Welcome(
        host=chosen.host,
        port=chosen.port,
        redis=f"{server}, {_whereabouts(chosen, redis_url)}",
        models=tuple(files),
        model_dir=str(source.path) if source else None,
        refused=sorted(names - files.keys()),
        default_model=default,
        example=file.config.example if file else None,
        needs_key=chosen.api_keys is not None,
        note=clearing.note if clearing else "",
    )


async def _ask_server(chosen: Settings, redis_url: str) -> tuple[str, str | None]:
    """The server's name, and the default model that was started on it."""
    async with configuration.store(chosen, redis_url) as store:
        try:
            return await store.check_server(), await store.default_model()
        except RedisUnavailable:
            return "not answering yet", None


def _whereabouts(chosen: Settings, redis_url: str) -> str:
    if configuration.redis_url(chosen) is None:
        return f"embedded; its data in {configuration.data_dir(chosen)}"
    return f"at {shown_url(redis_url)}"
