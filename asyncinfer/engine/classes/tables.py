"""The table of classes of an output, by column, read from the nodes of the graph that make it.

Converters of scikit-learn, LightGBM, XGBoost and CatBoost write it into the attributes of a
classifier, or into a constant in which the number of the highest score is looked up.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Final, TypeAlias

from msgspec import Struct

from asyncinfer.models import onnx_graph
from asyncinfer.models.onnx_file import DamagedFile, mapped
from asyncinfer.models.onnx_graph import Graph, Node, Span

Table: TypeAlias = tuple[int | str, ...]

_MAX_STEPS: Final = 32
_MAX_TABLE_BYTES: Final = 1 << 20
_MAX_TOTAL_BYTES: Final = 4 << 20
"""Of all tables that are read for one model, which takes a second or two."""

_PASS_THROUGH: Final = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_CLASSIFIERS: Final = frozenset({"LinearClassifier", "SVMClassifier", "TreeEnsembleClassifier"})
_LOOKUPS: Final = frozenset({"ArrayFeatureExtractor", "Gather"})


class ClassTable(Struct, frozen=True):
    """What a graph shows of an output that may be the class."""

    table: Table
    """By column the value of the output; empty if it is unknown."""
    is_only: bool
    """Whether the output is the label of the only classifier node, and the scores are of that node
    too. Of two heads one may be a classifier, and the scores may be the other's."""
    is_lowest: bool = False
    """Whether the output is the number of the lowest column, as KMeans picks the least distance."""


def class_tables(
    path: Path, graph: Graph, names: Collection[str], score_output: str
) -> dict[str, ClassTable]:
    """The tables of the outputs `names`, by output; outputs without one are left out.
    `score_output` is the output with the scores, and `graph` that of the file, whose constants are
    read. Never raises: a damaged file has no tables."""
    try:
        with mapped(path) as content:
            finder = _TableFinder(graph, content)
            found = {name: finder.class_table(name, score_output) for name in names}
    except (OSError, ValueError, IndexError):  # damaged, or replaced since the graph was read
        return {}
    return {name: class_table for name, class_table in found.items() if class_table}


class _TableFinder:
    """Finds the tables of one graph; its methods raise a ValueError if the file is damaged or there
    is too much to read."""

    def __init__(self, graph: Graph, content: memoryview) -> None:
        self._content = content
        self._table_bytes = 0
        self._makers = {name: node for node in graph.nodes for name in node.outputs}
        self._classifiers = [node for node in graph.nodes if node.operator in _CLASSIFIERS]
        self._constants = {
            name: tensor.span
            for name, tensor in graph.initializers.items()
            if tensor.span[1] - tensor.span[0] <= _MAX_TABLE_BYTES
        }

    def class_table(self, name: str, score_output: str) -> ClassTable | None:
        """The table of an output; None if the graph shows neither a table nor that it is the lowest
        column."""
        table, is_label = self._table(name, _MAX_STEPS)
        is_lowest = self._is_lowest(name)
        if not table and not is_lowest:
            return None
        is_only = is_label and self._has_only_classifier(score_output)
        return ClassTable(table, is_only, is_lowest)

    def _has_only_classifier(self, score_output: str) -> bool:
        """Whether the graph has one classifier node, and this output depends on it."""
        if len(self._classifiers) != 1:
            return False
        (classifier,) = self._classifiers
        pending, known = [score_output], {score_output}
        while pending:
            node = self._makers.get(pending.pop())
            if node is classifier:
                return True
            new = set(node.inputs) - known if node else set()
            pending += new
            known |= new
        return False

    def _is_lowest(self, name: str) -> bool:
        """Whether this output is the number of the lowest of several numbers."""
        for _ in range(_MAX_STEPS):
            node = self._makers.get(name)
            if node is None or len(node.inputs) < (2 if node.operator in _LOOKUPS else 1):
                return False
            if node.operator == "TopK":
                return name in node.outputs[1:] and node.integers.get("largest") == 0
            if node.operator not in _LOOKUPS | _PASS_THROUGH | {"LabelEncoder"}:
                return node.operator == "ArgMin"
            name = node.inputs[node.operator in _LOOKUPS]
        return False

    def _table(self, name: str, steps: int) -> tuple[Table, bool]:
        """The table of the node that makes this value, empty if it is unknown, and whether that
        node is a classifier. Follows at most `steps` nodes."""
        for step in range(steps):
            node = self._makers.get(name)
            if node is None or not node.inputs:
                break
            if node.operator in _CLASSIFIERS and node.outputs[0] == name:
                return self._attribute(node, "classlabels_"), True
            if node.operator in _LOOKUPS and node.inputs[0] in self._constants:
                span = self._constants[node.inputs[0]]
                self._count_bytes(span)
                return onnx_graph.tensor_values(self._content, span), False
            if node.operator == "LabelEncoder":
                return self._encoded_table(node, steps - step - 1)
            if node.operator not in _PASS_THROUGH:
                break
            name = node.inputs[0]
        return (), False

    def _encoded_table(self, node: Node, steps: int) -> tuple[Table, bool]:
        """The table of a LabelEncoder: its input's table, with each entry encoded; empty if an
        entry cannot be encoded. Second, whether it is of a classifier."""
        keys, values = self._attribute(node, "keys_"), self._attribute(node, "values_")
        if not keys or not values or len(keys) != len(values):
            return (), False
        names = dict(zip(keys, values, strict=True))
        before, is_label = self._table(node.inputs[0], steps)
        before = before or tuple(range(len(keys)))
        is_known = set(before) <= names.keys()
        return tuple(names[value] for value in before) if is_known else (), is_label

    def _attribute(self, node: Node, prefix: str) -> Table:
        """The whole numbers, else the strings, of the first attribute with any whose name begins
        with `prefix`; empty if there are none."""
        for span in node.attributes:
            if onnx_graph.attribute_name(self._content, span).startswith(prefix):
                self._count_bytes(span)
                if found := onnx_graph.attribute_values(self._content, span):
                    return found
        return ()

    def _count_bytes(self, span: Span) -> None:
        """Adds to the bytes read so far; raises DamagedFile if they are too many."""
        self._table_bytes += span[1] - span[0]
        if self._table_bytes > _MAX_TOTAL_BYTES:
            raise DamagedFile("too many classes to look at")
