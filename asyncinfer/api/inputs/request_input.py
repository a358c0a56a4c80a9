"""The input of a request in any form, checked against its model."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, ParamSpec, TypeVar

import msgspec
from anyio import CapacityLimiter, to_thread
from msgspec import Struct

from asyncinfer.api.catalog import Served
from asyncinfer.api.config import ApiConfig
from asyncinfer.api.http import npy
from asyncinfer.api.http.body import Body, read_body
from asyncinfer.api.http.messages import Request
from asyncinfer.api.inputs.envelope import (
    ParsedBody,
    read_envelope,
    read_line_envelope,
    reject_input,
)
from asyncinfer.api.inputs.tensor_input import read_outputs, read_tensors
from asyncinfer.errors import InputError, InvalidInput, InvalidJSON, InvalidQuery
from asyncinfer.jobs import Options
from asyncinfer.models.signature import Signature, data_input
from asyncinfer.models.validation import check_data, check_inputs
from asyncinfer.schemas.requests import RequestOptions, SubmitQuery
from asyncinfer.tensors import packing, shape_errors
from asyncinfer.tensors.datatypes import (
    RANGES,
    Array,
    datatype_of,
    number_beyond,
    range_text,
)
from asyncinfer.tensors.json_errors import invalid_input_error
from asyncinfer.tensors.shape_errors import TensorDescription

P = ParamSpec("P")
T = TypeVar("T")

PayloadForm = Literal["json", "tensors"]

MAX_JSON_PAYLOAD_BYTES: Final = 1024
"""Longer numeric `data` is stored as tensors, so that a worker need not parse it again."""

_SLOW_TEXT_BYTES: Final = 64 << 10
"""Parsing this much JSON takes some 2 ms, during which no other request is answered."""

_NO_OPTIONS: Final = RequestOptions()
_NO_QUERY: Final = SubmitQuery()
_NOT_PACKED: Final = frozenset({"BYTES", "BOOL"})


class Input(Struct, frozen=True):
    """A checked input, ready to be stored: `content` is JSON text or packed tensors, as `payload`
    says, and `answer` is the form in which its result will be stored."""

    signature: Signature
    options: Options
    tensors: Sequence[TensorDescription]
    payload: PayloadForm
    content: bytes
    answer: PayloadForm
    outputs: tuple[str, ...] = ()
    text: bytes = b""
    """The client's own `data`; empty if it sent `inputs` or `.npy`."""

    def fingerprint_parts(self) -> tuple[bytes, ...]:
        """The parts that are equal for equal requests, from which a fingerprint is made. Two texts
        of `data` are equal only byte by byte."""
        options = b"" if self.options == _NO_OPTIONS else msgspec.json.encode(self.options)
        model = self.signature.model.encode()
        if self.text:
            return model, options, self.text
        return model, options, msgspec.json.encode(self.outputs), self.content


async def read_input(
    request: Request[RequestOptions], config: ApiConfig, served: Served, long_reads: CapacityLimiter
) -> Input:
    """The input in the request's body. Raises a RequestError if the body cannot be read or does not
    fit the model."""
    check_query_options(request.query, config.max_ttl_seconds)

    def parse(body: Body) -> Input:
        return input_of(body, request.query, served, config.max_ttl_seconds)

    return await read_and_parse(request, config, long_reads, parse)


async def read_and_parse(
    request: Request[Any],
    config: ApiConfig,
    long_reads: CapacityLimiter,
    parse: Callable[[Body], T],
) -> T:
    """What `parse` makes of the request's body. Raises as `read_body` and `parse` do.

    A body that takes long to parse is parsed in a thread, of which `long_reads` allows one: a
    second one would only compete for the interpreter.
    """
    body = await read_body(request, config)
    if is_slow_to_parse(body.content) and _has_much_to_parse(body):
        return await to_thread.run_sync(parse, body, limiter=long_reads)
    return parse(body)


