"""GET /job/{id}/result: the result alone, in the form that `Accept` names."""

from collections.abc import Iterator, Sequence
from typing import Final, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from asyncinfer.api.http import npy
from asyncinfer.api.http.body import JSON_LENGTH_HEADER, NPY
from asyncinfer.api.http.messages import OWS, Header, Reply, Request, encode_json
from asyncinfer.api.job_lookup import find_job
from asyncinfer.api.services import Services
from asyncinfer.api.views import error_of, result_text, version_of
from asyncinfer.errors import (
    InvalidQuery,
    JobCancelled,
    JobFailed,
    JobNotFinished,
    NotAcceptable,
    ResultDamaged,
)
from asyncinfer.repository.stored_jobs import StoredJob
from asyncinfer.schemas.requests import ResultQuery
from asyncinfer.tensors import packing
from asyncinfer.tensors.json_errors import unknown_name_detail
from asyncinfer.tensors.packing import PackedTensor

ResultForm = Literal["json", "binary", "npy"]

BINARY: Final = "application/octet-stream"

_MEDIA_TYPES: Final[dict[ResultForm, str]] = {
    "json": "application/json",
    "binary": BINARY,
    "npy": NPY,
}
_RETRY_AFTER_SECONDS: Final = 1.0


class _Parameters(Struct, frozen=True):
    binary_data_size: int


class _Output(Struct, frozen=True):
    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: _Parameters


class _Head(Struct, frozen=True):
    """The JSON of the Open Inference Protocol's binary layout."""

    model_name: str | UnsetType
    model_version: str | UnsetType
    id: str
    outputs: list[_Output]


async def read_result(services: Services, request: Request[ResultQuery]) -> Reply:
    """A completed job's result alone, as JSON or binary.

    Raises NotAcceptable, JobNotFound, JobExpired or RedisUnavailable, and as `result_reply` does.
    """
    form = requested_form(request.header(b"accept"))
    if form is None:
        raise NotAcceptable(f"A result is given as one of {', '.join(_MEDIA_TYPES.values())}.")
    return result_reply(await find_job(services, request), form, request.query.output)


def requested_form(accept: str | None) -> ResultForm | None:
    """The form that `Accept` prefers (RFC 9110), JSON if several are equal or there is no `Accept`
    (None). Returns None if it accepts no form of results."""
    if accept is None:
        return "json"
    ranges = [_parse_range(part) for part in accept.split(",")]
    qualities = {form: _quality(media_type, ranges) for form, media_type in _MEDIA_TYPES.items()}
    best = max(qualities, key=lambda form: qualities[form])
    return best if qualities[best][0] > 0 else None


def result_reply(
    stored: StoredJob, form: ResultForm, output: str | None, *headers: Header
) -> Reply:
    """The 200 with the result, or its tensor `output`, in a form. Raises JobNotFinished, JobFailed
    or JobCancelled for a job without a result, and NotAcceptable, InvalidQuery or ResultDamaged if
    the result cannot be given so."""
    _check_completed(stored)
    result = stored.result or b""
    if not packing.is_packed(result):
        return _text_reply(stored, form, output, headers)
    try:
        selected = result if output is None else _select_output(result, output)
        if form == "binary":
            return _binary_reply(stored, selected, headers)
        if form == "npy":
            return _npy_reply(stored, selected, headers)
        text = result_text(msgspec.structs.replace(stored, result=selected))
    except packing.DamagedPayload as error:
        raise ResultDamaged(
            f"The stored result is damaged: {error}. Submit the input again.", job_id=stored.job_id
        ) from error
    return Reply(200, bytes(text or b"null"), tuple(headers))


def _check_completed(stored: StoredJob) -> None:
    """Raises JobNotFinished, JobFailed or JobCancelled if the job has no result."""
    job_id = stored.job_id
    if not stored.has_ended:
        raise JobNotFinished(
            f"The job is {stored.status}; retry later, or wait with GET /job/{{id}}?wait=10.",
            job_id=job_id,
            retry_after_seconds=_RETRY_AFTER_SECONDS,
        )
    if error := error_of(stored):
        raise JobFailed((error.code, error.message), job_id)
    if stored.status == "cancelled":
        raise JobCancelled("A cancelled job has no result; retry the job first.", job_id=job_id)


