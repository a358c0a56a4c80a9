"""What the README shows is what happens: its commands are run, its answers compared."""

import contextlib
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from asyncinfer.engine import Engine
from asyncinfer.models.folder import scan
from asyncinfer.settings import Settings
from tests.docs.markdown import (
    README,
    all_blocks,
    blocks,
    check_step,
    is_up,
    sections_with,
    shell,
    steps,
)
from tests.faults.harness import eventually_sync
from tests.process import REPOSITORY
from tests.serving import answer_of, free_port, serving
from tests.zoo import mlp

# --- sessions ------------------------------------------------------------------------------


def test_the_sessions_give_the_answers_that_are_shown(folder: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    ids: dict[str, str] = {}
    (session,) = sections_with(r"\AA session\n")
    with serving(cwd=folder, DATA_DIR=str(folder / "data")) as serve:
        answer_of(serve)
        for block in all_blocks(session):
            for step in steps(block.text) if block.language == "console" else ():
                check_step(step, serve.welcome["URL"], folder, ids)


def test_the_python_session_prints_what_is_shown(folder: Path) -> None:
    (section,) = sections_with(r"\AFrom Python\n")
    program, shown = [block.text for block in all_blocks(section)]
    with serving(cwd=folder, DATA_DIR=str(folder / "data")) as serve:
        answer_of(serve)
        program = program.replace("http://127.0.0.1:8000", serve.welcome["URL"])
        said = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, check=True
        )
    assert said.stdout == shown


@pytest.mark.soak
def test_the_session_at_a_terminal_gives_what_is_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (section,) = sections_with(r"\AFrom a terminal\n")
    (session,) = (block for block in all_blocks(section) if block.language == "console")
    with serving(cwd=folder, DATA_DIR=str(folder / "data")) as serve:
        answer_of(serve)
        monkeypatch.setenv("ASYNCINFER_URL", serve.welcome["URL"])
        for step in steps(session.text):
            check_step(step, serve.welcome["URL"], folder, {})


@pytest.mark.soak
def test_the_test_that_is_shown_passes(folder: Path) -> None:
    (section,) = sections_with(r"\AIn your own tests\n")
    (program,) = [block.text for block in all_blocks(section)]
    (folder / "models").mkdir()
    shutil.copy(REPOSITORY / "model" / "iris" / "1" / "model.onnx", folder / "models/churn.onnx")
    (folder / "test_shown.py").write_text(program)
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_shown.py"]
    ran = subprocess.run(argv, capture_output=True, text=True, cwd=folder, check=False)
    assert "1 passed" in ran.stdout, ran.stdout


# --- commands ------------------------------------------------------------------------------


def commands() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line]


def runnable() -> list[str]:
    return [line for line in commands() if "pip install" not in line]


def test_what_the_readme_installs_is_what_ci_installs_and_runs() -> None:
    ci = (REPOSITORY / ".ci" / "run").read_text()
    lines = [line for line in commands() if line.startswith("pip install")]
    assert "pip install . && asyncinfer serve" in lines
    assert "pip install '.[dev]' && pytest" in lines
    assert "'.[dev]'" in ci
    assert "\npytest\n" in ci


@pytest.mark.soak
@pytest.mark.parametrize("command", runnable())
def test_every_command_does_what_it_is_shown_for(
    command: str, folder: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PORT", str(free_port()))
    monkeypatch.setenv("DATA_DIR", str(folder / "data"))
    real = re.sub(r"redis://[\w.:]+", redis_url, command)
    made = ["asyncinfer keygen --tenant acme --scopes submit,read >> keys"]
    for before in made if "API_KEYS=keys" in command else []:
        subprocess.run(["bash", "-c", before], cwd=folder, check=True, capture_output=True)
    with contextlib.ExitStack() as stack:
        if real.startswith("asyncinfer work"):
            stack.enter_context(serving(cwd=folder, PORT=str(free_port())))
        process = stack.enter_context(shell(real, folder))
        if not re.search(r"asyncinfer (serve|work)\b", real):  # one that ends by itself
            assert process.wait(30) == 0
            return
        eventually_sync(lambda: is_up(process, (folder / "said").read_text()), "it is up", 30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


# --- tables and files ----------------------------------------------------------------------


def test_the_model_toml_shown_is_one_that_is_taken(folder: Path) -> None:
    (text,) = blocks("toml")
    path = folder / "churn" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(mlp([3, 4, 2]), path)
    (folder / "churn" / "model.toml").write_text(text)

    (file,) = scan(folder)

    assert not file.problem
    assert Engine.load(file, intra_op_threads=1).signature.labels == ("stays", "leaves")


def test_every_setting_is_in_the_table_and_nothing_else() -> None:
    (section,) = sections_with(r"\ASettings\n")
    shown = set(
        re.findall(r"`([A-Z][A-Z_]+)`", "\n".join(re.findall(r"^\| (.*?) \|", section, re.M)))
    )
    assert shown == {name.upper() for name in Settings.__struct_fields__}


def test_every_link_to_a_file_leads_to_one() -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", README):
        assert (REPOSITORY / target).exists(), target
