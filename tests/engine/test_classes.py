"""The class of a classifier: named only where it is known, whatever other outputs there are."""

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from asyncinfer.engine import Engine, Stop
from asyncinfer.engine.classes.tables import class_tables
from asyncinfer.errors import ModelRefused
from asyncinfer.models import onnx_graph
from asyncinfer.models.folder import scan
from tests import zoo
from tests.models.single_result import render_result

FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64
BOOL, STRING = TensorProto.BOOL, TensorProto.STRING
ABC = 'labels = ["a", "b", "c"]\n'
node = helper.make_node

WEIGHTS: zoo.Weights = {
    "one": np.array(1),
    "ones": np.array([1]),
    "half": np.array(0.5, np.float32),
    "limit": np.array(0.9, np.float32),
    "far": np.array(1e6, np.float32),
    "last": np.array([2]),
    "from_ten": np.array([10, 20, 30]),
    "turned": np.array([7, -2, 4]),
    "passengers": np.array([1, 2, 3]),
    "few": np.array([3, 3, 3]),
    "words": np.array(["x", "y", "z"], object),
    "other": np.array(["b", "c", "a"], object),
    "mix": np.array([[0.3, -1, 0.2], [1, 0.1, -0.7], [-0.4, 0.6, 1]], np.float32),
}


def three_column_model(
    nodes: Sequence[onnx.NodeProto], *outputs: tuple[str, Sequence[Any], int]
) -> Any:
    """A model with the input `x` of three columns, these outputs, and the `WEIGHTS` that a node
    reads."""
    read = {name for reader in nodes for name in reader.input}
    output_values = [zoo.tensor(name, shape, kind) for name, shape, kind in outputs]
    weights = {name: value for name, value in WEIGHTS.items() if name in read}
    return zoo.model(nodes, [zoo.tensor("x", ["b", 3])], output_values, weights)


def load(folder: Path, made: Any, toml: str = ABC) -> Engine:
    zoo.place(folder, "m", made, toml=toml)
    (file,) = scan(folder)
    return Engine.load(file, intra_op_threads=1)


def render_rows(engine: Engine, rows: Any) -> list[Any]:
    outputs = engine.run({"x": np.array(rows, np.float32)}, Stop())
    result = json.loads(render_result(outputs, engine.signature))
    return result if isinstance(result, list) else [result]


def class_names(engine: Engine, rows: Any) -> list[Any]:
    results = render_rows(engine, rows)
    for row in results:
        assert row["class_name"] == engine.signature.labels[row["prediction"]]
    return [row["class_name"] for row in results]


SCORES = ("p", ["b", 3], FLOAT)
SCORED = [node("Softmax", ["x"], ["p"], axis=1)]
TOP = [node("ArgMax", ["x"], ["top"], axis=1, keepdims=0)]
ROWS = [[9, 1, 0], [0, 5, 1], [1, 2, 3], [-1, -5, -2], [0, 0, 0.5]]
NAMES = ["a", "b", "c", "a", "c"]


def with_scores(*nodes: onnx.NodeProto) -> list[onnx.NodeProto]:
    return [*SCORED, *TOP, *nodes]


# --- not the class -----------------------------------------------------------------------------

