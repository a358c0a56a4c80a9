"""A few parameters of many for the default suite; the rest run with `pytest -m soak`."""

from collections.abc import Iterable
from typing import Any

import pytest


def soak_except(parameters: Iterable[Any], kept: int) -> list[Any]:
    """The parameters of a parametrised test, all but `kept` of them marked `soak`.

    The kept ones are spread evenly from the first to the last. Each parameter is one value, or a
    `pytest.param(...)`, which keeps its id and marks.
    """
    listed = list(parameters)
    assert 2 <= kept < len(listed), f"{kept} of {len(listed)} parameters"
    step = (len(listed) - 1) / (kept - 1)
    chosen = {round(number * step) for number in range(kept)}
    return [one if place in chosen else _in_soak(one) for place, one in enumerate(listed)]


def _in_soak(parameter: Any) -> Any:
    if isinstance(parameter, type(pytest.param())):
        return pytest.param(
            *parameter.values, id=parameter.id, marks=[*parameter.marks, pytest.mark.soak]
        )
    return pytest.param(parameter, marks=pytest.mark.soak)
