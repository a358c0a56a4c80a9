"""The outputs from which results read the class of a labelled classifier; chosen at load."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeAlias

import msgspec
import numpy as np
from msgspec import Struct

from asyncinfer.engine.batch_probe import RunFunction
from asyncinfer.engine.classes import probe
from asyncinfer.engine.classes.configured import (
    ClassConfig,
    may_be_class,
    may_be_misdeclared,
    may_be_scores,
    may_have_columns,
)
from asyncinfer.engine.classes.probe import LABEL_NAMES, MIN_ROWS, ProbeAnswers, plain_name
from asyncinfer.engine.classes.tables import ClassTable, Table, class_tables
from asyncinfer.models.folder import ModelFile
from asyncinfer.models.onnx_graph import Graph
from asyncinfer.models.results import highest_columns
from asyncinfer.models.signature import Signature
from asyncinfer.tensors.datatypes import Array, Feeds, TensorSpec

Values: TypeAlias = tuple[int | str | None, ...]
"""By column the value that stands for its class; None where it is unknown."""

Pairs: TypeAlias = Sequence[tuple[int | str, int]]
"""(value, column) of each row: the value of an output, and the column of the row's best score."""

_MIN_LEAD: Final = 1e-5
"""By what share the highest score must lead for its row to count: scores are rounded."""

_POSSIBLE_LABEL_NAMES: Final = frozenset(
    {
        *("class", "classes", "class_id", "class_index", "classindex", "classid", "labels"),
        *("predicted_class", "predicted", "prediction", "predictions", "pred", "preds"),
        *("y_pred", "yhat", "y_hat", "category", "winner", "argmax"),
    }
)
"""Names that the class may have, and other things too, such as a passenger's class."""

_SCORE_NAMES: Final = ("prob", "softmax", "score", "confidence", "logit")
"""Parts of names of scores, the likeliest first."""

_KNOWN: Final = 3
"""Its name, the graph or `model.toml` says that it is the class, and what its values mean."""
_OBSERVED: Final = 2
"""In the probe rows it had the class of the highest score."""
_NAMED: Final = 1
"""It has a name that the class may have, and the probe rows show what its values mean."""


class _Candidate(Struct, frozen=True):
    """An output that may be the class, and what its values mean."""

    name: str
    values: Values
    """By column the value of the class; empty if the value is the number of the column."""
    sureness: int
    """Of several candidates the highest is the class."""


def with_class_outputs(
    signature: Signature,
    file: ModelFile,
    graph: Graph | None,
    run: RunFunction,
    example: Feeds | None,
    seconds: float,
) -> Signature:
    """The signature with the names of the outputs that are the scores and the class, and what the
    values of the class mean; unchanged without labels. Runs made-up rows, for at most `seconds`.
    `graph` is that of the file, None if it was too large to be read.

    Raises ModelRefused if `model.toml` asks for what the model does not have.
    """
    config = ClassConfig(file, signature)
    if not signature.labels:
        return signature
    class_specs = config.class_outputs or [spec for spec in signature.outputs if may_be_class(spec)]
    observe = partial(probe.observe, signature, class_specs, run, example, seconds)
    scores, answers = _observe_scores(signature, config, class_specs, observe)
    config.check_width(signature)
    if not scores:
        return signature
    if answers.is_multilabel and not config.class_outputs:
        return signature
    score_output = _best_scores(scores, answers, signature, config)
    names = [spec.name for spec in class_specs]
    tables = class_tables(file.path, graph, names, score_output) if graph else {}
    found = _ClassFinder(signature, score_output, answers, config, tables).best(class_specs)
    config.check_order(signature.keys, signature.labels)
    if found:
        config.check_order(found.values or range(len(signature.labels)), signature.labels)
    return msgspec.structs.replace(
        signature,
        score_output=score_output,
        class_output=found.name if found else "",
        class_values=found.values if found else (),
    )


