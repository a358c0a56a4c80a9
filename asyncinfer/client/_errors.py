"""What can go wrong on the way to a server, and the server's own errors by their code."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NoReturn
from urllib.parse import urlsplit

import msgspec

from asyncinfer import errors
from asyncinfer.client._protocol import Lost, Response
from asyncinfer.client._wait_reasons import WaitingFor
from asyncinfer.errors import AsyncinferError, Fault, JobFailed, RequestError


class ConnectionFailed(AsyncinferError, ConnectionError):
    """No answer came from the server, after all retries."""

    code = "connection_failed"


class NotAsyncinfer(AsyncinferError):
    """Something answers at this URL, but not asyncinfer."""

    code = "not_asyncinfer"


class WaitTimeout(AsyncinferError, TimeoutError):
    """The job had not ended in time; it goes on, unless it was to be cancelled then."""

    code = "wait_timeout"

    def __init__(
        self, detail: str, *, job_id: str | None = None, waiting_for: WaitingFor | None = None
    ) -> None:
        super().__init__(detail)
        self.job_id = job_id
        self.waiting_for = waiting_for
        """Why it waits, where the server knows a reason."""


class CannotSend(AsyncinferError, ValueError):
    """An input that has no form in which a server would take it."""

    code = "cannot_send"


class WrongAddress(AsyncinferError, ValueError):
    """A URL or an API key that cannot be one."""

    code = "wrong_address"


class ClientClosed(AsyncinferError):
    code = "client_closed"


class UnknownAnswer(RequestError):
    """An error of a newer server, whose code this release has no class for."""

    code, title = "unknown_answer", "The server refused"


class SlowMapWarning(UserWarning):
    """Many rows are mapped over a model that runs each of them alone."""


_REMEDIES: Final = {
    "unauthorized": "Give the client one with api_key=, or set ASYNCINFER_API_KEY.",
    "forbidden": "Give the client another key with api_key=, or set ASYNCINFER_API_KEY.",
    "route_not_found": (
        "Give Client the server's address alone, such as http://127.0.0.1:8000; if that is what "
        "it has, the server is older than this client."
    ),
}


def error_of(response: Response, url: str) -> AsyncinferError:
    """The error that an answer stands for."""
    try:
        problem: Any = msgspec.json.decode(response.content)
    except (ValueError, RecursionError):
        problem = None
    if not isinstance(problem, dict) or not isinstance(problem.get("code"), str):
        return stranger(response, url)
    return problem_error(problem, retry_after(response))


def problem_error(problem: dict[str, Any], retry_after_seconds: float | None) -> RequestError:
    """The server's own class for its code."""
    code, job_id = problem["code"], problem.get("job_id")
    if code == JobFailed.code and isinstance(problem.get("error"), dict):
        return job_failed(problem["error"], str(job_id))
    detail = str(problem.get("detail") or problem.get("title") or code)
    if remedy := _REMEDIES.get(code):
        detail = f"{detail} {remedy}"
    known = _classes().get(code, UnknownAnswer)
    error = known(
        detail,
        faults=_faults(problem.get("errors")),
        retry_after_seconds=retry_after_seconds,
        job_id=job_id if isinstance(job_id, str) else None,
    )
    if known is UnknownAnswer:
        error.add_note(f"Its code is {code!r}; a newer release of asyncinfer knows it.")
    return error


def _faults(errors: Any) -> list[Fault]:
    """None where another program writes something else there."""
    try:
        return msgspec.convert(errors or [], list[Fault])
    except msgspec.ValidationError:
        return []


def job_failed(error: dict[str, Any], job_id: str) -> JobFailed:
    return JobFailed((str(error.get("code")), str(error.get("message"))), job_id)


def retry_after(response: Response) -> float | None:
    """Whole seconds; dates are not what asyncinfer sends."""
    value = response.headers.get("retry-after", "")
    return float(value) if value.isascii() and value.isdecimal() else None


def stranger(response: Response, url: str) -> NotAsyncinfer:
    kind = response.headers.get("content-type", "nothing").partition(";")[0]
    return NotAsyncinfer(
        f"{url} answered {response.status} with {kind}, which is not how asyncinfer answers. Give "
        "the address that `asyncinfer serve` shows as its URL, and mind proxies between."
    )


def reason_of(told: Response | Lost, url: str) -> WaitingFor:
    """Why a request has to be sent again."""
    error = lost(told.reason, url) if isinstance(told, Lost) else error_of(told, url)
    return WaitingFor(error.code, error.detail)


@contextmanager
def strange_refused(what: str) -> Iterator[None]:
    """Raises NotAsyncinfer where what a server answered cannot be read as what it stands for."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise NotAsyncinfer(
            f"{what} is in no form that this release of asyncinfer reads "
            f"({type(error).__name__}). Give the address that `asyncinfer serve` shows as its "
            "URL, or install the server's release."
        ) from error


def lost(reason: str, url: str) -> ConnectionFailed:
    return ConnectionFailed(
        f"No answer from {url}: {reason}. Is it running? Start it with `asyncinfer serve`, or "
        "give its address: Client(url), or ASYNCINFER_URL."
    )


def checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise WrongAddress(f"The URL is {url!r}; give one such as http://127.0.0.1:8000.")
    return url.rstrip("/")


def checked_key(key: str) -> str:
    """Without the line break that a copied key may end with; it is not shown."""
    key = key.strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise WrongAddress("The API key has characters that no key has; `keygen` shows one once.")
    return key


def refuse_closed() -> NoReturn:
    raise ClientClosed("This client was closed; make a new one.")


def _classes() -> dict[str, type[RequestError]]:
    """Where two share a code, the one whose name the code is."""
    return {
        one.code: one
        for one in vars(errors).values()
        if isinstance(one, type)
        and issubclass(one, RequestError)
        and one not in (RequestError, JobFailed)
    }
