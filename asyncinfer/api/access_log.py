"""The access log: one line for each request, once it is answered."""

import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asyncinfer.api.http.messages import REQUEST_ID

_log = logging.getLogger("asyncinfer.access")


async def answer_and_log(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers a request with `app`, and logs it without its query, headers and body. Raises what
    `app` raises."""
    began_at = time.perf_counter()
    status = 0

    async def send_and_note(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        await send(message)

    try:
        await app(scope, receive, send_and_note)
    finally:
        _write(scope, status, 1000 * (time.perf_counter() - began_at))


def _write(scope: Scope, status: int, duration_ms: float) -> None:
    """Writes the line; the status is 0 if the client has left before its answer began."""
    client, request_id = scope["client"], scope[REQUEST_ID]
    address = client[0] if client else "-"
    fields = {
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "duration_ms": round(duration_ms, 1),
        "client": address,
        "request_id": request_id,
    }
    _log.info(
        "%s %s %d in %.1f ms from %s, request %s",
        *(scope["method"], scope["path"], status, duration_ms, address, request_id),
        extra=fields,
    )