def _observe_scores(
    signature: Signature,
    config: ClassConfig,
    class_specs: Sequence[TensorSpec],
    observe: Callable[[Sequence[TensorSpec]], ProbeAnswers],
) -> tuple[Sequence[TensorSpec], ProbeAnswers]:
    """The outputs that may be the scores, empty if there are none, and the answers of made-up rows,
    which are run (by `observe`) only if they are needed to choose.

    Raises ModelRefused if no output has a column for each label.
    """
    specs = signature.outputs
    scores = config.score_outputs or [spec for spec in specs if may_be_scores(spec, signature)]
    is_declared = any(may_have_columns(spec, signature) for spec in specs)
    if not is_declared:
        scores = [spec for spec in specs if may_be_misdeclared(spec, signature)]
    is_multilabel = any(map(probe.may_be_multilabel, specs))
    is_clear = is_declared and len(scores) == 1 and not class_specs and not is_multilabel
    answers = ProbeAnswers() if is_clear or not scores else observe(scores)
    has_columns = answers.scores or (is_declared and (answers.is_multilabel or not answers.unfit))
    if not has_columns:
        raise config.missing_columns_error(answers.unfit)
    return scores, answers


# --- which output has the scores ---------------------------------------------------------------


def _best_scores(
    specs: Sequence[TensorSpec], answers: ProbeAnswers, signature: Signature, config: ClassConfig
) -> str:
    """The name of the output among `specs`, which must not be empty, whose rows and name look most
    like scores; raises ModelRefused if two look alike and disagree."""
    fitting = [spec for spec in specs if not answers.scores or spec.name in answers.scores] or specs
    ranks = {spec.name: _score_rank(spec, answers, signature) for spec in fitting}
    first, *others = [name for name, rank in ranks.items() if rank == max(ranks.values())]
    for other in others:
        if first in answers.scores and _disagree(answers.scores[first], answers.scores[other]):
            raise config.error(
                f"labels: `{first}` and `{other}` have a column for each and disagree; name the "
                "one that they are for as score_output"
            )
    return first


def _score_rank(
    spec: TensorSpec, answers: ProbeAnswers, signature: Signature
) -> tuple[bool, bool, int, bool]:
    """Sort key, the highest is the best: probabilities or logits as configured, then the name, then
    whether a possible class output goes with these scores."""
    wants_logits = signature.scores == "logits"
    name, rows = spec.name.lower(), answers.scores.get(spec.name)
    places = [at for at, word in enumerate(_SCORE_NAMES) if word in name]
    is_wanted_kind = rows is not None and _are_probabilities(rows) != wants_logits
    goes_with_class = rows is not None and any(
        _is_one_to_one(_value_column_pairs(values, rows)) for values in answers.classes.values()
    )
    return (
        is_wanted_kind,
        wants_logits and "logit" in name,
        -min(places, default=len(_SCORE_NAMES)),
        goes_with_class,
    )


def _disagree(first: Array, second: Array) -> bool:
    """Whether several rows have their clear highest score in another column of the second scores
    than of the first. Both have shape (rows, labels)."""
    pairs = _value_column_pairs(highest_columns(first), second)
    return sum(column != other for column, other in pairs) >= MIN_ROWS


def _are_probabilities(rows: Array) -> bool:
    """Whether no score is negative and each row adds up to 1; rows with NaN are left out."""
    finite = rows[np.isfinite(rows).all(axis=1)]
    sums: Any = finite.astype(np.float64)
    return bool(len(sums) and (sums >= -1e-3).all() and (abs(sums.sum(axis=1) - 1) < 1e-2).all())


def _may_be_distances(rows: Array) -> bool:
    """Whether the scores may be distances, as KMeans gives them to its clusters: none is negative,
    some are above 1, and rows do not add up to 1."""
    finite: Any = rows[np.isfinite(rows).all(axis=1)]
    return bool((finite >= 0).all() and (finite > 1).any()) and not _are_probabilities(rows)


# --- which output is the class -----------------------------------------------------------------


def _value_column_pairs(values: Array, scores: Array) -> Pairs:
    """For each row its value and the column of its highest score: `values` has one value for each
    row of the matrix `scores`. Rows without a clear highest score are left out; empty for fewer
    than two columns."""
    if scores.shape[1] < 2:
        return []
    ordered: Any = np.sort(scores, axis=1)  # NaN comes last
    first, second = ordered[:, -1], ordered[:, -2]
    with np.errstate(invalid="ignore"):
        leads = np.isfinite(first) & (first - second > _MIN_LEAD * abs(first))
    return list(zip(values[leads].tolist(), highest_columns(scores)[leads].tolist(), strict=True))


