"""Models with one behaviour each.

Most take `x` of [batch, 1] and return it as `y`, so that a test knows every right result.
The value decides what happens meanwhile:

- `slow`: loops in proportion to the value; can be stopped between two steps
- `huge_matmul`: spends the time in one kernel, which nothing can stop
- `picky`: fails unless the value is 0, 1 or 2
- `hungry`: allocates as many MiB as the value says
- `place_poison`: kills the process once its weights file is truncated while it is mapped
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from msgspec import Struct
from onnx import TensorProto, helper, numpy_helper

from tests.zoo.model_builder import Dims, Weights, model, place, tensor

FOREVER = 1e15
"""A value with which `slow` runs for years."""

TOO_BIG = 20_000.0
"""A value with which `huge_matmul` runs for minutes, in one kernel."""

ENDLESS_MIB = 1e12
"""A value with which `hungry` asks for more than any address space has."""

# --- the value decides; y = x ------------------------------------------------------------------


def slow(steps_per_unit: int = 1600) -> onnx.ModelProto:
    """Loops `steps_per_unit` steps, about a millisecond, for each 1.0 of the largest value."""
    nodes = [
        *_largest_as_int(steps_per_unit, "steps"),
        helper.make_node("Loop", ["steps", "", "seed"], ["spun"], body=_spin()),
        *_unchanged_but_after("spun"),
    ]
    return model(nodes, [tensor("x", ["batch", 1])], [tensor("y", ["batch", 1])], _ZERO_AND_SEED)


def huge_matmul() -> onnx.ModelProto:
    """One matrix product of integers, n by n where n is the largest value: 2·n³ steps.

    Integers because ONNX Runtime multiplies them slowly and in one thread.
    """
    nodes = [
        *_largest_as_int(1, "n"),
        helper.make_node("Concat", ["n_1d", "n_1d"], ["square"], axis=0),
        helper.make_node("ConstantOfShape", ["square"], ["a"], value=_one(np.int64)),
        helper.make_node("MatMul", ["a", "a"], ["product"]),
        helper.make_node("Cast", ["product"], ["product_float"], to=TensorProto.FLOAT),
        *_unchanged_but_after("product_float"),
    ]
    return model(nodes, [tensor("x", ["batch", 1])], [tensor("y", ["batch", 1])], _ZERO_AND_SEED)


def picky() -> onnx.ModelProto:
    """Fails for the whole run when any value is not 0, 1 or 2 (cut to a whole number)."""
    nodes = [
        helper.make_node("Cast", ["x"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "index"], ["found"], name="pick"),
        *_unchanged_but_after("found"),
    ]
    weights = {**_ZERO_AND_SEED, "table": np.zeros(3, np.float32)}
    return model(nodes, [tensor("x", ["batch", 1])], [tensor("y", ["batch", 1])], weights)


def hungry() -> onnx.ModelProto:
    """Allocates and fills as many MiB as the largest value."""
    nodes = [
        *_largest_as_int(2**18, "floats"),
        helper.make_node("ConstantOfShape", ["floats_1d"], ["filling"], value=_one(np.float32)),
        *_unchanged_but_after("filling"),
    ]
    return model(nodes, [tensor("x", ["batch", 1])], [tensor("y", ["batch", 1])], _ZERO_AND_SEED)


def _largest_as_int(factor: int, name: str) -> list[onnx.NodeProto]:
    """Nodes that compute int(max(x) * factor), at least 1, as a scalar and as `{name}_1d`."""
    return [
        helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
        helper.make_node("Constant", [], ["factor"], value_float=float(factor)),
        helper.make_node("Constant", [], ["least"], value_float=1.0),
        helper.make_node("Mul", ["largest", "factor"], ["scaled"]),
        helper.make_node("Max", ["scaled", "least"], ["clipped"]),
        helper.make_node("Cast", ["clipped"], [name], to=TensorProto.INT64),
        helper.make_node("Constant", [], ["axis"], value_ints=[0]),
        helper.make_node("Unsqueeze", [name, "axis"], [f"{name}_1d"]),
    ]


def _unchanged_but_after(name: str) -> list[onnx.NodeProto]:
    """Nodes that compute y = x + 0 * max(name): so the nodes before them cannot be optimized away.

    The maximum is taken along one axis, since a number that is computed from all dimensions turns
    batching off, even if it changes nothing.
    """
    return [
        helper.make_node("Constant", [], ["flat"], value_ints=[-1]),
        helper.make_node("Reshape", [name, "flat"], ["all"]),
        helper.make_node("Constant", [], ["only"], value_ints=[0]),
        helper.make_node("ReduceMax", ["all", "only"], [f"{name}_max"], keepdims=0),
        helper.make_node("Mul", [f"{name}_max", "zero"], ["nothing"]),
        helper.make_node("Add", ["x", "nothing"], ["y"]),
    ]


def _spin() -> onnx.GraphProto:
    nodes = [
        helper.make_node("Identity", ["go"], ["go_on"]),
        helper.make_node("Cos", ["v"], ["v_next"]),
    ]
    inputs = [
        tensor("step", [], TensorProto.INT64),
        tensor("go", [], TensorProto.BOOL),
        tensor("v", [1]),
    ]
    outputs = [tensor("go_on", [], TensorProto.BOOL), tensor("v_next", [1])]
    return helper.make_graph(nodes, "spin", inputs, outputs)


def _one(dtype: type[np.generic]) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ones(1, dtype))


_ZERO_AND_SEED: Weights = {
    "zero": np.array(0, np.float32),
    "seed": np.ones(1, np.float32),
}


# --- a weights file that is truncated under a running session ----------------------------------

_PAGE_BYTES = 4096
_PAGES = 64


class Poison(Struct, frozen=True):
    """A model with `y = x` that reads page int(x) of a weights file that the session has mapped."""

    path: Path
    weights: Path

    def arm(self) -> None:
        """From now on a value of 1 or more kills the process (SIGBUS); 0 still works."""
        with self.weights.open("r+b") as file:
            file.truncate(_PAGE_BYTES)

    def disarm(self) -> None:
        """Restores the file's size: a session that loads a truncated file refuses it."""
        with self.weights.open("r+b") as file:
            file.truncate(_PAGES * _PAGE_BYTES)


