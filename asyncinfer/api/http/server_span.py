"""The span of a request that submits, by the conventions for HTTP servers."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from asyncinfer.api.http.messages import ClientGone, Reply, Request, Stream
from asyncinfer.errors import RequestError
from asyncinfer.telemetry.trace_context import of_headers

if TYPE_CHECKING:
    from asyncinfer.telemetry.tracing import ActiveSpan, Tracing

_MAX_AGENT_LENGTH: Final = 256
_FIRST_SERVER_ERROR: Final = 500


async def in_server_span(
    tracing: "Tracing", request: Request[Any], answer: Callable[[], Awaitable[Reply | Stream]]
) -> Reply | Stream:
    """Returns or raises what `answer` does, within a span whose parent is the span of the caller.
    It becomes the trace of the request's jobs, and ends with the answer, a stream's too."""
    route = "/predict" if request.path("model") is None else "/predict/{model}"
    span = tracing.start(
        f"POST {route}",
        "server",
        parent=of_headers(request.headers),
        attributes=_attributes(request, route),
    )
    request.trace = span.context
    try:
        answered = await answer()
    except RequestError as error:
        # An error of the client is none of the server.
        _end(span, error.status, error.code if error.status >= _FIRST_SERVER_ERROR else "")
        raise
    except (ClientGone, asyncio.CancelledError):
        # There is no answer any more that could have a status.
        span.end()
        raise
    except Exception as error:
        _end(span, _FIRST_SERVER_ERROR, type(error).__name__)
        raise
    if isinstance(answered, Stream):
        return replace(answered, chunks=_chunks(answered, span))
    _end(span, answered.status)
    return answered


def _attributes(request: Request[Any], route: str) -> dict[str, str | int]:
    """What is known when the request begins. The query may hold nothing but options, and is left
    out, as are all headers but the client's name of itself."""
    scope = request.scope
    client_host, _ = scope["client"] or ("", 0)
    values = {
        "http.request.method": scope["method"],
        "http.route": route,
        "url.path": scope["path"],
        "url.scheme": scope["scheme"],
        "network.protocol.version": scope["http_version"],
        "client.address": client_host,
        "user_agent.original": (request.header(b"user-agent") or "")[:_MAX_AGENT_LENGTH],
    }
    return {name: value for name, value in values.items() if value}


async def _chunks(stream: Stream, span: "ActiveSpan") -> AsyncGenerator[bytes, None]:
    """The chunks of a stream; ends the span with them."""
    error = ""
    try:
        async with contextlib.aclosing(stream.chunks) as chunks:
            async for chunk in chunks:
                yield chunk
    except Exception as failure:
        error = type(failure).__name__
        raise
    finally:
        _end(span, stream.status, error)


def _end(span: "ActiveSpan", status: int, error: str = "") -> None:
    """Ends the span with the status of the answer, and the code of the server's error, if any."""
    span.end(attributes={"http.response.status_code": status}, error=error)