def _class_pairs(values: Array, scores: Array, *, is_lowest: bool) -> Pairs:
    """As `_value_column_pairs`, but for distances, where the class is the nearest, with the column
    of the lowest. `is_lowest`: the graph shows that the class is the nearest.

    Of two columns only the graph can show it: one is the lowest where the other is the highest.
    """
    highest = _value_column_pairs(values, scores)
    if not _may_be_distances(scores):
        return highest
    lowest = _value_column_pairs(values, np.negative(scores))
    is_seen = scores.shape[1] > 2 and not _is_one_to_one(highest) and _is_one_to_one(lowest)
    return lowest if is_lowest or is_seen else highest


def _majority_columns(pairs: Pairs) -> dict[int | str, int]:
    """By value the column of more than half of its rows; other values are left out."""
    columns: dict[int | str, Counter[int]] = {}
    for value, column in pairs:
        columns.setdefault(value, Counter())[column] += 1
    majority = {}
    for value, counts in columns.items():
        ((column, rows),) = counts.most_common(1)
        if 2 * rows > counts.total():
            majority[value] = column
    return majority


def _is_one_to_one(pairs: Pairs) -> bool:
    """Whether each value has one column and each column one value, over two columns or more."""
    majority = _majority_columns(pairs)
    return (
        all(majority.get(value) == column for value, column in pairs)
        and len(set(majority.values())) == len(majority)
        and _mostly_agree(pairs, majority)
    )


def _mostly_agree(pairs: Pairs, columns: Mapping[int | str, int]) -> bool:
    """Whether the values stand for these columns: in two columns or more that have several rows,
    and in all such columns, most rows of the column have its value and most rows with the value
    have the column.

    Counted by column, since of all rows together most would agree if nearly all have one column and
    one value.
    """
    column_rows = Counter(column for _, column in pairs)
    value_rows = Counter(columns.get(value) for value, _ in pairs)
    agreeing = Counter(column for value, column in pairs if columns.get(value) == column)
    tested = [column for column, rows in column_rows.items() if rows >= MIN_ROWS]
    return len(tested) > 1 and all(
        2 * agreeing[column] > max(column_rows[column], value_rows[column]) for column in tested
    )


