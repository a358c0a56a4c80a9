"""The errors that a client raises, and the making of each from a server's answer.

    AsyncinferError                       has `.code`; in a map, `.row` is the number of the row
    ├── ConnectionFailed                  also a ConnectionError: no answer, after all retries
    ├── NotAsyncinfer                     another program, or another release, answered
    ├── WaitTimeout                       also a TimeoutError: `.job_id`, `.waiting_for`
    ├── CannotSend                        also a ValueError: the input has no form to send it in, or
    │                                     an argument cannot be right
    ├── WrongAddress                      also a ValueError: not a URL, an API key or a CA file
    ├── ClientClosed
    ├── WebhookNotVerified                what was received is no webhook of the sender
    ├── InvalidSecret                     also a ValueError: no secret to verify webhooks with
    └── RequestError                      the server's answer: `.status`, `.detail`, `.job_id`
        ├── Unauthorized                  401
        ├── Forbidden                     403, the key lacks a scope
        ├── JobNotFound                   404; so ModelNotFound, VersionNotFound, GroupNotFound,
        │                                 WebhookNotFound
        ├── JobFinished                   409; so JobNotFinished, JobCancelled, JobNotRetryable
        ├── GroupClosed                   409, the group takes no more jobs
        ├── JobExpired                    410, the job is no longer kept
        ├── BodyTooLarge                  413
        ├── InvalidInput                  422, `.faults` has a JSON pointer for each fault
        ├── JobFailed                     422, `.job_error` is the code and message of the job
        ├── IdempotencyConflict           422, the key was used with another input
        ├── WebhookRefused                422, the webhook's URL is not allowed or has no secret
        ├── QueueFull                     429, after all retries: `.retry_after_seconds`; so
        │                                 WebhooksFull
        ├── RedisUnavailable              503, after all retries; so StorageFull
        ├── NoModelAnnounced              503, after all retries
        │   └── ModelLoading
        └── UnknownAnswer                 a code that this release has no class for

    UserWarning
    └── SlowMapWarning                    many rows are mapped over a model that does not batch

RequestError and the classes below it, but for UnknownAnswer, are those of `asyncinfer.errors`,
which has all of them; the tree shows those that a user of the client is likely to meet.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NoReturn
from urllib.parse import urlsplit, urlunsplit

import msgspec

from asyncinfer import errors
from asyncinfer.client._protocol import Lost, Response
from asyncinfer.client._wait_reasons import WaitingFor
from asyncinfer.errors import AsyncinferError, InputError, JobFailed, RequestError


class ConnectionFailed(AsyncinferError, ConnectionError):
    """No answer came from the server, after all retries."""

    code = "connection_failed"


class NotAsyncinfer(AsyncinferError):
    """The server at this URL is not asyncinfer, or its release answers in an unknown form."""

    code = "not_asyncinfer"


class WaitTimeout(AsyncinferError, TimeoutError):
    """The job did not end in time. It goes on, unless `cancel_on_timeout` was given.

    `client.job(error.job_id)` finds it again.
    """

    code = "wait_timeout"

    def __init__(
        self, detail: str, *, job_id: str | None = None, waiting_for: WaitingFor | None = None
    ) -> None:
        super().__init__(detail)
        self.job_id = job_id
        """None if the time was over before the server accepted a job, or for a whole map."""
        self.waiting_for = waiting_for
        """Why the job waits, if the server knows a reason."""


class CannotSend(AsyncinferError, ValueError):
    """The client has no form in which to send this input, or an argument cannot be right."""

    code = "cannot_send"


class WrongAddress(AsyncinferError, ValueError):
    """The URL is not an HTTP URL, the API key has characters that no key has, or the file of CAs
    cannot be used."""

    code = "wrong_address"


class ClientClosed(AsyncinferError):
    """The client was used after `close()`."""

    code = "client_closed"


class UnknownAnswer(RequestError):
    """An error of a newer server, whose code this release has no class for."""

    code, title = "unknown_answer", "The server refused"


class SlowMapWarning(UserWarning):
    """Many rows are mapped over a model that runs each row alone."""


_REMEDIES: Final = {
    "unauthorized": "Give the client one with api_key=, or set ASYNCINFER_API_KEY.",
    "forbidden": "Give the client another key with api_key=, or set ASYNCINFER_API_KEY.",
    "route_not_found": (
        "Give Client the server's address alone, such as http://127.0.0.1:8000; if that is what "
        "it has, the server is older than this client."
    ),
}


def error_of_response(response: Response, url: str) -> AsyncinferError:
    """Returns the error that a response of 400 or above stands for, to be raised by the caller.

    It is NotAsyncinfer if the content is no problem with a code. `url` is that of the server, for
    the message.
    """
    try:
        problem: Any = msgspec.json.decode(response.content)
    except (ValueError, RecursionError):
        problem = None
    if not isinstance(problem, dict) or not isinstance(problem.get("code"), str):
        return not_asyncinfer_error(response, url)
    return problem_error(problem, retry_after_seconds(response))


def problem_error(problem: dict[str, Any], retry_after_seconds: float | None) -> RequestError:
    """Returns the error of a problem's code (RFC 9457); UnknownAnswer if no class has this code.

    `problem` must have `code`, a string; all else may be missing.
    """
    code, job_id = problem["code"], problem.get("job_id")
    if code == JobFailed.code and isinstance(problem.get("error"), dict):
        return job_failed_error(problem["error"], str(job_id))
    detail = str(problem.get("detail") or problem.get("title") or code)
    if remedy := _REMEDIES.get(code):
        detail = f"{detail} {remedy}"
    kind = _classes_by_code().get(code, UnknownAnswer)
    error = kind(
        detail,
        faults=_faults(problem.get("errors")),
        retry_after_seconds=retry_after_seconds,
        job_id=job_id if isinstance(job_id, str) else None,
    )
    if kind is UnknownAnswer:
        error.add_note(f"Its code is {code!r}; a newer release of asyncinfer knows it.")
    return error


def _faults(errors: Any) -> list[InputError]:
    """The faults in a problem's `errors`; an empty list if another program wrote it."""
    try:
        return msgspec.convert(errors or [], list[InputError])
    except msgspec.ValidationError:
        return []


