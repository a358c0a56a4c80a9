"""How a labelled classifier tells its class: decided once, when the model is loaded."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeAlias

import msgspec
import numpy as np
from msgspec import Struct

from asyncinfer.engine import class_probing, class_tables
from asyncinfer.engine.class_probing import LEAST_ROWS, Seen
from asyncinfer.engine.class_tables import Table
from asyncinfer.engine.probing import Run
from asyncinfer.errors import ModelRefused
from asyncinfer.models import ModelFile, Signature
from asyncinfer.results import highest_columns
from asyncinfer.tensors import FLOATS, Array, Feeds, TensorSpec

Values: TypeAlias = tuple[int | str | None, ...]

_LEAST_LEAD: Final = 1e-5
"""By what share the highest score must lead for its row to tell anything: scores are rounded."""

_LABEL: Final = frozenset({"label", "output_label", "class_label", "predicted_label"})
"""What converters call the class."""

_LIKE_A_LABEL: Final = frozenset(
    {
        *("class", "classes", "class_id", "class_index", "classindex", "classid", "labels"),
        *("predicted_class", "predicted", "prediction", "predictions", "pred", "preds"),
        *("y_pred", "yhat", "y_hat", "category", "winner", "argmax"),
    }
)
"""Names that the class may have, and other things too, such as a passenger's class."""

_SCORE_NAMES: Final = ("prob", "softmax", "score", "confidence", "logit")


class _Candidate(Struct, frozen=True):
    """An output that is the class, if a model calls its classes like this."""

    name: str
    values: Values
    rank: tuple[int, float]
    """Which is the class, of several: the highest."""


def decided(
    signature: Signature, file: ModelFile, run: Run, example: Feeds | None, seconds: float
) -> Signature:
    """The signature with the outputs that results tell the class from.

    Raises ModelRefused where `model.toml` asks for what the model does not have.
    """
    asked = _Asked(file, signature)
    if not signature.labels:
        return signature
    width = len(signature.labels)
    scores = asked.scores or [spec for spec in signature.outputs if _may_be_scores(spec, width)]
    given = asked.given or [spec for spec in signature.outputs if _may_be_class(spec)]
    if not scores:
        return signature
    seen = Seen({}, {})
    if given or len(scores) > 1:
        seen = class_probing.observed(signature, scores, given, run, example, seconds)
    scored = _best_scores(scores, seen, signature)
    found = _Deciding(signature, file, scored, seen, asked).best(given)
    return msgspec.structs.replace(
        signature,
        score_output=scored,
        class_output=found.name if found else "",
        class_values=found.values if found else (),
    )


def _may_be_scores(spec: TensorSpec, width: int) -> bool:
    is_matrix = spec.datatype in FLOATS and len(spec.shape) == 2
    return is_matrix and (spec.shape[1] == width or not isinstance(spec.shape[1], int))


def _may_be_class(spec: TensorSpec) -> bool:
    """By its type; converters declare the shape wrongly, LightGBM's as [1] for any rows."""
    one_a_row = len(spec.shape) < 2 or (
        len(spec.shape) == 2 and (spec.shape[1] == 1 or not isinstance(spec.shape[1], int))
    )
    return spec.datatype not in FLOATS and one_a_row


# --- what model.toml says ----------------------------------------------------------------------