OVER = [node("Greater", ["x", "half"], ["over"])]
COUNT = [*OVER, node("Cast", ["over"], ["each"], to=INT64)]
OTHERS: dict[str, tuple[list[onnx.NodeProto], tuple[str, Sequence[Any], int]]] = {
    "a count": (
        [*COUNT, node("ReduceSum", ["each", "ones"], ["n"], keepdims=0)],
        ("n", ["b"], INT64),
    ),
    "a count as a column": (
        [*COUNT, node("ReduceSum", ["each", "ones"], ["n"], keepdims=1)],
        ("n", ["b", 1], INT64),
    ),
    "a count of another type": (
        [
            *OVER,
            node("Cast", ["over"], ["each"], to=INT32),
            node("ReduceSum", ["each", "ones"], ["n"], keepdims=0),
        ],
        ("n", ["b"], INT32),
    ),
    "a flag": (
        [
            node("Gather", ["x", "one"], ["second"], axis=1),
            node("Greater", ["second", "half"], ["flag"]),
        ],
        ("flag", ["b"], BOOL),
    ),
    "the same for every row": (
        [node("Mul", ["top", "one"], ["t"]), node("Sub", ["t", "t"], ["zero"])],
        ("zero", ["b"], INT64),
    ),
    "the place of the lowest score": (
        [node("ArgMin", ["x"], ["low"], axis=1, keepdims=0)],
        ("low", ["b"], INT64),
    ),
    "words that are labels": (
        [node("ArgMin", ["x"], ["at"], axis=1), node("Gather", ["other", "at"], ["runner_up"])],
        ("runner_up", ["b", 1], STRING),
    ),
    "a passenger's class": (
        [
            node("ArgMin", ["x"], ["at"], axis=1, keepdims=0),
            node("Gather", ["passengers", "at"], ["class"]),
        ],
        ("class", ["b"], INT64),
    ),
    "two numbers a row": (
        [node("TopK", ["x", "last"], ["values", "indices"])],
        ("indices", ["b", 2], INT64),
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_whole_numbers_beside_the_scores_are_not_the_class(tmp_path: Path, what: str) -> None:
    nodes, output = OTHERS[what]
    engine = load(tmp_path, three_column_model(with_scores(*nodes), output, SCORES))

    assert class_names(engine, ROWS) == NAMES
    assert engine.signature.class_output == ""


@pytest.mark.parametrize("what", ["a count", "the place of the lowest score"])
def test_whole_numbers_beside_zipmap_with_the_same_keys_are_not_the_class(
    tmp_path: Path, what: str
) -> None:
    nodes, output = OTHERS[what]
    kind = helper.make_map_type_proto(INT64, helper.make_tensor_type_proto(FLOAT, []))
    maps = node("ZipMap", ["p"], ["maps"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2])
    made = three_column_model(with_scores(*nodes, maps), output)
    made.graph.output.append(helper.make_value_info("maps", helper.make_sequence_type_proto(kind)))

    engine = load(tmp_path, made, ABC)

    assert class_names(engine, ROWS) == NAMES


def test_a_hard_threshold_that_nobody_calls_a_class_is_none(tmp_path: Path) -> None:
    nodes = [
        node("Gather", ["p", "one"], ["second"], axis=1),
        node("Greater", ["second", "limit"], ["over"]),
        node("Cast", ["over"], ["alarm"], to=INT64),
    ]
    engine = load(
        tmp_path, three_column_model(with_scores(*nodes), ("alarm", ["b"], INT64), SCORES)
    )

    assert class_names(engine, [[0, 1, 0], [0, 9, 0]]) == ["b", "b"]


# --- the class ---------------------------------------------------------------------------------

LAST_OF_EQUAL = [node("ArgMax", ["x"], ["last_top"], axis=1, keepdims=0, select_last_index=1)]


@pytest.mark.parametrize(
    ("nodes", "output"),
    [
        ([], ("last_top", ["b"], INT64)),
        ([node("Unsqueeze", ["last_top", "ones"], ["y"])], ("y", ["b", 1], INT64)),
        ([node("Cast", ["last_top"], ["y"], to=INT32)], ("y", ["b"], INT32)),
        (
            [node("Cast", ["last_top"], ["y"], to=TensorProto.UINT8)],
            ("y", ["b"], TensorProto.UINT8),
        ),
        ([node("Add", ["last_top", "one"], ["y"])], ("y", ["b"], INT64)),
        ([node("Neg", ["last_top"], ["y"])], ("y", ["b"], INT64)),
        ([node("Gather", ["from_ten", "last_top"], ["y"])], ("y", ["b"], INT64)),
        ([node("Gather", ["turned", "last_top"], ["y"])], ("y", ["b"], INT64)),
        ([node("Gather", ["words", "last_top"], ["y"])], ("y", ["b"], STRING)),
        ([node("Gather", ["turned", "last_top"], ["label"])], ("label", ["b"], INT64)),
    ],
)
def test_what_follows_the_scores_is_the_class_whatever_numbers_it_has(
    tmp_path: Path, nodes: Sequence[Any], output: Any
) -> None:
    others, other = OTHERS["the place of the lowest score"]
    made = three_column_model(with_scores(*LAST_OF_EQUAL, *others, *nodes), other, output, SCORES)

    engine = load(tmp_path, made)

    assert class_names(engine, ROWS) == NAMES
    # Of equal scores it says which: that is how it can be seen to be the class.
    assert class_names(engine, [[1, 1, 0], [0, 2, 2], [3, 0, 3]]) == ["b", "c", "c"]


def test_a_value_that_no_probe_row_had_is_the_class_of_the_highest_score(tmp_path: Path) -> None:
    nodes = [
        node("Greater", ["x", "far"], ["is_far"]),
        node("Cast", ["is_far"], ["far_ones"], to=INT64),
        node("ReduceSum", ["far_ones", "ones"], ["more"], keepdims=0),
        node("Add", ["top", "more"], ["y"]),
    ]
    engine = load(tmp_path, three_column_model(with_scores(*nodes), ("y", ["b"], INT64), SCORES))

    assert engine.signature.class_output == "y"
    assert class_names(engine, [[0, 0, 1], [0, 0, 1e7]]) == ["c", "c"]


def test_a_binary_label_may_be_a_boolean(tmp_path: Path) -> None:
    nodes = [node("Cast", ["y"], ["label"], to=BOOL), node("ArgMax", ["p"], ["y"], axis=1)]
    made = zoo.model(
        [node("Softmax", ["x"], ["p"], axis=1), *reversed(nodes)],
        [zoo.tensor("x", ["b", 2])],
        [zoo.tensor("label", ["b", 1], BOOL), zoo.tensor("p", ["b", 2])],
    )

    engine = load(tmp_path, made, 'labels = ["no", "yes"]')

    assert engine.signature.class_output == "label"
    assert class_names(engine, [[0, 1], [1, 0]]) == ["yes", "no"]


def test_a_threshold_that_is_called_the_label_is_the_class(tmp_path: Path) -> None:
    nodes = [
        node("Softmax", ["x"], ["p"], axis=1),
        node("Gather", ["p", "one"], ["second"], axis=1),
        node("Greater", ["second", "limit"], ["over"]),
        node("Cast", ["over"], ["label"], to=INT64),
    ]
    weights = {name: WEIGHTS[name] for name in ("one", "limit")}
    made = zoo.model(
        nodes,
        [zoo.tensor("x", ["b", 2])],
        [zoo.tensor("label", ["b"], INT64), zoo.tensor("p", ["b", 2])],
        weights,
    )

    engine = load(tmp_path, made, 'labels = ["ok", "bad"]')

    assert class_names(engine, [[0, 1], [0, 9], [3, 0]]) == ["ok", "bad", "ok"]


TABLES = {
    "LinearClassifier": [
        node(
            "LinearClassifier",
            ["x"],
            ["label", "votes"],
            domain="ai.onnx.ml",
            classlabels_ints=[-5, 6, 70],
            coefficients=np.eye(3).ravel().tolist(),
            intercepts=[0.0, 0.0, 0.0],
            multi_class=0,
            post_transform="NONE",
        )
    ],
    "ArrayFeatureExtractor": [
        node("ArrayFeatureExtractor", ["classes", "top"], ["found"], domain="ai.onnx.ml"),
        node("Reshape", ["found", "flat"], ["label"]),
    ],
    "LabelEncoder": [
        node(
            "LabelEncoder",
            ["top"],
            ["label"],
            domain="ai.onnx.ml",
            keys_int64s=[2, 1, 0],
            values_int64s=[70, 6, -5],
        )
    ],
}


@pytest.mark.parametrize("operator", TABLES)
def test_the_table_of_a_label_is_read_from_the_graph_where_no_probe_row_shows_it(
    tmp_path: Path, operator: str
) -> None:
    """As in a support vector machine with probabilities, which are fitted separately."""
    made = zoo.model(
        [
            *TOP,
            *TABLES[operator],
            node("Mul", ["x", "tiny"], ["y"]),
            node("Add", ["y", "p0"], ["p"]),
        ],
        [zoo.tensor("x", ["b", 3])],
        [zoo.tensor("label", ["b"], INT64), zoo.tensor("p", ["b", 3])],
        {
            "tiny": np.array(1e-9, np.float32),
            "p0": np.array([0.6, 0.3, 0.1], np.float32),
            "classes": np.array([-5, 6, 70]),
            "flat": np.array([-1]),
        },
    )

    engine = load(tmp_path, made)

    assert engine.signature.class_values == (-5, 6, 70)
    assert class_names(engine, ROWS) == NAMES


def test_the_label_of_the_only_classifier_is_the_class_whatever_its_name(tmp_path: Path) -> None:
    """A support vector machine's label and its probabilities may disagree everywhere."""
    made = one_classifier("votes")

    assert class_names(load(tmp_path, made), ROWS) == NAMES


def test_the_label_of_the_only_classifier_is_not_that_of_another_head(tmp_path: Path) -> None:
    """Two models of the same classes in one file, of which one ends in a Softmax."""
    engine = load(tmp_path, one_classifier("x"))

    assert class_names(engine, ROWS) == ["c", "a", "a", "b", "a"]
    assert engine.signature.class_output == ""


def one_classifier(scores_of: str) -> Any:
    """Its label is called `y`; the scores are highest where `scores_of` is lowest."""
    (classifier,) = TABLES["LinearClassifier"]
    made = three_column_model(
        [classifier, node("Neg", [scores_of], ["minus"]), node("Softmax", ["minus"], ["p"])],
        ("label", ["b"], INT64),
        SCORES,
    )
    made.graph.node[0].output[0] = made.graph.output[0].name = "y"
    return made


@pytest.mark.parametrize("order", [("label", "label2"), ("label2", "label")])
def test_of_two_labels_the_class_is_the_one_that_follows_the_scores(
    tmp_path: Path, order: tuple[str, str]
) -> None:
    other = [
        node("MatMul", ["x", "mix"], ["z"]),
        node("ArgMax", ["z"], ["low"], axis=1, keepdims=0),
    ]
    tables = [
        node("Gather", ["from_ten", "low"], ["label"]),
        node("Gather", ["from_ten", "top"], ["label2"]),
    ]
    outputs = [(name, ["b"], INT64) for name in order]
    made = three_column_model([*SCORED, *TOP, *other, *tables], *outputs, SCORES)

    assert class_names(load(tmp_path, made), ROWS) == NAMES


def test_a_label_that_leans_to_one_class_is_not_outdone_by_the_second_best(tmp_path: Path) -> None:
    """Of two columns the lowest follows the highest score one to one; a threshold does not."""
    made = zoo.model(
        [
            node("Softmax", ["x"], ["p"], axis=1),
            node("Add", ["p", "lean"], ["leaned"]),
            node("ArgMax", ["leaned"], ["label"], axis=1, keepdims=0),
            node("ArgMin", ["p"], ["second"], axis=1, keepdims=0),
        ],
        [zoo.tensor("x", ["b", 2])],
        [
            zoo.tensor("second", ["b"], INT64),
            zoo.tensor("label", ["b"], INT64),
            zoo.tensor("p", ["b", 2]),
        ],
        {"lean": np.array([0.4, 0], np.float32)},
    )

    engine = load(tmp_path, made, 'labels = ["a", "b"]\n')

    assert class_names(engine, [[1, 0], [0, 0.5], [0, 5]]) == ["a", "a", "b"]


TWO = [zoo.tensor("p", ["b", 2])]
SECOND = [
    node("Softmax", ["x"], ["p"], axis=1),
    node("ArgMin", ["p"], ["second"], axis=1, keepdims=0),
]


def test_labels_that_are_numbers_are_not_refused_for_the_second_best_of_two(tmp_path: Path) -> None:
    outputs = [zoo.tensor("second", ["b"], INT64), *TWO]
    made = zoo.model(SECOND, [zoo.tensor("x", ["b", 2])], outputs, {})

    assert class_names(load(tmp_path, made, 'labels = ["0", "1"]\n'), [[3, 1], [0, 1]]) == [
        "0",
        "1",
    ]


def test_a_flag_that_mostly_says_the_opposite_is_not_the_class_for_its_name(
    tmp_path: Path,
) -> None:
    nodes = [
        SECOND[0],
        node("Gather", ["x", "zero"], ["first"], axis=1),
        node("Greater", ["first", "half"], ["prediction"]),
    ]
    outputs = [zoo.tensor("prediction", ["b"], BOOL), *TWO]
    weights = {"zero": np.array(0), "half": np.array(0.5, np.float32)}
    made = zoo.model(nodes, [zoo.tensor("x", ["b", 2])], outputs, weights)

    engine = load(tmp_path, made, 'labels = ["a", "b"]\n')

    assert class_names(engine, [[3, 1], [0, 1], [-3, -5], [2, 9]]) == ["a", "b", "a", "b"]


def test_the_cluster_of_the_least_distance_is_the_class(tmp_path: Path) -> None:
    """As k-means is exported. With two clusters, the label is the number of the column that is not
    the highest."""
    made = zoo.model(
        [node("Abs", ["x"], ["far"]), node("ArgMin", ["far"], ["label"], axis=1, keepdims=0)],
        [zoo.tensor("x", ["b", 2])],
        [zoo.tensor("label", ["b"], INT64), zoo.tensor("far", ["b", 2])],
        {},
    )

    engine = load(tmp_path, made, 'labels = ["a", "b"]\n')

    assert class_names(engine, [[9, 1], [0, 5], [-1, 3]]) == ["b", "a", "a"]


def table_model() -> bytes:
    outputs = (("label", ["b"], INT64), SCORES)
    made = three_column_model(with_scores(*TABLES["LabelEncoder"]), *outputs)
    return bytes(made.SerializeToString())


def test_half_a_file_has_no_table(tmp_path: Path) -> None:
    content, path = table_model(), tmp_path / "half.onnx"
    graph = onnx_graph.read_content(memoryview(content)).graph
    path.write_bytes(content)
    assert class_tables(path, graph, ["label", "p"], "p").keys() == {"label"}
    for size in range(0, len(content) // 2, 7):
        path.write_bytes(content[:size])
        assert class_tables(path, graph, ["label", "p"], "p") == {}


@given(st.data())
def test_a_file_that_changes_after_its_graph_was_read_is_no_error(data: st.DataObject) -> None:
    content = bytearray(table_model())
    graph = onnx_graph.read_content(memoryview(bytes(content))).graph
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.NamedTemporaryFile() as file:
        file.write(content[: data.draw(st.integers(1, len(content)))])
        file.flush()

        class_tables(Path(file.name), graph, ["label", "p"], "p")


@pytest.mark.soak
def test_tables_of_a_million_classes_are_not_read_over_and_over(tmp_path: Path) -> None:
    keys = list(range(100_000))
    chain = [
        node("LabelEncoder", [f"l{at + 1}"], [f"l{at}"], domain="ai.onnx.ml") for at in range(32)
    ]
    made = three_column_model(with_scores(*chain), ("l0", ["b"], INT64), SCORES)
    for encoder in made.graph.node[2:]:
        for name in ("keys_int64s", "values_int64s"):
            encoder.attribute.append(helper.make_attribute(name, keys))
    onnx.save(made, tmp_path / "m.onnx")

    graph = onnx_graph.read(tmp_path / "m.onnx").graph
    assert class_tables(tmp_path / "m.onnx", graph, ["l0"], "p") == {}


def test_a_model_that_takes_one_row_at_a_time_is_probed_all_the_same(tmp_path: Path) -> None:
    made = zoo.model(
        [*SCORED, *LAST_OF_EQUAL, node("Add", ["last_top", "one"], ["y"])],
        [zoo.tensor("x", [1, 3])],
        [zoo.tensor("y", [1], INT64), zoo.tensor("p", [1, 3])],
        {"one": WEIGHTS["one"]},
    )

    assert class_names(load(tmp_path, made), [[1, 1, 0]]) == ["b"]


# --- which output has the scores ---------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("first", "second", "toml"),
    [
        ("logits", "probabilities", ABC),
        ("y0", "y1", ABC),
        ("logits", "probabilities", ABC + 'scores = "logits"'),
        ("y0", "y1", ABC + 'scores = "logits"'),
    ],
)
def test_probabilities_are_distinguished_from_logits_beside_them(
    tmp_path: Path, first: str, second: str, toml: str, turned: bool
) -> None:
    nodes = [node("Identity", ["x"], [first]), node("Softmax", ["x"], [second], axis=1)]
    outputs = [(first, ["b", 3], FLOAT), (second, ["b", 3], FLOAT)]
    engine = load(
        tmp_path, three_column_model(nodes, *(outputs[::-1] if turned else outputs)), toml
    )

    (row,) = render_rows(engine, [[0, 2, 1]])

    assert row["class_name"] == "b"
    np.testing.assert_allclose(row["probabilities"], [0.0900, 0.6652, 0.2447], atol=1e-4)


def test_an_embedding_as_wide_as_the_scores_has_another_name(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "mix"], ["embedding"]), node("Identity", ["x"], ["scores"])]
    made = three_column_model(nodes, ("embedding", ["b", 3], FLOAT), ("scores", ["b", 3], FLOAT))

    assert class_names(load(tmp_path, made), ROWS) == NAMES


