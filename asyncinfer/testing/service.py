"""A whole service for a test: its start, its end and its settings."""

import os
import secrets
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import anyio
from msgspec import Struct

from asyncinfer import api_keys
from asyncinfer.errors import StartError
from asyncinfer.jobs import DEFAULT_TENANT
from asyncinfer.testing.process import Process, free_port
from asyncinfer.testing.running_service import Running
from asyncinfer.testing.settings import Model, environment, variables
from asyncinfer.testing.startup import PortTaken, StartPlan, wait_until_serving

_TRIES: Final = 5


def service(
    model: Model | None = None,
    *,
    name: str | None = None,
    models: Mapping[str, Model] | None = None,
    start_seconds: float = 60.0,
    **settings: Any,
) -> "Service":
    """A service for the time of a `with` or `async with` block, which is given its `Running`.

    `model` is an ONNX file, a model's folder, an `onnx.ModelProto` or its bytes. Its name is
    `name`, else that of the file, else `model`. It may also be a folder of models, which is served
    in place. `models` are several models by name. With neither the shipped models are served.
    `settings` are those of `asyncinfer serve`, such as `max_queue=10`. Jobs that run when the block
    ends are stopped, unless `drain_timeout` is set. With `redis_url` that server is used, with a
    unique `queue_name`; nothing is removed from it.

    Raises InvalidSetting at once, and TypeError if `models` come with `model` or `name`. The block
    raises StartError with the service's own message if it cannot start within `start_seconds`;
    ModelRefused, a StartError, if a model cannot be served.
    """
    if models is not None and not (model is None and name is None):
        raise TypeError("give one model, or `models` by name, not both")
    return Service(ServiceOptions(model, name, models, variables(settings), start_seconds))


class ServiceOptions(Struct, frozen=True):
    """The arguments of `service`; `variables` are its settings as environment variables."""

    model: Model | None
    name: str | None
    models: Mapping[str, Model] | None
    variables: Mapping[str, str]
    start_seconds: float


class Service:
    """A service for `with` or `async with`, made by `service`; usable again after its block."""

    def __init__(self, options: ServiceOptions) -> None:
        self._options = options
        self._busy = threading.Lock()
        self._open: ExitStack | None = None

    def __enter__(self) -> Running:
        """Starts the service, which blocks until it serves its models. Raises RuntimeError if it
        runs already, StartError if it cannot start."""
        with self._busy:
            if self._open is not None:
                raise RuntimeError("this service runs already; call service() for another")
            with ExitStack() as stack:
                running = _start(self._options, stack)
                self._open = stack.pop_all()
            return running

    def __exit__(self, *_: object) -> None:
        self._stop()

    async def __aenter__(self) -> Running:
        """Starts the service in a thread; stops it again if this is cancelled meanwhile."""
        try:
            return await anyio.to_thread.run_sync(self.__enter__)
        except anyio.get_cancelled_exc_class():  # the start goes on in its thread
            await self._stop_in_thread()
            raise

    async def __aexit__(self, *_: object) -> None:
        await self._stop_in_thread()

    async def _stop_in_thread(self) -> None:
        """Stops the service in a thread and waits for its end, even if cancelled."""
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._stop)

    def _stop(self) -> None:
        """Stops the service and waits for its end; does nothing if it does not run."""
        with self._busy:
            stack, self._open = self._open, None
            if stack is not None:
                stack.close()


def refuse_windows(platform: str = sys.platform) -> None:
    """Raises StartError on Windows, with what to do there."""
    if platform == "win32":
        raise StartError(
            "asyncinfer.testing runs on Linux and macOS: there is no embedded Valkey for Windows. "
            "Start `asyncinfer serve` and `asyncinfer work` with REDIS_URL there, and give your "
            "tests their URL."
        )


def _start(options: ServiceOptions, stack: ExitStack) -> Running:
    """Starts a service and returns once it serves its models; `stack` ends it and removes its files
    when it is closed. Raises StartError."""
    refuse_windows()
    # This loads numpy, which an import of asyncinfer.testing need not wait for.
    from asyncinfer.testing import model_folder

    temporary = tempfile.TemporaryDirectory(prefix="asyncinfer-test-", ignore_cleanup_errors=True)
    folder = Path(stack.enter_context(temporary))
    model_dir = model_folder.model_dir(folder, options.model, options.name, options.models)
    names = model_folder.names_in(model_dir)
    variables, api_key = _with_added_key(options.variables, folder)
    folders = {"MODEL_DIR": str(model_dir), "DATA_DIR": str(folder / "data")}
    plan = StartPlan(
        environ=environment(os.environ, _with_unique_queue({**variables, **folders})),
        arguments=("--work",) if "REDIS_URL" in variables else (),
        folder=folder,
        models=tuple(sorted(names)),
        api_key=api_key,
        seconds=options.start_seconds,
    )
    return _on_a_free_port(plan, stack)


def _with_unique_queue(variables: Mapping[str, str]) -> dict[str, str]:
    """Adds a unique QUEUE_NAME on a shared Redis, where other tests may have models of these names;
    keeps the one that is set, if any."""
    if "REDIS_URL" not in variables:
        return dict(variables)
    return {"QUEUE_NAME": f"test_{secrets.token_hex(8)}", **variables}


def _with_added_key(
    variables: Mapping[str, str], folder: Path
) -> tuple[Mapping[str, str], str | None]:
    """Replaces the file of keys by a copy in `folder` with one key more, and returns that key, in
    plain text; None without a file of keys.

    The file has only hashes of the other keys. Raises KeyFileRefused if it cannot be read.
    """
    if "API_KEYS" not in variables:
        return variables, None
    content = api_keys.read_key_file(Path(variables["API_KEYS"]))
    key = api_keys.new_key()
    line = api_keys.entry_of(key, DEFAULT_TENANT, ",".join(api_keys.SCOPES)).line()
    copy = folder / "api_keys"
    copy.touch(mode=0o600)
    copy.write_bytes(content + f"\n{line}\n".encode())
    return {**variables, "API_KEYS": str(copy)}, key


def _on_a_free_port(plan: StartPlan, stack: ExitStack) -> Running:
    """Starts the service of the plan on a free port, and tries another one if that is taken in the
    meantime; raises StartError after five."""
    for _ in range(_TRIES):
        with free_port() as port:
            process = Process(plan.arguments, {**plan.environ, "PORT": str(port)}, plan.folder)
            with ExitStack() as started:
                started.callback(process.stop)
                try:
                    running = wait_until_serving(process.log, plan, port)
                except PortTaken:
                    continue
                started.callback(running.close)
                stack.push(started.pop_all())
                return running
    raise StartError(
        f"{_TRIES} ports were taken by other programs before the service had them. Try again."
    )
