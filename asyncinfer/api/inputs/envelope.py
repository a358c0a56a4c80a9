"""The JSON object around an input, taken apart into text and options."""

import json
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn, TypeVar

import msgspec
from msgspec import Raw, Struct

from asyncinfer.api.http.json_text import parse_problem
from asyncinfer.api.http.validation_errors import escaped, fault_of
from asyncinfer.errors import InputError, InvalidInput, InvalidJSON
from asyncinfer.jobs import MAX_WEBHOOK_URL
from asyncinfer.schemas.requests import RequestOptions

IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")

_MAX_COLONS: Final = 256
"""Colons in options without repeated keys: one per key, and up to 128 in the name of a group."""

MAX_METADATA_BYTES: Final = 4096
MAX_METADATA_LEVELS: Final = 16

_MAX_WEBHOOK_COLONS: Final = MAX_WEBHOOK_URL + MAX_METADATA_BYTES
"""Colons in a webhook: those of its URL, its metadata and its keys."""

_NO_OPTIONS: Final = RequestOptions()
_KEY = re.compile(rb'[ \t\r\n{,]*("(?:[^"\\]|\\.)*")[ \t\r\n]*:[ \t\r\n]*')
_AT_BYTE = re.compile(r"\(byte (\d+)\)$")
_BARE_NON_FINITE = re.compile(rb"NaN|Infinity")
_NON_FINITE_HINT: Final = (
    "JSON has no NaN and no Infinity, though some writers write them: send the strings "
    '"NaN", "Infinity", "-Infinity", or null for NaN.'
)
_AFTER_VALUE = re.compile(rb"[ \t\r\n]*[,}]")


class ParsedBody(Struct, frozen=True):
    """The body of a predict request, taken apart. All but the options is the client's own text,
    empty where the client left it out. Either `data` or `inputs` is there."""

    data: bytes
    options: RequestOptions
    inputs: bytes = b""
    outputs: bytes = b""
    parameters: bytes = b""
    has_options: bool = False
    key: str | None = None
    """The `idempotency_key` of a line."""


_ABSENT: Final = Raw(b"")


class _Envelope(Struct, frozen=True, forbid_unknown_fields=True):
    """A request whose parts are still text, empty where the client left one out."""

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
_decode_options = msgspec.json.Decoder(RequestOptions).decode
_decode_key = msgspec.json.Decoder(str).decode
_decode_members = msgspec.json.Decoder(dict[str, Raw]).decode


def read_envelope(body: bytes) -> ParsedBody:
    """Takes a body apart. Raises InvalidJSON if it is not JSON, InvalidInput if it is not a predict
    request, RecursionError if it is nested too deeply."""
    body = _utf8_text(body)
    envelope = _decode(body, _decode_envelope, _Envelope)
    if _has_only_data(envelope) and _has_one_data(body):
        return ParsedBody(bytes(envelope.data), _NO_OPTIONS)
    present = _present(envelope)
    reject_repeated_keys(body, present)
    _check_combination(present)
    return _parsed(envelope, None)


def read_line_envelope(line: bytes) -> ParsedBody:
    """`read_envelope` for a line of a bulk request, which may have its own `idempotency_key`.
    Raises InvalidJSON, InvalidInput or RecursionError."""
    line = _utf8_text(line)
    envelope = _decode(line, _decode_line, _LineEnvelope)
    key = _read_key(envelope.idempotency_key)
    if _has_only_data(envelope) and _has_one_data(line):
        if key is None:
            return ParsedBody(bytes(envelope.data), _NO_OPTIONS)
        if line.count(b'"idempotency_key"') == 1:
            return ParsedBody(bytes(envelope.data), _NO_OPTIONS, key=key)
    present = _present(envelope)
    reject_repeated_keys(line, present)
    _check_combination(present)
    return _parsed(envelope, key)