@pytest.mark.parametrize("turned", [False, True])
def test_a_constant_as_wide_as_the_scores_is_none(tmp_path: Path, turned: bool) -> None:
    """Such as transitions between the classes: its rows are not those of the input."""
    nodes = [
        node("Identity", ["x"], ["y"]),
        node("Identity", ["mix"], ["prob_prior"]),
        node("ArgMax", ["x"], ["top"], axis=1, keepdims=0),
    ]
    outputs: list[tuple[str, Sequence[Any], int]]
    outputs = [("y", ["b", 3], FLOAT), ("prob_prior", [3, 3], FLOAT)]
    made = three_column_model(nodes, *(outputs[::-1] if turned else outputs), ("top", ["b"], INT64))

    engine = load(tmp_path, made)

    assert class_names(engine, ROWS) == NAMES
    assert engine.signature.score_output == "y"


TWO_HEADS = three_column_model(
    [node("MatMul", ["x", "mix"], ["y0"]), node("Identity", ["x"], ["y1"])],
    ("y0", ["b", 3], FLOAT),
    ("y1", ["b", 3], FLOAT),
)


def test_of_two_heads_the_one_with_the_class_is_named_by_model_toml(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="`y0` and `y1` have a column for each and disagree"):
        load(tmp_path / "open", TWO_HEADS)
    engine = load(tmp_path / "named", TWO_HEADS, ABC + 'score_output = "y1"')

    assert class_names(engine, ROWS) == NAMES


