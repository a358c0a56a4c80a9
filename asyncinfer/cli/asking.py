"""Requests to a service, and its answers; its refusals as the errors they stand for."""

from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import quote

import msgspec

from asyncinfer import errors
from asyncinfer.cli.options import Server
from asyncinfer.errors import AsyncinferError, Fault, RequestError

if TYPE_CHECKING:
    import httpx2

_Answer = TypeVar("_Answer")
_MARGIN_SECONDS: Final = 15.0


class ConnectionFailed(AsyncinferError):
    code = "connection_failed"


class NotAsyncinfer(AsyncinferError):
    code = "not_asyncinfer"


class Service:
    """One service, asked over one pool of connections."""

    def __init__(self, server: Server) -> None:
        import httpx2

        self._url = server.url.rstrip("/")
        headers = {"x-api-key": server.api_key} if server.api_key else {}
        self._http = httpx2.Client(headers=headers, verify=server.url.startswith("https"))

    def __enter__(self) -> "Service":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._http.close()

    def ask(
        self, method: str, path: str, *, body: Any = None, wait_seconds: float = 0, **query: Any
    ) -> Any:
        """The JSON of a good answer; raises what a bad one stands for."""
        import httpx2

        given = {name: _text(value) for name, value in query.items() if value not in (None, False)}
        if wait_seconds:
            given["wait"] = f"{wait_seconds:g}"
        try:
            answer = self._http.request(
                method,
                self._url + path,
                params=given,
                json=body,
                timeout=wait_seconds + _MARGIN_SECONDS,
            )
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            raise ConnectionFailed(
                f"No answer from {self._url} ({error}). Start it with `asyncinfer serve`, or give "
                "its address: --url or ASYNCINFER_URL."
            ) from error
        return _decoded(answer, self._url)

    def ask_as(self, kind: type[_Answer], method: str, path: str, **more: Any) -> _Answer:
        try:
            return msgspec.convert(self.ask(method, path, **more), kind)
        except msgspec.ValidationError as error:
            raise _stranger(self._url) from error


def part(name: str) -> str:
    """A name as one part of a path."""
    return quote(name, safe="")


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _decoded(answer: "httpx2.Response", url: str) -> Any:
    try:
        found = msgspec.json.decode(answer.content)
    except msgspec.DecodeError as error:
        raise _stranger(url) from error
    if answer.status_code < 400:
        return found
    if not isinstance(found, dict) or "code" not in found:
        raise _stranger(url)
    raise _error_of(found)


def _stranger(url: str) -> NotAsyncinfer:
    return NotAsyncinfer(
        f"{url} does not answer as asyncinfer does. Give the address that `asyncinfer serve` "
        "shows as its URL: --url or ASYNCINFER_URL."
    )


def _error_of(problem: dict[str, Any]) -> RequestError:
    detail = str(problem.get("detail"))
    if problem["code"] in ("unauthorized", "forbidden"):
        detail += " Set ASYNCINFER_API_KEY to one that has it."
    found = [Fault(one["pointer"], one["detail"]) for one in problem.get("errors", ())]
    return _classes().get(problem["code"], RequestError)(detail, faults=found)


def _classes() -> dict[str, type[RequestError]]:
    return {
        one.code: one
        for one in vars(errors).values()
        if isinstance(one, type)
        and issubclass(one, RequestError)
        and one not in (RequestError, errors.JobFailed)
    }
