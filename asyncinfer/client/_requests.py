"""One request of a flow: sent, retried, and its reply decoded."""

import math
import random
import time
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote, urlencode

import msgspec
from msgspec import Struct

from asyncinfer.client._errors import (
    WaitTimeout,
    error_of,
    lost,
    reason_of,
    retry_after,
    stranger,
)
from asyncinfer.client._models import Model
from asyncinfer.client._protocol import Flow, Lost, Pause, Request, Response, exchange
from asyncinfer.client._wait_reasons import WaitingFor
from asyncinfer.errors import (
    InvalidInput,
    ModelLoading,
    NoModelAnnounced,
)

_FIRST_TRIES: Final = 3


AGAIN: Final = frozenset({429, 502, 503, 504})


FIRST_WORKER_RETRIES: Final = 2
"""`serve` answers about a second before its worker has said that it lives."""


_BACKOFF_SECONDS: Final = 0.5


_BACKOFF_CAP_SECONDS: Final = 30.0


class Server(Struct):
    """The server that a client speaks to, and what it remembers of it."""

    url: str
    headers: dict[str, str]
    timeout_seconds: float
    retries: int
    until: float = math.inf
    """On the monotonic clock: past it nothing is waited for, or sent a second time."""
    models: dict[str | None, tuple[float, Model]] = {}
    waits_for_models: bool = False
    """A model that a worker is loading is waited for until then, beyond all retries."""
    takes_lines: bool = True
    """Until it says that it does not: a server of an earlier release."""


def ask(
    server: Server, request: Request, *, until: float = math.inf, patience_seconds: float = 0.0
) -> Flow[Response]:
    """The answer, good or bad, of a request that may be sent again until one comes.

    Raises ConnectionFailed. Past `until` (of the monotonic clock) it tries no more; a full queue
    costs no retry while there is patience. Raises WaitTimeout when the client's own time is over.
    """
    request = with_own_headers(server, request)
    patient_until = time.monotonic() + patience_seconds
    attempt = 0
    while True:
        told = yield from exchange(request)
        if isinstance(told, Response) and not _may_pass(server, told):
            return told
        pause = _pause_seconds(attempt, told)
        due = time.monotonic() + pause
        reason = reason_of(told, server.url)
        is_full = isinstance(told, Response) and told.status == 429 and due < patient_until
        if not (is_full or (server.waits_for_models and reason.code == ModelLoading.code)):
            attempt += 1
        if attempt > server.retries or is_hopeless(told, attempt):
            break
        if until < min(due, server.until):
            break
        yield from wait_before_retry(server, pause, reason)
    if isinstance(told, Lost):
        raise lost(told.reason, server.url)
    return told


def _may_pass(server: Server, told: Response) -> bool:
    """Whether the same request may be answered otherwise soon. Where there is no model at all that
    could be served, the server names no time to ask again: a person has to mend the folder."""
    if told.status not in AGAIN:
        return False
    is_for_good = told.status == 503 and retry_after(told) is None
    return not (is_for_good and isinstance(error_of(told, server.url), NoModelAnnounced))


def with_own_headers(server: Server, request: Request) -> Request:
    """With the API key."""
    return msgspec.structs.replace(request, headers={**server.headers, **request.headers})


def is_hopeless(told: Response | Lost, losses: int) -> bool:
    """A first answer may be cut as any other, but not again and again."""
    return isinstance(told, Lost) and (told.hopeless or (told.first and losses >= _FIRST_TRIES))


def ask_json(server: Server, request: Request, *, until: float = math.inf) -> Flow[Any]:
    """The JSON of a good answer; raises what a bad one stands for."""
    response = yield from ask(server, request, until=until)
    return decoded(server, response)


def decoded(server: Server, response: Response) -> Any:
    if response.status >= 400:
        raise error_of(response, server.url)
    try:
        return msgspec.json.decode(response.content)
    except (ValueError, RecursionError):
        # A DecodeError and a UnicodeDecodeError are ValueErrors.
        raise stranger(response, server.url) from None


def get(server: Server, path: str, **query: Any) -> Flow[Any]:
    return (yield from ask_json(server, Request(method="GET", path=path + query_text(query))))


def call(server: Server, method: str, path: str, **query: Any) -> Flow[Any]:
    return (yield from ask_json(server, Request(method=method, path=path + query_text(query))))


def path_part(name: str) -> str:
    """A name as a part of a path; raises InvalidInput for one that cannot be."""
    if not name:
        raise InvalidInput("The name of a job, a model or a group is empty.")
    # A dot alone or two would be taken for a step in the path, also when quoted.
    if name in (".", ".."):
        raise InvalidInput(f"{name!r} is no name of a job, a model or a group.")
    return quote(name, safe="")


def wait_before_retry(server: Server, seconds: float, reason: WaitingFor) -> Flow[None]:
    """Waits before the next try; raises WaitTimeout where the client's own time is over first."""
    left = server.until - time.monotonic()
    yield Pause(max(0.0, min(seconds, left)), reason)
    if left < seconds:
        raise WaitTimeout(f"No answer in time: {reason.message}", waiting_for=reason)


def _pause_seconds(attempt: int, told: Response | Lost) -> float:
    asked = retry_after(told) if isinstance(told, Response) else None
    return max(asked or 0.0, backoff_seconds(attempt))


def backoff_seconds(attempt: int) -> float:
    backoff = min(_BACKOFF_CAP_SECONDS, _BACKOFF_SECONDS * 3.0**attempt)
    return backoff * random.uniform(0.5, 1.0)


def query_text(query: Mapping[str, Any]) -> str:
    given = {name: _text(value) for name, value in query.items() if value is not None}
    return f"?{urlencode(given)}" if given else ""


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
