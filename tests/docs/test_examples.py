"""The examples of own models: their programs make models, serve them and send requests."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.docs.examples import example_clients, example_pages, make_example_models
from tests.docs.markdown import as_shown, check_step, page, run_programs, steps
from tests.faults.harness import eventually_sync
from tests.process import REPOSITORY
from tests.serving import running_serve

DIGITS: Final = 2
"""The number of a result's digits that are equal on all machines that train the models."""


@pytest.mark.soak
@pytest.mark.system("curl")
def test_every_example_prints_the_output_that_is_shown(folder: Path) -> None:
    models = make_example_models(folder)
    with running_serve(cwd=folder, DATA_DIR=str(folder / "data")) as serve:
        eventually_sync(lambda: len(serve.get("/models")["models"]) == models, "all are listed")
        check_examples(serve.banner["URL"], folder)


def check_examples(url: str, folder: Path) -> None:
    clients = example_clients()
    outputs = run_programs([program for program, _ in clients], url, folder)
    for output, (_, shown) in zip(outputs, clients, strict=True):
        assert as_shown(output, {}, DIGITS) == as_shown(shown, {}, DIGITS)
    consoles = [console for part in example_pages() for console in part.texts("console")]
    for step in [step for console in consoles for step in steps(console)]:
        # The files that skl2onnx writes, and so their hashes, differ between its releases.
        shown = re.sub(r'"sha256":"[0-9a-f]{64}",', "", step.shown)
        command = step.command + """ | sed -E 's/"sha256":"[0-9a-f]{64}",//'"""
        check_step(step._replace(command=command, shown=shown), url, folder, {}, DIGITS)


def test_programs_are_short() -> None:
    programs = [program for part in example_pages() for program, _ in part.programs()]
    assert max(len(program.splitlines()) for program in programs) <= 28


@pytest.mark.soak
def test_the_test_program_of_the_client_page_passes(folder: Path) -> None:
    (program,) = page("client.md").section("In your own tests").texts("python")
    (folder / "models").mkdir()
    shutil.copy(REPOSITORY / "model" / "iris" / "1" / "model.onnx", folder / "models/churn.onnx")
    (folder / "test_shown.py").write_text(program)
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_shown.py"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=folder, check=False)
    assert "1 passed" in done.stdout, done.stdout