def _decode(
    body: bytes, decode: Callable[[bytes], EnvelopeT], struct: type[EnvelopeT]
) -> EnvelopeT:
    """The body as this envelope; raises InvalidJSON if it cannot be parsed, InvalidInput for a
    member that is unknown."""
    try:
        return decode(body)
    except msgspec.ValidationError as error:
        reject_input(fault_of(error, struct), error)
    except msgspec.DecodeError as error:
        raise InvalidJSON(_parse_error_message(error, body)) from error


def _has_one_data(body: bytes) -> bool:
    """Whether `"data"` is there once in a text without escapes: then the key is not repeated. False
    may also mean that this is not certain."""
    return body.count(b'"data"') == 1 and b"\\" not in body


def _read_key(text: Raw) -> str | None:
    """The key of a line, None without one; raises InvalidInput if it is malformed."""
    if text is _ABSENT:
        return None
    try:
        key = _decode_key(text)
    except msgspec.ValidationError:
        key = ""
    if not IDEMPOTENCY_KEY.fullmatch(key):
        reject_input(InputError("/idempotency_key", "It takes 1 to 255 visible ASCII characters."))
    return key


def _has_only_data(envelope: _Envelope) -> bool:
    """Whether the body has `data` and nothing else, a line's key apart. True for most requests,
    which then skip the checks that the others need."""
    return (
        envelope.data is not _ABSENT
        and envelope.options is _ABSENT
        and envelope.inputs is _ABSENT
        and envelope.outputs is _ABSENT
        and envelope.parameters is _ABSENT
    )


def _present(envelope: _Envelope) -> dict[str, Raw]:
    """The members that the client sent, by name."""
    values = {name: getattr(envelope, name) for name in envelope.__struct_fields__}
    return {name: value for name, value in values.items() if len(value)}


def _check_combination(present: Mapping[str, Raw]) -> None:
    """Raises InvalidInput unless the body has `data` alone, or `inputs` with what goes with
    them."""
    if "inputs" in present:
        if "data" in present:
            reject_input(InputError("/data", "Send either `data` or `inputs`, not both."))
        return
    if "data" not in present:
        reject_input(InputError("/data", "This field is required, or `inputs` for named tensors."))
    for name in ("outputs", "parameters"):
        if name in present:
            reject_input(InputError(f"/{name}", f"`{name}` goes with `inputs`; `data` has none."))


def _parsed(envelope: _Envelope, key: str | None) -> ParsedBody:
    """The envelope with its options read; raises InvalidInput if they are not valid."""
    options_text = bytes(envelope.options)
    return ParsedBody(
        data=bytes(envelope.data),
        options=_read_options(options_text) if options_text else _NO_OPTIONS,
        inputs=bytes(envelope.inputs),
        outputs=bytes(envelope.outputs),
        parameters=bytes(envelope.parameters),
        has_options=bool(options_text),
        key=key,
    )


def _utf8_text(body: bytes) -> bytes:
    """The body without a byte order mark, which Windows tools write and a parser may ignore
    (RFC 8259). Raises InvalidJSON if it is empty or not UTF-8."""
    if not body:
        raise InvalidJSON('The body is empty; send {"data": [[...]]}.')
    if body.isascii():
        return body
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise InvalidJSON(f"The body is not UTF-8 (byte {error.start}).") from error
    return body.removeprefix(BOM_UTF8)


def _parse_error_message(error: msgspec.DecodeError, body: bytes) -> str:
    """What is wrong and where, with a hint if the parser stopped at a bare NaN or Infinity."""
    message = parse_problem(error, body)
    place = _AT_BYTE.search(message)
    is_non_finite = place and _BARE_NON_FINITE.match(body, int(place[1]))
    hint = f" {_NON_FINITE_HINT}" if is_non_finite else ""
    return f"The body cannot be parsed: {message}.{hint}"


