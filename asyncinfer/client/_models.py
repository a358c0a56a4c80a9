"""Models as a server describes them."""

from collections.abc import Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from asyncinfer.client import _display

_MAX_EXAMPLE_CHARACTERS: Final = 120


class TensorInfo(Struct, frozen=True):
    """An input or output of a model.

    `datatype` is the name in the Open Inference Protocol, such as FP32. `shape` has a size, a
    symbolic name or None (any size) for each dimension; it is None if any number of dimensions is
    allowed.

    >>> client.model("iris").inputs[0].shape
    ('batch', 4)
    """

    name: str
    datatype: str
    shape: tuple[int | str | None, ...] | None
    optional: bool = False

    @property
    def rank(self) -> int | None:
        """The number of dimensions; None if it is not fixed."""
        return None if self.shape is None else len(self.shape)

    @property
    def shape_words(self) -> str:
        """The shape as text, such as `[batch, 3, ?]`."""
        if self.shape is None:
            return "[...]"
        return f"[{', '.join('?' if dim is None else str(dim) for dim in self.shape)}]"


class ModelProblem(Struct, frozen=True, kw_only=True):
    """Why a worker does not serve a version, or why it serves an older file of it.

    `version` None: the problem is in its `model.toml`, for all versions. Another worker than this
    one may serve the version.
    """

    model: str
    version: str | None = None
    worker: str
    reason: str


class Model(Struct, frozen=True, kw_only=True):
    """A model that is served: what it takes, what it gives, and how it runs.

    >>> iris = client.model("iris")
    >>> iris.labels
    ('setosa', 'versicolor', 'virginica')
    >>> client.predict(iris.example(), "iris")["class_name"]
    'setosa'
    """

    model: str
    """Its name."""
    version: str
    """The version that is served."""
    versions: tuple[str, ...] = ()
    """All announced versions, newest first."""
    default: bool = False
    """Whether it is used when no model is named."""
    description: str = ""
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    input_axes: tuple[int | None, ...] = ()
    """For each input the axis that counts rows, if several jobs may share a run."""
    output_axes: tuple[int | None, ...] = ()
    """The same for each output."""
    labels: tuple[str, ...] = ()
    """The names of its classes; empty if its results are arrays."""
    batched: bool = False
    """Whether several jobs may share a run; `batching` says why or why not."""
    batching: str = ""
    max_rows: int = 10_000
    """The most rows that one job may have."""
    max_ttl_seconds: int = 30 * 24 * 3600
    """The longest `ttl_seconds` of a job; servers of earlier releases do not tell it."""
    sha256: str = ""
    """The SHA-256 of the model file, in hexadecimal."""
    paused: bool = False
    """True if jobs are accepted and none is run."""
    workers: int = 0
    """The number of living workers that serve it."""
    problems: tuple[ModelProblem, ...] = ()
    """Versions that a worker found and does not serve."""
    run_times: dict[str, dict[str, float]] = {}
    """By worker, the measured seconds of a run by its number of rows."""
    shown_example: Any = msgspec.field(name="example", default=None)

    def __post_init__(self) -> None:
        """Raises ValueError if an axis is impossible; msgspec makes a ValidationError of it."""
        _reject_missing_axis(self.inputs, self.input_axes)
        for axis in self.output_axes:
            # Only the sign is checked: some files declare the shapes of outputs wrongly.
            if axis is not None and axis < 0:
                raise ValueError(f"no output has an axis {axis}")

    def example(self) -> Any:
        """Returns an input that `predict` takes; None if the server knows none.

        It is nested lists of the shape `(rows, *dims)`, or a dict of them by name for several
        inputs.

        >>> client.model("iris").example()
        [[5.1, 3.5, 1.4, 0.2]]
        """
        body = self.shown_example
        if not isinstance(body, dict):
            return None
        if "data" in body:
            return body["data"]
        return {
            tensor["name"]: _nested(tensor["data"], tensor["shape"]) for tensor in body["inputs"]
        }

    def __repr__(self) -> str:
        """All fields; a long example is cut."""
        shown = _shortened(self.shown_example)
        return Struct.__repr__(msgspec.structs.replace(self, shown_example=shown))

    def _repr_html_(self) -> str:
        """The card that a notebook shows."""
        workers = f"{self.workers or 'no'} worker{'s' * (self.workers > 1)}"
        name = f"{self.model} version {self.version}"
        return _display.model_card(name, "paused" if self.paused else workers, _card_rows(self))


