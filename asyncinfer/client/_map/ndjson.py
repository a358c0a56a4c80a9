"""Many jobs in one request: a line each, answered in order as each ends."""

import math
import time
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from asyncinfer.client._encoding import is_plain, json_body
from asyncinfer.client._errors import error_of, stranger
from asyncinfer.client._flows import Submission, is_view
from asyncinfer.client._protocol import Flow, Request
from asyncinfer.client._requests import Server, ask, path_part

MOST_LINES: Final = 16
"""With 8 requests in flight as many as share a run; and results of slow models keep coming."""

_NDJSON: Final = "application/x-ndjson"
_WAIT_SECONDS: Final = 30
_MARGIN_SECONDS: Final = 15.0

Answer = dict[str, Any]
"""A job as it is after the wait, or the problem that it has instead."""


def text_of(asked: Submission) -> bytes | None:
    """A job as a line; None where it can only go as bytes."""
    body = json_body(asked.value, asked.options) if is_plain(asked.value) else None
    if body is None:
        return None
    return b'{"idempotency_key":' + msgspec.json.encode(asked.key) + b"," + body.content[1:]


def ask_lines(
    server: Server, model: str | None, texts: Sequence[bytes], patience_seconds: float
) -> Flow[list[Answer] | None]:
    """What is answered to each; None from a server that takes no lines."""
    seconds = math.ceil(max(1, min(_WAIT_SECONDS, server.until - time.monotonic())))
    path = "/predict" if model is None else f"/predict/{path_part(model)}"
    request = Request(
        method="POST",
        path=path,
        headers={"content-type": _NDJSON, "prefer": f"wait={seconds}"},
        body=b"\n".join(texts),
        timeout_seconds=seconds + _MARGIN_SECONDS,
    )
    response = yield from ask(server, request, patience_seconds=patience_seconds)
    if response.status == 415:
        server.takes_lines = False
        return None
    if response.status >= 400:
        raise error_of(response, server.url)
    try:
        answers: list[Answer] = msgspec.json.Decoder(dict[str, Any]).decode_lines(response.content)
    except (ValueError, RecursionError):
        answers = []
    if len(answers) != len(texts) or not all(map(_is_answer, answers)):
        raise stranger(response, server.url)
    return answers


def _is_answer(answer: Answer) -> bool:
    return is_view(answer) or isinstance(answer.get("code"), str)
