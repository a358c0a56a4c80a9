"""How a labelled classifier tells its class: decided once, when the model is loaded."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

import msgspec
import numpy as np
from msgspec import Struct

from asyncinfer.engine.batch_probe import Run
from asyncinfer.engine.classes import probe, tables
from asyncinfer.engine.classes.configured import (
    Asked,
    may_be_class,
    may_be_misdeclared,
    may_be_scores,
    may_have_columns,
)
from asyncinfer.engine.classes.probe import LABEL, LEAST_ROWS, Seen, plain_name
from asyncinfer.engine.classes.tables import Shown, Table
from asyncinfer.models.folder import ModelFile
from asyncinfer.models.results import highest_columns
from asyncinfer.models.signature import Signature
from asyncinfer.tensors.datatypes import Array, Feeds, TensorSpec

Values: TypeAlias = tuple[int | str | None, ...]

_LEAST_LEAD: Final = 1e-5
"""By what share the highest score must lead for its row to tell anything: scores are rounded."""

_LIKE_A_LABEL: Final = frozenset(
    {
        *("class", "classes", "class_id", "class_index", "classindex", "classid", "labels"),
        *("predicted_class", "predicted", "prediction", "predictions", "pred", "preds"),
        *("y_pred", "yhat", "y_hat", "category", "winner", "argmax"),
    }
)
"""Names that the class may have, and other things too, such as a passenger's class."""

_SCORE_NAMES: Final = ("prob", "softmax", "score", "confidence", "logit")


_SURE: Final = 3
"""Its name, the graph or `model.toml` says that it is, and what its values mean."""
_SEEN: Final = 2
"""It was seen to have the classes that probe rows have."""
_CALLED: Final = 1
"""It has a name that the class may have, and what its values mean follows from the rows."""


class _Candidate(Struct, frozen=True):
    """An output that is the class, if a model calls its classes like this."""

    name: str
    values: Values
    sureness: int
    """Of several the highest is the class."""


def decided(
    signature: Signature, file: ModelFile, run: Run, example: Feeds | None, seconds: float
) -> Signature:
    """The signature with the outputs that results tell the class from.

    Raises ModelRefused where `model.toml` asks for what the model does not have.
    """
    asked = Asked(file, signature)
    if not signature.labels:
        return signature
    given = asked.given or [spec for spec in signature.outputs if may_be_class(spec)]

    def observe(scores: Sequence[TensorSpec]) -> Seen:
        return probe.observed(signature, scores, given, run, example, seconds)

    scores, seen = _observed(signature, asked, given, observe)
    asked.check_width(signature)
    if not scores:
        return signature
    if seen.several and not asked.given:
        return signature
    scored = _best_scores(scores, seen, signature, asked)
    found = _Deciding(signature, file, scored, seen, asked).best(given)
    asked.check_order(signature.keys, signature.labels)
    if found:
        asked.check_order(found.values or range(len(signature.labels)), signature.labels)
    return msgspec.structs.replace(
        signature,
        score_output=scored,
        class_output=found.name if found else "",
        class_values=found.values if found else (),
    )


def _observed(
    signature: Signature,
    asked: Asked,
    given: Sequence[TensorSpec],
    observe: Callable[[Sequence[TensorSpec]], Seen],
) -> tuple[Sequence[TensorSpec], Seen]:
    """The outputs that may have the scores, and what rows gave where those were needed.

    Raises ModelRefused where none has a column for each label.
    """
    specs = signature.outputs
    scores = asked.scores or [spec for spec in specs if may_be_scores(spec, signature)]
    is_declared = any(may_have_columns(spec, signature) for spec in specs)
    if not is_declared:
        scores = [spec for spec in specs if may_be_misdeclared(spec, signature)]
    several = probe.may_have_several(signature)
    is_clear = is_declared and len(scores) == 1 and not given and not several
    seen = Seen() if is_clear or not scores else observe(scores)
    has_columns = seen.scores or (is_declared and (seen.several or not seen.unfit))
    if not has_columns:
        raise asked.without_columns(seen.unfit)
    return scores, seen


# --- which output has the scores ---------------------------------------------------------------


def _best_scores(
    specs: Sequence[TensorSpec], seen: Seen, signature: Signature, asked: Asked
) -> str:
    """The output whose rows and name look most like scores; raises ModelRefused if two do."""
    fitting = [spec for spec in specs if not seen.scores or spec.name in seen.scores] or specs
    ranks = {spec.name: _score_rank(spec, seen, signature) for spec in fitting}
    first, *others = [name for name, rank in ranks.items() if rank == max(ranks.values())]
    for other in others:
        if first in seen.scores and _disagree(seen.scores[first], seen.scores[other]):
            raise asked.ambiguous([first, other])
    return first


