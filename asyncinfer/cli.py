"""The command line: argv and environment to `serve`, `work` or `keygen`.

Imports what a command needs where it needs it: `serve` starts its children first.
"""

import argparse
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from asyncinfer import __version__, garbage, settings
from asyncinfer.errors import InvalidSetting, RedisUnavailable, StartError
from asyncinfer.settings import Knob, Settings
from asyncinfer.welcome import Welcome, shown_url

if TYPE_CHECKING:
    from asyncinfer.api.config import ApiConfig
    from asyncinfer.repository.store import Policy
    from asyncinfer.supervisor import Api, Stop
    from asyncinfer.worker.library import Source
    from asyncinfer.worker.process import WorkerProcess

_EXIT_CANNOT_START: Final = 2
_EXIT_INTERRUPTED: Final = 130
_API_PROCESS: Final = "api-process"
_LOOP: Final = {"use_uvloop": sys.platform != "win32"}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    # The kernel keeps from process 1 of a container each signal that it has no handler for.
    before = signal.signal(signal.SIGTERM, _stopped_before_it_began)
    try:
        return int(arguments.command(arguments))
    except (StartError, BaseExceptionGroup) as error:
        # Several children may be refused at once, for one reason.
        for detail in dict.fromkeys(refusal.detail for refusal in _refusals(error)):
            sys.stderr.write(f"asyncinfer: {detail}\n")
        return _EXIT_CANNOT_START
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


def _stopped_before_it_began(number: int, _: object) -> None:
    sys.exit(0)


def _refusals(error: StartError | BaseExceptionGroup[Any]) -> list[StartError]:
    """Task groups wrap what stops a start; raises the group again when it holds anything else."""
    if isinstance(error, StartError):
        return [error]
    refusals = []
    for one in error.exceptions:
        if not isinstance(one, StartError | BaseExceptionGroup):
            raise error
        refusals += _refusals(one)
    return refusals


# --- argv ------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="asyncinfer", description="Any ONNX model behind a durable job queue."
    )
    parser.add_argument("--version", action="version", version=f"asyncinfer {__version__}")
    commands = parser.add_subparsers(required=True, metavar="serve | work | keygen")
    _add_serve(commands)
    _add_work(commands)
    _add_keygen(commands)
    _add_api_process(commands)
    return parser


def _add_serve(commands: Any) -> None:
    serve = _command(commands, "serve", _serve, "Run the API; with no Redis configured, all of it.")
    serve.add_argument("--work", action="store_true", help="run a worker too, beside your Redis")
    serve.add_argument(
        "--insecure", action="store_true", help="let everyone in who reaches HOST, without API keys"
    )
    _add_knobs(serve)


def _add_work(commands: Any) -> None:
    _add_knobs(_command(commands, "work", _work, "Run a worker."))


def _add_keygen(commands: Any) -> None:
    keygen = _command(
        commands,
        "keygen",
        _keygen,
        "Make an API key. Its line for the API_KEYS file goes to stdout: asyncinfer keygen >> keys",
    )
    keygen.add_argument("--tenant", default="default", help="whose jobs it sees (default: default)")
    keygen.add_argument(
        "--scopes", default="submit,read", help="of submit, read, admin (default: submit,read)"
    )


def _add_api_process(commands: Any) -> None:
    """Without a help of its own, so that only `serve` knows it."""
    process = commands.add_parser(_API_PROCESS, add_help=False)
    process.add_argument("--held-fd", type=int, required=True)
    process.add_argument("--report-fd", type=int, required=True)
    process.set_defaults(command=_api_process)


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        usage=f"asyncinfer {name} [--help] [setting ...]",
        help=text,
        description=text,
        allow_abbrev=False,
    )
    parser.set_defaults(command=run)
    return parser


def _add_knobs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("settings, by flag or environment variable")
    for knob in settings.knobs():
        form: dict[str, Any] = {"metavar": (knob.unit or knob.name).upper()}
        if isinstance(knob.default, bool):
            form = {"action": argparse.BooleanOptionalAction}
        group.add_argument(
            knob.flag, dest=knob.name, default=argparse.SUPPRESS, help=_help(knob), **form
        )


def _help(knob: Knob) -> str:
    default = f"{settings.text(knob.default)} {knob.unit}".strip() or knob.unset
    return f"{knob.help} Default: {default}. [{knob.variable}]".replace("%", "%%")


def _read_settings(arguments: argparse.Namespace) -> Settings:
    given = vars(arguments)
    flags = {knob.name: given[knob.name] for knob in settings.knobs() if knob.name in given}
    return settings.read(os.environ, {name: str(value) for name, value in flags.items()})


# --- serve -----------------------------------------------------------------------------------


def _serve(arguments: argparse.Namespace) -> int:
    import anyio

    from asyncinfer import supervisor

    chosen = _read_settings(arguments)
    _refuse_open_door(chosen, arguments.insecure)
    _model_file(chosen)  # a wrong one stops the start before anything is started
    _set_up_logging()
    redis_url = _redis_url(chosen)
    with_worker = arguments.work or redis_url is None
    plan = supervisor.Plan(
        redis_url=redis_url,
        data_dir=_data_dir(chosen),
        worker=_own_command("work") if with_worker else (),
        environ=_child_environ(chosen),
        drain_seconds=chosen.drain_timeout,
    )
    api: Api = partial(_api if chosen.api_processes == 1 else _apis, chosen, with_worker)
    anyio.run(supervisor.serve, plan, api, backend_options=_LOOP)
    return 0


