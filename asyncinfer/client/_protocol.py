"""What a conversation asks of whoever carries it, and what it is told in return.

A flow is a generator: it yields a `Request` and is sent a `Response`, or a `Lost` where none
came; it yields a `Pause` and is sent None once that time has passed. It does no I/O itself, so
that one flow serves threads and event loops.
"""

from collections.abc import Generator, Mapping
from typing import Any, TypeAlias, TypeVar

from msgspec import Struct

from asyncinfer.client._wait_reasons import WaitingFor


class Request(Struct, frozen=True, kw_only=True):
    method: str
    path: str
    """With its query, as it is sent."""
    headers: Mapping[str, str] = {}
    body: bytes | None = None
    timeout_seconds: float = 30.0
    """How long the server may be silent."""


class Pause(Struct, frozen=True):
    seconds: float
    reason: WaitingFor | None = None


class Response(Struct, frozen=True):
    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    content: bytes


class Lost(Struct, frozen=True):
    """No answer came, and the request may or may not have arrived."""

    reason: str
    hopeless: bool = False
    """Nothing ever answered at this URL, and nothing listens there: more likely wrong than away."""
    first: bool = False
    """Nothing ever answered at this URL."""


class Event(Struct, frozen=True):
    """`name` is a job's new status, or snapshot, progress, done, gap; `data` what it says."""

    name: str
    data: Any
    id: str = ""


Asked: TypeAlias = Request | Pause
Told: TypeAlias = Response | Lost | None

T = TypeVar("T")
Flow: TypeAlias = Generator[Asked, Told, T]


def exchange(request: Request) -> Flow[Response | Lost]:
    """One request, once."""
    told = yield request
    assert told is not None, "a request is answered"
    return told
