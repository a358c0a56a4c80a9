"""ONNX models that tests put into a model folder.

- `model_builder`: functions that build a model and write it to a model folder
- `behaviour`: models with one behaviour each: slow, hungry for memory, picky about values
- `catalogue`: models of all kinds that users may bring, with random inputs for each
- `reference`: ONNX Runtime alone, whose results every served result must equal
- `hostile`, `mutations`: files that must be refused, and damaged models
"""

from tests.zoo.behaviour import (
    ENDLESS_MIB,
    FOREVER,
    TOO_BIG,
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
from tests.zoo.model_builder import (
    IR_VERSION,
    OPSET,
    Dims,
    Weights,
    model,
    place,
    place_bytes,
    tensor,
)

__all__ = [
    "ENDLESS_MIB",
    "FOREVER",
    "IR_VERSION",
    "OPSET",
    "TOO_BIG",
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
