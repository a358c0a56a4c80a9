"""The example request of a model: the one in `model.toml`, or one made up and tried."""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Final

import msgspec
import numpy as np

from asyncinfer.engine.batch_probe import OPEN_SIZES, RunFunction, deadline, dims_or_guess
from asyncinfer.engine.runner import Stopped
from asyncinfer.errors import InvalidInput, JobError, ModelRefused
from asyncinfer.models.folder import ModelFile
from asyncinfer.models.signature import Signature
from asyncinfer.models.validation import check_data
from asyncinfer.tensors.datatypes import DTYPES, FLOATS, Array, Feeds, TensorSpec

MAX_EXAMPLE_ELEMENTS: Final = 1000
"""Longer examples are not made up: nobody would paste one, and every announcement carries it."""

_SEARCH_SECONDS: Final = 2.0

_VALUE_PAIRS: Final = ((0, 1), (0, 0), (1, 1))
"""Values to try: of all fractions, and of whole numbers with rows and columns. For the latter 1
comes first: they may be a mask, and a mask of zeros leaves nothing to compute from."""


def configured_example(file: ModelFile, signature: Signature) -> Feeds | None:
    """The input tensors of the `example` in `model.toml`, by input and checked; None without one.
    Raises ModelRefused if they are not what a request may have."""
    value = file.config.example
    if value is None:
        return None
    needed = [spec for spec in signature.inputs if not spec.optional]
    if not isinstance(value, dict) and len(needed) != 1:
        raise ModelRefused(
            f"{file.model}/model.toml: example: give a table with a value for each of "
            f"{', '.join(spec.name for spec in signature.inputs)}"
        )
    values = value if isinstance(value, dict) else {needed[0].name: value}
    return {
        name: _check_input(name, input_value, file, signature)
        for name, input_value in _in_order(values, file, signature).items()
    }


def with_example(
    signature: Signature, file: ModelFile, run: RunFunction, seconds: float
) -> Signature:
    """The signature with an example, as JSON values: the one in `model.toml`, else one that the
    model accepts when it is tried, for at most `seconds`; without one if it would be too long.
    Raises nothing for a model that accepts none."""
    value = file.config.example
    needed = [spec for spec in signature.inputs if not spec.optional]
    if value is None:
        value = _find_example(needed, run, min(seconds, _SEARCH_SECONDS))
    elif not isinstance(value, dict):
        return msgspec.structs.replace(signature, example=value)
    only = value[needed[0].name] if value and len(value) == len(needed) == 1 else None
    of_several = value if file.config.example is not None or len(needed) > 1 else None
    return msgspec.structs.replace(signature, example=only, example_inputs=of_several)


def _in_order(
    values: dict[str, object], file: ModelFile, signature: Signature
) -> dict[str, object]:
    """The values in the order of the inputs; raises ModelRefused for unknown and missing names."""
    names = [spec.name for spec in signature.inputs]
    for name in values:
        if name not in names:
            raise ModelRefused(
                f"{file.model}/model.toml: example: `{name}` is not one of {', '.join(names)}"
            )
    for spec in signature.inputs:
        if spec.name not in values and not spec.optional:
            raise ModelRefused(f"{file.model}/model.toml: example: `{spec.name}` is missing")
    return {name: values[name] for name in names if name in values}


def _check_input(name: str, value: object, file: ModelFile, signature: Signature) -> Array:
    """The tensor of one input of the example, from its JSON `value`; raises ModelRefused if it does
    not fit the input."""
    spec = next(spec for spec in signature.inputs if spec.name == name)
    single_input = msgspec.structs.replace(
        signature, inputs=(msgspec.structs.replace(spec, optional=False),)
    )
    try:
        return check_data(msgspec.json.encode(value), single_input)
    except InvalidInput as error:
        where = f"example.{name}" if len(signature.inputs) > 1 else "example"
        raise ModelRefused(f"{file.model}/model.toml: {where}: {error.detail}") from error


# --- made-up examples --------------------------------------------------------------------------


def _find_example(
    needed: Sequence[TensorSpec], run: RunFunction, seconds: float
) -> dict[str, object] | None:
    """By input, as JSON, the first guess for which all outputs are finite, else the first that the
    model accepts in time, else the first of all. None if each would be too long."""
    guesses = list(_guesses(needed))
    if not guesses:
        return None
    best = guesses[0]
    is_accepted = False
    with deadline(seconds) as stop:
        for feeds in guesses:
            try:
                outputs = run(feeds, stop)
            except JobError:
                continue
            except Stopped:
                break
            if all(_is_finite(output) for output in outputs):
                return _as_json(feeds)
            best = best if is_accepted else feeds
            is_accepted = True
    return _as_json(best)


def _guesses(needed: Sequence[TensorSpec]) -> Iterator[Feeds]:
    """Inputs to try, small ones first. A dimension that is the first of any input, such as the
    rows, stays 1."""
    rows = {dims_or_guess(spec)[0] for spec in needed if dims_or_guess(spec)}
    tried = set()
    for size in (1, *OPEN_SIZES):
        shapes = tuple(
            tuple(
                dim if isinstance(dim, int) else 1 if not at or (dim and dim in rows) else size
                for at, dim in enumerate(dims_or_guess(spec))
            )
            for spec in needed
        )
        if shapes in tried or any(prod(shape) > MAX_EXAMPLE_ELEMENTS for shape in shapes):
            continue
        tried.add(shapes)
        for fraction, whole in _VALUE_PAIRS:
            yield {
                spec.name: _filled_array(spec, shape, fraction, whole)
                for spec, shape in zip(needed, shapes, strict=True)
            }


def _filled_array(spec: TensorSpec, shape: Sequence[int], fraction: int, whole: int) -> Array:
    """An array of one value: `fraction`, `whole` or a text, by the datatype. For whole numbers with
    fewer than two dimensions it is 0 unless `fraction` is 1."""
    dtype = DTYPES[spec.datatype]
    if spec.datatype == "BYTES":
        return np.full(shape, "text", dtype)
    if spec.datatype in FLOATS:
        return np.full(shape, fraction, dtype)
    return np.full(shape, whole if fraction or len(shape) > 1 else 0, dtype)


def _is_finite(output: Array) -> bool:
    """Whether an output has neither NaN nor infinities; True for other types than fractions."""
    if output.dtype == DTYPES["BF16"]:
        output = output.astype(np.float32)
    return output.dtype.kind != "f" or bool(np.isfinite(output).all())


def _as_json(feeds: Feeds) -> dict[str, object]:
    """The tensors as nested lists by input; bfloat16 as FP32."""
    bf16 = DTYPES["BF16"]
    return {
        name: (array.astype(np.float32) if array.dtype == bf16 else array).tolist()
        for name, array in feeds.items()
    }
