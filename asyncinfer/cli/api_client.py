"""Requests of commands to a running service, for which the Python client has no method."""

import math
import re
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlencode

import msgspec
from msgspec import Struct

from asyncinfer.cli.options import ServerOptions
from asyncinfer.client import Cadence, Client, Model, ModelProblem, NotAsyncinfer
from asyncinfer.client._protocol import Request
from asyncinfer.client._requests import fetch_json
from asyncinfer.untrusted.printable import printable_line

_T = TypeVar("_T")
_MARGIN_SECONDS: Final = 15.0
_COUNT: Final = re.compile("[0-9]{1,18}")
_CADENCE: Final = Cadence()
_RETRIES: Final = 2
"""Two retries take some two seconds, which is enough while a person waits."""


class ModelList(Struct, frozen=True):
    models: tuple[Model, ...]
    problems: tuple[ModelProblem, ...] = ()
    """Problems of models of which no worker serves any version."""
    loading: tuple[str, ...] = ()
    """Names of models that a worker is loading."""

    @property
    def all_problems(self) -> list[ModelProblem]:
        of_served = (problem for model in self.models for problem in model.problems)
        return [*self.problems, *of_served]


class ApiClient:
    """JSON requests to one service, over one pool of connections; a context manager closes them."""

    def __init__(
        self,
        server: ServerOptions,
        *,
        retries: int = _RETRIES,
        deadline: float = math.inf,
        waits_for_models: bool = False,
        on_wait: Callable[[str], None] | None = None,
        cadence: Cadence = _CADENCE,
    ) -> None:
        """Each request is retried up to `retries` times; nothing is sent yet.

        After `deadline`, on the monotonic clock, no request is retried and no wait goes on. With
        `waits_for_models` a model that a worker is loading is waited for until then; without it
        such a request raises ModelLoading. `on_wait` takes lines that say why no answer comes.
        """
        self.client = Client(
            server.url,
            server.api_key,
            retries=retries,
            total_timeout=deadline - time.monotonic(),
            wait_for_models=waits_for_models,
            on_wait=on_wait,
            cadence=cadence,
        )

    def __enter__(self) -> "ApiClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.client.close()

    def request_json(
        self, method: str, path: str, *, body: Any = None, wait_seconds: float = 0, **query: Any
    ) -> Any:
        """The decoded JSON of a successful response; raises the RequestError of any other.

        `body` is encoded as JSON; None sends none. Parameters in `query` that are None are left
        out. With `wait_seconds` the server may hold the response back that long. Raises
        ConnectionFailed after all retries, NotAsyncinfer if the response is not JSON, and
        WaitTimeout past the deadline.
        """
        parameters = {name: _text(value) for name, value in query.items() if value is not None}
        if wait_seconds:
            parameters["wait"] = f"{wait_seconds:g}"
        request = Request(
            method=method,
            path=f"{path}?{urlencode(parameters)}" if parameters else path,
            headers={} if body is None else {"content-type": "application/json"},
            body=None if body is None else msgspec.json.encode(body),
            timeout_seconds=wait_seconds + _MARGIN_SECONDS,
        )
        client = self.client
        return client._driver.run(fetch_json(client._server, request))

    def request_as(self, kind: type[_T], method: str, path: str, **more: Any) -> _T:
        """The response of `request_json` as a `kind`; raises NotAsyncinfer if it has another form.

        `more` are the other arguments of `request_json`.
        """
        return self.convert(kind, self.request_json(method, path, **more), path)

    def convert(self, kind: type[_T], value: Any, path: str) -> _T:
        """A decoded JSON value as a `kind`; raises NotAsyncinfer if it has another form.

        `path` is where the value was read, for the message.
        """
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            raise NotAsyncinfer(
                f"{self.client.url}{path} does not answer as this release of asyncinfer does "
                f"({error}). Give the address that `asyncinfer serve` shows as its URL."
            ) from error


def problem_line(problem: ModelProblem) -> str:
    """A problem of a model, as a server lists it, in one printable line."""
    where = f"{problem.model} {problem.version or 'all versions'}, worker {problem.worker}"
    return printable_line(f"{where}: {problem.reason}")


def seconds_by_rows(times: dict[str, float]) -> list[tuple[int, float]]:
    """Pairs of the number of rows and the seconds of a run, fewest rows first.

    `times` has the seconds by the number of rows as a string; entries with another key are left
    out.
    """
    return sorted((int(rows), spent) for rows, spent in times.items() if _COUNT.fullmatch(rows))


def path_part(name: str) -> str:
    """A name, quoted as one segment of a path; no name is refused."""
    return quote(name, safe="")


def _text(value: Any) -> str:
    """A parameter of a query as text; booleans are `true` and `false`."""
    return str(value).lower() if isinstance(value, bool) else str(value)
