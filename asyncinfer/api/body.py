"""Reading a request's body: the right kind, and no more of it than allowed."""

from collections.abc import Mapping
from typing import Any, Final

import anyio
from starlette.types import Receive

from asyncinfer.api.exchange import ClientGone, Request
from asyncinfer.errors import BodyTooLarge, EncodingRefused, MediaTypeRefused

_CLOSE: Final = ("connection", "close")
_DISCARD_SECONDS: Final = 2.0


async def read_json_text(request: Request[Any], max_bytes: int) -> bytes:
    """The body of a request that says it sends JSON; not parsed."""
    _check_media_type(request.header(b"content-type"))
    _check_encoding(request.header(b"content-encoding"))
    _check_announced_length(request.header(b"content-length"), max_bytes)
    return await _read(request, max_bytes)


async def discard(receive: Receive, headers: Mapping[bytes, bytes]) -> None:
    """Takes what still comes of a refused body, for a moment.

    A socket closed with unread bytes is reset, and the client may lose the answer with it. One
    that waits for `100 Continue` sends nothing, and must not be asked to.
    """
    if b"expect" in headers:
        return
    with anyio.move_on_after(_DISCARD_SECONDS):
        while (await receive()).get("more_body"):
            pass


async def _read(request: Request[Any], max_bytes: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        chunks.append(chunk)
        more = message.get("more_body", False)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _check_media_type(value: str | None) -> None:
    """No Content-Type at all counts as JSON; a browser's form cannot send that."""
    if value is None or value == "application/json":
        return
    media_type, _, parameters = value.lower().partition(";")
    media_type = media_type.strip()
    if media_type != "application/json" and not media_type.endswith("+json"):
        hint = " (curl -d sends that unless told)" if "form-urlencoded" in media_type else ""
        raise MediaTypeRefused(
            f"Content-Type is {value[:100]!r}{hint}; send `Content-Type: application/json`.",
            headers=[("accept", "application/json")],
        )
    for parameter in parameters.split(";"):
        name, _, text = parameter.partition("=")
        if name.strip() == "charset" and text.strip().strip('"') not in ("utf-8", "utf8"):
            raise MediaTypeRefused("JSON is sent in UTF-8; leave the charset out, or say utf-8.")


def _check_encoding(value: str | None) -> None:
    if value is not None and value.strip().lower() != "identity":
        raise EncodingRefused(
            f"Content-Encoding is {value[:100]!r}; send the body as it is, uncompressed.",
            headers=[("accept-encoding", "identity")],
        )


def _check_announced_length(value: str | None, max_bytes: int) -> None:
    """Refuses by what is announced, before a byte is read; what comes is counted all the same."""
    if value is not None and value.isdecimal() and int(value[:20]) > max_bytes:
        raise _too_large(max_bytes)


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"A JSON body may have {max_bytes} bytes. Send fewer rows per job, or raise MAX_JSON.",
        headers=[_CLOSE],
    )