class _Asked:
    """What `model.toml` says of scores and class; raises ModelRefused unless that can be."""

    def __init__(self, file: ModelFile, signature: Signature) -> None:
        self._shown = f"{file.model}/model.toml"
        self._specs = {spec.name: spec for spec in signature.outputs}
        config = file.config
        self.values: Table = config.classes
        self.scores = self._output("score_output", config.score_output)
        self.given = self._output("class_output", config.class_output)
        if not signature.labels and (self.scores or self.given):
            raise self._refused("score_output and class_output need `labels`")
        if self.scores and not _may_be_scores(self.scores[0], len(signature.labels)):
            raise self._refused(
                f"score_output: `{self.scores[0].name}` has no columns of fractions, one for each "
                f"of the {len(signature.labels)} labels"
            )
        if self.given and not _may_be_class(self.given[0]):
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
            if _may_be_class(spec) and (spec.datatype == "BYTES") is is_text
        ]
        if self.given and not fitting:
            raise self._refused(
                f"classes: `{self.given[0].name}` is {self.given[0].datatype}; give "
                f"{'whole numbers' if is_text else 'values of that type'}"
            )
        if len(fitting) > 1:
            names = ", ".join(f"`{spec.name}`" for spec in fitting)
            raise self._refused(f"classes: of {names}, name the one they are for as class_output")
        self.given = fitting

    def unknown(self, name: str) -> ModelRefused:
        return self._refused(
            f"class_output: which value of `{name}` means which column of the scores is not known "
            "from the graph or from probe rows; give `classes`, a value for each label in their "
            "order"
        )

    def _refused(self, problem: str) -> ModelRefused:
        return ModelRefused(f"{self._shown}: {problem}")


# --- which output has the scores ---------------------------------------------------------------


def _best_scores(specs: Sequence[TensorSpec], seen: Seen, signature: Signature) -> str:
    """Of several the one that was asked for, or whose rows or name look most like scores."""
    fitting = [spec for spec in specs if not seen.scores or spec.name in seen.scores] or specs

    def rank(spec: TensorSpec) -> tuple[bool, bool, int, float]:
        rows = seen.scores.get(spec.name)
        name = spec.name.lower()
        wanted = "logit" in name if signature.scores == "logits" else False
        places = [at for at, word in enumerate(_SCORE_NAMES) if word in name]
        sums = rows is not None and _are_shares(rows)
        is_kind = sums != (signature.scores == "logits")
        follows = max(
            (_share(_pairs(given, rows)) for given in seen.given.values() if rows is not None),
            default=0.0,
        )
        return is_kind, wanted, -min(places, default=len(_SCORE_NAMES)), follows

    return max(fitting, key=rank).name


def _are_shares(rows: Array) -> bool:
    finite = rows[np.isfinite(rows).all(axis=1)]
    sums: Any = finite.astype(np.float64)
    return bool(len(sums) and (sums >= -1e-3).all() and (abs(sums.sum(axis=1) - 1) < 1e-2).all())


# --- which output is the class -----------------------------------------------------------------


def _pairs(given: Array, scores: Array) -> list[tuple[int | str, int]]:
    """What a row is given and the column of its highest score, where that clearly leads."""
    if scores.shape[1] < 2:
        return []
    first, second = np.partition(np.nan_to_num(scores), -2, axis=1)[:, [-1, -2]].T
    leads = np.isfinite(scores).all(axis=1) & (first - second > _LEAST_LEAD * abs(first))
    return list(zip(given[leads].tolist(), highest_columns(scores)[leads].tolist(), strict=True))


def _most_often(pairs: Sequence[tuple[int | str, int]]) -> dict[int | str, int]:
    """By value the column that more than half of its rows have."""
    columns: dict[int | str, Counter[int]] = {}
    for value, column in pairs:
        columns.setdefault(value, Counter())[column] += 1
    found = {}
    for value, counts in columns.items():
        ((column, rows),) = counts.most_common(1)
        if 2 * rows > counts.total():
            found[value] = column
    return found


def _share(pairs: Sequence[tuple[int | str, int]]) -> float:
    """How many rows a map of values to columns explains, if it is one to one over several."""
    most = _most_often(pairs)
    counts = Counter(column for _, column in pairs)
    several = sum(counts[column] >= LEAST_ROWS for column in most.values())
    if several < 2 or len(set(most.values())) < len(most):
        return 0.0
    return sum(most.get(value) == column for value, column in pairs) / len(pairs)


