"""Reading a request's body: its kind, its encoding and its size limit."""

import io
import re
from collections.abc import Mapping
from typing import Any, Final

import anyio
from msgspec import Struct
from starlette.types import Receive

from asyncinfer.api.config import ApiConfig
from asyncinfer.api.http.byte_budget import SMALL_BODY_BYTES, Reservation
from asyncinfer.api.http.messages import OWS, ClientGone, Request
from asyncinfer.errors import BodyTooLarge, EncodingRefused, InvalidHeader, MediaTypeRefused

JSON_LENGTH_HEADER: Final = b"inference-header-content-length"
"""The length of the JSON in a body that begins with JSON and continues with tensors."""

NPY: Final = "application/x-npy"

NDJSON: Final = "application/x-ndjson"
_LINE_TYPES: Final = (NDJSON, "application/jsonl", "application/x-jsonlines")
"""Media types in use for one JSON text per line; none of them is registered."""

_CLOSE: Final = ("connection", "close")
_DISCARD_SECONDS: Final = 2.0
_JSON: Final = "application/json"


class Body(Struct, frozen=True):
    """A request body: JSON, JSON followed by tensors, or an array as numpy saves it."""

    content: bytes
    json_bytes: int | None
    """How many of its bytes are JSON; None if all are."""
    npy: bool = False


async def read_body(request: Request[Any], config: ApiConfig) -> Body:
    """The body, not parsed; it can be read once. `Inference-Header-Content-Length` says whether
    tensors follow its JSON, since clients of the Open Inference Protocol send any Content-Type, or
    none.

    A large body takes room in the budget of uploads, until `Request.release_body`.

    Raises BodyTooLarge, TooManyUploads, MediaTypeRefused, EncodingRefused, InvalidHeader or
    ClientGone, and the errors of `Admission.check` if the key was revoked meanwhile.
    """
    if is_plain_json(request.headers):
        json_bytes, npy, limit = None, False, _json_limit(config)
    else:
        json_bytes, npy, limit = _kind(request, config)
    announced_bytes = _announced_bytes(request.header(b"content-length"), limit)
    content = await _read(request, limit, announced_bytes)
    # The key may have been revoked while the body was being received.
    request.admission.check()
    if json_bytes is not None and json_bytes > len(content):
        raise InvalidHeader(
            f"Inference-Header-Content-Length is {json_bytes}, the body has {len(content)} bytes; "
            "it is the length of the JSON that the body begins with."
        )
    return Body(content, json_bytes, npy)


def is_plain_json(headers: Mapping[bytes, bytes]) -> bool:
    """Whether the body is JSON alone by its headers. True for most bodies, which then skip the
    checks that the others need."""
    return (
        headers.get(b"content-type") == b"application/json"
        and JSON_LENGTH_HEADER not in headers
        and b"content-encoding" not in headers
    )


def _kind(request: Request[Any], config: ApiConfig) -> tuple[int | None, bool, "_Limit"]:
    """How many bytes of the body are JSON (None: all), whether it is `.npy`, and its size limit.
    Raises InvalidHeader, BodyTooLarge, MediaTypeRefused or EncodingRefused."""
    json_bytes = _json_bytes(request.header(JSON_LENGTH_HEADER), config.max_json_bytes)
    media_type = request.header(b"content-type")
    npy = json_bytes is None and _is_npy(media_type)
    dense = npy or json_bytes is not None
    if not dense:
        _check_media_type(media_type)
    _check_encoding(request.header(b"content-encoding"))
    limit = _Limit(config.max_body_bytes, "MAX_BODY") if dense else _json_limit(config)
    return json_bytes, npy, limit


def is_bulk(media_type: bytes | None) -> bool:
    """Whether a Content-Type (None: there is none) means one request per line, which `read_body`
    refuses."""
    if media_type is None or media_type == b"application/json":
        return False
    return _media_type(media_type.decode("latin-1")) in _LINE_TYPES


def check_bulk_headers(request: Request[Any]) -> None:
    """Raises InvalidHeader, MediaTypeRefused or EncodingRefused if the headers of a bulk request do
    not allow its lines to be read."""
    if request.header(JSON_LENGTH_HEADER) is not None:
        raise InvalidHeader(
            f"Inference-Header-Content-Length does not go with {NDJSON}: no tensors follow a line. "
            "Send their elements in `data`."
        )
    _check_charset((request.header(b"content-type") or "").lower())
    _check_encoding(request.header(b"content-encoding"))


async def discard(receive: Receive, headers: Mapping[bytes, bytes]) -> None:
    """Reads and drops the rest of a refused body, for at most 2 s.

    A socket closed with unread bytes is reset, and the client may lose the answer with it. A client
    that waits for `100 Continue` sends nothing, and must not be told to.
    """
    if b"expect" in headers:
        return
    with anyio.move_on_after(_DISCARD_SECONDS):
        while (await receive()).get("more_body"):
            pass


class _Limit(Struct, frozen=True):
    """How large a body may be, and the setting that says so."""

    max_bytes: int
    setting: str

    def error(self) -> BodyTooLarge:
        """Makes the error for a larger body; its reply also says that the connection closes."""
        kind = "JSON body" if self.setting == "MAX_JSON" else "body"
        hint = ", send binary tensors" if self.setting == "MAX_JSON" else ""
        return BodyTooLarge(
            f"A {kind} may have {self.max_bytes} bytes. Send fewer rows per job{hint}, or raise "
            f"{self.setting}.",
            headers=[_CLOSE],
        )


def _json_limit(config: ApiConfig) -> _Limit:
    return _Limit(config.max_json_bytes, "MAX_JSON")