def _read_options(text: bytes) -> RequestOptions:
    """The options of a text of JSON; raises InvalidInput if they are not valid or a key is
    repeated."""
    try:
        options = _decode_options(text)
    except msgspec.ValidationError as error:
        reject_input(fault_of(error, RequestOptions, under="/options"), error)
    if options.webhook:
        check_metadata(options.webhook.metadata, "/options/webhook/metadata")
    # Checked after decoding, since only then the text is known to have few members.
    if text.count(b":") > _MAX_COLONS + (_MAX_WEBHOOK_COLONS if options.webhook else 0):
        reject_input(InputError("/options", "Keys are given more than once; send each once."))
    reject_repeated_members(text, "/options")
    return options


def check_metadata(metadata: dict[str, Any], pointer: str) -> None:
    """Raises InvalidInput for the metadata of a webhook, at `pointer`, that are too large or deep,
    or that Redis cannot hold."""
    if _is_deeper(metadata, MAX_METADATA_LEVELS):
        reject_input(InputError(pointer, f"It has more than {MAX_METADATA_LEVELS} levels."))
    size = len(msgspec.json.encode(metadata))
    if size > MAX_METADATA_BYTES:
        reject_input(
            InputError(pointer, f"It has {size} bytes as JSON; {MAX_METADATA_BYTES} are allowed.")
        )
    try:
        msgspec.msgpack.encode(metadata)
    except OverflowError:
        reject_input(InputError(pointer, "A whole number in it takes more than 64 bits."))


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether objects and lists are nested more deeply than this; looks no deeper."""
    if not isinstance(value, dict | list):
        return False
    parts = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(part, levels - 1) for part in parts)


def reject_repeated_keys(body: bytes, values: Mapping[str, Raw], under: str = "") -> None:
    """Raises InvalidInput if a key is repeated: parsers differ in which one counts, msgspec takes
    the last.

    `body` must be an object with no other keys than `values`, which has the last value of each. So
    a value in the text that differs from it shows that its key comes again.
    """
    seen = set()
    place = 0
    while key := _KEY.match(body, place):
        name = msgspec.json.decode(key[1], type=str)
        value = bytes(values[name])
        place = key.end() + len(value)
        is_whole = body.startswith(value, key.end()) and _AFTER_VALUE.match(body, place)
        if name in seen or not is_whole:
            reject_input(_repeated_key(f"{under}/{escaped(name)}"))
        seen.add(name)


def reject_repeated_names(text: bytes, under: str = "") -> dict[str, Raw]:
    """`reject_repeated_keys` for any object, whose members are returned. The text must be JSON."""
    members = _decode_members(text)
    reject_repeated_keys(text, members, under)
    return members


def reject_repeated_members(text: bytes, under: str = "") -> None:
    """Raises InvalidInput if an object has a key twice, whether the outer one, which is `under`
    this pointer, or one in it. The text must be JSON with few members; RecursionError if it is
    nested too deeply."""
    _reject_repeated_in(json.loads(text, object_pairs_hook=_Members), under)


class _Members(tuple[tuple[str, Any], ...]):
    """The members of a JSON object in their order, repeated ones too."""


def _reject_repeated_in(value: Any, pointer: str) -> None:
    """`reject_repeated_members` for a value at this pointer, whose objects are `_Members`."""
    if isinstance(value, _Members):
        seen: set[str] = set()
        for name, part in value:
            place = f"{pointer}/{escaped(name)}"
            if name in seen:
                reject_input(_repeated_key(place))
            seen.add(name)
            _reject_repeated_in(part, place)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            _reject_repeated_in(part, f"{pointer}/{index}")


def _repeated_key(pointer: str) -> InputError:
    """The fault of a repeated key at this JSON pointer."""
    return InputError(pointer, "This key is given more than once; send it once.")


def reject_input(fault: InputError, cause: Exception | None = None) -> NoReturn:
    """Always raises InvalidInput, for a fault of the request."""
    place = f" at {fault.pointer}" if fault.pointer else ""
    raise InvalidInput(
        f"The request is not as expected{place}: {fault.detail}", faults=[fault]
    ) from cause
