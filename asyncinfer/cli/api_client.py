"""Requests to a service, through the client: what commands ask that it has no method for."""

import math
import re
from types import TracebackType
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlencode

import msgspec
from msgspec import Struct

from asyncinfer.cli.options import Server
from asyncinfer.client import Client, Model, NotAsyncinfer
from asyncinfer.client._protocol import Request
from asyncinfer.client._requests import ask_json
from asyncinfer.untrusted.printable import printable_line

_Answer = TypeVar("_Answer")
_MARGIN_SECONDS: Final = 15.0
_COUNT: Final = re.compile("[0-9]{1,18}")
_RETRIES: Final = 2
"""A person waits: some two seconds are enough."""


class ModelList(Struct, frozen=True):
    models: tuple[Model, ...]
    problems: tuple[dict[str, Any], ...] = ()
    """Of models that no worker serves in any version."""
    loading: tuple[str, ...] = ()

    @property
    def all_problems(self) -> list[dict[str, Any]]:
        return [*self.problems, *(it for one in self.models for it in one.problems)]


class Service:
    """One service, asked over one pool of connections."""

    def __init__(
        self,
        server: Server,
        *,
        retries: int = _RETRIES,
        until: float = math.inf,
        waits_for_models: bool = False,
    ) -> None:
        """`until` on the monotonic clock; nothing is waited for after that, and what a worker is
        loading until then, if so wished."""
        self.client = Client(server.url, server.api_key, retries=retries)
        self.client._server.until = until
        self.client._server.waits_for_models = waits_for_models

    def __enter__(self) -> "Service":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.client.close()

    def ask(
        self, method: str, path: str, *, body: Any = None, wait_seconds: float = 0, **query: Any
    ) -> Any:
        """The JSON of a good answer; raises what a bad one stands for."""
        given = {name: _text(value) for name, value in query.items() if value is not None}
        if wait_seconds:
            given["wait"] = f"{wait_seconds:g}"
        request = Request(
            method=method,
            path=f"{path}?{urlencode(given)}" if given else path,
            headers={} if body is None else {"content-type": "application/json"},
            body=None if body is None else msgspec.json.encode(body),
            timeout_seconds=wait_seconds + _MARGIN_SECONDS,
        )
        client = self.client
        return client._driver.run(ask_json(client._server, request))

    def ask_as(self, kind: type[_Answer], method: str, path: str, **more: Any) -> _Answer:
        return self.checked(kind, self.ask(method, path, **more), path)

    def checked(self, kind: type[_Answer], answer: Any, path: str) -> _Answer:
        """An answer, or a part of one, whose types are those that a command relies on."""
        try:
            return msgspec.convert(answer, kind)
        except msgspec.ValidationError as error:
            raise NotAsyncinfer(
                f"{self.client.url}{path} does not answer as this release of asyncinfer does "
                f"({error}). Give the address that `asyncinfer serve` shows as its URL."
            ) from error


def told_problem(one: dict[str, Any]) -> str:
    """In one line, of a model as a server lists it."""
    version = one.get("version") or "all versions"
    told = f"{one.get('model')} {version}, worker {one.get('worker')}: {one.get('reason')}"
    return printable_line(told)


def by_rows(times: dict[str, float]) -> list[tuple[int, float]]:
    """The seconds of a run by its number of rows, fewest first."""
    return sorted((int(rows), took) for rows, took in times.items() if _COUNT.fullmatch(rows))


def part(name: str) -> str:
    """A name as one part of a path."""
    return quote(name, safe="")


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
