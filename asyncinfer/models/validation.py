"""Input checked against a model's signature: `data`, or named tensors."""

import itertools
from collections.abc import Iterable, Sequence
from operator import mul
from typing import Final

import msgspec

from asyncinfer.errors import Fault
from asyncinfer.models.signature import Signature, data_input
from asyncinfer.tensors import datatypes, json_errors, shape_errors
from asyncinfer.tensors.datatypes import Array, Feeds, TensorSpec
from asyncinfer.tensors.shape_errors import Given


def check_data(data: bytes | msgspec.Raw, signature: Signature) -> Array:
    """The model's input from the JSON text of a request's `data`: the shape that it takes.

    Raises InvalidInput with every fault, each a JSON pointer that starts with /data. The API
    and the worker both call this, because strangers bypass the API.
    """
    spec = data_input(signature)
    if spec is None:
        raise json_errors.refusal([Fault("/data", _no_data(signature))])
    data = bytes(data)
    model, max_rows = signature.model, signature.max_rows
    if len(data) > _MANY_BYTES:
        _check_rows(_rows_by_brackets(data, spec), spec, signature)
    try:
        array = datatypes.decode(data, spec)
    except (ValueError, OverflowError) as error:
        problem = f"cannot be read: {error}"
    else:
        if array.shape and array.shape[0] > max_rows:
            _check_rows(array.shape[0], spec, signature)
        if datatypes.fits(array.shape, spec):
            return array
        takes = f"{model} takes shape {datatypes.shape_words(spec)}"
        problem = f"its shape is {list(array.shape)}, {takes}"
    found = json_errors.find(data, spec, model=model, max_rows=max_rows)
    raise json_errors.refusal(found, otherwise=problem)


_MANY_BYTES: Final = 64 << 10


def _rows_by_brackets(data: bytes, spec: TensorSpec) -> int:
    """How many rows a long text of numbers holds, before any is read: those that are too many
    must cost next to nothing. 0 where only reading tells."""
    dims = datatypes.dims(spec)
    inner = dims[1:-1]
    known = all(isinstance(size, int) and size > 0 for size in inner)
    if spec.datatype not in datatypes.RANGES or not known or not dims:
        return 0
    most = data.count(b",") + 1
    if len(dims) == 1:
        return most
    sizes = itertools.accumulate((int(size or 1) for size in inner), mul, initial=1)
    return min(most, (data.count(b"[") - 1) // sum(sizes))


def _check_rows(rows: int, spec: TensorSpec, signature: Signature) -> None:
    if datatypes.is_open(spec) and rows > signature.max_rows:
        detail = json_errors.too_many_rows(
            str(rows), spec, model=signature.model, max_rows=signature.max_rows
        )
        raise json_errors.refusal([Fault("/data", detail)])


def check_data_alike(data: Sequence[bytes], signature: Signature) -> list[Array] | None:
    """`check_data` of several at once, for a third of what it takes one by one; None unless each
    is numbers that fit, in rows of one shape."""
    spec = data_input(signature)
    if spec is None or not datatypes.is_open(spec) or spec.datatype in ("BYTES", "BOOL"):
        return None
    try:
        rows, counts = datatypes.decode_rows(data, spec)
    except (ValueError, OverflowError):
        return None
    if not (min(counts) > 0 and max(counts) <= signature.max_rows):
        return None
    if not datatypes.fits(rows.shape, spec):
        return None
    ends = itertools.accumulate(counts, initial=0)
    return [rows[start:end] for start, end in itertools.pairwise(ends)]


def check_inputs(feeds: Feeds, signature: Signature) -> Feeds:
    """The model's inputs from named tensors, in the order of the signature.

    Raises InvalidInput with every fault, each a JSON pointer that starts with /inputs. Called by
    the API and by the worker.
    """
    refuse_misfits(shape_errors.described(feeds), signature, shape_errors.broken_booleans(feeds))
    return {spec.name: feeds[spec.name] for spec in signature.inputs if spec.name in feeds}


def refuse_misfits(
    given: Sequence[Given], signature: Signature, others: Iterable[Fault] = ()
) -> None:
    """Raises InvalidInput where tensors so described do not fit, or there are `others`."""
    found = shape_errors.find(
        given, signature.inputs, model=signature.model, max_rows=signature.max_rows
    )
    if all_faults := [*found, *others]:
        raise json_errors.refusal(all_faults)


def _no_data(signature: Signature) -> str:
    names = ", ".join(spec.name for spec in signature.inputs)
    if not names:
        return f"{signature.model} takes no input"
    return (
        f"{signature.model} takes {len(signature.inputs)} inputs ({names}), `data` is one; send "
        '`"inputs": [{"name", "shape", "datatype", "data"}]`'
    )