def _score_rank(spec: TensorSpec, seen: Seen, signature: Signature) -> tuple[bool, bool, int, bool]:
    wants_logits = signature.scores == "logits"
    name, rows = spec.name.lower(), seen.scores.get(spec.name)
    places = [at for at, word in enumerate(_SCORE_NAMES) if word in name]
    is_kind = rows is not None and _are_shares(rows) != wants_logits
    is_followed = rows is not None and any(
        _follows(_pairs(given, rows)) for given in seen.given.values()
    )
    return (
        is_kind,
        wants_logits and "logit" in name,
        -min(places, default=len(_SCORE_NAMES)),
        is_followed,
    )


def _disagree(some: Array, others: Array) -> bool:
    """Whether several rows have their highest score in another column."""
    pairs = _pairs(highest_columns(some), others)
    return sum(mine != its for mine, its in pairs) >= LEAST_ROWS


def _are_shares(rows: Array) -> bool:
    finite = rows[np.isfinite(rows).all(axis=1)]
    sums: Any = finite.astype(np.float64)
    return bool(len(sums) and (sums >= -1e-3).all() and (abs(sums.sum(axis=1) - 1) < 1e-2).all())


def _are_distances(rows: Array) -> bool:
    """Whether these may be distances, as KMeans has them to its clusters: none is negative."""
    finite: Any = rows[np.isfinite(rows).all(axis=1)]
    return bool((finite >= 0).all() and (finite > 1).any()) and not _are_shares(rows)


# --- which output is the class -----------------------------------------------------------------


def _pairs(given: Array, scores: Array) -> list[tuple[int | str, int]]:
    """What a row is given and the column of its highest score, where that clearly leads."""
    if scores.shape[1] < 2:
        return []
    ordered: Any = np.sort(scores, axis=1)  # NaN comes last
    first, second = ordered[:, -1], ordered[:, -2]
    with np.errstate(invalid="ignore"):
        leads = np.isfinite(first) & (first - second > _LEAST_LEAD * abs(first))
    return list(zip(given[leads].tolist(), highest_columns(scores)[leads].tolist(), strict=True))


def _telling_pairs(given: Array, scores: Array, *, is_lowest: bool) -> list[tuple[int | str, int]]:
    """As `_pairs`; of distances with the column of the lowest, where the class is the nearest.

    Of two columns only the graph tells: one is the lowest where the other is the highest.
    """
    highest = _pairs(given, scores)
    if not _are_distances(scores):
        return highest
    lowest = _pairs(given, np.negative(scores))
    is_seen = scores.shape[1] > 2 and not _follows(highest) and _follows(lowest)
    return lowest if is_lowest or is_seen else highest


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


def _follows(pairs: Sequence[tuple[int | str, int]]) -> bool:
    """Whether values and columns are one to one, over two columns or more."""
    most = _most_often(pairs)
    return (
        all(most.get(value) == column for value, column in pairs)
        and len(set(most.values())) == len(most)
        and _mostly_agree(pairs, most)
    )


def _mostly_agree(pairs: Sequence[tuple[int | str, int]], columns: Mapping[int | str, int]) -> bool:
    """Whether the values mean these columns: for two columns or more, and for every one that
    several rows have, most of its rows have its value, and most rows of the value are its.

    Of all rows together most would agree where nearly all have one column and one value.
    """
    its_rows = Counter(column for _, column in pairs)
    of_value = Counter(columns.get(value) for value, _ in pairs)
    both = Counter(column for value, column in pairs if columns.get(value) == column)
    several = [column for column, rows in its_rows.items() if rows >= LEAST_ROWS]
    return len(several) > 1 and all(
        2 * both[column] > max(its_rows[column], of_value[column]) for column in several
    )