def _refuse_open_door(chosen: Settings, insecure: bool) -> None:
    if not (insecure or chosen.api_keys or _is_loopback(chosen.host)):
        raise StartError(
            f"HOST {chosen.host} lets in everyone who reaches it, and there are no API keys. Make "
            "one with `asyncinfer keygen >> keys` and set API_KEYS=keys, or add --insecure where "
            "something else guards this port."
        )


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


async def _api(chosen: Settings, with_worker: bool, redis_url: str, stop: "Stop") -> None:
    from asyncinfer.api.server import serve

    welcome = await _welcome(chosen, with_worker, redis_url)

    def on_ready() -> None:
        garbage.settle()
        stop.hand_over()
        _say(welcome.text())

    await serve(_api_config(chosen, redis_url), on_ready=on_ready)


async def _apis(chosen: Settings, with_worker: bool, redis_url: str, stop: "Stop") -> None:
    import anyio

    from asyncinfer import api_processes
    from asyncinfer.api.listener import hold

    with contextlib.closing(hold(chosen.host, chosen.port)) as held:
        held_fd = str(held.fileno())
        plan = api_processes.ApiProcesses(
            count=chosen.api_processes,
            command=lambda report_fd: _own_command(
                _API_PROCESS, "--held-fd", held_fd, "--report-fd", str(report_fd)
            ),
            environ={**_child_environ(chosen), "REDIS_URL": redis_url},
            keep_fds=(held.fileno(),),
        )
        async with api_processes.running(plan, stop) as ready:
            welcome = await _welcome(chosen, with_worker, redis_url)
            await ready.wait()
            _say(welcome.text())
            await anyio.sleep_forever()


def _api_process(arguments: argparse.Namespace) -> int:
    import anyio

    from asyncinfer import api_processes

    chosen = _read_settings(arguments)
    _set_up_logging()
    try:
        anyio.run(_answer, chosen, arguments.held_fd, arguments.report_fd, backend_options=_LOOP)
    except (StartError, BaseExceptionGroup) as error:
        refusal = " ".join(refusal.detail for refusal in _refusals(error))
        api_processes.report_refusal(arguments.report_fd, refusal)
        return _EXIT_CANNOT_START
    return 0


async def _answer(chosen: Settings, held_fd: int, report_fd: int) -> None:
    from asyncinfer import api_processes
    from asyncinfer.api.listener import share
    from asyncinfer.api.server import serve_on

    def on_ready() -> None:
        garbage.settle()
        api_processes.report_ready(report_fd)

    assert chosen.redis_url, "given by the parent"
    config = _api_config(chosen, chosen.redis_url)
    with socket.socket(fileno=held_fd) as held, share(held) as listener:
        await serve_on(listener, config, on_ready=on_ready)


async def _welcome(chosen: Settings, with_worker: bool, redis_url: str) -> Welcome:
    from asyncinfer import models, onnxfile

    found = _source(chosen).files() if with_worker else []
    names = {one.model for one in found}
    whole = [one for one in found if not one.problem and onnxfile.looks_whole(one.path)]
    files = models.to_serve(whole)
    server, stored_default = await _ask_server(chosen, redis_url)
    default = models.default_model(_default_model(chosen) or stored_default, names)
    file = files.get(default or "")
    return Welcome(
        host=chosen.host,
        port=chosen.port,
        redis=f"{server}, {_whereabouts(chosen, redis_url)}",
        models=tuple(files),
        refused=sorted(names - files.keys()),
        default_model=default,
        example=file.config.example if file else None,
        needs_key=chosen.api_keys is not None,
    )


async def _ask_server(chosen: Settings, redis_url: str) -> tuple[str, str | None]:
    """The server's name, and the default model that was started on it."""
    from asyncinfer.repository.store import Store

    async with Store.open(
        redis_url, queue_name=chosen.queue_name, policy=_policy(chosen), name="cli"
    ) as store:
        try:
            return await store.check_server(), await store.default_model()
        except RedisUnavailable:
            return "not answering yet", None


def _whereabouts(chosen: Settings, redis_url: str) -> str:
    if _redis_url(chosen) is None:
        return f"embedded; its data in {_data_dir(chosen)}"
    return f"at {shown_url(redis_url)}"


# --- work ------------------------------------------------------------------------------------


def _work(arguments: argparse.Namespace) -> int:
    chosen = _read_settings(arguments)
    _set_up_logging()
    from asyncinfer.worker.process import run

    return run(_worker_process(chosen, _redis_url(chosen) or _embedded_url(chosen)))


def _embedded_url(chosen: Settings) -> str:
    from asyncinfer import valkey

    url = valkey.running_url(_data_dir(chosen))
    if url is None:
        raise StartError(
            "There is no Redis to take jobs from. Set REDIS_URL, or start `asyncinfer serve` on "
            f"this machine with the same DATA_DIR ({_data_dir(chosen)})."
        )
    return url


