"""The settings of a classifier's outputs in `model.toml`, checked against the graph."""

from collections.abc import Mapping, Sequence
from typing import Final

from asyncinfer.engine.classes.tables import Table
from asyncinfer.errors import ModelRefused
from asyncinfer.models.folder import ModelFile
from asyncinfer.models.signature import Signature
from asyncinfer.tensors.datatypes import FLOATS, RANGES, TensorSpec, dims, shape_text

_MAX_SHOWN: Final = 6
"""The most outputs of a model that an error names."""


class ClassConfig:
    """The settings of scores and class in `model.toml`, and the errors about them."""

    def __init__(self, file: ModelFile, signature: Signature) -> None:
        """Raises ModelRefused for settings that do not fit the outputs of the signature."""
        self._prefix = f"{file.model}/model.toml"
        self._specs = {spec.name: spec for spec in signature.outputs}
        self._labels = signature.labels
        config = file.config
        self.values: Table = config.classes
        """By column the value that stands for its class; empty if not set."""
        self.score_outputs = self._output("score_output", config.score_output)
        """The output that is set, as a list of one; empty if none is."""
        self.class_outputs = self._output("class_output", config.class_output)
        """As `score_outputs`; also the only output that can have the `values`."""
        if not signature.labels and (self.score_outputs or self.class_outputs):
            raise self.error("score_output and class_output need `labels`")
        if self.score_outputs and not may_be_scores(self.score_outputs[0], signature):
            raise self.error(
                f"score_output: `{self.score_outputs[0].name}` has no columns of fractions, one "
                f"for each of the {len(signature.labels)} labels"
            )
        if self.class_outputs and not may_be_class(self.class_outputs[0]):
            raise self.error(
                f"class_output: `{self.class_outputs[0].name}` does not have one whole number or "
                "one string for each row"
            )
        if self.values:
            self._check_values(signature)

    def _output(self, key: str, name: str | None) -> list[TensorSpec]:
        """The output of this name as a list of one, empty for None; raises ModelRefused if there is
        none such. `key` is the name of the setting."""
        if name is None:
            return []
        if name not in self._specs:
            raise self.error(f"{key}: `{name}` is not one of {', '.join(self._specs)}")
        return [self._specs[name]]

    def _check_values(self, signature: Signature) -> None:
        """Sets `class_outputs` to the output that has the `values`; raises ModelRefused for values
        that fit no output, several, or not the labels."""
        labels = signature.labels
        if len(self.values) != len(labels):
            raise self.error(
                f"classes: {len(self.values)} values for {len(labels)} labels; give one for each "
                "column of the scores"
            )
        if len(set(self.values)) < len(self.values):
            raise self.error("classes: a value is there twice; each means one column")
        if len({type(value) for value in self.values}) > 1:
            raise self.error("classes: give whole numbers, or strings, alone")
        is_text = isinstance(self.values[0], str)
        fitting = [
            spec
            for spec in self.class_outputs or self._specs.values()
            if may_be_class(spec) and (spec.datatype == "BYTES") is is_text
        ]
        if self.class_outputs and not fitting:
            output = self.class_outputs[0]
            raise self.error(
                f"classes: `{output.name}` is {output.datatype}; give "
                f"{'whole numbers' if is_text else 'values of that type'}"
            )
        if len(fitting) > 1:
            names = ", ".join(f"`{spec.name}`" for spec in fitting)
            raise self.error(f"classes: of {names}, name the one they are for as class_output")
        if not fitting:
            raise self.error(
                "classes: no output has such a value for each row; name the columns of the scores "
                "with `labels`"
            )
        self._check_range(fitting[0])
        self.class_outputs = fitting

    def _check_range(self, spec: TensorSpec) -> None:
        """Raises ModelRefused for a value that the output's datatype cannot have."""
        low, high = RANGES.get(spec.datatype, (0, 1))
        for value in self.values:
            if isinstance(value, int) and not low <= value <= high:
                raise self.error(
                    f"classes: {value} is none of `{spec.name}`, which is {spec.datatype}"
                )

    def check_order(self, actual: Sequence[int | str | None], labels: Sequence[str]) -> None:
        """Raises ModelRefused if the labels are the model's own names of its classes (`actual`, by
        column, None: unknown) in another order. Other labels are accepted."""
        words = list(map(str, actual))
        if words != list(labels) and sorted(words) == sorted(labels):
            raise self.error(
                f"labels: the columns of the scores are {', '.join(words)}, in this order; give "
                "the labels in the order of the columns"
            )

    def check_width(self, signature: Signature) -> None:
        """Raises ModelRefused if there is one label, which would be the class of every row."""
        if len(self._labels) == 1 and not signature.keys:
            raise self.error(
                "1 label, but a class is one of two or more columns of scores; leave `labels` out "
                "for a model that gives one number a row"
            )

    def missing_columns_error(self, seen_shapes: Mapping[str, Sequence[int]]) -> ModelRefused:
        """Makes the error for labels without an output that has a column for each. `seen_shapes`
        are those that made-up rows got."""
        specs = list(self._specs.values())
        declared = ", ".join(
            f"`{spec.name}` {spec.datatype} {shape_text(spec)}" for spec in specs[:_MAX_SHOWN]
        )
        more = ", ..." if len(specs) > _MAX_SHOWN else ""
        shapes = [f"`{name}` {list(shape)}" for name, shape in seen_shapes.items()][:_MAX_SHOWN]
        seen = f", and the model gave {', '.join(shapes)}" if shapes else ""
        return self.error(
            f"{len(self._labels)} labels, but no output of shape [batch, {len(self._labels)}]; the "
            f"file declares {declared}{more}{seen}"
        )

    def error(self, problem: str) -> ModelRefused:
        """Makes the error about a setting; the problem begins with its name."""
        return ModelRefused(f"{self._prefix}: {problem}")


