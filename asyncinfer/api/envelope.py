"""The JSON around an input: `data` as the client wrote it, and the options beside it."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

import msgspec
from msgspec import Raw, Struct

from asyncinfer.api.struct_faults import fault_of
from asyncinfer.errors import Fault, InvalidInput, InvalidJSON
from asyncinfer.jobs import Options
from asyncinfer.schemas import AskedOptions, PredictRequest

_BOM: Final = b"\xef\xbb\xbf"
_NO_OPTIONS: Final = AskedOptions()
_KEY = re.compile(rb'[ \t\r\n{,]*("(?:[^"\\]|\\.)*")[ \t\r\n]*:[ \t\r\n]*')
_AFTER_VALUE = re.compile(rb"[ \t\r\n]*[,}]")


class Asked(Struct, frozen=True):
    """A predict request taken apart; both texts are the client's own bytes."""

    data: bytes
    options: Options
    options_text: bytes


class _Envelope(Struct, frozen=True, forbid_unknown_fields=True):
    """PredictRequest with its parts still text."""

    data: Raw
    options: Raw = Raw(b"")


_decode_envelope = msgspec.json.Decoder(_Envelope).decode
_decode_options = msgspec.json.Decoder(AskedOptions).decode


def read_envelope(body: bytes) -> Asked:
    """Raises InvalidJSON for what is no JSON, InvalidInput for what is not this request."""
    _check_text(body)
    try:
        envelope = _decode_envelope(body)
    except msgspec.ValidationError as error:
        _refuse(fault_of(error, PredictRequest), error)
    except msgspec.DecodeError as error:
        raise InvalidJSON(_malformed(error)) from error
    except RecursionError:
        # `from None`: the traceback would be as deep as the JSON.
        raise InvalidJSON("The JSON is nested too deeply; `data` is a list of rows.") from None
    if len(envelope.options) == 0:
        # Spelled once and nothing escaped, it cannot be there twice.
        if body.count(b'"data"') != 1 or b"\\" in body:
            _check_repeated(body, {"data": envelope.data})
        return Asked(bytes(envelope.data), _NO_OPTIONS, b"")
    _check_repeated(body, {"data": envelope.data, "options": envelope.options})
    text = bytes(envelope.options)
    return Asked(bytes(envelope.data), _read_options(text), text)


def _check_text(body: bytes) -> None:
    if not body:
        raise InvalidJSON('The body is empty; send {"data": [[...]]}.')
    if body.isascii():
        return
    if body.startswith(_BOM):
        raise InvalidJSON("The body starts with a byte order mark; JSON has none (RFC 8259).")
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise InvalidJSON(f"The body is not UTF-8 (byte {error.start}).") from error


def _malformed(error: msgspec.DecodeError) -> str:
    message = str(error).removeprefix("JSON is malformed: ")
    hint = " JSON has no NaN and no Infinity." if "invalid character" in message else ""
    return f"The body cannot be parsed: {message}.{hint}"


def _read_options(text: bytes) -> Options:
    try:
        options = _decode_options(text)
    except msgspec.ValidationError as error:
        _refuse(fault_of(error, AskedOptions, under="/options"), error)
    # After decoding: only then is the text known to be flat.
    json.loads(text, object_pairs_hook=_refuse_repeated_option)
    return options


def _check_repeated(body: bytes, values: Mapping[str, Raw]) -> None:
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
            _refuse(_given_twice(f"/{name}"))
        seen.add(name)


def _refuse_repeated_option(pairs: Sequence[tuple[str, Any]]) -> None:
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        _refuse(_given_twice(f"/options/{twice}"))


def _given_twice(pointer: str) -> Fault:
    return Fault(pointer, "This key is given more than once; send it once.")


def _refuse(fault: Fault, cause: Exception | None = None) -> NoReturn:
    place = f" at {fault.pointer}" if fault.pointer else ""
    raise InvalidInput(
        f"The request is not as expected{place}: {fault.detail}", faults=[fault]
    ) from cause
