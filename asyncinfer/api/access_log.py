"""The access log: one line for each request, once it is answered."""

import logging
import time
from typing import Final
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asyncinfer.api.http.messages import REQUEST_ID
from asyncinfer.api.views import url_of

_log = logging.getLogger("asyncinfer.access")

_JOB: Final = url_of("")


async def answer_and_log(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers a request with `app`, and logs it without its query, headers and body. Raises what
    `app` raises."""
    began_at = time.perf_counter()
    status, job_id = 0, ""

    async def send_and_note(message: Message) -> None:
        nonlocal status, job_id
        if message["type"] == "http.response.start":
            status, job_id = message["status"], _job_of(message)
        await send(message)

    try:
        await app(scope, receive, send_and_note)
    finally:
        _write(scope, status, job_id, 1000 * (time.perf_counter() - began_at))


def _job_of(start: Message) -> str:
    """The id of the job that a request has submitted or retried, whose address its answer has;
    empty for other requests."""
    location = dict(start.get("headers", ())).get(b"location", b"").decode("latin-1")
    return unquote(location.removeprefix(_JOB)) if location.startswith(_JOB) else ""


def _write(scope: Scope, status: int, job_id: str, duration_ms: float) -> None:
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
        **({"job_id": job_id} if job_id else {}),
    }
    _log.info(
        "%s %s %d in %.1f ms from %s, request %s%s",
        *(scope["method"], scope["path"], status, duration_ms, address, request_id),
        f", job {job_id}" if job_id else "",
        extra=fields,
    )
