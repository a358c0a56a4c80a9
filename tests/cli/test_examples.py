"""Every example in a --help works on a real service, and every help text is complete."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from asyncinfer.cli.commands import SECTIONS, commands
from asyncinfer.cli.exit_codes import EXIT_CODES
from asyncinfer.client import Client
from tests.cli.command_line import run_command, run_in_shell
from tests.docs.markdown import has_started, running_command
from tests.ports import free_port

from .submitted_jobs import submit, wait_until_ended

NAMES = [name for section in SECTIONS.values() for name in section]
_JOB_ID = re.compile(r"\b[0-9a-f]{32}\b")


def command(name: str) -> click.Command:
    command = commands.get_command(click.Context(commands), name)
    assert command
    return command


def examples(name: str) -> list[str]:
    _, _, lines = (command(name).epilog or "").partition("Examples:\n")
    return [line.strip() for line in lines.splitlines()]


EXAMPLES = [(name, line) for name in NAMES for line in examples(name)]


@pytest.fixture
def folder(tmp_path: Path, flowers: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that the examples name."""
    (tmp_path / "rows.ndjson").write_text("[5.1, 3.5, 1.4, 0.2]\n[6.7, 3.0, 5.2, 2.3]\n")
    (tmp_path / "model").symlink_to(Path(__file__).parents[2] / "model")
    (tmp_path / ".config" / "fish" / "completions").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def job_id(url: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """The id of a job that suits the command: it can be cancelled, retried or shown."""
    name = request.node.callspec.params["name"]
    if name not in ("cancel", "retry"):
        yield wait_until_ended(url, submit(url))
        return
    run_command("pause", "digits")
    job_id = submit(url, "digits")
    if name == "retry":
        run_command("cancel", job_id)
    yield job_id
    run_command("resume", "digits")


@pytest.mark.soak
@pytest.mark.parametrize(("name", "example"), EXAMPLES, ids=[line for _, line in EXAMPLES])
def test_an_example_works_as_it_is_shown(
    name: str, example: str, folder: Path, job_id: str, redis_url: str
) -> None:
    line = _JOB_ID.sub(job_id, example)
    if "--resume flowers-1" in line:
        with Client(os.environ["ASYNCINFER_URL"]) as client:
            client.submit([[5.1, 3.5, 1.4, 0.2]], group="flowers-1")
    line = line.replace("redis://127.0.0.1:6379", redis_url).replace("--seconds 2", "--seconds 0.5")
    if name in ("serve", "work"):
        start_and_stop(line.replace("8001", str(free_port())), folder, redis_url)
        return
    # A shell takes a moment to start.
    is_plain = line.startswith("asyncinfer ") and not any(character in line for character in "|>~&")
    ran = (
        run_command(*shlex.split(line, comments=True)[1:])
        if is_plain
        else run_in_shell(line, folder)
    )
    # The doctor reports a Redis without persistence as a problem.
    assert ran.code == 0 or (name == "doctor" and "no persistence" not in ran.err), ran
    assert "Traceback" not in ran.err


def start_and_stop(line: str, folder: Path, redis_url: str) -> None:
    words = line.partition("    #")[0]
    words = words if "REDIS_URL" in words else f"REDIS_URL={redis_url} {words}"
    words = f"PORT={free_port()} {words}"
    with running_command(words, folder) as process:
        log = folder / "said"
        wait_until_up(process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def wait_until_up(process: subprocess.Popen[bytes], log: Path) -> None:
    from tests.faults.harness import eventually_sync

    eventually_sync(lambda: has_started(process, log.read_text()), "it is up", 30)


# --- help ------------------------------------------------------------------------------------


def test_help_says_what_a_command_is_for_and_shows_an_example() -> None:
    offenders = {}
    for name in NAMES:
        ran = run_command(name, "--help")
        wanted = ("Examples:", f"Usage: asyncinfer {name} ", "--help")
        absent = [words for words in wanted if words not in ran.out]
        if ran.code or absent:
            offenders[name] = absent
    assert offenders == {}


def test_the_list_of_commands_says_what_their_help_does() -> None:
    listed = {name: entry.text for section in SECTIONS.values() for name, entry in section.items()}
    assert {name: (command(name).help or "").partition("\n")[0] for name in NAMES} == listed


def test_help_states_the_exit_codes() -> None:
    shown = " ".join(run_command("--help").out.split())

    assert all(f"{code} {text}" in shown for code, text in EXIT_CODES.items())


def test_every_option_says_what_it_is_for() -> None:
    assert [
        f"{name} {option.name}: {option.help}"
        for name in NAMES
        for option in command(name).params
        if isinstance(option, click.Option) and not is_explained(option.help or "")
    ] == []


def test_the_option_for_a_tenant_says_what_the_command_does_with_it() -> None:
    verbs = {"cancel": "Cancel", "retry": "Retry", "purge": "Delete", "webhooks": "Webhooks"}
    for name, verb in verbs.items():
        texts = [
            getattr(option, "help", "") or ""
            for option in command(name).params
            if option.name in ("tenant", "all_tenants")
        ]
        assert [text.startswith(f"{verb} ") for text in texts] == [True, True], texts
        assert not any("without inputs" in text for text in texts)


def is_explained(text: str) -> bool:
    """Whether a help text ends as a sentence, or in the values that are allowed."""
    return "[" in text or text.rstrip("])").endswith(tuple(".KLR0123456789"))


# --- completion ------------------------------------------------------------------------------


@pytest.mark.parametrize("shell_name", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands(shell_name: str, tmp_path: Path) -> None:
    script = run_command("completion", shell_name)
    variables = {
        "bash": "COMP_WORDS='asyncinfer pre' COMP_CWORD=1",
        "zsh": "COMP_WORDS='asyncinfer pre' COMP_CWORD=1",
        "fish": "COMP_WORDS='asyncinfer pre' COMP_CWORD=pre",
    }[shell_name]
    line = f"{variables} _ASYNCINFER_COMPLETE={shell_name}_complete asyncinfer"

    assert "_ASYNCINFER_COMPLETE" in script.out
    assert "predict" in run_in_shell(line, tmp_path).out


def test_a_shell_completes_options(tmp_path: Path) -> None:
    line = "COMP_WORDS='asyncinfer jobs --sta' COMP_CWORD=2 _ASYNCINFER_COMPLETE=bash_complete"

    assert "--status" in run_in_shell(f"{line} asyncinfer", tmp_path).out


# --- what is loaded --------------------------------------------------------------------------


def test_help_loads_neither_tables_nor_numbers_nor_networks() -> None:
    heavy = ("rich", "numpy", "redis", "httpx2", "starlette", "onnxruntime")
    code = (
        "import sys, json; from asyncinfer.cli import main\n"
        "try: main(['--help'])\n"
        f"finally: print(json.dumps(sorted(set({heavy!r}) & set(sys.modules))), file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(ran.stderr) == []


def test_a_worker_that_has_nothing_to_parse_loads_no_parser() -> None:
    code = (
        "import sys; from asyncinfer.cli import main\nprint(main(['work']), 'click' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["2", "False"]
