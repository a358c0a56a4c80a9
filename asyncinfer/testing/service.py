"""Starting a whole service for a test, and ending it."""

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
from asyncinfer.testing.startup import Plan, PortTaken, until_it_serves

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

    `model` is an ONNX file, a model's folder, an `onnx.ModelProto` or its bytes, called `name`,
    else as its file is, else `model`; or a folder of models, served where it is. `models` are
    several by name; with neither, the shipped ones. `settings` are those of `asyncinfer serve`,
    such as `max_queue=10`. Unless `drain_timeout` is set, what runs when the block ends is stopped.
    With `redis_url` that server is used, under a `queue_name` of our own; nothing is removed there.

    The block raises StartError with the service's own words when it cannot start: ModelRefused
    when a model cannot be served. InvalidSetting is raised at once.
    """
    if models is not None and not (model is None and name is None):
        raise TypeError("give one model, or `models` by name, not both")
    return Service(Wanted(model, name, models, variables(settings), start_seconds))


class Wanted(Struct, frozen=True):
    model: Model | None
    name: str | None
    models: Mapping[str, Model] | None
    variables: Mapping[str, str]
    start_seconds: float


class Service:
    """Made by `service`; one block at a time."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._busy = threading.Lock()
        self._open: ExitStack | None = None

    def __enter__(self) -> Running:
        with self._busy:
            if self._open is not None:
                raise RuntimeError("this service runs already; call service() for another")
            with ExitStack() as stack:
                running = _started(self._wanted, stack)
                self._open = stack.pop_all()
            return running

    def __exit__(self, *_: object) -> None:
        self._stop()

    async def __aenter__(self) -> Running:
        try:
            return await anyio.to_thread.run_sync(self.__enter__)
        except anyio.get_cancelled_exc_class():  # the start goes on in its thread
            await self._stop_in_thread()
            raise

    async def __aexit__(self, *_: object) -> None:
        await self._stop_in_thread()

    async def _stop_in_thread(self) -> None:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._stop)

    def _stop(self) -> None:
        with self._busy:
            opened, self._open = self._open, None
            if opened is not None:
                opened.close()


def refuse_windows(platform: str = sys.platform) -> None:
    if platform == "win32":
        raise StartError(
            "asyncinfer.testing runs on Linux and macOS: for Windows there is no embedded Valkey. "
            "Start `asyncinfer serve` and `asyncinfer work` with REDIS_URL there, and give your "
            "tests their URL."
        )


def _started(wanted: Wanted, stack: ExitStack) -> Running:
    refuse_windows()
    # Loads numpy, which who only imports us need not wait for.
    from asyncinfer.testing import model_folder

    made = tempfile.TemporaryDirectory(prefix="asyncinfer-test-", ignore_cleanup_errors=True)
    folder = Path(stack.enter_context(made))
    model_dir = model_folder.model_dir(folder, wanted.model, wanted.name, wanted.models)
    names = model_folder.names_in(model_dir)
    variables, api_key = _with_own_key(wanted.variables, folder)
    places = {"MODEL_DIR": str(model_dir), "DATA_DIR": str(folder / "data")}
    plan = Plan(
        environ=environment(os.environ, _with_own_queue({**variables, **places})),
        words=("--work",) if "REDIS_URL" in variables else (),
        folder=folder,
        models=tuple(sorted(names)),
        api_key=api_key,
        seconds=wanted.start_seconds,
    )
    return _on_a_free_port(plan, stack)


def _with_own_queue(variables: Mapping[str, str]) -> dict[str, str]:
    """On a server that others use too, tests beside this one have models of the same names."""
    if "REDIS_URL" not in variables:
        return dict(variables)
    return {"QUEUE_NAME": f"test_{secrets.token_hex(8)}", **variables}


def _with_own_key(
    variables: Mapping[str, str], folder: Path
) -> tuple[Mapping[str, str], str | None]:
    """A copy of the file of keys that has one of ours, since of the others we know only hashes."""
    if "API_KEYS" not in variables:
        return variables, None
    given = Path(variables["API_KEYS"])
    content = api_keys.read_key_file(given)
    key = api_keys.new_key()
    line = api_keys.entry_of(key, DEFAULT_TENANT, ",".join(api_keys.SCOPES)).line()
    copy = folder / "api_keys"
    copy.touch(mode=0o600)
    copy.write_bytes(content + f"\n{line}\n".encode())
    return {**variables, "API_KEYS": str(copy)}, key


def _on_a_free_port(plan: Plan, stack: ExitStack) -> Running:
    for _ in range(_TRIES):
        with free_port() as port:
            process = Process(plan.words, {**plan.environ, "PORT": str(port)}, plan.folder)
            with ExitStack() as started:
                started.callback(process.stop)
                try:
                    running = until_it_serves(process.log, plan, port)
                except PortTaken:
                    continue
                started.callback(running.close)
                stack.push(started.pop_all())
                return running
    raise StartError(f"{_TRIES} ports were taken by others before the service had them. Try again.")
