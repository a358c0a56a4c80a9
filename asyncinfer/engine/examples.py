"""A request that works: the one that `model.toml` shows, or one made up and tried."""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Final

import msgspec
import numpy as np

from asyncinfer.engine.batch_probe import OPEN_SIZES, Run, deadline, guessed
from asyncinfer.engine.runner import Stopped
from asyncinfer.errors import InvalidInput, JobError, ModelRefused
from asyncinfer.models.folder import ModelFile
from asyncinfer.models.signature import Signature
from asyncinfer.models.validation import check_data
from asyncinfer.tensors.datatypes import DTYPES, FLOATS, Array, Feeds, TensorSpec

MAX_EXAMPLE_ELEMENTS: Final = 1000
"""A longer example is not made up: nobody would paste it, and every announcement carries it."""

_TRYING_SECONDS: Final = 2.0

_FILLINGS: Final = ((0, 1), (0, 0), (1, 1))
"""What fractions are, and what whole numbers are that have rows and columns. Of these ones come
first: they may be a mask, and a mask of zeros leaves nothing to answer from."""


def shown(file: ModelFile, signature: Signature) -> Feeds | None:
    """The inputs that `model.toml` shows; they must be such as a request may have."""
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
        name: _shown_input(name, one, file, signature)
        for name, one in _in_order(values, file, signature).items()
    }


def with_example(signature: Signature, file: ModelFile, run: Run, seconds: float) -> Signature:
    """The signature with the example that is announced."""
    value = file.config.example
    needed = [spec for spec in signature.inputs if not spec.optional]
    if value is None:
        value = _made_up(needed, run, min(seconds, _TRYING_SECONDS))
    elif not isinstance(value, dict):
        return msgspec.structs.replace(signature, example=value)
    only = value[needed[0].name] if value and len(value) == len(needed) == 1 else None
    of_several = value if file.config.example is not None or len(needed) > 1 else None
    return msgspec.structs.replace(signature, example=only, example_inputs=of_several)


def _in_order(
    values: dict[str, object], file: ModelFile, signature: Signature
) -> dict[str, object]:
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


def _shown_input(name: str, value: object, file: ModelFile, signature: Signature) -> Array:
    spec = next(spec for spec in signature.inputs if spec.name == name)
    alone = msgspec.structs.replace(
        signature, inputs=(msgspec.structs.replace(spec, optional=False),)
    )
    try:
        return check_data(msgspec.json.encode(value), alone)
    except InvalidInput as error:
        where = f"example.{name}" if len(signature.inputs) > 1 else "example"
        raise ModelRefused(f"{file.model}/model.toml: {where}: {error.detail}") from error


# --- made up -----------------------------------------------------------------------------------


def _made_up(needed: Sequence[TensorSpec], run: Run, seconds: float) -> dict[str, object] | None:
    """The first that the model answers with numbers; else one that it takes; else a guess."""
    guesses = list(_guesses(needed))
    if not guesses:
        return None
    best = guesses[0]
    taken = False
    with deadline(seconds) as stop:
        for feeds in guesses:
            try:
                answer = run(feeds, stop)
            except JobError:
                continue
            except Stopped:
                break
            if all(_is_finite(one) for one in answer):
                return _as_json(feeds)
            best = best if taken else feeds
            taken = True
    return _as_json(best)


def _guesses(needed: Sequence[TensorSpec]) -> Iterator[Feeds]:
    """Small ones first; a dimension that comes first somewhere, such as the rows, stays 1."""
    rows = {guessed(spec)[0] for spec in needed if guessed(spec)}
    tried = set()
    for size in (1, *OPEN_SIZES):
        shapes = tuple(
            tuple(
                dim if isinstance(dim, int) else 1 if not at or (dim and dim in rows) else size
                for at, dim in enumerate(guessed(spec))
            )
            for spec in needed
        )
        if shapes in tried or any(prod(shape) > MAX_EXAMPLE_ELEMENTS for shape in shapes):
            continue
        tried.add(shapes)
        for fraction, whole in _FILLINGS:
            yield {
                spec.name: _filled(spec, shape, fraction, whole)
                for spec, shape in zip(needed, shapes, strict=True)
            }


def _filled(spec: TensorSpec, shape: Sequence[int], fraction: int, whole: int) -> Array:
    dtype = DTYPES[spec.datatype]
    if spec.datatype == "BYTES":
        return np.full(shape, "text", dtype)
    if spec.datatype in FLOATS:
        return np.full(shape, fraction, dtype)
    return np.full(shape, whole if fraction or len(shape) > 1 else 0, dtype)


def _is_finite(answer: Array) -> bool:
    if answer.dtype == DTYPES["BF16"]:
        answer = answer.astype(np.float32)
    return answer.dtype.kind != "f" or bool(np.isfinite(answer).all())


def _as_json(feeds: Feeds) -> dict[str, object]:
    bf16 = DTYPES["BF16"]
    return {
        name: (array.astype(np.float32) if array.dtype == bf16 else array).tolist()
        for name, array in feeds.items()
    }