# --- distances: the class is the nearest -------------------------------------------------------


@pytest.mark.soak
@pytest.mark.parametrize("clusters", [2, 5])
def test_a_cluster_of_kmeans_is_the_nearest(tmp_path: Path, clusters: int) -> None:
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType
    from sklearn.cluster import KMeans

    x = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    fitted = KMeans(clusters, n_init=1, random_state=0).fit(x)

    made = to_onnx(fitted, initial_types=[("x", FloatTensorType([None, 3]))])
    engine = load(tmp_path, made, f"labels = {list('abcde')[:clusters]}")

    expected = ["abcde"[at] for at in fitted.predict(x)]
    assert class_names(engine, x) == expected


NEAREST: dict[str, list[onnx.NodeProto]] = {
    "smallest of all": [
        node("TopK", ["d", "ones"], ["least", "at"], axis=1, largest=0),
        node("Identity", ["at"], ["cluster"]),
    ],
    "numbers of its own": [
        node("ArgMin", ["d"], ["at"], axis=1, keepdims=1),
        node("Gather", ["turned", "at"], ["cluster"]),
    ],
    "highest of the negative": [
        node("Neg", ["d"], ["near"]),
        node("ArgMax", ["near"], ["cluster"], axis=1, keepdims=1),
    ],
}


