"""The planted faults fit the code as it is now, so that they can be planted at any time."""

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.planted_faults.faults import FAULTS, Fault, problem_of
from tests.process import REPOSITORY

_IDS = [fault.name for fault in FAULTS]


@pytest.mark.parametrize("fault", FAULTS, ids=_IDS)
def test_the_line_of_a_fault_is_found_once_and_changed(fault: Fault) -> None:
    assert problem_of(fault) is None
    assert fault.new != fault.old
    assert "\n" not in fault.old + fault.new


@pytest.mark.parametrize("fault", FAULTS, ids=_IDS)
def test_the_tests_that_notice_a_fault_exist(fault: Fault) -> None:
    assert fault.tests
    for test in fault.tests:
        name, _, function = test.partition("::")
        path = REPOSITORY / name
        assert path.is_file(), f"{name} does not exist: name the tests that notice this fault now"
        assert not function or function in _functions(path), f"{test} does not exist any more"


def test_no_two_faults_have_one_name_or_one_line() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert len({(fault.file, fault.old) for fault in FAULTS}) == len(FAULTS)


@cache
def _functions(path: Path) -> frozenset[str]:
    """The names of the functions that a module of tests defines."""
    return frozenset(
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