def job_failed_error(error: dict[str, Any], job_id: str) -> JobFailed:
    """Returns the JobFailed of a job whose `error`, a dict of `code` and `message`, is given."""
    return JobFailed((str(error.get("code")), str(error.get("message"))), job_id)


def retry_after_seconds(response: Response) -> float | None:
    """The seconds in Retry-After; None if it is absent, or a date, which asyncinfer never sends."""
    value = response.headers.get("retry-after", "")
    return float(value) if value.isascii() and value.isdecimal() else None


def not_asyncinfer_error(response: Response, url: str) -> NotAsyncinfer:
    """Returns the error for a response that asyncinfer would not send."""
    kind = response.headers.get("content-type", "nothing").partition(";")[0]
    return NotAsyncinfer(
        f"{shown_url(url)} answered {response.status} with {kind}, which is not how asyncinfer "
        "answers. Give the address that `asyncinfer serve` shows as its URL, and check any proxy "
        "in between."
    )


def retry_reason(reply: Response | Lost, url: str) -> WaitingFor:
    """Why a request has to be sent again, from the reply to it."""
    error = (
        connection_failed_error(reply, url)
        if isinstance(reply, Lost)
        else error_of_response(reply, url)
    )
    return WaitingFor(error.code, error.detail)


@contextmanager
def reject_unreadable_result() -> Iterator[None]:
    """Turns errors of decoding a result in its block into NotAsyncinfer.

    These are ArithmeticError, AttributeError, LookupError, TypeError and ValueError.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise NotAsyncinfer(
            "A result has a form that this release of asyncinfer cannot read "
            f"({type(error).__name__}). Give the address that `asyncinfer serve` shows as its "
            "URL, or install the server's release."
        ) from error


_START_OR_ADDRESS: Final = (
    "Is it running? Start it with `asyncinfer serve`, or give its address: Client(url), or "
    "ASYNCINFER_URL."
)


def connection_failed_error(lost: Lost, url: str) -> ConnectionFailed:
    """Returns the error for a request that got no answer."""
    advice = lost.advice or _START_OR_ADDRESS
    return ConnectionFailed(f"No answer from {shown_url(url)}: {lost.reason}. {advice}")


def normalized_url(url: str) -> str:
    """The URL without a slash at its end; raises WrongAddress if it is no HTTP URL with a host."""
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_valid = False
    if not is_valid:
        # What stands before an @ may be a password.
        raise WrongAddress(
            f"The URL is {url.rpartition('@')[2]!r}; give one such as http://127.0.0.1:8000."
        )
    return url.rstrip("/")


def shown_url(url: str) -> str:
    """A valid URL without user and password, to be shown."""
    scheme, netloc, path, query, fragment = urlsplit(url)
    return urlunsplit((scheme, netloc.rpartition("@")[2], path, query, fragment))


def checked_ca(path: str) -> str | None:
    """The path of a PEM file with CAs, None if it is empty; raises WrongAddress if it has none."""
    if not path:
        return None
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except (OSError, ValueError) as error:
        # A ValueError is that of a path which is none, such as one with a null character.
        why = error.strerror if isinstance(error, OSError) else error
        why = "it has no certificate" if isinstance(error, ssl.SSLError) else why
        raise WrongAddress(
            f"The CA file {path!r} cannot be used: {why}. Give a PEM file: ca=, or ASYNCINFER_CA."
        ) from error
    return path


def normalized_key(key: str) -> str:
    """The key without the line break that a copied one may end with.

    Raises WrongAddress, which does not show the key.
    """
    key = key.strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise WrongAddress(
            "The API key has characters that no key has. Copy it again, or make another with "
            "`asyncinfer keygen`."
        )
    return key


def raise_client_closed() -> NoReturn:
    """Raises ClientClosed."""
    raise ClientClosed("This client was closed; make a new one.")


def _classes_by_code() -> dict[str, type[RequestError]]:
    """The error class of each code; of two with one code the base class, which stands first.

    JobFailed is left out, since it takes other arguments.
    """
    return {
        kind.code: kind
        for kind in reversed(vars(errors).values())
        if isinstance(kind, type)
        and issubclass(kind, RequestError)
        and kind not in (RequestError, JobFailed)
    }