class Catalog(Struct, frozen=True, kw_only=True):
    """All models of a service, also those that do not run yet, or not at all.

    Workers serve `models`, are `loading` those of these names, and have `problems` with models of
    which they serve no version.

    >>> client.catalog().loading
    ()
    """

    models: tuple[Model, ...]
    loading: tuple[str, ...] = ()
    problems: tuple[ModelProblem, ...] = ()

    @property
    def all_problems(self) -> tuple[ModelProblem, ...]:
        """These problems, and then those of the models that are served."""
        return sum((model.problems for model in self.models), self.problems)

    def _repr_html_(self) -> str:
        """The table that a notebook shows."""
        problems = [
            f"{problem.model}{f' version {problem.version}' if problem.version else ''}: "
            f"{problem.reason}"
            for problem in self.problems
        ]
        below = {"loading": ", ".join(self.loading), "problems": "; ".join(problems)}
        return _display.table_card("Models", list(map(model_row, self.models)), below)


def model_row(model: Model) -> dict[str, Any]:
    """The row of a model in a table."""
    return {
        "model": model.model,
        "version": model.version,
        "inputs": "; ".join(map(_tensor_text, model.inputs)),
        "labels": ", ".join(model.labels),
        "batches": "yes" if model.batched else "no",
        "workers": model.workers,
        "state": ", ".join(
            word
            for word, holds in (
                ("default", model.default),
                ("paused", model.paused),
                ("problems", model.problems),
            )
            if holds
        ),
    }


def _shortened(example: Any) -> Any:
    """An example as it is shown among the fields of a model; the beginning of a long one."""
    if example is None or len(text := repr(example)) <= _MAX_EXAMPLE_CHARACTERS:
        return example
    return f"{text[:_MAX_EXAMPLE_CHARACTERS]} …"


def _card_rows(model: Model) -> dict[str, Any]:
    """The rows of a model's card by label; those with an empty value are not shown."""
    example = model.example()
    return {
        "inputs": "; ".join(map(_tensor_text, model.inputs)),
        "outputs": "; ".join(map(_tensor_text, model.outputs)),
        "labels": ", ".join(model.labels),
        "batching": model.batching,
        "rows a job": f"{model.max_rows:,}",
        "example": msgspec.json.encode(example).decode() if example else None,
        "about": model.description,
    }


def _tensor_text(spec: TensorInfo) -> str:
    """A tensor as `input FP32 [batch, 4]`, with a note if it is optional."""
    return f"{spec.name} {spec.datatype} {spec.shape_words}{' (optional)' if spec.optional else ''}"


def _reject_missing_axis(specs: Sequence[TensorInfo], axes: Sequence[int | None]) -> None:
    """Raises ValueError if a tensor has no axis of the given number."""
    for spec, axis in zip(specs, axes, strict=False):
        if axis is None or (spec.rank is None and axis >= 0):
            continue
        if not 0 <= axis < (spec.rank or 0):
            raise ValueError(f"{spec.name!r} has no axis {axis}")


def _nested(data: Any, shape: list[int]) -> Any:
    """Row-major elements as nested lists of the shape.

    Elements that are nested already are unchanged, and so is a vector; an empty shape gives the
    only element.
    """
    if not shape:
        return data[0] if isinstance(data, list) else data
    if len(shape) < 2 or any(isinstance(element, list) for element in data):
        return data
    size = len(data) // max(shape[0], 1)
    rows = [data[at * size : (at + 1) * size] for at in range(shape[0])]
    return [_nested(row, shape[1:]) for row in rows]