def may_be_scores(spec: TensorSpec, signature: Signature) -> bool:
    """Whether an output may be scores by its type and declared shape: fractions, with a row for
    each row of the input and a column for each label."""
    return spec.datatype in FLOATS and may_have_columns(spec, signature)


def may_be_misdeclared(spec: TensorSpec, signature: Signature) -> bool:
    """Whether an output may be scores although its declared shape does not say so: converters
    declare the probabilities of two classes as [batch, 1], and as [2] after zipmap was removed."""
    return spec.datatype in FLOATS and not is_transposed(spec, signature)


def may_have_columns(spec: TensorSpec, signature: Signature) -> bool:
    """Whether an output may have a row for each row of the input, and a column for each label."""
    if spec.shape is None:
        return True
    if len(spec.shape) != 2 or is_transposed(spec, signature):
        return False
    return spec.shape[1] == len(signature.labels) or not isinstance(spec.shape[1], int)


def is_transposed(spec: TensorSpec, signature: Signature) -> bool:
    """Whether the columns of an output are the rows of the input, as those of [4, batch] are.

    With 4 rows, the scores of 4 classes would be read the wrong way round.
    """
    shape = dims(spec)
    if len(shape) != 2 or isinstance(shape[1], int):
        return False
    rows, columns = shape
    input_rows = [dims(input_spec)[0] for input_spec in signature.inputs if dims(input_spec)]
    is_named = columns is not None and columns in input_rows
    return rows not in input_rows and (is_named or isinstance(rows, int))


def may_be_class(spec: TensorSpec) -> bool:
    """Whether an output may be the class by its type: one value for each row, no fraction. Some
    declared shapes are wrong: LightGBM's is [1] for any number of rows."""
    shape = dims(spec)
    has_one_value_per_row = len(shape) < 2 or (
        len(shape) == 2 and (shape[1] == 1 or not isinstance(shape[1], int))
    )
    return spec.datatype not in FLOATS and has_one_value_per_row
