"""A model as a server describes it."""

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from asyncinfer.client import _display


class TensorInfo(Struct, frozen=True):
    """An input or output: its datatype by its Open Inference name, and per dimension a size, a
    symbolic name, or None. The shape is None where there may be any number of dimensions."""

    name: str
    datatype: str
    shape: tuple[int | str | None, ...] | None
    optional: bool = False

    @property
    def rank(self) -> int | None:
        """How many dimensions it has, where that is fixed."""
        return None if self.shape is None else len(self.shape)

    @property
    def shape_words(self) -> str:
        """As `[batch, 3, ?]`."""
        if self.shape is None:
            return "[...]"
        return f"[{', '.join('?' if dim is None else str(dim) for dim in self.shape)}]"


class Model(Struct, frozen=True, kw_only=True):
    """What a model takes and gives. `example()` is an input that works."""

    model: str
    version: str
    versions: tuple[str, ...] = ()
    default: bool = False
    description: str = ""
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    input_axes: tuple[int | None, ...] = ()
    """Where several jobs may share a run: per input the axis that counts rows."""
    output_axes: tuple[int | None, ...] = ()
    labels: tuple[str, ...] = ()
    batched: bool = False
    batching: str = ""
    max_rows: int = 10_000
    sha256: str = ""
    paused: bool = False
    workers: int = 0
    problems: tuple[dict[str, Any], ...] = ()
    run_times: dict[str, dict[str, float]] = {}
    shown_example: Any = msgspec.field(name="example", default=None)

    def __post_init__(self) -> None:
        """Of what is no model of ours msgspec raises a ValidationError."""
        _refuse_no_axis(self.inputs, self.input_axes)
        for axis in self.output_axes:
            # The shapes of outputs are what files declare, some of them wrongly.
            if axis is not None and axis < 0:
                raise ValueError(f"no output has an axis {axis}")

    def example(self) -> Any:
        """An input as `predict` takes it; None where the server knows none."""
        shown = self.shown_example
        if not isinstance(shown, dict):
            return None
        if "data" in shown:
            return shown["data"]
        return {one["name"]: _nested(one["data"], one["shape"]) for one in shown["inputs"]}

    def _repr_html_(self) -> str:
        workers = f"{self.workers or 'no'} worker{'s' * (self.workers > 1)}"
        name = f"{self.model} version {self.version}"
        return _display.model_card(name, "paused" if self.paused else workers, _facts(self))


def _facts(model: Model) -> dict[str, Any]:
    """The rows of a model's card."""
    example = model.example()
    return {
        "inputs": "; ".join(map(_tensor, model.inputs)),
        "outputs": "; ".join(map(_tensor, model.outputs)),
        "labels": ", ".join(model.labels),
        "batching": model.batching,
        "rows a job": f"{model.max_rows:,}",
        "example": msgspec.json.encode(example).decode() if example else None,
        "about": model.description,
    }


def _tensor(spec: TensorInfo) -> str:
    return f"{spec.name} {spec.datatype} {spec.shape_words}{' (optional)' if spec.optional else ''}"


def _refuse_no_axis(specs: Sequence[TensorInfo], axes: Sequence[int | None]) -> None:
    for spec, axis in zip(specs, axes, strict=False):
        if axis is None or (spec.rank is None and axis >= 0):
            continue
        if not 0 <= axis < (spec.rank or 0):
            raise ValueError(f"{spec.name!r} has no axis {axis}")


def _nested(data: Any, shape: list[int]) -> Any:
    """Row-major elements as nested lists."""
    if not shape:
        return data[0] if isinstance(data, list) else data
    if len(shape) < 2 or any(isinstance(one, list) for one in data):
        return data
    size = len(data) // max(shape[0], 1)
    rows = [data[at * size : (at + 1) * size] for at in range(shape[0])]
    return [_nested(row, shape[1:]) for row in rows]
