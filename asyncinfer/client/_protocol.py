"""The messages between a flow and the driver that carries it out.

A flow is a generator: it yields a `Request` and is sent a `Response`, or a `Lost` if no answer
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
    """The quoted path and query, as they are sent."""
    headers: Mapping[str, str] = {}
    body: bytes | None = None
    timeout_seconds: float = 30.0
    """How long the server may be silent before the request counts as lost."""


class Pause(Struct, frozen=True):
    """A wait of a flow before it sends a request again, and why it has to."""

    seconds: float
    reason: WaitingFor
    begun_at: float
    """When the request was sent first, on the monotonic clock."""


class Response(Struct, frozen=True):
    status: int
    headers: Mapping[str, str]
    """Names are in lower case."""
    content: bytes


class Lost(Struct, frozen=True):
    """No answer came; the request may or may not have arrived."""

    reason: str
    is_unreachable: bool = False
    """The same request would fail again: nothing has ever answered at this URL and nothing listens
    there, so that the address is more likely wrong than the server away; or TLS is refused."""
    is_first_contact: bool = False
    """Nothing has ever answered at this URL."""
    advice: str = ""
    """What to do, where it is not to start the server or to give another address."""


class Event(Struct, frozen=True):
    """A server-sent event of `Job.events()` or `Group.events()`.

    `name` is "snapshot", a job's new status such as "completed", "progress" or "done" (both of a
    group), or "gap" (events were missed); `data` is the decoded JSON of the event.
    """

    name: str
    data: Any
    id: str = ""


FlowRequest: TypeAlias = Request | Pause
FlowReply: TypeAlias = Response | Lost | None

T = TypeVar("T")
Flow: TypeAlias = Generator[FlowRequest, FlowReply, T]


def exchange(request: Request) -> Flow[Response | Lost]:
    """Yields a request once, without a retry, and returns the driver's reply."""
    reply = yield request
    assert reply is not None, "a driver replies to a request with a Response or a Lost"
    return reply
