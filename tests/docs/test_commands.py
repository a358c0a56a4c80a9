"""The commands of the pages that start or prepare a service: each starts or succeeds."""

import contextlib
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.docs.markdown import has_started, page, running_command
from tests.faults.harness import eventually_sync
from tests.ports import free_port
from tests.process import REPOSITORY
from tests.serving import running_serve


def commands() -> list[str]:
    texts = [*page("README.md").texts("sh"), *page("security.md").texts("sh")]
    return [line for text in texts for line in text.splitlines() if line]


def runnable() -> list[str]:
    return [line for line in commands() if "pip install" not in line]


def test_the_readme_and_ci_install_and_test_in_the_same_way() -> None:
    ci = (REPOSITORY / ".ci" / "run").read_text()
    lines = [line for line in commands() if line.startswith("pip install")]
    assert lines == ["pip install . && asyncinfer serve", "pip install '.[dev]' && pytest"]
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
