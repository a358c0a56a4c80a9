"""Many jobs in one request of NDJSON: a line each, answered in order as each job ends."""

import math
import time
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from asyncinfer.client._encoding import is_json_value, json_body
from asyncinfer.client._errors import error_of_response, not_asyncinfer_error
from asyncinfer.client._flows.submitting import NewJob
from asyncinfer.client._flows.views import is_job_view
from asyncinfer.client._protocol import Flow, Request
from asyncinfer.client._requests import RemoteServer, fetch, path_part

MAX_LINES: Final = 16
"""With 8 requests in flight as many as share a run; and results of slow models keep coming."""

_NDJSON: Final = "application/x-ndjson"
_WAIT_SECONDS: Final = 30
_MARGIN_SECONDS: Final = 15.0

Answer = dict[str, Any]
"""A job as it is after the wait, or a problem if it was not accepted."""


def line_of(job: NewJob) -> bytes | None:
    """A job as a line of JSON without a line end; None if its input can only be sent as bytes."""
    body = json_body(job.value, job.options) if is_json_value(job.value) else None
    if body is None:
        return None
    return b'{"idempotency_key":' + msgspec.json.encode(job.key) + b"," + body.content[1:]


def submit_lines(
    server: RemoteServer, model: str | None, lines: Sequence[bytes], queue_full_seconds: float
) -> Flow[list[Answer] | None]:
    """Submits a job per line in one request, waits, and returns the answer to each, in order.

    A job that has not ended within 30 s, or before the client's deadline, is in it as it is then.
    None from a server of an earlier release, which takes no NDJSON; this is noted in `server`. A
    full queue is awaited for `queue_full_seconds`. Raises the error of a request that is refused as
    a whole, NotAsyncinfer, and what `fetch` raises.
    """
    seconds = math.ceil(max(1, min(_WAIT_SECONDS, server.until - time.monotonic())))
    path = "/predict" if model is None else f"/predict/{path_part(model)}"
    request = Request(
        method="POST",
        path=path,
        headers={"content-type": _NDJSON, "prefer": f"wait={seconds}"},
        body=b"\n".join(lines),
        timeout_seconds=seconds + _MARGIN_SECONDS,
    )
    response = yield from fetch(server, request, queue_full_seconds=queue_full_seconds)
    if response.status == 415:
        server.accepts_ndjson = False
        return None
    if response.status >= 400:
        raise error_of_response(response, server.url)
    try:
        answers: list[Answer] = msgspec.json.Decoder(dict[str, Any]).decode_lines(response.content)
    except (ValueError, RecursionError):
        answers = []
    if len(answers) != len(lines) or not all(map(_is_answer, answers)):
        raise not_asyncinfer_error(response, server.url)
    return answers


def _is_answer(answer: Answer) -> bool:
    """Whether a decoded line shows a job or is a problem."""
    return is_job_view(answer) or isinstance(answer.get("code"), str)
