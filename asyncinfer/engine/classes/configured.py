"""What `model.toml` says of a classifier's outputs, checked against what the graph declares."""

from collections.abc import Mapping, Sequence
from typing import Final

from asyncinfer.engine.classes.tables import Table
from asyncinfer.errors import ModelRefused
from asyncinfer.models.folder import ModelFile
from asyncinfer.models.signature import Signature
from asyncinfer.tensors.datatypes import FLOATS, RANGES, TensorSpec, dims

_MOST_SHOWN: Final = 6
"""Of a model's outputs, in a refusal."""


class Asked:
    """What `model.toml` says of scores and class; raises ModelRefused unless that can be."""

    def __init__(self, file: ModelFile, signature: Signature) -> None:
        self._shown = f"{file.model}/model.toml"
        self._specs = {spec.name: spec for spec in signature.outputs}
        self._labels = signature.labels
        config = file.config
        self.values: Table = config.classes
        self.scores = self._output("score_output", config.score_output)
        self.given = self._output("class_output", config.class_output)
        if not signature.labels and (self.scores or self.given):
            raise self._refused("score_output and class_output need `labels`")
        if self.scores and not may_be_scores(self.scores[0], signature):
            raise self._refused(
                f"score_output: `{self.scores[0].name}` has no columns of fractions, one for each "
                f"of the {len(signature.labels)} labels"
            )
        if self.given and not may_be_class(self.given[0]):
            raise self._refused(
                f"class_output: `{self.given[0].name}` does not have one whole number or one "
                "string for each row"
            )
        if self.values:
            self._check_values(signature)

    def _output(self, key: str, name: str | None) -> list[TensorSpec]:
        if name is None:
            return []
        if name not in self._specs:
            raise self._refused(f"{key}: `{name}` is not one of {', '.join(self._specs)}")
        return [self._specs[name]]

    def _check_values(self, signature: Signature) -> None:
        labels = signature.labels
        if len(self.values) != len(labels):
            raise self._refused(
                f"classes: {len(self.values)} values for {len(labels)} labels; give one for each "
                "column of the scores"
            )
        if len(set(self.values)) < len(self.values):
            raise self._refused("classes: a value is there twice; each means one column")
        if len({type(value) for value in self.values}) > 1:
            raise self._refused("classes: give whole numbers, or strings, alone")
        is_text = isinstance(self.values[0], str)
        fitting = [
            spec
            for spec in self.given or self._specs.values()
            if may_be_class(spec) and (spec.datatype == "BYTES") is is_text
        ]
        if self.given and not fitting:
            raise self._refused(
                f"classes: `{self.given[0].name}` is {self.given[0].datatype}; give "
                f"{'whole numbers' if is_text else 'values of that type'}"
            )
        if len(fitting) > 1:
            names = ", ".join(f"`{spec.name}`" for spec in fitting)
            raise self._refused(f"classes: of {names}, name the one they are for as class_output")
        if not fitting:
            raise self._refused(
                "classes: no output has such a value for each row; name the columns of the scores "
                "with `labels`"
            )
        self._check_range(fitting[0])
        self.given = fitting

    def _check_range(self, spec: TensorSpec) -> None:
        low, high = RANGES.get(spec.datatype, (0, 1))
        for value in self.values:
            if isinstance(value, int) and not low <= value <= high:
                raise self._refused(
                    f"classes: {value} is none of `{spec.name}`, which is {spec.datatype}"
                )

    def ambiguous(self, names: Sequence[str]) -> ModelRefused:
        shown = " and ".join(f"`{name}`" for name in names)
        return self._refused(
            f"labels: {shown} have a column for each and disagree; name the one that they are for "
            "as score_output"
        )

    def check_order(self, own: Sequence[int | str | None], labels: Sequence[str]) -> None:
        """Raises ModelRefused where the labels are the model's own words, in another order."""
        words = list(map(str, own))
        if words != list(labels) and sorted(words) == sorted(labels):
            raise self._refused(
                f"labels: the columns of the scores are {', '.join(words)}, in this order; give "
                "the labels in the order of the columns"
            )

    def check_width(self, signature: Signature) -> None:
        """Raises ModelRefused for one label, which would be the class of every row."""
        if len(self._labels) == 1 and not signature.keys:
            raise self._refused(
                "1 label, but a class is one of two or more columns of scores; leave `labels` out "
                "for a model that gives one number a row"
            )

    def without_columns(self, given: Mapping[str, Sequence[int]]) -> ModelRefused:
        """`given` are the shapes of outputs that made-up rows got."""
        specs = list(self._specs.values())
        declared = ", ".join(map(_declared, specs[:_MOST_SHOWN]))
        more = ", ..." if len(specs) > _MOST_SHOWN else ""
        shapes = [f"`{name}` {list(shape)}" for name, shape in given.items()][:_MOST_SHOWN]
        came = f", and the model gave {', '.join(shapes)}" if shapes else ""
        return self._refused(
            f"{len(self._labels)} labels, but no output of shape [batch, {len(self._labels)}]; the "
            f"file declares {declared}{more}{came}"
        )

    def unknown(self, name: str) -> ModelRefused:
        return self._refused(
            f"class_output: which value of `{name}` means which column of the scores is not known "
            "from the graph or from probe rows; give `classes`, a value for each label in their "
            "order"
        )

    def _refused(self, problem: str) -> ModelRefused:
        return ModelRefused(f"{self._shown}: {problem}")


def _declared(spec: TensorSpec) -> str:
    sizes = ", ".join("?" if dim is None else str(dim) for dim in dims(spec))
    return f"`{spec.name}` {spec.datatype} [{sizes}]"


def may_be_scores(spec: TensorSpec, signature: Signature) -> bool:
    """By its type: a row for each row of the input, a column for each label."""
    return spec.datatype in FLOATS and may_have_columns(spec, signature)


def may_be_misdeclared(spec: TensorSpec, signature: Signature) -> bool:
    """Whether only what it gives tells: converters declare the probabilities of two classes as
    [batch, 1], and what zipmap was cut off from by hand as [2]."""
    return spec.datatype in FLOATS and not lies_across(spec, signature)


def may_have_columns(spec: TensorSpec, signature: Signature) -> bool:
    """Whether it may have a row for each row of the input, and a column for each label."""
    if spec.shape is None:
        return True
    if len(spec.shape) != 2 or lies_across(spec, signature):
        return False
    return spec.shape[1] == len(signature.labels) or not isinstance(spec.shape[1], int)


def lies_across(spec: TensorSpec, signature: Signature) -> bool:
    """Whether its columns are the rows of the input, as those of [4, batch] are.

    With 4 rows the scores of 4 classes would be taken the wrong way round.
    """
    shape = dims(spec)
    if len(shape) != 2 or isinstance(shape[1], int):
        return False
    rows, columns = shape
    of_inputs = [dims(given)[0] for given in signature.inputs if dims(given)]
    is_named = columns is not None and columns in of_inputs
    return rows not in of_inputs and (is_named or isinstance(rows, int))


def may_be_class(spec: TensorSpec) -> bool:
    """By its type; converters declare the shape wrongly, LightGBM's as [1] for any rows."""
    shape = dims(spec)
    one_a_row = len(shape) < 2 or (
        len(shape) == 2 and (shape[1] == 1 or not isinstance(shape[1], int))
    )
    return spec.datatype not in FLOATS and one_a_row
