"""ONNX models that tests put into a model folder.

- `making`: how one is made and placed
- `behaving`: models that do one thing each to the process that runs them
- `catalogue`: what people may bring, with inputs for each; `bare` runs them without us
"""

from tests.zoo.behaviour import (
    ENDLESS_MIB,
    FOREVER,
    Poison,
    added,
    adds,
    huge_matmul,
    hungry,
    identity,
    loop_for_hours,
    minus_mean,
    mlp,
    picky,
    place_poison,
    positive_rows,
    quantized,
    recurrent,
    running_sum,
    slow,
    sorted_rows,
    unary,
    zipmap,
)
from tests.zoo.making import IR_VERSION, OPSET, Dims, Weights, model, place, place_bytes, tensor

__all__ = [
    "ENDLESS_MIB",
    "FOREVER",
    "IR_VERSION",
    "OPSET",
    "Dims",
    "Poison",
    "Weights",
    "added",
    "adds",
    "huge_matmul",
    "hungry",
    "identity",
    "loop_for_hours",
    "minus_mean",
    "mlp",
    "model",
    "picky",
    "place",
    "place_bytes",
    "place_poison",
    "positive_rows",
    "quantized",
    "recurrent",
    "running_sum",
    "slow",
    "sorted_rows",
    "tensor",
    "unary",
    "zipmap",
]