def place_poison(folder: Path, name: str, *, toml: str = "") -> Poison:
    """Writes the model and its weights file to the model folder; it is harmless until armed."""
    nodes = [
        helper.make_node("Constant", [], ["first"], value_float=0.0),
        helper.make_node("Constant", [], ["last"], value_float=_PAGES - 1.0),
        helper.make_node("Clip", ["x", "first", "last"], ["clipped"]),
        helper.make_node("Cast", ["clipped"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["pages", "index"], ["page"]),
        *_unchanged_but_after("page"),
    ]
    poison = model(nodes, [tensor("x", ["batch", 1])], [tensor("y", ["batch", 1])])
    poison.graph.initializer.append(numpy_helper.from_array(np.array(0, np.float32), "zero"))
    pages = poison.graph.initializer.add(
        name="pages",
        data_type=TensorProto.FLOAT,
        dims=[_PAGES, _PAGE_BYTES // 4],
        data_location=TensorProto.EXTERNAL,
    )
    length = _PAGES * _PAGE_BYTES
    for key, value in (("location", "weights.bin"), ("offset", "0"), ("length", str(length))):
        pages.external_data.add(key=key, value=value)
    path = place(folder, name, poison, toml=toml)
    weights = path.parent / "weights.bin"
    weights.write_bytes(bytes(length))
    return Poison(path, weights)


# --- models without a special behaviour --------------------------------------------------------


def loop_for_hours(first_dim: int | str = 1) -> onnx.ModelProto:
    """Loops for any input; takes only one row by default, so that loading does not probe it."""
    nodes = [
        helper.make_node("Loop", ["steps", "", "seed"], ["spun"], body=_spin()),
        *_unchanged_but_after("spun"),
    ]
    weights = {**_ZERO_AND_SEED, "steps": np.array(2**62)}
    return model(nodes, [tensor("x", [first_dim, 1])], [tensor("y", [first_dim, 1])], weights)


def mlp(widths: Sequence[int], first_dim: int | str | None = "batch") -> onnx.ModelProto:
    """Matrix products with ReLU between them, softmax at the end."""
    rng = np.random.default_rng(0)
    nodes, last = [], "x"
    weights: dict[str, npt.NDArray[Any]] = {}
    for layer, (wide, next_wide) in enumerate(itertools.pairwise(widths)):
        scale = np.float32(1 / np.sqrt(wide))
        weights[f"w{layer}"] = rng.normal(size=(wide, next_wide)).astype(np.float32) * scale
        is_last = layer == len(widths) - 2
        nodes.append(helper.make_node("MatMul", [last, f"w{layer}"], [f"m{layer}"]))
        operator, last = ("Softmax", "y") if is_last else ("Relu", f"h{layer}")
        nodes.append(helper.make_node(operator, [f"m{layer}"], [last]))
    inputs = [tensor("x", [first_dim, widths[0]])]
    return model(nodes, inputs, [tensor("y", [first_dim, widths[-1]])], weights)


def identity(elem_type: int, shape: Dims | None = ("batch", 2)) -> onnx.ModelProto:
    """`y = x` of any datatype and shape."""
    node = helper.make_node("Identity", ["x"], ["y"])
    return model([node], [tensor("x", shape, elem_type)], [tensor("y", shape, elem_type)])


def adds(number: float) -> onnx.ModelProto:
    """`y = x + number`."""
    node = helper.make_node("Add", ["x", "number"], ["y"])
    weights = {"number": np.array(number, np.float32)}
    inputs, outputs = [tensor("x", ["batch", 1])], [tensor("y", ["batch", 1])]
    return model([node], inputs, outputs, weights)


def unary(operator: str, shape: Dims | None = ("batch", 2)) -> onnx.ModelProto:
    """`y = operator(x)`: Log gives NaN and infinities. A shape of None takes inputs of any rank."""
    return model(
        [helper.make_node(operator, ["x"], ["y"])], [tensor("x", shape)], [tensor("y", shape)]
    )


def quantized(height: int = 40) -> onnx.ModelProto:
    """The most likely class of each id, from a table whose rows are quantized when they are run.

    The scale is that of the largest number of all rows of a run, so some results depend on the
    other rows. The first and the last ten rows have the same scale, so that probes with small
    numbers show nothing.
    """
    rng = np.random.default_rng(0)
    rows = rng.uniform(size=(height, 16)).astype(np.float32)
    rows[:, 0] = 1
    rows[10:-10] *= 100
    weights: Weights = {"table": rows, "w": rng.integers(-128, 127, (16, 8)).astype(np.int8)}
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
        helper.make_node("MatMulInteger", ["q", "w", "zero"], ["scores"]),
        helper.make_node("Cast", ["scores"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("ArgMax", ["numbers"], ["y"], axis=-1, keepdims=0),
    ]
    kind = TensorProto.INT64
    return model(nodes, [tensor("ids", ["batch"], kind)], [tensor("y", ["batch"], kind)], weights)


def added(a: Dims = ("batch", 2), b: Dims = ("batch", 2)) -> onnx.ModelProto:
    """`y = a + b`: two inputs."""
    return model(
        [helper.make_node("Add", ["a", "b"], ["y"])],
        [tensor("a", a), tensor("b", b)],
        [tensor("y", a)],
    )


# --- rows that depend on each other: batching would give wrong results -------------------------


def running_sum() -> onnx.ModelProto:
    node = helper.make_node("CumSum", ["x", "axis"], ["y"])
    weights = {"axis": np.array(0)}
    return model([node], [tensor("x", ["n", 2])], [tensor("y", ["n", 2])], weights)


def minus_mean() -> onnx.ModelProto:
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["y"]),
    ]
    weights = {"axes": np.array([0], np.int64)}
    return model(nodes, [tensor("x", ["n", 2])], [tensor("y", ["n", 2])], weights)


def sorted_rows() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Slice", ["shape", "zero", "one"], ["count"]),
        helper.make_node("TopK", ["x", "count"], ["y", "order"], axis=0),
    ]
    weights = {"zero": np.array([0], np.int64), "one": np.array([1], np.int64)}
    return model(nodes, [tensor("x", ["n", 2])], [tensor("y", ["n", 2])], weights)


