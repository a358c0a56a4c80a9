"""Programs that a test needs: without them it is skipped, and fails in CI."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.process import REPOSITORY


@pytest.mark.system("curl")
def test_a_marked_test_finds_its_program() -> None:
    shown = subprocess.run(["curl", "--version"], capture_output=True, check=True)
    assert shown.stdout.startswith(b"curl ")


@pytest.mark.soak
@pytest.mark.parametrize(("ci", "outcome"), [("", "1 skipped"), ("true", "1 error")])
def test_a_marked_test_without_its_program_is_skipped_and_fails_in_ci(
    ci: str, outcome: str
) -> None:
    marked = f"{Path(__file__)}::{test_a_marked_test_finds_its_program.__name__}"
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-rsE", "-p", "no:cacheprovider", marked],
        cwd=REPOSITORY,
        env={**os.environ, "PATH": str(Path(sys.executable).parent), "CI": ci},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome in ran.stdout, ran.stdout
    assert "needs curl: apt-get install curl" in ran.stdout


def test_the_packages_that_ci_installs_are_those_of_the_missing_programs() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.tools"],
        cwd=REPOSITORY,
        env={**os.environ, "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split() == ["curl", "git", "locales", "prometheus", "redis-server"]
    assert "python -m tests.tools" in (REPOSITORY / ".ci" / "run").read_text()


def test_tests_look_for_programs_in_one_module() -> None:
    """A skip of its own would hide in CI that a program is missing."""
    own_way = re.compile(r"\b(shutil\.which|pytest\.importorskip)\(")
    assert [
        str(path.relative_to(REPOSITORY))
        for path in sorted((REPOSITORY / "tests").rglob("*.py"))
        if own_way.search(path.read_text()) and path.name != "tools.py"
    ] == []