@pytest.mark.parametrize("how", NEAREST)
def test_the_nearest_is_the_class_however_it_was_found(tmp_path: Path, how: str) -> None:
    nodes = [node("Mul", ["x", "x"], ["d"]), *NEAREST[how]]
    made = three_column_model(nodes, ("d", ["b", 3], FLOAT), ("cluster", ["b", 1], INT64))

    assert class_names(load(tmp_path, made), [[9, 1, 2], [0, 5, 1], [1, 2, 0.5]]) == ["b", "a", "c"]


# --- model.toml --------------------------------------------------------------------------------

ALARM = three_column_model(
    [
        *SCORED,
        node("ArgMin", ["x"], ["low"], axis=1, keepdims=0),
        node("Gather", ["turned", "low"], ["alarm"]),
        node("Gather", ["few", "low"], ["three"]),
        node("Gather", ["words", "low"], ["word"]),
    ],
    ("alarm", ["b"], INT64),
    ("three", ["b"], INT64),
    ("word", ["b"], STRING),
    SCORES,
)


def test_model_toml_has_the_last_word(tmp_path: Path) -> None:
    toml = ABC + 'class_output = "alarm"\nclasses = [7, -2, 4]'
    named = load(tmp_path / "named", ALARM, toml)
    words = load(tmp_path / "words", ALARM, 'classes = ["x", "y", "z"]')

    assert class_names(named, [[9, 1, 0], [0, 5, 1]]) == ["c", "a"]
    assert class_names(words, [[9, 1, 0], [0, 5, 1]]) == ["z", "x"]


