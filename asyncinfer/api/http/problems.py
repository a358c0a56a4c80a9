"""Replies for errors, as problem documents (RFC 9457)."""

from math import ceil
from typing import Final

from asyncinfer.api.http.messages import Reply, encode_json
from asyncinfer.errors import InternalError, RequestError
from asyncinfer.schemas.problems import problem_of

_RETRY_STATUSES: Final = frozenset({429, 503})
_RETRY_AFTER_SECONDS: Final = 1.0


def problem_reply(error: RequestError, path: str = "") -> Reply:
    """The reply for an error; 429 and 503 always have Retry-After, in whole seconds: 1 unless the
    error says otherwise. `path` is the request's, empty if it is not known."""
    headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in error.headers]
    if error.status in _RETRY_STATUSES or error.retry_after_seconds is not None:
        seconds = error.retry_after_seconds or _RETRY_AFTER_SECONDS
        headers.append((b"retry-after", str(max(1, ceil(seconds))).encode()))
    return Reply(
        error.status,
        encode_json(problem_of(error, path)),
        tuple(headers),
        b"application/problem+json",
    )


def internal_error() -> InternalError:
    """Makes the error of an unexpected exception, without its details."""
    return InternalError("Something went wrong on the server; its log has the details.")