async def _read(request: Request[Any], limit: _Limit, announced_bytes: int | None) -> bytes:
    """The whole body, whose announced size is None if it comes in chunks. Raises BodyTooLarge as
    soon as more than the limit was received, TooManyUploads or ClientGone."""
    if announced_bytes is not None and announced_bytes > SMALL_BODY_BYTES:
        return await _read_large(request, limit, announced_bytes, b"")
    content = b""
    more = True
    while more:
        chunk, more = await _receive(request)
        content = content + chunk if content else chunk
        if len(content) > limit.max_bytes:
            raise limit.error()
        if more and len(content) > SMALL_BODY_BYTES:
            return await _read_large(request, limit, None, content)
    return content


async def _read_large(
    request: Request[Any], limit: _Limit, announced_bytes: int | None, begun: bytes
) -> bytes:
    """The whole body, of which `begun` was received, within a reservation of its announced size,
    else of the limit; raises as `_read` does. Reads nothing before there is room.

    The bytes are collected in a buffer of the announced size, whose pages take memory only once
    they are written: a list of chunks took up to twice as much. It is closed in any case, since an
    error would keep it in memory for as long as the answer is sent.
    """
    reading = anyio.CancelScope()
    reserved_bytes = announced_bytes or limit.max_bytes
    request.reservation = await request.uploads.reserve(reserved_bytes, reading.cancel)
    with io.BytesIO(bytes(announced_bytes or 0)) as content:
        content.write(begun)
        with reading:
            await _receive_rest(request, request.reservation, limit, content)
        if request.reservation.is_ended:
            raise request.uploads.too_slow_error()
        request.reservation.complete()
        content.truncate()
        return content.getvalue()


async def _receive_rest(
    request: Request[Any], reservation: Reservation, limit: _Limit, content: io.BytesIO
) -> None:
    """Adds the rest of the body to `content`; raises BodyTooLarge or ClientGone."""
    more = True
    while more:
        chunk, more = await _receive(request)
        content.write(chunk)
        if content.tell() > limit.max_bytes:
            raise limit.error()
        reservation.received(content.tell())


async def _receive(request: Request[Any]) -> tuple[bytes, bool]:
    """The next bytes of the body, and whether more follow; raises ClientGone."""
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise ClientGone
    return message.get("body", b""), message.get("more_body", False)


def _json_bytes(value: str | None, max_json_bytes: int) -> int | None:
    """The value of Inference-Header-Content-Length, at least 1; None without it. Raises
    InvalidHeader, or BodyTooLarge if that is more than `max_json_bytes`."""
    if value is None:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", value) or int(value) == 0:
        raise InvalidHeader(
            "Inference-Header-Content-Length is the number of bytes of JSON, at least 1, that the "
            "body begins with; the tensors follow it."
        )
    if int(value) > max_json_bytes:
        raise BodyTooLarge(
            f"The JSON before the tensors may have {max_json_bytes} bytes. Send the data of more "
            "inputs as binary, or raise MAX_JSON.",
            headers=[_CLOSE],
        )
    return int(value)


def _is_npy(value: str | None) -> bool:
    return value is not None and _media_type(value) == NPY


def _media_type(value: str) -> str:
    """The media type without parameters, in lower case."""
    return value.partition(";")[0].strip(OWS).lower()


def _check_media_type(value: str | None) -> None:
    """Raises MediaTypeRefused unless the body may be JSON. Accepts a missing Content-Type and
    `application/octet-stream` as JSON: a browser's form can send neither."""
    if value is None or value == _JSON:
        return
    media_type = _media_type(value)
    if media_type in _LINE_TYPES:
        raise MediaTypeRefused(
            f"Content-Type is {value[:100]!r}: only POST /predict takes one request per line. Send "
            "a single one here, with `Content-Type: application/json`.",
            headers=[("accept", f"{_JSON}, {NPY}")],
        )
    is_json = media_type == _JSON or media_type.endswith("+json")
    if not is_json and media_type != "application/octet-stream":
        hint = " (the default of curl -d)" if "form-urlencoded" in media_type else ""
        raise MediaTypeRefused(
            f"Content-Type is {value[:100]!r}{hint}; send `Content-Type: application/json`, "
            f"or `{NPY}` for an array that numpy saved.",
            headers=[("accept", f"{_JSON}, {NPY}")],
        )
    _check_charset(value.lower())


def _check_charset(media_type: str) -> None:
    """Raises MediaTypeRefused for a charset other than UTF-8; takes the Content-Type in lower
    case."""
    for parameter in media_type.split(";")[1:]:
        name, _, text = parameter.partition("=")
        if name.strip(OWS) == "charset" and text.strip(OWS).strip('"') not in ("utf-8", "utf8"):
            raise MediaTypeRefused("JSON must be UTF-8; leave the charset out, or set it to utf-8.")


def _check_encoding(value: str | None) -> None:
    """Raises EncodingRefused for a Content-Encoding other than `identity`."""
    if value is not None and value.strip(OWS).lower() != "identity":
        raise EncodingRefused(
            f"Content-Encoding is {value[:100]!r}; send the body as it is, uncompressed.",
            headers=[("accept-encoding", "identity")],
        )


def _announced_bytes(value: str | None, limit: _Limit) -> int | None:
    """The Content-Length, None without one. Raises BodyTooLarge by it, before the body is read;
    `_read` counts bytes all the same."""
    if value is None or not value.isdecimal():
        return None
    announced_bytes = int(value[:20])
    if announced_bytes > limit.max_bytes:
        raise limit.error()
    return announced_bytes
