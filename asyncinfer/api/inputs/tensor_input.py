"""The named tensors of a request as arrays, from JSON or from the bytes behind it."""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from math import prod
from typing import Annotated, Final

import msgspec
import numpy as np
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from asyncinfer.api.http.validation_errors import fault_of
from asyncinfer.api.inputs.envelope import ParsedBody, reject_input, reject_repeated_names
from asyncinfer.errors import InputError, InvalidInput
from asyncinfer.models.signature import Signature
from asyncinfer.models.validation import check_inputs, reject_mismatches
from asyncinfer.schemas.requests import InputParameters, RequestedOutput, RequestParameters
from asyncinfer.tensors import datatypes, json_errors, packing, shape_errors
from asyncinfer.tensors.datatypes import DTYPES, Array, Feeds, TensorSpec
from asyncinfer.tensors.shape_errors import TensorDescription

_MAX_BYTES: Final = 1 << 40
_UNBOUNDED: Final = 1 << 62
_FEW_BYTES: Final = 4096
_NESTED = re.compile(rb"[ \t\r\n]*\[[ \t\r\n]*\[")
_NOT_A_LIST = re.compile(rb"[ \t\r\n]*[^ \t\r\n\[]")


class _Entry(Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of `inputs`; either `data` or its parameter `binary_data_size` is set."""

    name: str
    shape: Annotated[tuple[Annotated[int, Meta(ge=0, le=2**31 - 1)], ...], Meta(max_length=32)]
    datatype: str
    data: Raw | UnsetType = UNSET
    parameters: InputParameters = InputParameters()


_decode_entry = msgspec.json.Decoder(_Entry).decode
_decode_outputs = msgspec.json.Decoder(list[RequestedOutput]).decode
_decode_parameters = msgspec.json.Decoder(RequestParameters).decode


def read_tensors(
    parsed: ParsedBody, body: bytes, json_bytes: int | None, signature: Signature
) -> Feeds:
    """The inputs by name, checked; arrays whose bytes were sent as they are stay views of `body`.
    `json_bytes` is how many bytes of it are JSON, None if all are.

    Raises InvalidInput, which lists the faults of all tensors; those of elements only once all
    entries and sizes are valid.
    """
    entries = _read_entries(parsed.inputs, signature)
    described = [TensorDescription(entry.name, entry.datatype, entry.shape) for entry in entries]
    starts, size_faults = _start_offsets(entries, len(body), json_bytes)
    if size_faults:
        reject_mismatches(described, signature, size_faults)
    readable = _readable(entries, described, signature)
    arrays: dict[str, Array] = {}
    problems: list[InputError] = []
    for index, (entry, start) in enumerate(zip(entries, starts, strict=True)):
        if index not in readable:
            continue
        try:
            arrays[entry.name] = _read_array(
                entry, described[index], body, start, f"/inputs/{index}"
            )
        except InvalidInput as error:
            problems += error.faults
    reject_mismatches(described, signature, problems)
    return check_inputs(arrays, signature)


def _readable(
    entries: Sequence[_Entry], described: Sequence[TensorDescription], signature: Signature
) -> set[int]:
    """The indices of the tensors whose elements should be read. A tensor whose description does not
    fit the model is left out, unless it is small: then all its faults are reported at once."""
    faults = shape_errors.find_errors(
        described, signature.inputs, model=signature.model, max_rows=signature.max_rows
    )
    wrong = {fault.pointer.split("/")[2] for fault in faults if fault.pointer != "/inputs"}
    return {
        index
        for index, entry in enumerate(entries)
        if entry.datatype in DTYPES
        and (str(index) not in wrong or 0 < len(entry.data or b"") <= _FEW_BYTES)
    }


def read_outputs(parsed: ParsedBody, signature: Signature) -> tuple[str, ...]:
    """The names of the requested outputs, in the client's order; empty means all. Raises
    InvalidInput for unknown or repeated names, or invalid `parameters`."""
    if parsed.parameters:
        try:
            _decode_parameters(parsed.parameters)
        except msgspec.ValidationError as error:
            reject_input(fault_of(error, RequestParameters, under="/parameters"), error)
        reject_repeated_names(parsed.parameters, "/parameters")
    if not parsed.outputs:
        return ()
    texts = _entry_texts("outputs", parsed.outputs, len(signature.outputs), signature.model)
    try:
        names = tuple(output.name for output in _decode_outputs(parsed.outputs))
    except msgspec.ValidationError as error:
        reject_input(fault_of(error, list[RequestedOutput], under="/outputs"), error)
    for index, text in enumerate(texts):
        _reject_repeated(text, f"/outputs/{index}")
    if problems := list(_output_faults(names, signature)):
        raise json_errors.invalid_input_error(problems)
    return names


def _output_faults(names: tuple[str, ...], signature: Signature) -> Iterator[InputError]:
    """Yields a fault for each name that is unknown or repeated."""
    known = {spec.name for spec in signature.outputs}
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name not in known:
            yield InputError(f"/outputs/{index}/name", json_errors.unknown_name_detail(name, known))
        elif name in seen:
            yield InputError(f"/outputs/{index}/name", f"`{name}` is given more than once")
        seen.add(name)


def _entry_texts(field: str, text: bytes, max_entries: int, model: str) -> list[bytes]:
    """The entries of a list, still text. Raises InvalidInput if there are more than the model has
    names for: each would cost far more memory than its two bytes.

    One entry too many is allowed here, since the check of names finds it unknown or repeated.
    """
    try:
        entries = _entries_decoder(max_entries + 1)(text)
    except msgspec.ValidationError as error:
        if text.lstrip().startswith(b"["):
            noun = field[:-1] if max_entries == 1 else field
            detail = f"more than {max_entries + 1} {field}, {model} has {max_entries} {noun}"
            fault = InputError(f"/{field}", detail)
        else:
            fault = fault_of(error, list[_Entry], under=f"/{field}")
        reject_input(fault, error)
    return [bytes(entry) for entry in msgspec.structs.astuple(entries) if len(entry)]


@cache
def _entries_decoder(max_entries: int) -> Callable[[bytes], Struct]:
    """A decoder of lists of at most `max_entries` entries, which raises ValidationError at the
    first one too many; a decoder of lists of any length would make an object of each of a million
    entries. It returns a struct with a field for each possible entry, empty for those that are not
    there."""
    fields = [(f"entry_{index}", Raw, Raw(b"")) for index in range(max_entries)]
    entries = msgspec.defstruct(
        "Entries", fields, array_like=True, forbid_unknown_fields=True, frozen=True
    )
    return msgspec.json.Decoder(entries).decode


def _read_entries(text: bytes, signature: Signature) -> list[_Entry]:
    """The entries of `inputs`; raises InvalidInput with a fault for each invalid entry."""
    entries: list[_Entry] = []
    problems: list[InputError] = []
    texts = _entry_texts("inputs", text, len(signature.inputs), signature.model)
    for index, entry_text in enumerate(texts):
        pointer = f"/inputs/{index}"
        try:
            entries.append(_read_entry(entry_text, pointer))
        except msgspec.ValidationError as error:
            problems.append(fault_of(error, _Entry, under=pointer))
        except InvalidInput as error:
            problems += error.faults
    if problems:
        raise json_errors.invalid_input_error(problems)
    return entries


def _read_entry(text: bytes, pointer: str) -> _Entry:
    """The entry in a text, at this JSON pointer. Raises ValidationError or InvalidInput."""
    entry = _decode_entry(text)
    _reject_repeated(text, pointer)
    if (entry.data is UNSET) == (entry.parameters.binary_data_size is None):
        reject_input(InputError(pointer, "Set either `data` or `parameters.binary_data_size`."))
    if prod(max(size, 1) for size in entry.shape) * 8 > _MAX_BYTES:
        reject_input(InputError(f"{pointer}/shape", "No request can carry so large a tensor."))
    return entry


def _reject_repeated(entry: bytes, pointer: str) -> None:
    """Raises InvalidInput if an entry of `inputs` or `outputs`, or its parameters, has a key
    twice."""
    members = reject_repeated_names(entry, pointer)
    if parameters := members.get("parameters"):
        reject_repeated_names(bytes(parameters), f"{pointer}/parameters")


def _start_offsets(
    entries: list[_Entry], body_bytes: int, json_bytes: int | None
) -> tuple[list[int], list[InputError]]:
    """Where in the body each tensor's bytes begin, and faults of the sizes, after which the offsets
    may be incomplete. An entry with `data` has the offset of the next one."""
    starts: list[int] = []
    end = 0 if json_bytes is None else json_bytes
    begin = end
    for index, entry in enumerate(entries):
        starts.append(end)
        size = entry.parameters.binary_data_size
        if size is not None and json_bytes is None:
            pointer = f"/inputs/{index}/parameters/binary_data_size"
            return starts, [InputError(pointer, "needs the header Inference-Header-Content-Length")]
        end += size or 0
    if json_bytes is not None and end != body_bytes:
        sizes = f"the tensors have {end - begin} bytes by their binary_data_size"
        return starts, [InputError("/inputs", f"{sizes}, {body_bytes - begin} follow the JSON")]
    return starts, []


def _read_array(
    entry: _Entry, description: TensorDescription, body: bytes, start: int, pointer: str
) -> Array:
    """The elements of an entry, from its `data` or its bytes in the body from `start` on; a view of
    the body if they are numbers. Raises InvalidInput, with faults at the JSON pointer."""
    if isinstance(entry.data, Raw):
        return _read_json_elements(bytes(entry.data), description, f"{pointer}/data")
    size = entry.parameters.binary_data_size or 0
    if entry.datatype == "BYTES":
        return _read_strings(memoryview(body)[start : start + size], description, pointer)
    dtype = DTYPES[entry.datatype]
    count = prod(entry.shape)
    if size != count * dtype.itemsize:
        expected = f"{entry.datatype}{list(entry.shape)} takes {count * dtype.itemsize}"
        reject_input(
            InputError(f"{pointer}/parameters/binary_data_size", f"{size} bytes, {expected}")
        )
    return np.frombuffer(body, dtype, count, start if count else 0).reshape(entry.shape)


def _read_strings(content: memoryview, description: TensorDescription, pointer: str) -> Array:
    """The array of strings, each sent behind its length; raises InvalidInput unless they are as
    many as the shape has."""
    expected = prod(description.shape)
    try:
        strings = packing.unpack_strings(content, max_count=expected)
    except packing.TooManyStrings as error:
        reject_input(
            InputError(pointer, f"more than {expected} strings, which is what its shape takes"),
            error,
        )
    except packing.DamagedPayload as error:
        reject_input(
            InputError(pointer, f"{error}; each string is sent behind its length, 4 bytes"), error
        )
    if len(strings) != expected:
        reject_input(InputError(pointer, f"{len(strings)} strings, its shape takes {expected}"))
    array = np.empty(len(strings), dtype=object)
    array[:] = strings
    return array.reshape(description.shape)


def _read_json_elements(text: bytes, description: TensorDescription, pointer: str) -> Array:
    """The array of a text with the elements in nested lists, or in a flat list in row-major order.
    Raises InvalidInput."""
    nested = _NESTED.match(text) if description.shape else _NOT_A_LIST.match(text)
    shape = description.shape if nested else (prod(description.shape),)
    spec = TensorSpec(description.name, description.datatype, shape)
    _reject_too_many_elements(text, description, pointer)
    try:
        array = datatypes.decode(text, spec)
        problem = "" if array.shape == shape else f"its elements are {list(array.shape)}"
    except ValueError as error:
        problem = str(error)
    if problem:
        faults = json_errors.find_errors(
            text, spec, model="its `shape`", max_rows=_UNBOUNDED, at=pointer
        )
        raise json_errors.invalid_input_error(
            faults, otherwise=f"`{description.name}` cannot be read: {problem}"
        )
    return array.reshape(description.shape)


def _reject_too_many_elements(text: bytes, description: TensorDescription, pointer: str) -> None:
    """Raises InvalidInput for a long text of numbers that has more commas than its shape allows,
    before it is parsed."""
    if len(text) > _FEW_BYTES and description.datatype in datatypes.RANGES:
        count, expected = text.count(b",") + 1, prod(description.shape)
        if count > expected:
            reject_input(InputError(pointer, f"{count} elements, its shape takes {expected}"))