class _Deciding:
    """Looks for the class output of one model, whose scores are known."""

    def __init__(
        self, signature: Signature, file: ModelFile, scored: str, seen: Seen, asked: _Asked
    ) -> None:
        self._signature = signature
        self._width = len(signature.labels)
        self._path = file.path
        self._seen = seen
        self._scores = seen.scores.get(scored)
        self._asked = asked
        self._tables: dict[str, Table] = {}

    def best(self, specs: Sequence[TensorSpec]) -> _Candidate | None:
        if specs and not (self._asked.values and self._asked.given):
            self._tables = class_tables.class_tables(self._path, [spec.name for spec in specs])
        found = [one for spec in specs if (one := self._candidate(spec))]
        if self._asked.given and not found:
            raise self._asked.unknown(self._asked.given[0].name)
        return max(found, key=lambda one: one.rank, default=None)

    def _candidate(self, spec: TensorSpec) -> _Candidate | None:
        is_asked = bool(self._asked.given)
        if is_asked and self._asked.values:
            return self._of(spec, self._asked.values, 9, 1.0)
        given = self._seen.given.get(spec.name)
        if given is None and self._seen.given and not is_asked:
            return None  # its rows are not one value each
        pairs = (
            _pairs(given, self._scores) if given is not None and self._scores is not None else []
        )
        values = set() if given is None else set(given.tolist())
        is_label = is_asked or _plain_name(spec.name) in _LABEL
        may_be = is_label or _plain_name(spec.name) in _LIKE_A_LABEL
        for table in self._known_tables(spec):
            if not values <= set(table):
                continue
            share = self._agreement(pairs, table)
            if is_label or (
                share > 0.5 and (may_be or spec.datatype == "BYTES" or len(values) > 1)
            ):
                return self._of(spec, table, 3 if is_label else 2, share)
        if _share(pairs) == 1.0:
            return self._of(spec, self._followed(pairs), 3 if is_label else 2, 1.0)
        return self._by_name(spec, pairs, values) if may_be else None

    def _known_tables(self, spec: TensorSpec) -> Iterator[Table]:
        """What says what each column is called, the surest first."""
        text = spec.datatype == "BYTES"
        said = [self._tables.get(spec.name), self._signature.keys]
        if text:
            said.append(self._signature.labels)
        for table in said:
            is_whole = table and len(set(table)) == len(table) == self._width
            if table and is_whole and isinstance(table[0], str) is text:
                yield table

    def _agreement(self, pairs: Sequence[tuple[int | str, int]], table: Table) -> float:
        """How many rows have in the table the column of their highest score."""
        places = {value: column for column, value in enumerate(table)}
        return sum(places.get(value) == column for value, column in pairs) / max(len(pairs), 1)

    def _by_name(
        self, spec: TensorSpec, pairs: Sequence[tuple[int | str, int]], values: set[int | str]
    ) -> _Candidate | None:
        """An output called like the class, which does not always follow the highest score."""
        is_label = bool(self._asked.given) or _plain_name(spec.name) in _LABEL
        if len(values) == self._width:
            # Every library has its columns in ascending order of the classes.
            table = tuple(sorted(values, key=lambda value: (str(type(value)), value)))
            share = self._agreement(pairs, table)
            return self._of(spec, table, int(is_label), share) if is_label or share > 0.5 else None
        share = _share(pairs)
        if share <= 0.5:
            return None
        return self._of(spec, self._followed(pairs), int(is_label), share)

    def _followed(self, pairs: Sequence[tuple[int | str, int]]) -> Values:
        values: list[int | str | None] = [None] * self._width
        for value, column in _most_often(pairs).items():
            values[column] = value
        return tuple(values)

    def _of(self, spec: TensorSpec, values: Values, sureness: int, share: float) -> _Candidate:
        is_place = all(value in (None, at) for at, value in enumerate(values))
        return _Candidate(spec.name, () if is_place else values, (sureness, share))


def _plain_name(name: str) -> str:
    """`model/Label:0` as label."""
    words = [word for word in re.split(r"[/:]", name) if word and not word.isdigit()]
    return re.sub(r"[-. ]", "_", words[-1].lower()).rstrip("_0123456789") if words else ""
