"""The requests of a flow: sending one, retrying it, and decoding its answer."""

import math
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import quote

import msgspec
from msgspec import Struct

from asyncinfer.client._errors import (
    CannotSend,
    NotAsyncinfer,
    WaitTimeout,
    connection_failed_error,
    error_of_response,
    not_asyncinfer_error,
    retry_after_seconds,
    retry_reason,
    shown_url,
)
from asyncinfer.client._models import Model
from asyncinfer.client._protocol import Flow, Lost, Pause, Request, Response, T, exchange
from asyncinfer.client._wait_reasons import CADENCE, Cadence, WaitingFor
from asyncinfer.errors import InvalidInput, ModelLoading, NoModelAnnounced
from asyncinfer.telemetry.trace_context import headers_of_caller

RETRYABLE_STATUSES: Final = frozenset({429, 502, 503, 504})
FIRST_WORKER_RETRIES: Final = 2
"""`serve` answers about a second before its worker is announced."""

_MAX_FIRST_TRIES: Final = 3
"""Tries at a URL where nothing has ever answered."""
_BACKOFF_SECONDS: Final = 0.5
_MAX_BACKOFF_SECONDS: Final = 30.0


class RemoteServer(Struct):
    """The server of a client: its address, the client's limits, and what is known of it."""

    url: str
    headers: dict[str, str]
    timeout_seconds: float
    retries: int
    ca: str | None = None
    """A PEM file with CAs that are trusted besides those of the system."""
    until: float = math.inf
    """The client's deadline on the monotonic clock: past it nothing is awaited or sent again."""
    waits_for_models: bool = False
    """A model that a worker is loading is awaited until `until`, beyond all retries."""
    on_wait: Callable[[str], None] | None = None
    """Takes the lines that say why no answer comes; None: those of maps go to their progress."""
    cadence: Cadence = CADENCE
    models: dict[str | None, tuple[float, Model]] = {}
    """Models by name, None for the default one, each with the time when it was read."""
    accepts_ndjson: bool = True
    """False once the server, one of an earlier release, has refused NDJSON."""


def fetch(
    server: RemoteServer,
    request: Request,
    *,
    until: float = math.inf,
    queue_full_seconds: float = 0.0,
) -> Flow[Response]:
    """Sends a request, again if need be, and returns its response, an error response too.

    A 429, 502, 503 or 504 and a lost answer are retried, `server.retries` times. Past `until` (on
    the monotonic clock) nothing is sent again. A full queue is awaited for `queue_full_seconds` at
    no cost of retries. Raises ConnectionFailed if no answer came, and WaitTimeout if the client's
    own deadline has passed.
    """
    request = with_client_headers(server, request)
    begun_at = time.monotonic()
    queue_full_until = begun_at + queue_full_seconds
    attempt = 0
    while True:
        reply = yield from exchange(request)
        if isinstance(reply, Response) and not _is_retryable(server, reply):
            return reply
        pause_seconds = seconds_before_retry(attempt, reply)
        due = time.monotonic() + pause_seconds
        reason = retry_reason(reply, server.url)
        is_full = isinstance(reply, Response) and reply.status == 429 and due < queue_full_until
        if not (is_full or (server.waits_for_models and reason.code == ModelLoading.code)):
            attempt += 1
        if attempt > server.retries or is_final_loss(reply, attempt):
            break
        if until < min(due, server.until):
            break
        yield from wait_before_retry(server, pause_seconds, reason, begun_at)
    if isinstance(reply, Lost):
        raise connection_failed_error(reply, server.url)
    return reply


def _is_retryable(server: RemoteServer, response: Response) -> bool:
    """Whether the same request may soon be answered otherwise.

    If no model could be served at all, the server sends no Retry-After: a person has to correct
    the folder.
    """
    if response.status not in RETRYABLE_STATUSES:
        return False
    is_permanent = response.status == 503 and retry_after_seconds(response) is None
    return not (
        is_permanent and isinstance(error_of_response(response, server.url), NoModelAnnounced)
    )


def with_client_headers(server: RemoteServer, request: Request) -> Request:
    """The request with the client's own headers, which have the API key, and with the trace of the
    caller's span, if one is active."""
    headers = {**headers_of_caller(), **server.headers, **request.headers}
    return msgspec.structs.replace(request, headers=headers)


def is_final_loss(reply: Response | Lost, losses: int) -> bool:
    """Whether to give up after this lost answer, without the remaining retries.

    `losses` is the number of tries that have failed, this one included. The first answer of a
    server may be cut as any other, but not several times in a row. False for a response.
    """
    return isinstance(reply, Lost) and (
        reply.is_unreachable or (reply.is_first_contact and losses >= _MAX_FIRST_TRIES)
    )


