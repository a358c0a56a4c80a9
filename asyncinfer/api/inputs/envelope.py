"""The JSON around an input: `data` as the client wrote it, and the options beside it."""

import json
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NoReturn, TypeVar

import msgspec
from msgspec import Raw, Struct

from asyncinfer.api.http.validation_errors import fault_of
from asyncinfer.errors import Fault, InvalidInput, InvalidJSON
from asyncinfer.schemas.requests import AskedOptions

IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")

_MOST_COLONS: Final = 256
"""In options of which each is given once: one a key, and up to 128 in the name of a group."""

_NO_OPTIONS: Final = AskedOptions()
_KEY = re.compile(rb'[ \t\r\n{,]*("(?:[^"\\]|\\.)*")[ \t\r\n]*:[ \t\r\n]*')
_AT_BYTE = re.compile(r"\(byte (\d+)\)$")
_BARE_GAP = re.compile(rb"NaN|Infinity")
_NO_BARE_GAPS: Final = (
    "JSON has no NaN and no Infinity, though some writers write them: send the strings "
    '"NaN", "Infinity", "-Infinity", or null for NaN.'
)
_AFTER_VALUE = re.compile(rb"[ \t\r\n]*[,}]")


class Asked(Struct, frozen=True):
    """A predict request taken apart; all but the options is the client's own text, empty where
    it was left out. There is either `data` or `inputs`."""

    data: bytes
    options: AskedOptions
    inputs: bytes = b""
    outputs: bytes = b""
    parameters: bytes = b""
    has_options: bool = False
    key: str | None = None
    """The `idempotency_key` of a line."""


_ABSENT: Final = Raw(b"")


class _Envelope(Struct, frozen=True, forbid_unknown_fields=True):
    """A request with its parts still text."""

    data: Raw = _ABSENT
    inputs: Raw = _ABSENT
    outputs: Raw = _ABSENT
    parameters: Raw = _ABSENT
    options: Raw = _ABSENT


class _LineEnvelope(_Envelope, frozen=True, forbid_unknown_fields=True):
    idempotency_key: Raw = _ABSENT


EnvelopeT = TypeVar("EnvelopeT", bound=_Envelope)

_decode_envelope = msgspec.json.Decoder(_Envelope).decode
_decode_line = msgspec.json.Decoder(_LineEnvelope).decode
_decode_options = msgspec.json.Decoder(AskedOptions).decode
_decode_key = msgspec.json.Decoder(str).decode


def read_envelope(body: bytes) -> Asked:
    """Raises InvalidJSON for what is no JSON, InvalidInput for what is not this request."""
    body = _text(body)
    envelope = _decoded(body, _decode_envelope, _Envelope)
    if _only_data(envelope) and _spelled_once(body, b'"data"'):
        return Asked(bytes(envelope.data), _NO_OPTIONS)
    given = _given(envelope)
    check_repeated(body, given)
    _check_together(given)
    return _asked(envelope, None)


def read_line_envelope(line: bytes) -> Asked:
    """`read_envelope` of one of many requests, each of which may have its `idempotency_key`."""
    line = _text(line)
    envelope = _decoded(line, _decode_line, _LineEnvelope)
    key = _key(envelope.idempotency_key)
    if _only_data(envelope) and _spelled_once(line, b'"data"'):
        if key is None:
            return Asked(bytes(envelope.data), _NO_OPTIONS)
        if line.count(b'"idempotency_key"') == 1:
            return Asked(bytes(envelope.data), _NO_OPTIONS, key=key)
    given = _given(envelope)
    check_repeated(line, given)
    _check_together(given)
    return _asked(envelope, key)


def _decoded(
    body: bytes, decode: Callable[[bytes], EnvelopeT], struct: type[EnvelopeT]
) -> EnvelopeT:
    try:
        return decode(body)
    except msgspec.ValidationError as error:
        refuse(fault_of(error, struct), error)
    except msgspec.DecodeError as error:
        raise InvalidJSON(_malformed(error, body)) from error
    except RecursionError:
        # `from None`: the traceback would be as deep as the JSON.
        raise InvalidJSON("The JSON is nested too deeply; `data` is a list of rows.") from None


def _spelled_once(body: bytes, name: bytes) -> bool:
    """Spelled once and nothing escaped, it cannot be there twice."""
    return body.count(name) == 1 and b"\\" not in body


