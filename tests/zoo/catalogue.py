"""All entries of the zoo, by name."""

from collections.abc import Iterable
from typing import Any, Final

import pytest

from tests.zoo import basic, control_flow, realistic, row_dependent
from tests.zoo.entry import Entry

_PARTS: Final = (basic, row_dependent, control_flow, realistic)

ENTRIES: Final[dict[str, Entry]] = {
    entry.name: entry for part in _PARTS for entry in part.entries()
}

_KINDS: Final = frozenset(
    [
        "int64",
        "fp16",
        "bf16",
        "bytes",
        "rank_0",
        "rank_3",
        "fixed_four",
        "mlp",
        "several",
        "half",
        "summed_or_empty",
        "overridden",
        "running_sum",
        "sorted_rows",
        "top_row",
        "sequence",
        "lstm_step",
        "images",
        "embedding",
        "text",
    ]
)
"""One entry of each kind: these are in the default suite, the others in soak."""


def soak_except_kinds(names: Iterable[str]) -> list[Any]:
    """Names of entries as parameters of a test, all but one of each kind marked `soak`."""
    return [
        name if name in _KINDS else pytest.param(name, marks=pytest.mark.soak) for name in names
    ]