# --- keygen ----------------------------------------------------------------------------------


def _keygen(arguments: argparse.Namespace) -> int:
    from asyncinfer import access

    key = access.new_key()
    try:
        entry = access.entry_of(key, arguments.tenant, arguments.scopes)
    except ValueError as error:
        raise InvalidSetting(f"No key made: {error}.") from error
    sys.stderr.write(f"The key, shown only now: {key}\nIts line for the API_KEYS file:\n")
    sys.stderr.flush()
    _say(f"{entry.line()}\n")
    return 0


# --- settings to what each part is given -----------------------------------------------------


def _redis_url(chosen: Settings) -> str | None:
    if chosen.redis_url or not chosen.redis_host:
        return chosen.redis_url
    host = f"[{chosen.redis_host}]" if ":" in chosen.redis_host else quote(chosen.redis_host)
    return f"redis://{host}:{chosen.redis_port}"


def _data_dir(chosen: Settings) -> Path:
    import platformdirs

    return (chosen.data_dir or platformdirs.user_state_path("asyncinfer")).absolute()


def _model_dir(chosen: Settings) -> Path:
    from asyncinfer.models import find_model_dir

    folder = find_model_dir(chosen.model_dir, cwd=Path.cwd())
    if not folder.is_dir():
        raise StartError(f"MODEL_DIR {folder} is no folder. Set it to your folder of models.")
    return folder


def _source(chosen: Settings) -> "Source":
    from asyncinfer.worker.library import Source

    file = _model_file(chosen)
    folder = file.parent if file else _model_dir(chosen)
    return Source(folder, chosen.models, file)


def _model_file(chosen: Settings) -> Path | None:
    """The one file to serve; raises InvalidSetting when it cannot be one."""
    if chosen.model is None:
        return None
    from asyncinfer.models import NAME_RULE, valid_name

    file = chosen.model.absolute()
    if file.suffix != ".onnx" or not file.is_file():
        raise InvalidSetting(f"MODEL {chosen.model} is no .onnx file. Set it to one that exists.")
    if not valid_name(file.stem):
        raise InvalidSetting(f"MODEL: rename {file.name}, which names the model: {NAME_RULE}.")
    if chosen.default_model not in (None, file.stem):
        raise InvalidSetting(
            f"MODEL makes {file.stem!r} the default model, but DEFAULT_MODEL is "
            f"{chosen.default_model!r}. Set one of the two."
        )
    return file


def _default_model(chosen: Settings) -> str | None:
    file = _model_file(chosen)
    return file.stem if file else chosen.default_model


def _policy(chosen: Settings) -> "Policy":
    from asyncinfer.repository.store import Policy

    return Policy(
        job_ttl_seconds=chosen.job_ttl,
        failed_ttl_seconds=chosen.failed_ttl,
        keep_input=chosen.keep_input,
        max_queue=chosen.max_queue,
        max_queue_bytes=chosen.max_queue_bytes,
        lease_seconds=chosen.lease_seconds,
        reap_seconds=chosen.reap_seconds,
        max_deliveries=chosen.max_deliveries,
    )


def _api_config(chosen: Settings, redis_url: str) -> "ApiConfig":
    from asyncinfer.api.config import ApiConfig

    return ApiConfig(
        redis_url=redis_url,
        queue_name=chosen.queue_name,
        policy=_policy(chosen),
        default_model=_default_model(chosen),
        host=chosen.host,
        port=chosen.port,
        allowed_hosts=chosen.allowed_hosts,
        allowed_origins=chosen.allowed_origins,
        api_keys=chosen.api_keys,
        max_body_bytes=chosen.max_body,
        max_json_bytes=chosen.max_json,
    )


def _worker_process(chosen: Settings, redis_url: str) -> "WorkerProcess":
    from asyncinfer.cores import cores
    from asyncinfer.worker.process import WorkerProcess
    from asyncinfer.worker.shelf import Bounds
    from asyncinfer.worker.worker import WorkerConfig

    concurrency = chosen.concurrency or cores()
    return WorkerProcess(
        redis_url=redis_url,
        queue_name=chosen.queue_name,
        policy=_policy(chosen),
        source=_source(chosen),
        bounds=Bounds(chosen.max_models, chosen.max_model_bytes),
        default_model=_default_model(chosen),
        intra_op_threads=max(1, cores() // concurrency),
        allow_custom_ops=chosen.allow_custom_ops,
        monitor_port=chosen.monitor_port,
        monitor_host=chosen.monitor_host,
        worker=WorkerConfig(
            concurrency=concurrency,
            max_batch=chosen.max_batch,
            brpop_timeout_seconds=chosen.brpop_timeout,
            prediction_timeout_seconds=chosen.prediction_timeout,
            drain_timeout_seconds=chosen.drain_timeout,
            rescan_seconds=chosen.rescan_seconds,
        ),
    )


# --- what people see -------------------------------------------------------------------------


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _set_up_logging() -> None:
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
