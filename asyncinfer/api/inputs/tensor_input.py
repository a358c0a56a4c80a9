"""The named tensors of a request, in JSON or as bytes behind it, as arrays."""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from math import prod
from typing import Annotated, Final

import msgspec
import numpy as np
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from asyncinfer.api.http.validation_errors import fault_of
from asyncinfer.api.inputs.envelope import Asked, check_repeated, refuse
from asyncinfer.errors import Fault, InvalidInput
from asyncinfer.models.signature import Signature
from asyncinfer.models.validation import check_inputs, refuse_misfits
from asyncinfer.schemas.requests import AskedOutput, AskedParameters, InputParameters
from asyncinfer.tensors import datatypes, json_errors, packing, shape_errors
from asyncinfer.tensors.datatypes import DTYPES, Array, Feeds, TensorSpec
from asyncinfer.tensors.shape_errors import Given

_MOST_BYTES: Final = 1 << 40
_UNBOUNDED: Final = 1 << 62
_FEW_BYTES: Final = 4096
_NESTED = re.compile(rb"[ \t\r\n]*\[[ \t\r\n]*\[")
_NO_LIST = re.compile(rb"[ \t\r\n]*[^ \t\r\n\[]")


class _Parts(Struct, frozen=True):
    """An entry of `inputs`, still text."""

    name: Raw = Raw(b"")
    shape: Raw = Raw(b"")
    datatype: Raw = Raw(b"")
    data: Raw = Raw(b"")
    parameters: Raw = Raw(b"")


