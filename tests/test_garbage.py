"""A start looks for no garbage; whatever lives on does."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("then", "looks"),
    [
        ("garbage.settle(); said.append(gc.isenabled())", [False, True, True]),
        ("raise OSError", [False, True]),
    ],
    ids=["once it has started", "when it cannot start"],
)
def test_a_start_looks_for_no_garbage_and_what_lives_on_does(then: str, looks: list[bool]) -> None:
    code = f"""
import contextlib, gc
from asyncinfer import garbage
said = []
with contextlib.suppress(OSError), garbage.left_until_settled():
    said.append(gc.isenabled())
    {then}
print([*said, gc.isenabled()])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == str(looks)