def _text_reply(
    stored: StoredJob, form: ResultForm, output: str | None, headers: Sequence[Header]
) -> Reply:
    """The reply of a result that is stored as JSON text; raises NotAcceptable for another form or a
    tensor of it."""
    if form != "json" or output is not None:
        raise NotAcceptable(
            "This result is JSON text. Request it with `Accept: application/json` and without "
            "`output`, or submit the input as `inputs` to get binary tensors.",
            job_id=stored.job_id,
        )
    return Reply(200, bytes(result_text(stored) or b"null"), tuple(headers))


def _select_output(packed: bytes, name: str) -> bytes:
    """The packed tensor `name` alone. Raises InvalidQuery if there is none, and DamagedPayload."""
    tensors = packing.unpack(packed)
    if name not in tensors:
        raise InvalidQuery(f"Query parameter `output`: {unknown_name_detail(name, tensors)}")
    return packing.pack({name: tensors[name]})


def _binary_reply(stored: StoredJob, packed: bytes, headers: Sequence[Header]) -> Reply:
    """The packed tensors in the Open Inference Protocol's binary layout: JSON that describes them,
    then their bytes. Raises DamagedPayload."""
    tensors, starts = packing.read_layout(packed)
    outputs = [
        _Output(tensor.name, tensor.datatype, tensor.shape, _Parameters(tensor.size))
        for tensor in tensors
    ]
    head = encode_json(
        _Head(stored.model or UNSET, version_of(stored.record), stored.job_id, outputs)
    )
    body = b"".join([head, *_contents(packed, tensors, starts)])
    length = (JSON_LENGTH_HEADER, str(len(head)).encode())
    return Reply(200, body, (length, *headers), BINARY.encode())


def _contents(
    packed: bytes, tensors: Sequence[PackedTensor], starts: Sequence[int]
) -> Iterator[memoryview]:
    """Yields the bytes of each tensor, as views of `packed`."""
    view = memoryview(packed)
    for tensor, start in zip(tensors, starts, strict=True):
        yield view[start : start + tensor.size]


def _npy_reply(stored: StoredJob, packed: bytes, headers: Sequence[Header]) -> Reply:
    """The only tensor as `.npy`. Raises NotAcceptable if there are several or `.npy` cannot hold
    its datatype, and DamagedPayload."""
    tensors, starts = packing.read_layout(packed)
    if len(tensors) != 1:
        names = ", ".join(f"`{tensor.name}`" for tensor in tensors)
        raise NotAcceptable(
            f"`.npy` holds one array, the result has {names}; choose one with ?output=NAME.",
            job_id=stored.job_id,
        )
    head = npy.header_of(tensors[0].datatype, tensors[0].shape)
    if head is None:
        raise NotAcceptable(
            f"`.npy` cannot hold {tensors[0].datatype}; use `Accept: {BINARY}` or JSON.",
            job_id=stored.job_id,
        )
    body = b"".join([head, *_contents(packed, tensors, starts)])
    return Reply(200, body, tuple(headers), NPY.encode())


def _parse_range(part: str) -> tuple[str, float]:
    """A media range of `Accept` in lower case, and its quality from 0 to 1."""
    media_range, *parameters = part.split(";")
    quality = 1.0
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip(OWS).lower() == "q":
            quality = _parse_quality(value.strip(OWS))
    return media_range.strip(OWS).lower(), quality


def _parse_quality(text: str) -> float:
    """The value of `q`, from 0 to 1; 0 if it is not such a number."""
    try:
        number = float(text)
    except ValueError:
        return 0.0
    return number if 0 <= number <= 1 else 0.0


def _quality(media_type: str, ranges: Sequence[tuple[str, float]]) -> tuple[float, int]:
    """The quality of a media type and how specific its range is, from 1 to 3: the most specific
    range counts. (0, 0) if no range includes it."""
    specificities = {media_type: 3, f"{media_type.partition('/')[0]}/*": 2, "*/*": 1}
    matches = [
        (specificities[media_range], quality)
        for media_range, quality in ranges
        if media_range in specificities
    ]
    specificity, quality = max(matches, default=(0, 0.0))
    return quality, specificity