@pytest.mark.parametrize(
    ("toml", "reason"),
    [
        ('class_output = "alert"', "class_output: `alert` is not one of alarm, three, word, p"),
        ('class_output = "p"', "class_output: `p` does not have one whole number or one string"),
        ('class_output = "three"', "class_output: which value of `three` means which column"),
        ('score_output = "alarm"', "score_output: `alarm` has no columns of fractions"),
        ("classes = [1, 2]", "classes: 2 values for 3 labels"),
        ("classes = [1, 2, 2]", "classes: a value is there twice"),
        ('classes = [1, 2, "3"]', "classes: give whole numbers, or strings, alone"),
        ("classes = [7, -2, 4]", "classes: of `alarm`, `three`, name the one they are for"),
        (
            'class_output = "alarm"\nclasses = [1, 2, 18446744073709551616]',
            "classes: 18446744073709551616 is none of `alarm`, which is INT64",
        ),
        ('class_output = "alarm"\nclasses = ["x", "y", "z"]', "classes: `alarm` is INT64; give"),
    ],
)
def test_what_model_toml_asks_of_the_class_must_be_there(
    tmp_path: Path, toml: str, reason: str
) -> None:
    with pytest.raises(ModelRefused) as refused:
        load(tmp_path, ALARM, ABC + toml)

    assert refused.value.detail.startswith(f"m/model.toml: {reason}")