def _refuses_deep_json(read: Callable[P, T]) -> Callable[P, T]:
    """`read`, which raises InvalidJSON for JSON that is nested too deeply.

    A body is taken apart in several steps. How deep each can read depends on how deep the calls
    around it are, so what one has read may be too deep for the next.
    """

    @functools.wraps(read)
    def reading(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return read(*args, **kwargs)
        except RecursionError:
            # Without a cause: its traceback would be as deep as the JSON.
            raise InvalidJSON("The JSON is nested too deeply; `data` is a list of rows.") from None

    return reading


@_refuses_deep_json
def input_of(body: Body, query: RequestOptions, served: Served, max_ttl_seconds: int) -> Input:
    """The input in a body, with the options of the body, or of the query, which
    `check_query_options` has checked. Raises a RequestError if it does not fit the model."""
    if body.npy:
        return _from_npy(body.content, query, served)
    json_text = body.content if body.json_bytes is None else body.content[: body.json_bytes]
    parsed = read_envelope(json_text)
    _check_body_options(parsed, max_ttl_seconds)
    return _check_parsed(parsed, body, _options(parsed, query), served)


def check_query_options(query: RequestOptions, max_ttl_seconds: int) -> None:
    """Raises InvalidQuery if the query asks for a `ttl_seconds` above the limit, or for a deadline
    that its delay cannot meet."""
    if problem := _problem_of(query, max_ttl_seconds):
        name, detail = problem
        raise InvalidQuery(f"Query parameter `{name}`: {detail}")


def options_of(query: SubmitQuery) -> RequestOptions:
    """The options in the query of a submit."""
    if query == _NO_QUERY:
        return _NO_OPTIONS
    names = RequestOptions.__struct_fields__
    return RequestOptions(**{name: getattr(query, name) for name in names})


def is_slow_to_parse(line: bytes) -> bool:
    """Whether a text is so long that other requests must not wait while it is parsed."""
    return len(line) > _SLOW_TEXT_BYTES


async def read_long_line(
    line: bytes,
    defaults: RequestOptions,
    served: Served,
    max_ttl_seconds: int,
    long_reads: CapacityLimiter,
) -> tuple[Input, str | None]:
    """`read_line` in a thread, while the event loop continues; waits while `long_reads` allows no
    thread."""
    return await to_thread.run_sync(
        read_line, line, defaults, served, max_ttl_seconds, limiter=long_reads
    )


@_refuses_deep_json
def read_line(
    line: bytes, defaults: RequestOptions, served: Served, max_ttl_seconds: int
) -> tuple[Input, str | None]:
    """The input of a line of a bulk request, and its idempotency key (None without one); raises
    InvalidJSON, InvalidInput, VersionNotFound or ModelLoading. `defaults` are the options of a line
    without its own, which `check_query_options` has checked."""
    parsed = read_line_envelope(line)
    _check_body_options(parsed, max_ttl_seconds)
    options = parsed.options if parsed.has_options else defaults
    return _check_parsed(parsed, Body(line, None), options, served), parsed.key


def _has_much_to_parse(body: Body) -> bool:
    """Whether a long body has much to parse: JSON or strings. Binary numbers are not parsed at all,
    only their description. May also be true if a tensor is only named like that datatype."""
    if body.npy:
        return False
    head_bytes = body.json_bytes
    if head_bytes is None or head_bytes > _SLOW_TEXT_BYTES:
        return True
    return body.content.find(b'"BYTES"', 0, head_bytes) >= 0


def _check_parsed(parsed: ParsedBody, body: Body, options: RequestOptions, served: Served) -> Input:
    """The input in a parsed body, checked against the version that `options` name. Raises
    VersionNotFound, ModelLoading or InvalidInput."""
    signature = served.signature_of(options.version)
    if parsed.inputs:
        return _from_tensors(parsed, body, options, signature)
    return _from_data(parsed, body, options, signature)


def _check_body_options(parsed: ParsedBody, max_ttl_seconds: int) -> None:
    """Raises InvalidInput if the body's own options have a `ttl_seconds` above the limit, or a
    deadline that their delay cannot meet."""
    if problem := _problem_of(parsed.options, max_ttl_seconds):
        name, detail = problem
        reject_input(InputError(f"/options/{name}", detail))


def _problem_of(options: RequestOptions, max_ttl_seconds: int) -> tuple[str, str] | None:
    """The option that cannot be granted, and what to do; None if all can."""
    wanted = options.ttl_seconds
    if wanted is not None and wanted > max_ttl_seconds:
        return (
            "ttl_seconds",
            f"{wanted} s is longer than this server keeps a job, {max_ttl_seconds} s at most. Ask "
            "for less, or raise MAX_TTL.",
        )
    for name in ("start_within_seconds", "finish_within_seconds"):
        deadline = getattr(options, name)
        if deadline is not None and 0 < options.delay_seconds >= deadline:
            return (
                name,
                f"The job cannot meet this deadline of {deadline:g} s, since it starts after "
                f"`delay_seconds`, {options.delay_seconds:g} s. Both count from the submit: give "
                "it more time, or a shorter delay.",
            )
    return None


def _options(parsed: ParsedBody, query: RequestOptions) -> RequestOptions:
    """The options of the body, or of the query if the body has none; raises InvalidQuery if both
    have some."""
    if not parsed.has_options:
        return query
    if query != _NO_OPTIONS:
        raise InvalidQuery(
            "Options are both in the body and in the query; send them in one of the two."
        )
    return parsed.options


def _from_data(
    parsed: ParsedBody, body: Body, options: RequestOptions, signature: Signature
) -> Input:
    """The input of a body with `data`, stored as tensors if it is long and numeric, else as JSON.
    Raises InvalidInput if it does not fit."""
    if body.json_bytes is not None:
        raise InvalidInput(
            "Tensors that follow the JSON are described by `inputs`; `data` has none.",
            faults=[InputError("/data", "`data` goes without Inference-Header-Content-Length")],
        )
    array = check_data(parsed.data, signature)
    spec = data_input(signature)
    assert spec is not None, "check_data refuses without one"
    described = (TensorDescription(spec.name, spec.datatype, array.shape),)
    answer = options.answer or "json"
    if len(parsed.data) <= MAX_JSON_PAYLOAD_BYTES or spec.datatype in _NOT_PACKED:
        return Input(signature, options, described, "json", parsed.data, answer, text=parsed.data)
    packed = packing.pack({spec.name: array})
    return Input(signature, options, described, "tensors", packed, answer, text=parsed.data)


def _from_tensors(
    parsed: ParsedBody, body: Body, options: RequestOptions, signature: Signature
) -> Input:
    """The input of a body with `inputs`; raises InvalidInput if they do not fit."""
    outputs = read_outputs(parsed, signature)
    feeds = read_tensors(parsed, body.content, body.json_bytes, signature)
    described = shape_errors.describe_tensors(feeds)
    answer = options.answer or "tensors"
    return Input(signature, options, described, "tensors", packing.pack(feeds), answer, outputs)


def _from_npy(content: bytes, options: RequestOptions, served: Served) -> Input:
    """The input of a `.npy` body; raises InvalidInput, VersionNotFound or ModelLoading."""
    signature = served.signature_of(options.version)
    spec = data_input(signature)
    if spec is None:
        names = ", ".join(tensor.name for tensor in signature.inputs)
        detail = f"{signature.model} takes {names}, `.npy` holds one; send `inputs`"
        raise InvalidInput(f"{detail}.", faults=[InputError("", detail)])
    array = npy.read(content)
    description = TensorDescription(spec.name, spec.datatype, array.shape)
    problems = list(
        shape_errors.find_errors(
            [description], signature.inputs, model=signature.model, max_rows=signature.max_rows
        )
    )
    if dtype_problem := _dtype_problem(array, spec.datatype, signature.model):
        problems.insert(0, InputError("/inputs/0/datatype", dtype_problem))
    if problems:
        raise invalid_input_error(problems)
    feeds = check_inputs({spec.name: array}, signature)
    answer = options.answer or "tensors"
    return Input(signature, options, [description], "tensors", packing.pack(feeds), answer)


def _dtype_problem(array: Array, datatype: str, model: str) -> str:
    """Why the array's dtype does not fit the datatype, or an empty string. The client must convert
    the array itself, since a silent cast could change the answer."""
    try:
        if datatype_of(array) == datatype:
            return ""
    except KeyError:
        pass
    mismatch = f"{array.dtype.str} array, {model} takes {datatype}"
    if datatype in npy.UNSUPPORTED_DATATYPES:
        return f"{mismatch}, which `.npy` cannot hold; send `inputs`"
    is_number = array.dtype.kind in "iuf" and datatype in RANGES
    # A conversion would make infinities, or other whole numbers, of such numbers.
    if is_number and (beyond := number_beyond(array, datatype)) is not None:
        return (
            f"{mismatch}, numbers from {range_text(datatype)}, and the array has {beyond}; "
            "replace such numbers, or leave their rows out"
        )
    return f'{mismatch}; save it with `array.astype("{npy.numpy_name_of(datatype)}")`'
