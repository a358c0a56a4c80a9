"""The input of a request, in whichever form it came, checked against its model."""

from collections.abc import Sequence
from typing import Final, Literal

import msgspec
from anyio import CapacityLimiter, to_thread
from msgspec import Struct

from asyncinfer.api.catalog import Served
from asyncinfer.api.config import ApiConfig
from asyncinfer.api.http import npy
from asyncinfer.api.http.body import Body, read_body
from asyncinfer.api.http.messages import Request
from asyncinfer.api.inputs.envelope import Asked, read_envelope, read_line_envelope
from asyncinfer.api.inputs.tensor_input import read_outputs, read_tensors
from asyncinfer.errors import Fault, InvalidInput, InvalidQuery
from asyncinfer.jobs import Options
from asyncinfer.models.signature import Signature, data_input
from asyncinfer.models.validation import check_data, check_inputs
from asyncinfer.schemas.requests import AskedOptions
from asyncinfer.tensors import packing, shape_errors
from asyncinfer.tensors.datatypes import Array, datatype_of
from asyncinfer.tensors.json_errors import refusal
from asyncinfer.tensors.shape_errors import Given

Form = Literal["json", "tensors"]

LONG_BYTES: Final = 1024
"""Above it numbers are stored as tensors, so that a worker need not parse them again."""

_LONG_TEXT_BYTES: Final = 64 << 10
"""Reading so much JSON takes some 2 ms, in which no other request is answered."""

_NO_OPTIONS: Final = AskedOptions()
_NOT_PACKED: Final = frozenset({"BYTES", "BOOL"})


class Input(Struct, frozen=True):
    """What is asked, ready to be stored."""

    signature: Signature
    options: Options
    tensors: Sequence[Given]
    payload: Form
    content: bytes
    answer: Form
    outputs: tuple[str, ...] = ()
    text: bytes = b""
    """The client's own `data`, where it sent that."""

    def meaning(self) -> tuple[bytes, ...]:
        """All that makes it another request; equal for equal ones."""
        options = b"" if self.options == _NO_OPTIONS else msgspec.json.encode(self.options)
        model = self.signature.model.encode()
        if self.text:
            return model, options, self.text
        return model, options, msgspec.json.encode(self.outputs), self.content


async def read_input(
    request: Request[AskedOptions],
    config: ApiConfig,
    served: Served,
    long_reads: CapacityLimiter,
) -> Input:
    """Raises what a client is told of a body that is none, or that its model does not take.

    What takes long to read is read in a thread, of which `long_reads` has one: a second would
    only share the interpreter with it.
    """
    body = await read_body(request, config)
    if body.npy:
        return _from_npy(body.content, request.query, served)
    if is_long(body.content) and _takes_long(body):
        return await to_thread.run_sync(_read, body, request.query, served, limiter=long_reads)
    return _read(body, request.query, served)


def is_long(line: bytes) -> bool:
    """Whether a text takes so long to read that other requests must not wait for it."""
    return len(line) > _LONG_TEXT_BYTES


async def read_long_line(
    line: bytes, defaults: AskedOptions, served: Served, long_reads: CapacityLimiter
) -> tuple[Input, str | None]:
    """`read_line` while the event loop goes on."""
    return await to_thread.run_sync(read_line, line, defaults, served, limiter=long_reads)


def read_line(line: bytes, defaults: AskedOptions, served: Served) -> tuple[Input, str | None]:
    """One of many requests and its idempotency key; raises as `read_input` does. `defaults` are
    for a line without options of its own."""
    asked = read_line_envelope(line)
    options = asked.options if asked.has_options else defaults
    return _from_json(asked, Body(line, None), options, served), asked.key


def _takes_long(body: Body) -> bool:
    """Of a long body: binary numbers are not read at all, only their description is; strings are,
    one by one."""
    head_bytes = body.json_bytes
    if head_bytes is None or head_bytes > _LONG_TEXT_BYTES:
        return True
    return body.content.find(b'"BYTES"', 0, head_bytes) >= 0


def _read(body: Body, query: AskedOptions, served: Served) -> Input:
    json_text = body.content if body.json_bytes is None else body.content[: body.json_bytes]
    asked = read_envelope(json_text)
    return _from_json(asked, body, _options(asked, query), served)


def _from_json(asked: Asked, body: Body, options: AskedOptions, served: Served) -> Input:
    signature = served.of(options.version)
    if asked.inputs:
        return _from_tensors(asked, body, options, signature)
    return _from_data(asked, body, options, signature)


def _options(asked: Asked, query: AskedOptions) -> AskedOptions:
    if not asked.has_options:
        return query
    if query != _NO_OPTIONS:
        raise InvalidQuery("Options are both in the body and in the query; send them in one.")
    return asked.options


def _from_data(asked: Asked, body: Body, options: AskedOptions, signature: Signature) -> Input:
    if body.json_bytes is not None:
        raise InvalidInput(
            "Tensors that follow the JSON are described by `inputs`; `data` has none.",
            faults=[Fault("/data", "`data` goes without Inference-Header-Content-Length")],
        )
    array = check_data(asked.data, signature)
    spec = data_input(signature)
    assert spec is not None, "check_data refuses without one"
    given = (Given(spec.name, spec.datatype, array.shape),)
    answer = options.answer or "json"
    if len(asked.data) <= LONG_BYTES or spec.datatype in _NOT_PACKED:
        return Input(signature, options, given, "json", asked.data, answer, text=asked.data)
    packed = packing.pack({spec.name: array})
    return Input(signature, options, given, "tensors", packed, answer, text=asked.data)


def _from_tensors(asked: Asked, body: Body, options: AskedOptions, signature: Signature) -> Input:
    outputs = read_outputs(asked, signature)
    feeds = read_tensors(asked, body.content, body.json_bytes, signature)
    given = shape_errors.described(feeds)
    answer = options.answer or "tensors"
    return Input(signature, options, given, "tensors", packing.pack(feeds), answer, outputs)


def _from_npy(content: bytes, options: AskedOptions, served: Served) -> Input:
    signature = served.of(options.version)
    spec = data_input(signature)
    if spec is None:
        names = ", ".join(one.name for one in signature.inputs)
        detail = f"{signature.model} takes {names}, `.npy` holds one; send `inputs`"
        raise InvalidInput(f"{detail}.", faults=[Fault("", detail)])
    array = npy.read(content)
    given = Given(spec.name, spec.datatype, array.shape)
    problems = list(
        shape_errors.find(
            [given], signature.inputs, model=signature.model, max_rows=signature.max_rows
        )
    )
    if wrong := _dtype_problem(array, spec.datatype, signature.model):
        problems.insert(0, Fault("/inputs/0/datatype", wrong))
    if problems:
        raise refusal(problems)
    feeds = check_inputs({spec.name: array}, signature)
    answer = options.answer or "tensors"
    return Input(signature, options, [given], "tensors", packing.pack(feeds), answer)


def _dtype_problem(array: Array, datatype: str, model: str) -> str:
    """The remedy is to convert on purpose: a silent cast could change the answer."""
    try:
        if datatype_of(array) == datatype:
            return ""
    except KeyError:
        pass
    takes = f"{array.dtype.str} array, {model} takes {datatype}"
    if datatype in npy.UNSUPPORTED_DATATYPES:
        return f"{takes}, which `.npy` cannot hold; send `inputs`"
    return f'{takes}; save it with `array.astype("{npy.numpy_name_of(datatype)}")`'