def fetch_json(server: RemoteServer, request: Request) -> Flow[Any]:
    """Sends a request as `fetch` does, and returns the decoded JSON of its response.

    Raises the error that the response stands for if its status is 400 or above, NotAsyncinfer if it
    is not JSON, and what `fetch` raises.
    """
    response = yield from fetch(server, request)
    return decode_json(server, response)


def decode_json(server: RemoteServer, response: Response) -> Any:
    """The decoded JSON of a response; raises the error that it stands for, or NotAsyncinfer.

    A status of 400 or above stands for an error; NotAsyncinfer is raised for other content than
    JSON.
    """
    if response.status >= 400:
        raise error_of_response(response, server.url)
    try:
        return msgspec.json.decode(response.content)
    except (ValueError, RecursionError):
        # A DecodeError and a UnicodeDecodeError are ValueErrors.
        raise not_asyncinfer_error(response, server.url) from None


def get(server: RemoteServer, path: str, **query: Any) -> Flow[Any]:
    """The decoded JSON of a GET; else as `call`."""
    return (yield from call(server, "GET", path, query))


def call(
    server: RemoteServer, method: str, path: str, query: Mapping[str, Any], body: Any = None
) -> Flow[Any]:
    """The decoded JSON of a request for `path`, which is quoted already.

    Parameters in `query` that are None are left out; `body` is sent as JSON, None sends none.
    Raises CannotSend, and as `fetch_json` does.
    """
    if not (path.startswith("/") and path.isprintable() and method.isalpha() and method.isascii()):
        raise CannotSend(f"{method} {path} is no request; give one such as GET /models/iris.")
    request = Request(
        method=method,
        path=path + query_text(query),
        headers={} if body is None else {"content-type": "application/json"},
        body=None if body is None else _json(body),
    )
    return (yield from fetch_json(server, request))


def convert(server: RemoteServer, value: Any, kind: type[T]) -> T:
    """Decoded JSON as `kind`, whatever more is in it; raises NotAsyncinfer for another form."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise NotAsyncinfer(
            f"{shown_url(server.url)} answered with other JSON ({error}), which is not how "
            "asyncinfer answers. Give the address that `asyncinfer serve` shows as its URL, or "
            "install the server's release."
        ) from error


def path_part(name: str) -> str:
    """A name quoted as one segment of a path; raises InvalidInput if it is empty, "." or ".."."""
    if not name:
        raise InvalidInput("The name of a job, a model or a group is empty.")
    # One dot or two would be read as a step in the path, also when they are quoted.
    if name in (".", ".."):
        raise InvalidInput(f"{name!r} is no name of a job, a model or a group.")
    return _quoted(name)


def _quoted(text: str) -> str:
    """A text as a part of a URL; raises InvalidInput if it is no Unicode."""
    try:
        return quote(text, safe="")
    except UnicodeEncodeError as error:
        raise InvalidInput(f"{text!r} has half a character, which no name has.") from error


def _json(body: Any) -> bytes:
    """The JSON of a body; raises CannotSend."""
    try:
        return msgspec.json.encode(body)
    except (TypeError, ValueError, RecursionError) as error:
        raise CannotSend(f"The body cannot be sent as JSON: {error}.") from error


def wait_before_retry(
    server: RemoteServer, seconds: float, reason: WaitingFor, begun_at: float
) -> Flow[None]:
    """Waits before the next try; raises WaitTimeout if the client's own deadline comes first.

    In that case it has waited until the deadline. `reason` is why the request has to be sent again,
    and `begun_at` when it was sent first.
    """
    left = server.until - time.monotonic()
    yield Pause(max(0.0, min(seconds, left)), reason, begun_at)
    if left < seconds:
        raise WaitTimeout(f"No answer in time: {reason.message}", waiting_for=reason)


def seconds_before_retry(attempt: int, reply: Response | Lost) -> float:
    """The seconds before the next try: what Retry-After says, or the backoff if that is longer."""
    requested = retry_after_seconds(reply) if isinstance(reply, Response) else None
    return max(requested or 0.0, backoff_seconds(attempt))


def backoff_seconds(attempt: int) -> float:
    """A random number of seconds that grows threefold with each attempt, from 0; at most 30."""
    backoff = min(_MAX_BACKOFF_SECONDS, _BACKOFF_SECONDS * 3.0**attempt)
    return backoff * random.uniform(0.5, 1.0)


def query_text(query: Mapping[str, Any]) -> str:
    """The query of a URL with its question mark, without None values; "" for no parameters."""
    values = {name: _query_value(value) for name, value in query.items() if value is not None}
    texts = [f"{_quoted(name)}={_quoted(value)}" for name, value in values.items()]
    return f"?{'&'.join(texts)}" if texts else ""


def _query_value(value: Any) -> str:
    """A parameter as text; booleans are `true` and `false`."""
    return str(value).lower() if isinstance(value, bool) else str(value)