class _Deciding:
    """Looks for the class output of one model, whose scores are known."""

    def __init__(
        self, signature: Signature, file: ModelFile, scored: str, seen: Seen, asked: Asked
    ) -> None:
        self._signature = signature
        self._width = len(signature.labels)
        self._path = file.path
        self._seen = seen
        self._scored = scored
        self._scores = seen.scores.get(scored)
        self._asked = asked
        self._shown: dict[str, Shown] = {}

    def best(self, specs: Sequence[TensorSpec]) -> _Candidate | None:
        if specs and not (self._asked.values and self._asked.given):
            names = [spec.name for spec in specs]
            self._shown = tables.class_tables(self._path, names, self._scored)
        found = [one for spec in specs if (one := self._candidate(spec))]
        if self._asked.given and not found:
            raise self._asked.unknown(self._asked.given[0].name)
        # Of the labels of two heads, both called so, the one that belongs to these scores.
        return max(found, key=lambda one: (one.sureness, self._agreement(one)), default=None)

    def _agreement(self, candidate: _Candidate) -> float:
        """In what share of the probe rows it means the column of the highest score."""
        pairs = self._pairs_of(candidate.name)
        columns = {value: at for at, value in enumerate(candidate.values or range(self._width))}
        return sum(columns.get(value) == column for value, column in pairs) / max(len(pairs), 1)

    def _pairs_of(self, name: str) -> list[tuple[int | str, int]]:
        given, shown = self._seen.given.get(name), self._shown.get(name)
        if given is None or self._scores is None:
            return []
        return _telling_pairs(given, self._scores, is_lowest=bool(shown and shown.is_lowest))

    def _candidate(self, spec: TensorSpec) -> _Candidate | None:
        is_asked = bool(self._asked.given)
        if is_asked and self._asked.values:
            return _of(spec, self._asked.values, _SURE)
        given = self._seen.given.get(spec.name)
        if given is None and self._seen.given and not is_asked:
            return None  # its rows have not one value each
        pairs = self._pairs_of(spec.name)
        values = set() if given is None else set(given.tolist())
        shown = self._shown.get(spec.name)
        is_label = is_asked or plain_name(spec.name) in LABEL or bool(shown and shown.is_only)
        return (
            self._by_table(spec, pairs, values, is_label)
            or self._by_following(spec, pairs, is_label)
            or self._by_name(spec, pairs, values, is_label)
        )

    def _by_table(
        self,
        spec: TensorSpec,
        pairs: Sequence[tuple[int | str, int]],
        values: set[int | str],
        is_label: bool,
    ) -> _Candidate | None:
        for table in self._known_tables(spec):
            columns = {value: column for column, value in enumerate(table)}
            if values <= columns.keys() and (is_label or _mostly_agree(pairs, columns)):
                return _of(spec, table, _SURE if is_label else _SEEN)
        return None

    def _known_tables(self, spec: TensorSpec) -> Iterator[Table]:
        """What says what each column is called, the surest first."""
        is_text = spec.datatype == "BYTES"
        shown = self._shown.get(spec.name)
        said = [shown.table if shown else (), self._signature.keys]
        if shown and shown.is_lowest:  # of a cluster's label: the scores are distances
            said.append(tuple(range(self._width)))
        if is_text:
            said.append(self._signature.labels)
        for table in said:
            is_whole = len(set(table)) == len(table) == self._width
            if is_whole and isinstance(table[0], str) is is_text:
                yield table

    def _by_following(
        self, spec: TensorSpec, pairs: Sequence[tuple[int | str, int]], is_label: bool
    ) -> _Candidate | None:
        if not _follows(pairs):
            return None
        values = self._most_often(pairs)
        if values == (1, 0) and not is_label:
            return None  # the place of the lowest of two scores, or of the second best
        return _of(spec, values, _SURE if is_label else _SEEN)

    def _by_name(
        self,
        spec: TensorSpec,
        pairs: Sequence[tuple[int | str, int]],
        values: set[int | str],
        is_label: bool,
    ) -> _Candidate | None:
        """An output called like the class, though it does not always follow the highest score."""
        if not is_label and plain_name(spec.name) not in _LIKE_A_LABEL:
            return None
        most = _most_often(pairs)
        if is_label and len(values) == self._width:
            table = _ascending(values)
            columns = {value: column for column, value in enumerate(table)}
            if most.items() <= columns.items() or len(set(most.values())) < len(most):
                return _of(spec, table, _SURE)
        if len(set(most.values())) < len(most) or not _mostly_agree(pairs, most):
            return None
        found = self._most_often(pairs)
        known = tuple(value for value in found if value is not None)
        if not is_label and known != _ascending(known):
            return None
        return _of(spec, found, _SURE if is_label else _CALLED)

    def _most_often(self, pairs: Sequence[tuple[int | str, int]]) -> Values:
        values: list[int | str | None] = [None] * self._width
        for value, column in _most_often(pairs).items():
            values[column] = value
        return tuple(values)


def _ascending(values: Iterable[int | str]) -> Table:
    """As every library has its columns."""
    return tuple(sorted(values, key=lambda value: (isinstance(value, str), value)))


def _of(spec: TensorSpec, values: Values, sureness: int) -> _Candidate:
    is_place = all(value in (None, at) for at, value in enumerate(values))
    return _Candidate(spec.name, () if is_place else values, sureness)