def positive_rows() -> onnx.ModelProto:
    """Returns only the rows that begin with a positive number."""
    nodes = [
        helper.make_node("Gather", ["x", "zero"], ["first"], axis=1),
        helper.make_node("Greater", ["first", "nought"], ["positive"]),
        helper.make_node("Compress", ["x", "positive"], ["y"], axis=0),
    ]
    weights = {"zero": np.array(0), "nought": np.array(0, np.float32)}
    return model(nodes, [tensor("x", ["n", 2])], [tensor("y", ["n", 2])], weights)


def recurrent() -> onnx.ModelProto:
    """An RNN whose first dimension is time: [sequence_length, 1, 3]."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(1, 5, 3)).astype(np.float32),
        "r": rng.normal(size=(1, 5, 5)).astype(np.float32),
        "axis": np.array([1]),
    }
    nodes = [
        helper.make_node("RNN", ["x", "w", "r"], ["all"], hidden_size=5),
        helper.make_node("Squeeze", ["all", "axis"], ["y"]),
    ]
    return model(
        nodes,
        [tensor("x", ["sequence_length", 1, 3])],
        [tensor("y", ["sequence_length", 1, 5])],
        weights,
    )


# --- a model whose output is a sequence of maps ------------------------------------------------


def zipmap() -> onnx.ModelProto:
    """Scores as a sequence of maps, as scikit-learn's converter writes them by default."""
    node = helper.make_node("ZipMap", ["x"], ["y"], domain="ai.onnx.ml", classlabels_int64s=[0, 1])
    maps = helper.make_sequence_type_proto(
        helper.make_map_type_proto(
            TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, [])
        )
    )
    return model([node], [tensor("x", ["batch", 2])], [helper.make_value_info("y", maps)])