def _key(text: Raw) -> str | None:
    if text is _ABSENT:
        return None
    try:
        key = _decode_key(text)
    except msgspec.ValidationError:
        key = ""
    if not IDEMPOTENCY_KEY.fullmatch(key):
        refuse(Fault("/idempotency_key", "It takes 1 to 255 visible ASCII characters."))
    return key


def _only_data(envelope: _Envelope) -> bool:
    """Most requests are that, and need none of the checks that others do."""
    return (
        envelope.data is not _ABSENT
        and envelope.options is _ABSENT
        and envelope.inputs is _ABSENT
        and envelope.outputs is _ABSENT
        and envelope.parameters is _ABSENT
    )


def _given(envelope: _Envelope) -> dict[str, Raw]:
    values = {name: getattr(envelope, name) for name in envelope.__struct_fields__}
    return {name: value for name, value in values.items() if len(value)}


def _check_together(given: Mapping[str, Raw]) -> None:
    if "inputs" in given:
        if "data" in given:
            refuse(Fault("/data", "Send either `data` or `inputs`, not both."))
        return
    if "data" not in given:
        refuse(Fault("/data", "This field is required, or `inputs` for named tensors."))
    for name in ("outputs", "parameters"):
        if name in given:
            refuse(Fault(f"/{name}", f"`{name}` goes with `inputs`; `data` has none."))


def _asked(envelope: _Envelope, key: str | None) -> Asked:
    options_text = bytes(envelope.options)
    return Asked(
        data=bytes(envelope.data),
        options=_read_options(options_text) if options_text else _NO_OPTIONS,
        inputs=bytes(envelope.inputs),
        outputs=bytes(envelope.outputs),
        parameters=bytes(envelope.parameters),
        has_options=bool(options_text),
        key=key,
    )


def _text(body: bytes) -> bytes:
    """Without a byte order mark, which Windows tools write and a parser may ignore (RFC 8259)."""
    if not body:
        raise InvalidJSON('The body is empty; send {"data": [[...]]}.')
    if body.isascii():
        return body
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise InvalidJSON(f"The body is not UTF-8 (byte {error.start}).") from error
    return body.removeprefix(BOM_UTF8)


def _malformed(error: msgspec.DecodeError, body: bytes) -> str:
    message = str(error).removeprefix("JSON is malformed: ")
    place = _AT_BYTE.search(message)
    is_gap = place and _BARE_GAP.match(body, int(place[1]))
    hint = f" {_NO_BARE_GAPS}" if is_gap else ""
    return f"The body cannot be parsed: {message}.{hint}"


def _read_options(text: bytes) -> AskedOptions:
    try:
        options = _decode_options(text)
    except msgspec.ValidationError as error:
        refuse(fault_of(error, AskedOptions, under="/options"), error)
    # After decoding: only then is the text known to be flat.
    if text.count(b":") > _MOST_COLONS:
        refuse(Fault("/options", "Keys are given more than once; send each once."))
    json.loads(text, object_pairs_hook=_refuse_repeated_option)
    return options


def check_repeated(body: bytes, values: Mapping[str, Raw], under: str = "") -> None:
    """Refuses a key given twice: parsers differ in which one counts, msgspec takes the last.

    `body` is known to be one object with no other keys, `values` are the last of each. So a
    value that is not the last of its key shows that the key comes again.
    """
    seen = set()
    place = 0
    while key := _KEY.match(body, place):
        name = msgspec.json.decode(key[1], type=str)
        value = bytes(values[name])
        place = key.end() + len(value)
        whole = body.startswith(value, key.end()) and _AFTER_VALUE.match(body, place)
        if name in seen or not whole:
            refuse(_given_twice(f"{under}/{name}"))
        seen.add(name)


def _refuse_repeated_option(pairs: Sequence[tuple[str, Any]]) -> None:
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        refuse(_given_twice(f"/options/{twice}"))


def _given_twice(pointer: str) -> Fault:
    return Fault(pointer, "This key is given more than once; send it once.")


def refuse(fault: Fault, cause: Exception | None = None) -> NoReturn:
    place = f" at {fault.pointer}" if fault.pointer else ""
    raise InvalidInput(
        f"The request is not as expected{place}: {fault.detail}", faults=[fault]
    ) from cause