@pytest.mark.parametrize("kind", ["words", "keys"])
def test_the_model_s_own_words_in_another_order_are_refused(tmp_path: Path, kind: str) -> None:
    """They would name another class than the model does."""
    words = node("Gather", ["words", "top"], ["label"])
    made = three_column_model(with_scores(words), ("label", ["b"], STRING), SCORES)
    if kind == "keys":
        maps = node(
            "ZipMap", ["p"], ["m"], domain="ai.onnx.ml", classlabels_strings=["x", "y", "z"]
        )
        made.graph.node.append(maps)
        pair = helper.make_map_type_proto(STRING, helper.make_tensor_type_proto(FLOAT, []))
        del made.graph.output[:]
        made.graph.output.append(helper.make_value_info("m", helper.make_sequence_type_proto(pair)))

    with pytest.raises(ModelRefused, match="the columns of the scores are x, y, z, in this order"):
        load(tmp_path, made, 'labels = ["z", "x", "y"]')


def test_class_output_without_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="need `labels`"):
        load(tmp_path, ALARM, 'class_output = "alarm"')


def test_classes_alone_are_the_labels_too(tmp_path: Path) -> None:
    nodes = [*LAST_OF_EQUAL, node("Gather", ["turned", "last_top"], ["y"])]
    engine = load(
        tmp_path,
        three_column_model(with_scores(*nodes), ("y", ["b"], INT64), SCORES),
        "classes = [7, -2, 4]",
    )

    assert engine.signature.labels == ("7", "-2", "4")
    assert class_names(engine, [[1, 1, 0]]) == ["-2"]


@pytest.mark.parametrize("kind", [INT64, BOOL])
def test_a_model_that_gives_a_row_several_labels_names_none(tmp_path: Path, kind: int) -> None:
    nodes = [
        node("Sigmoid", ["x"], ["p"]),
        node("Greater", ["p", "half"], ["over"]),
        node("Cast", ["over"], ["label"], to=kind),
    ]
    engine = load(tmp_path, three_column_model(nodes, ("label", ["b", 3], kind), SCORES))

    (row,) = render_rows(engine, [[1, 1, -1]])

    assert [output["name"] for output in row["outputs"]] == ["label", "p"]


def test_a_one_hot_label_is_accepted_beside_the_scores(tmp_path: Path) -> None:
    nodes = [
        node("Identity", ["three"], ["depth"]),
        node("OneHot", ["top", "depth", "off_on"], ["label"], axis=1),
    ]
    made = zoo.model(
        with_scores(*nodes),
        [zoo.tensor("x", ["b", 3])],
        [zoo.tensor("label", ["b", 3], INT64), zoo.tensor("p", ["b", 3])],
        {"three": np.array([3]), "off_on": np.array([0, 1])},
    )

    assert class_names(load(tmp_path, made), ROWS) == NAMES


def test_masked_logits_are_followed_too(tmp_path: Path) -> None:
    nodes = [
        node("Add", ["x", "mask"], ["p"]),
        node("ArgMax", ["p"], ["best"], axis=1, keepdims=0, select_last_index=1),
        node("Add", ["best", "one"], ["y"]),
    ]
    made = zoo.model(
        nodes,
        [zoo.tensor("x", ["b", 3])],
        [zoo.tensor("y", ["b"], INT64), zoo.tensor("p", ["b", 3])],
        {"mask": np.array([0, 0, -np.inf], np.float32), "one": WEIGHTS["one"]},
    )

    engine = load(tmp_path, made, ABC + 'scores = "logits"')

    assert class_names(engine, [[1, 1, 0], [5, 0, 9]]) == ["b", "a"]