class _ClassFinder:
    """Finds the class output of one model, whose scores are known; call `best` once."""

    def __init__(
        self,
        signature: Signature,
        score_output: str,
        answers: ProbeAnswers,
        config: ClassConfig,
        tables: Mapping[str, ClassTable],
    ) -> None:
        self._signature = signature
        self._width = len(signature.labels)
        self._answers = answers
        self._scores = answers.scores.get(score_output)
        self._config = config
        self._tables = tables
        """By output what the graph shows of it."""

    def best(self, specs: Sequence[TensorSpec]) -> _Candidate | None:
        """The most certain of these outputs, None if none is the class. Raises ModelRefused if
        `model.toml` names an output whose values are unknown."""
        candidates = [candidate for spec in specs if (candidate := self._candidate(spec))]
        if self._config.class_outputs and not candidates:
            raise self._config.error(
                f"class_output: which value of `{self._config.class_outputs[0].name}` means which "
                "column of the scores is not known from the graph or from probe rows; give "
                "`classes`, a value for each label in their order"
            )
        # If two heads have labels of the same kind, the one that agrees with these scores.
        return max(
            candidates,
            key=lambda candidate: (candidate.sureness, self._agreement(candidate)),
            default=None,
        )

    def _agreement(self, candidate: _Candidate) -> float:
        """The share, 0 to 1, of the probe rows in which the class is the column of the highest
        score; 0 without such rows."""
        pairs = self._pairs_of(candidate.name)
        columns = {value: at for at, value in enumerate(candidate.values or range(self._width))}
        return sum(columns.get(value) == column for value, column in pairs) / max(len(pairs), 1)

    def _pairs_of(self, name: str) -> Pairs:
        """The pairs of an output's values and the columns of the scores; empty without probe
        rows."""
        values, table = self._answers.classes.get(name), self._tables.get(name)
        if values is None or self._scores is None:
            return []
        return _class_pairs(values, self._scores, is_lowest=bool(table and table.is_lowest))

    def _candidate(self, spec: TensorSpec) -> _Candidate | None:
        """The output as a candidate by the first of: `model.toml`, a table of classes, values that
        go with the scores, its name. None if it is not the class by any."""
        is_configured = bool(self._config.class_outputs)
        if is_configured and self._config.values:
            return _candidate_of(spec, self._config.values, _KNOWN)
        answers = self._answers.classes.get(spec.name)
        if answers is None and self._answers.classes and not is_configured:
            return None  # it does not have one value for each row
        pairs = self._pairs_of(spec.name)
        values = set() if answers is None else set(answers.tolist())
        table = self._tables.get(spec.name)
        is_label = (
            is_configured or plain_name(spec.name) in LABEL_NAMES or bool(table and table.is_only)
        )
        return (
            self._by_table(spec, pairs, values, is_label)
            or self._by_scores(spec, pairs, is_label)
            or self._by_name(spec, pairs, values, is_label)
        )

    def _by_table(
        self, spec: TensorSpec, pairs: Pairs, values: set[int | str], is_label: bool
    ) -> _Candidate | None:
        """The output as a candidate if a known table has all its values and, unless it is surely a
        label, they mostly agree with the scores."""
        for table in self._known_tables(spec):
            columns = {value: column for column, value in enumerate(table)}
            if values <= columns.keys() and (is_label or _mostly_agree(pairs, columns)):
                return _candidate_of(spec, table, _KNOWN if is_label else _OBSERVED)
        return None

    def _known_tables(self, spec: TensorSpec) -> Iterator[Table]:
        """The tables that may tell which value stands for which column, the most certain first."""
        is_text = spec.datatype == "BYTES"
        class_table = self._tables.get(spec.name)
        possible = [class_table.table if class_table else (), self._signature.keys]
        if class_table and class_table.is_lowest:  # the label of a cluster: scores are distances
            possible.append(tuple(range(self._width)))
        if is_text:
            possible.append(self._signature.labels)
        for table in possible:
            is_complete = len(set(table)) == len(table) == self._width
            if is_complete and isinstance(table[0], str) is is_text:
                yield table

    def _by_scores(self, spec: TensorSpec, pairs: Pairs, is_label: bool) -> _Candidate | None:
        """The output as a candidate if its values and the columns of the scores are one to one."""
        if not _is_one_to_one(pairs):
            return None
        values = self._values_by_column(pairs)
        if values == (1, 0) and not is_label:
            return None  # the number of the lower of two scores, or of the second best
        return _candidate_of(spec, values, _KNOWN if is_label else _OBSERVED)

    def _by_name(
        self, spec: TensorSpec, pairs: Pairs, values: set[int | str], is_label: bool
    ) -> _Candidate | None:
        """The output as a candidate by its name, though it is not always the class of the highest
        score; its values must mostly agree with the scores, or be as many as the labels."""
        if not is_label and plain_name(spec.name) not in _POSSIBLE_LABEL_NAMES:
            return None
        majority = _majority_columns(pairs)
        if is_label and len(values) == self._width:
            table = _ascending(values)
            columns = {value: column for column, value in enumerate(table)}
            if majority.items() <= columns.items() or len(set(majority.values())) < len(majority):
                return _candidate_of(spec, table, _KNOWN)
        if len(set(majority.values())) < len(majority) or not _mostly_agree(pairs, majority):
            return None
        by_column = self._values_by_column(pairs)
        known = tuple(value for value in by_column if value is not None)
        if not is_label and known != _ascending(known):
            return None
        return _candidate_of(spec, by_column, _KNOWN if is_label else _NAMED)

    def _values_by_column(self, pairs: Pairs) -> Values:
        """By column the value whose rows mostly have this column; None if there is none."""
        values: list[int | str | None] = [None] * self._width
        for value, column in _majority_columns(pairs).items():
            values[column] = value
        return tuple(values)


def _ascending(values: Iterable[int | str]) -> Table:
    """The values in the order of columns that all libraries use: numbers first, then strings."""
    return tuple(sorted(values, key=lambda value: (isinstance(value, str), value)))


def _candidate_of(spec: TensorSpec, values: Values, sureness: int) -> _Candidate:
    """Makes a candidate; its values are left out if each is the number of its column."""
    is_column_number = all(value in (None, at) for at, value in enumerate(values))
    return _Candidate(spec.name, () if is_column_number else values, sureness)
