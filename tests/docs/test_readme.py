"""The README: its commands and programs are run, and their outputs compared with those shown."""

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
    has_started,
    running_command,
    sections_with,
    steps,
)
from tests.faults.harness import eventually_sync
from tests.ports import free_port
from tests.process import REPOSITORY
from tests.serving import running_serve, wait_for_result
from tests.zoo import mlp

# --- sessions ------------------------------------------------------------------------------


@pytest.mark.system("curl")
def test_the_commands_of_the_session_print_the_output_that_is_shown(folder: Path) -> None:
    ids: dict[str, str] = {}
    (session,) = sections_with(r"\AA session\n")
    with running_serve(cwd=folder, DATA_DIR=str(folder / "data")) as serve:
        wait_for_result(serve)
        for block in all_blocks(session):
            for step in steps(block.text) if block.language == "console" else ():
                check_step(step, serve.banner["URL"], folder, ids)


@pytest.mark.system("curl")
def test_the_python_program_prints_the_output_that_is_shown(folder: Path) -> None:
    (section,) = sections_with(r"\AFrom Python\n")
    program, shown = [block.text for block in all_blocks(section)]
    with running_serve(cwd=folder, DATA_DIR=str(folder / "data")) as serve:
        wait_for_result(serve)
        program = program.replace("http://127.0.0.1:8000", serve.banner["URL"])
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, check=True
        )
    assert done.stdout == shown


@pytest.mark.soak
@pytest.mark.system("curl")
def test_the_commands_for_a_terminal_print_the_output_that_is_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (section,) = sections_with(r"\AFrom a terminal\n")
    (session,) = (block for block in all_blocks(section) if block.language == "console")
    with running_serve(cwd=folder, DATA_DIR=str(folder / "data")) as serve:
        wait_for_result(serve)
        monkeypatch.setenv("ASYNCINFER_URL", serve.banner["URL"])
        for step in steps(session.text):
            check_step(step, serve.banner["URL"], folder, {})


@pytest.mark.soak
def test_the_test_program_of_the_readme_passes(folder: Path) -> None:
    (section,) = sections_with(r"\AIn your own tests\n")
    (program,) = [block.text for block in all_blocks(section)]
    (folder / "models").mkdir()
    shutil.copy(REPOSITORY / "model" / "iris" / "1" / "model.onnx", folder / "models/churn.onnx")
    (folder / "test_shown.py").write_text(program)
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_shown.py"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=folder, check=False)
    assert "1 passed" in done.stdout, done.stdout


# --- commands ------------------------------------------------------------------------------


def commands() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line]


def runnable() -> list[str]:
    return [line for line in commands() if "pip install" not in line]


def test_the_readme_and_ci_install_and_test_in_the_same_way() -> None:
    ci = (REPOSITORY / ".ci" / "run").read_text()
    lines = [line for line in commands() if line.startswith("pip install")]
    assert "pip install . && asyncinfer serve" in lines
    assert "pip install '.[dev]' && pytest" in lines
    assert "'.[dev]'" in ci
    assert "\npytest\n" in ci


@pytest.mark.soak
@pytest.mark.parametrize("command", runnable())
def test_every_command_starts_or_succeeds(
    command: str, folder: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PORT", str(free_port()))
    monkeypatch.setenv("DATA_DIR", str(folder / "data"))
    command = re.sub(r"redis://[\w.:]+", redis_url, command)
    if "API_KEYS=keys" in command:
        keygen = "asyncinfer keygen --tenant acme --scopes submit,read >> keys"
        subprocess.run(["bash", "-c", keygen], cwd=folder, check=True, capture_output=True)
    with contextlib.ExitStack() as stack:
        if command.startswith("asyncinfer work"):
            stack.enter_context(running_serve(cwd=folder, PORT=str(free_port())))
        process = stack.enter_context(running_command(command, folder))
        ends_by_itself = not re.search(r"asyncinfer (serve|work)\b", command)
        if ends_by_itself:
            assert process.wait(30) == 0
            return
        eventually_sync(
            lambda: has_started(process, (folder / "said").read_text()),
            "the command has started",
            30,
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


# --- tables and files ----------------------------------------------------------------------


def test_the_model_toml_of_the_readme_is_valid(folder: Path) -> None:
    (text,) = blocks("toml")
    path = folder / "churn" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(mlp([3, 4, 2]), path)
    (folder / "churn" / "model.toml").write_text(text)

    (file,) = scan(folder)

    assert not file.problem
    assert Engine.load(file, intra_op_threads=1).signature.labels == ("stays", "leaves")


def test_the_table_of_settings_has_all_settings_and_nothing_else() -> None:
    (section,) = sections_with(r"\ASettings\n")
    shown = set(
        re.findall(r"`([A-Z][A-Z_]+)`", "\n".join(re.findall(r"^\| (.*?) \|", section, re.M)))
    )
    assert shown == {name.upper() for name in Settings.__struct_fields__}


def test_every_link_to_a_file_has_an_existing_target() -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", README):
        assert (REPOSITORY / target).exists(), target