@pytest.mark.parametrize("declared", [["b", 1], [2], None, [1, 2]])
def test_scores_are_recognised_in_the_outputs_though_the_file_declares_another_shape(
    tmp_path: Path, declared: Sequence[Any] | None
) -> None:
    """As onnxmltools declares XGBoost's boosters, and as it is after zipmap was cut off by hand."""
    classifier = helper.make_node(
        "LinearClassifier",
        ["x"],
        ["label", "p"],
        domain="ai.onnx.ml",
        classlabels_ints=[4, 9],
        coefficients=[1.0, 0.0, 0.0, -1.0, 0.0, 0.0],
        intercepts=[0.0, 0.0],
        post_transform="SOFTMAX",
    )
    outputs = [zoo.tensor("label", ["b"], INT64), zoo.tensor("p", declared)]
    made = zoo.model([classifier], [zoo.tensor("x", ["b", 3])], outputs)

    engine = load(tmp_path, made, 'labels = ["no", "yes"]')

    assert class_names(engine, [[3, 0, 0], [-2, 0, 0]]) == ["no", "yes"]


@pytest.mark.parametrize("declared", [[3, "b"], [None, None]])
def test_labels_of_scores_that_lie_across_are_refused(
    tmp_path: Path, declared: Sequence[Any]
) -> None:
    """With as many rows as classes they would be read the wrong way round."""
    across = [node("Transpose", ["x"], ["y"])]
    made = zoo.model(across, [zoo.tensor("x", declared[::-1])], [zoo.tensor("y", declared)])

    with pytest.raises(ModelRefused, match=r"no output of shape|has its rows in dimension 1"):
        load(tmp_path, made)


def test_labels_are_refused_where_the_outputs_lack_the_declared_columns(
    tmp_path: Path,
) -> None:
    """As skl2onnx does of a RidgeClassifier of two classes."""
    from skl2onnx import to_onnx
    from sklearn.linear_model import RidgeClassifier

    x = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    fitted = RidgeClassifier().fit(x, x[:, 0] > 0)
    made = to_onnx(fitted, x[:1], options={"zipmap": False})

    reason = r"2 labels, but no output of shape.* the model gave `probabilities` \[48, 1\]"
    with pytest.raises(ModelRefused, match=reason):
        load(tmp_path, made, 'labels = ["no", "yes"]')


@pytest.mark.parametrize(
    ("shape", "labels"),
    [(["b", 1], '["price"]'), (["b", 1], '["out", "in"]'), ([2, "b", 3], '["a", "b", "c"]')],
)
def test_labels_are_refused_for_a_model_without_scores_of_classes(
    tmp_path: Path, shape: Sequence[Any], labels: str
) -> None:
    """A regressor, an outlier detector, a classifier of several targets."""
    nodes = (
        [
            node("Unsqueeze", ["x", "zero"], ["one_of"]),
            node("Concat", ["one_of"] * 2, ["y"], axis=0),
        ]
        if len(shape) == 3
        else [node("ReduceSum", ["x", "ones"], ["y"])]
    )
    weights = {"ones": WEIGHTS["ones"], "zero": np.array([0])}
    made = zoo.model(nodes, [zoo.tensor("x", ["b", 3])], [zoo.tensor("y", shape)], weights)

    with pytest.raises(ModelRefused, match="label"):
        load(tmp_path, made, f"labels = {labels}")


def test_a_model_that_takes_no_made_up_row_is_served(tmp_path: Path) -> None:
    nodes = [
        node("Greater", ["x", "far"], ["is_far"]),
        node("Cast", ["is_far"], ["far_ones"], to=INT64),
        node("ReduceMin", ["far_ones"], ["all_far"], keepdims=0),
        node("Sub", ["all_far", "one"], ["index"]),
        node("Sub", ["index", "last"], ["lower"]),
        node("Sub", ["lower", "last"], ["bad"]),
        node("Gather", ["from_ten", "bad"], ["picked"]),
        node("Add", ["top", "picked"], ["y"]),
    ]
    made = three_column_model(with_scores(*nodes), ("y", ["b"], INT64), SCORES)

    engine = load(tmp_path, made)

    assert engine.signature.class_output == ""


def test_looking_for_the_class_does_not_hold_a_load_up(tmp_path: Path) -> None:
    made = zoo.slow()
    name = made.graph.output[0].name
    made.graph.node.extend(
        [
            node("Concat", [name, made.graph.input[0].name], ["p"], axis=1),
            node("ArgMax", ["p"], ["n"], axis=1, keepdims=0),
        ]
    )
    made.graph.output.extend([zoo.tensor("p", ["b", 2]), zoo.tensor("n", ["b"], INT64)])
    zoo.place(tmp_path, "m", made, toml='labels = ["a", "b"]\nbatching.enabled = false')
    (file,) = scan(tmp_path)
    started = time.monotonic()

    Engine.load(file, intra_op_threads=1, probe_seconds=0.2)

    assert time.monotonic() - started < 5
