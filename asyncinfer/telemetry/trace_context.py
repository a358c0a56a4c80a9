"""The W3C trace context of requests and records: read, checked and bounded; loads nothing."""

import re
import sys
from collections.abc import Mapping
from typing import Any, Final

from asyncinfer.jobs import TraceContext

TRACEPARENT: Final = "traceparent"
TRACESTATE: Final = "tracestate"

_PARENT: Final = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-[ -~]*)?"
)
_VERSION_0: Final = "00-"
_PARENT_LENGTH: Final = 55
_MAX_PARENT_LENGTH: Final = 256
"""A later version may append fields, which are dropped."""

_MAX_STATE_LENGTH: Final = 512
"""As much as W3C asks to be passed on; a longer one is dropped whole."""
_MAX_STATE_MEMBERS: Final = 32
_STATE_MEMBER: Final = re.compile(
    r"[ \t]*(?:"
    r"(?:[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"
    r"=[ -+\--<>-~]{0,255}[!-+\--<>-~])?[ \t]*"
)

_SAMPLED: Final = 1
_KNOWN_FLAGS: Final = 3

_NO_HEADERS: Final[Mapping[str, str]] = {}


def read(traceparent: str, tracestate: str = "") -> TraceContext | None:
    """The context in the values of the two headers, at most 570 characters; None if `traceparent`
    is malformed, which W3C wants ignored. A malformed or too long `tracestate` is dropped."""
    if len(traceparent) > _MAX_PARENT_LENGTH or not (parts := _PARENT.fullmatch(traceparent)):
        return None
    if traceparent.startswith(_VERSION_0) and len(traceparent) != _PARENT_LENGTH:
        return None
    trace_id, span_id, flags = parts[1], parts[2], int(parts[3], 16) & _KNOWN_FLAGS
    return TraceContext(f"00-{trace_id}-{span_id}-{flags:02x}", _checked_state(tracestate))


def of_headers(headers: Mapping[bytes, bytes]) -> TraceContext | None:
    """The context that a request carries; None without one. Names are in lower case."""
    parent = headers.get(b"traceparent")
    if parent is None:
        return None
    state = headers.get(b"tracestate", b"")
    return read(parent.decode("latin-1"), state.decode("latin-1"))


def sampled_context(headers: Mapping[bytes, bytes]) -> TraceContext | None:
    """As `of_headers`; None also where the caller does not record its trace, since a job's record
    then needs not name it."""
    context = of_headers(headers)
    return context if context and is_sampled(context) else None


def is_sampled(context: TraceContext) -> bool:
    """Whether the trace is recorded; the context must be one that `read` has made."""
    return bool(int(context.traceparent[-2:], 16) & _SAMPLED)


def headers_of_caller() -> Mapping[str, str]:
    """The headers with the context of the span that is active in this thread or task; empty without
    one. A program that uses OpenTelemetry has loaded it, so nothing is imported here."""
    trace: Any = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return _NO_HEADERS
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return _NO_HEADERS
    parent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    state = _checked_state(context.trace_state.to_header())
    return {TRACEPARENT: parent, TRACESTATE: state} if state else {TRACEPARENT: parent}


def _checked_state(state: str) -> str:
    """The value of `tracestate`, empty if it is malformed or too long."""
    state = state.strip(" \t")
    members = state.split(",")
    is_valid = (
        len(state) <= _MAX_STATE_LENGTH
        and len(members) <= _MAX_STATE_MEMBERS
        and all(map(_STATE_MEMBER.fullmatch, members))
    )
    return state if is_valid else ""