class _Input(Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    shape: Annotated[tuple[Annotated[int, Meta(ge=0, le=2**31 - 1)], ...], Meta(max_length=32)]
    datatype: str
    data: Raw | UnsetType = UNSET
    parameters: InputParameters = InputParameters()


_decode_parts = msgspec.json.Decoder(_Parts).decode
_decode_input = msgspec.json.Decoder(_Input).decode
_decode_outputs = msgspec.json.Decoder(list[AskedOutput]).decode
_decode_parameters = msgspec.json.Decoder(AskedParameters).decode


def read_tensors(asked: Asked, body: bytes, json_bytes: int | None, signature: Signature) -> Feeds:
    """The inputs, checked; arrays whose bytes were sent as they are stay views of `body`.

    Raises InvalidInput with every fault of all tensors.
    """
    items = _items(asked.inputs, signature)
    given = [Given(item.name, item.datatype, item.shape) for item in items]
    starts, misplaced = _starts(items, len(body), json_bytes)
    if misplaced:
        refuse_misfits(given, signature, misplaced)
    readable = _readable(items, given, signature)
    found: dict[str, Array] = {}
    problems: list[Fault] = []
    for index, (item, start) in enumerate(zip(items, starts, strict=True)):
        if index not in readable:
            continue
        try:
            found[item.name] = _array(item, given[index], body, start, f"/inputs/{index}")
        except InvalidInput as error:
            problems += error.faults
    refuse_misfits(given, signature, problems)
    return check_inputs(found, signature)


def _readable(items: Sequence[_Input], given: Sequence[Given], signature: Signature) -> set[int]:
    """The places of the tensors whose elements are worth a look: not of those that the model does
    not take as they are described, unless they are few, and all faults can be told at once."""
    found = shape_errors.find(
        given, signature.inputs, model=signature.model, max_rows=signature.max_rows
    )
    wrong = {fault.pointer.split("/")[2] for fault in found if fault.pointer != "/inputs"}
    return {
        index
        for index, item in enumerate(items)
        if item.datatype in DTYPES
        and (str(index) not in wrong or 0 < len(item.data or b"") <= _FEW_BYTES)
    }


def read_outputs(asked: Asked, signature: Signature) -> tuple[str, ...]:
    """Names of the outputs that are wanted; none means all."""
    if asked.parameters:
        try:
            _decode_parameters(asked.parameters)
        except msgspec.ValidationError as error:
            refuse(fault_of(error, AskedParameters, under="/parameters"), error)
    if not asked.outputs:
        return ()
    _entries("outputs", asked.outputs, len(signature.outputs), signature.model)
    try:
        names = tuple(output.name for output in _decode_outputs(asked.outputs))
    except msgspec.ValidationError as error:
        refuse(fault_of(error, AskedOutput, under="/outputs"), error)
    if problems := list(_wrong_outputs(names, signature)):
        raise json_errors.refusal(problems)
    return names


def _wrong_outputs(names: tuple[str, ...], signature: Signature) -> Iterator[Fault]:
    known = {spec.name for spec in signature.outputs}
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name not in known:
            yield Fault(f"/outputs/{index}/name", json_errors.unknown_name(name, known))
        elif name in seen:
            yield Fault(f"/outputs/{index}/name", f"`{name}` is given more than once")
        seen.add(name)


def _entries(field: str, text: bytes, most: int, model: str) -> list[bytes]:
    """The entries of a list, still text. Raises InvalidInput where there are more than the model
    has names for, at the first that is too many: each would cost far more than its two bytes.

    One entry too many is left to those who look at the names: it must be unknown, or given twice.
    """
    try:
        entries = _entries_decoder(most + 1)(text)
    except msgspec.ValidationError as error:
        if text.lstrip().startswith(b"["):
            noun = field[:-1] if most == 1 else field
            fault = Fault(f"/{field}", f"more than {most + 1} {field}, {model} has {most} {noun}")
        else:
            fault = fault_of(error, _Input, under=f"/{field}")
        refuse(fault, error)
    return [bytes(entry) for entry in msgspec.structs.astuple(entries) if len(entry)]


@cache
def _entries_decoder(most: int) -> Callable[[bytes], Struct]:
    """Decodes a list of at most so many entries; it stops at the first that is too many, where a
    decoder of any list would make an object of each of a million."""
    fields = [(f"entry_{index}", Raw, Raw(b"")) for index in range(most)]
    entries = msgspec.defstruct(
        "Entries", fields, array_like=True, forbid_unknown_fields=True, frozen=True
    )
    return msgspec.json.Decoder(entries).decode


def _items(text: bytes, signature: Signature) -> list[_Input]:
    """The entries of `inputs`; raises InvalidInput with a fault for each that is none."""
    entries = _entries("inputs", text, len(signature.inputs), signature.model)
    items: list[_Input] = []
    problems: list[Fault] = []
    for index, entry in enumerate(entries):
        pointer = f"/inputs/{index}"
        try:
            items.append(_item(entry, pointer))
        except msgspec.ValidationError as error:
            problems.append(fault_of(error, _Input, under=pointer))
        except InvalidInput as error:
            problems += error.faults
    if problems:
        raise json_errors.refusal(problems)
    return items


def _item(text: bytes, pointer: str) -> _Input:
    one = _decode_input(text)
    parts = _decode_parts(text)
    values = {name: getattr(parts, name) for name in parts.__struct_fields__}
    check_repeated(text, {name: value for name, value in values.items() if len(value)}, pointer)
    if (one.data is UNSET) == (one.parameters.binary_data_size is None):
        refuse(Fault(pointer, "Set either `data` or `parameters.binary_data_size`."))
    if prod(max(size, 1) for size in one.shape) * 8 > _MOST_BYTES:
        refuse(Fault(f"{pointer}/shape", "No request can carry a tensor so large."))
    return one


def _starts(
    items: list[_Input], body_bytes: int, json_bytes: int | None
) -> tuple[list[int], list[Fault]]:
    """Where in the body each tensor's bytes begin, and what is wrong with the sizes."""
    starts: list[int] = []
    end = 0 if json_bytes is None else json_bytes
    begin = end
    for index, one in enumerate(items):
        starts.append(end)
        size = one.parameters.binary_data_size
        if size is not None and json_bytes is None:
            pointer = f"/inputs/{index}/parameters/binary_data_size"
            return starts, [Fault(pointer, "needs the header Inference-Header-Content-Length")]
        end += size or 0
    if json_bytes is not None and end != body_bytes:
        sizes = f"the tensors have {end - begin} bytes by their binary_data_size"
        return starts, [Fault("/inputs", f"{sizes}, {body_bytes - begin} follow the JSON")]
    return starts, []


def _array(one: _Input, given: Given, body: bytes, start: int, pointer: str) -> Array:
    if isinstance(one.data, Raw):
        return _from_json(bytes(one.data), given, f"{pointer}/data")
    size = one.parameters.binary_data_size or 0
    if one.datatype == "BYTES":
        return _strings(memoryview(body)[start : start + size], given, pointer)
    dtype = DTYPES[one.datatype]
    count = prod(one.shape)
    if size != count * dtype.itemsize:
        takes = f"{one.datatype}{list(one.shape)} takes {count * dtype.itemsize}"
        refuse(Fault(f"{pointer}/parameters/binary_data_size", f"{size} bytes, {takes}"))
    return np.frombuffer(body, dtype, count, start if count else 0).reshape(one.shape)


def _strings(content: memoryview, given: Given, pointer: str) -> Array:
    takes = prod(given.shape)
    try:
        strings = packing.unpack_strings(content, most=takes)
    except packing.TooManyStrings as error:
        refuse(Fault(pointer, f"more than {takes} strings, which is what its shape takes"), error)
    except packing.DamagedPayload as error:
        refuse(Fault(pointer, f"{error}; each string is sent behind its length, 4 bytes"), error)
    if len(strings) != takes:
        refuse(Fault(pointer, f"{len(strings)} strings, its shape takes {takes}"))
    array = np.empty(len(strings), dtype=object)
    array[:] = strings
    return array.reshape(given.shape)


def _from_json(text: bytes, given: Given, pointer: str) -> Array:
    """`text` holds the elements in nested lists, or in one flat list in row-major order."""
    nested = _NESTED.match(text) if given.shape else _NO_LIST.match(text)
    shape = given.shape if nested else (prod(given.shape),)
    spec = TensorSpec(given.name, given.datatype, shape)
    _check_elements(text, given, pointer)
    try:
        array = datatypes.decode(text, spec)
        problem = "" if array.shape == shape else f"its elements are {list(array.shape)}"
    except (ValueError, OverflowError) as error:
        problem = str(error)
    if problem:
        found = json_errors.find(text, spec, model="its `shape`", max_rows=_UNBOUNDED, at=pointer)
        raise json_errors.refusal(found, otherwise=f"`{given.name}` cannot be read: {problem}")
    return array.reshape(given.shape)


def _check_elements(text: bytes, given: Given, pointer: str) -> None:
    """Refuses a long text of numbers by its commas where its shape takes fewer."""
    if len(text) > _FEW_BYTES and given.datatype in datatypes.RANGES:
        count, takes = text.count(b",") + 1, prod(given.shape)
        if count > takes:
            refuse(Fault(pointer, f"{count} elements, its shape takes {takes}"))
